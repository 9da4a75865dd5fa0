"""Attention programs as data: Python source, and new input values in each call.

    AttentionProgram("def program(q, k, v): ...", inputs=(Input("q", "B H S D"), ...), calls=(Call(SIZES), ...))

The first call often has values without effect (ones, all-true masks, indices in order); program_checks.py compares the
later calls of the compiled graph with eager mode, too.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels.
"""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
WITH_GRADIENTS = ("train", "eval", "autocast")
MODES = (*WITH_GRADIENTS, "no_grad", "inference", "autocast no_grad")
LARGEST_LEVEL = 1e6  # scores added to smaller mask levels keep some of their digits


class CallSizes(NamedTuple):
    """Sizes of one call."""

    B: int = 2
    H: int = 4
    G: int = 4
    S: int = 5
    T: int = 5
    D: int = 4

    def shape(self, letters: str) -> tuple[int, ...]:
        """Resolve a shape spelled as letters and numbers, separated by spaces."""
        known = {**self._asdict(), "C": self.H * self.D, "K": self.G * self.D}
        return tuple(int(x) if x.isdigit() else known[x] for x in letters.split())


SIZES = CallSizes()


@dataclass(frozen=True)
class Input:
    """One input of a program.

    shape: letters of Sizes and numbers. values: a name of FLOATS, BOOLS or INDICES for each call; the last one is used
    for all further calls. dtype: "" is that of the program. held: "argument", or "parameter" or "buffer" of a module.
    below: the letter of the size that bounds an index. grad: its gradient is compared.
    """

    name: str
    shape: str
    values: tuple[str, ...] = ("normal",)
    dtype: str = ""
    held: str = "argument"
    below: str = ""
    grad: bool = True

    @property
    def is_float(self) -> bool:
        """Whether its dtype is floating-point."""
        return self.values[0] in FLOATS

    def draw(self, call: int, sizes: CallSizes, generator: torch.Generator) -> Tensor:
        """Draw the value of a call: float64, bool or int64."""
        shape, kind = sizes.shape(self.shape), self.values[min(call, len(self.values) - 1)]
        if kind in FLOATS:
            # Rounded to float32, so that the same program can also run at lower precision.
            return FLOATS[kind](shape, generator).float().double()
        if kind in BOOLS:
            return BOOLS[kind](shape, generator)
        return INDICES[kind](shape, sizes.shape(self.below)[0], generator)


@dataclass(frozen=True)
class Call:
    """Sizes and mode of one call."""

    sizes: CallSizes = SIZES
    mode: str = "train"


@dataclass(frozen=True)
class AttentionProgram:
    """A program and its calls.

    source: a function `program` of all inputs, held ones last. dynamic: of torch.compile. aot: trace the graphs passed
    to inductor by AOTAutograd; without it they run directly, in a third of the time.
    """

    source: str
    inputs: tuple[Input, ...]
    calls: tuple[Call, ...] = (Call(), Call(), Call())
    dtype: str = "float32"
    dynamic: bool | None = None
    seed: int = 0
    aot: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The program as a function of its inputs."""
        names = dict(NAMES)
        exec(compile(textwrap.dedent(self.source), "<program>", "exec"), names)
        made: Callable[..., Any] = names["program"]
        return made

    @property
    def precision(self) -> float:
        """The largest relative rounding error of the dtypes in use."""
        used = [self.dtype, *(i.dtype for i in self.inputs if i.is_float and i.dtype)]
        used += [name for name in DTYPES if f"torch.{name}" in self.source]
        used += ["float32"] if ".float()" in self.source else []
        used += ["bfloat16"] if any(call.mode.startswith("autocast") for call in self.calls) else []
        return max(torch.finfo(DTYPES[name]).eps for name in used)

    @property
    def level(self) -> float:
        """The largest mask level that rounds the scores it is added to without absorbing them."""
        used = [abs(float(x)) for x in re.findall(r"-\d+(?:\.\d+)?(?:e\d+)?", self.source)]
        used += [1e4] * any("-1e4" in value for i in self.inputs for value in i.values)
        return max((x for x in used if x < LARGEST_LEVEL), default=1.0)

    def values(self, call: int) -> list[Tensor]:
        """Draw the value of every input in a call."""
        generator = torch.Generator().manual_seed(1000 * self.seed + call)
        return [i.draw(call, self.calls[call].sizes, generator) for i in self.inputs]

    def __str__(self) -> str:
        """Format it as Python source that recreates it."""
        lines = ["AttentionProgram(", '    """']
        lines += textwrap.indent(textwrap.dedent(self.source).strip(), "    ").splitlines()
        lines += ['    """,', "    inputs=(", *(f"        {_shown(i)}," for i in self.inputs), "    ),"]
        lines += ["    calls=(", *(f"        {_shown(c)}," for c in self.calls), "    ),"]
        rest = [f for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        lines += [f"    {f.name}={getattr(self, f.name)!r}," for f in rest]
        return "\n".join([*lines, ")"])


def _shown(item: Any) -> str:
    """Format a dataclass without fields at their defaults."""
    known = [f for f in fields(item) if getattr(item, f.name) != f.default]
    shown = [repr(getattr(item, f.name)) if f.name == "name" else f"{f.name}={getattr(item, f.name)!r}" for f in known]
    return f"{type(item).__name__}({', '.join(shown)})"


# --------------------------------------------------------------------------------------------------- values

Shape = tuple[int, ...]


def _uniform(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def normal(shape: Shape, g: torch.Generator) -> Tensor:
    """Draw float64 elements of a normal distribution."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _some(shape: Shape, g: torch.Generator, value: float) -> Tensor:
    """Zeros, with another value in 40% of the elements."""
    return torch.zeros(shape, dtype=torch.float64).masked_fill(_uniform(shape, g) < 0.4, value)


FLOATS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "normal": normal,
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "ones": lambda shape, g: torch.ones(shape, dtype=torch.float64),
    "identity": lambda shape, g: torch.eye(*shape, dtype=torch.float64),
    "sixty": lambda shape, g: torch.full(shape, 60.0, dtype=torch.float64),
    "minus sixty": lambda shape, g: torch.full(shape, -60.0, dtype=torch.float64),
    "large": lambda shape, g: 50 * normal(shape, g),
    "larger": lambda shape, g: 3 * normal(shape, g),
    "small": lambda shape, g: 0.01 * normal(shape, g),
    "positive": lambda shape, g: _uniform(shape, g) * 2 + 0.25,
    "negative": lambda shape, g: -_uniform(shape, g) - 0.25,
    "zero or one": lambda shape, g: (_uniform(shape, g) < 0.6).double(),
    "0 or -inf": lambda shape, g: _some(shape, g, -math.inf),
    "0 or lowest": lambda shape, g: _some(shape, g, torch.finfo(torch.float32).min),
    "0 or -1e4": lambda shape, g: _some(shape, g, -1e4),
    "0 or -1e9": lambda shape, g: _some(shape, g, -1e9),
    "some infinite": lambda shape, g: normal(shape, g) + _some(shape, g, math.inf),
    "some nan": lambda shape, g: normal(shape, g) + _some(shape, g, math.nan),
}

BOOLS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "all": lambda shape, g: torch.ones(shape, dtype=torch.bool),
    "none": lambda shape, g: torch.zeros(shape, dtype=torch.bool),
    "most": lambda shape, g: _uniform(shape, g) < 0.7,
    "few": lambda shape, g: _uniform(shape, g) < 0.3,
    "whole rows": lambda shape, g: _rows(shape, g),
    "random and whole rows": lambda shape, g: _rows(shape, g) & (_uniform(shape, g) < 0.7),
}

INDICES: dict[str, Callable[[Shape, int, torch.Generator], Tensor]] = {
    "in order": lambda shape, n, g: torch.arange(shape[0]) * n // shape[0],
    "shuffled": lambda shape, n, g: (torch.arange(shape[0]) * n // shape[0])[torch.randperm(shape[0], generator=g)],
    "drawn": lambda shape, n, g: torch.randint(n, shape, generator=g),
}


def _rows(shape: Shape, g: torch.Generator) -> Tensor:
    """Return rows along the last axis that are all true or all false."""
    return (_uniform((*shape[:-1], *[1] * bool(shape)), g) < 0.6).expand(shape).clone()


# --------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class CallResult:
    """What one call gives: outputs, gradients of the inputs (None without one), and inputs after the call."""

    outputs: tuple[Any, ...]
    gradients: tuple[Tensor | None, ...]
    inputs: tuple[Tensor, ...]


class Holder(nn.Module):
    """A module that holds the parameters and buffers of a program; arguments come with the call."""

    def __init__(self, program: AttentionProgram, values: Sequence[Tensor]) -> None:
        super().__init__()
        self.function = program.function
        self.names: list[str] = []
        for given, value in zip(program.inputs, values, strict=True):
            if given.held == "argument":
                continue
            self.names.append(given.name)
            if given.held == "parameter" and given.is_float:
                self.register_parameter(given.name, nn.Parameter(value.clone(), requires_grad=given.grad))
            else:
                self.register_buffer(given.name, value.clone())

    def forward(self, *arguments: Any) -> Any:
        """Run the program."""
        return self.function(*arguments, *[getattr(self, name) for name in self.names])


@contextlib.contextmanager
def _in_mode(mode: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if "no_grad" in mode:
            stack.enter_context(torch.no_grad())
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        if mode.startswith("autocast"):
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def converted(program: AttentionProgram, values: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Cast inputs to their dtypes; floating ones to `dtype` unless it is None."""
    own = [dtype or DTYPES[i.dtype or program.dtype] for i in program.inputs]
    return [v.to(d) if v.is_floating_point() else v for v, d in zip(values, own, strict=True)]


def run(program: AttentionProgram, runner: Any, values: Sequence[Tensor], mode: str) -> CallResult:
    """Call a function of the arguments, or a compiled Holder, on copies of these values."""
    module = getattr(runner, "_orig_mod", None)
    leaves: list[Tensor] = []
    for given, value in zip(program.inputs, values, strict=True):
        if module is not None and given.held != "argument":
            held = getattr(module, given.name)
            with torch.no_grad():
                held.copy_(value)
            leaves.append(held)
            continue
        leaves.append(value.clone().requires_grad_(given.grad and value.is_floating_point() and mode in WITH_GRADIENTS))
    if module is not None:
        module.train(mode == "train")
    passed = [x for x, i in zip(leaves, program.inputs, strict=True) if module is None or i.held == "argument"]
    torch.manual_seed(program.seed)
    with _in_mode(mode):
        outputs = tuple(tree_leaves(runner(*passed)))
    gradients = _gradients(program, outputs, leaves) if mode in WITH_GRADIENTS else ()
    with torch.no_grad():
        return CallResult(outputs, gradients, tuple(x.detach().clone() for x in leaves))


def _gradients(
    program: AttentionProgram, outputs: Sequence[Any], leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    ends = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not ends or not wanted:
        return ()
    generator = torch.Generator().manual_seed(program.seed)
    given = [normal(tuple(x.shape), generator).to(x.dtype) for x in ends]
    return torch.autograd.grad(ends, wanted, given, allow_unused=True)
