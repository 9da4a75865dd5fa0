"""Attention programs as data: Python source, and new input values in each call; checked against eager mode.

    program = Program("def program(q, k, v): ...", inputs=(Input("q", "B H S D"), ...), calls=(Call(SIZES), ...))
    check(program)      ->  Verdict(sites=1)        raises Wrong if the backend `flashhead` is wrong

The first call often has values without effect (ones, all-true masks, indices in order). The compiled graph must also
be right for later calls: outputs, NaN and infinite elements, dtypes, the gradients of all inputs, and inputs that the
program writes to. Eager mode is the reference; if `aot_eager` differs from it as well, the program is invalid.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels.
"""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
WITH_GRADIENTS = ("train", "eval", "autocast")
MODES = (*WITH_GRADIENTS, "no_grad", "inference", "autocast no_grad")
TRACED = ("torch.func", "checkpoint(")  # graphs with these run only after AOTAutograd as in eager mode
# Rounding error of a dtype -> relative difference that is always allowed. float64: below the resolution of float32.
MIN_TOLERANCE = {2.0**-52: 4e-9, 2.0**-23: 2.0**-17, 2.0**-10: 2.0**-8, 2.0**-7: 2.0**-5}
ILL_CONDITIONED = 0.1  # elements that rounding may change by more than this share of the largest are not compared
LARGEST_LEVEL = 1e6  # scores added to smaller mask levels keep some of their digits
LARGEST_OPERAND = 1e3  # larger elements of inputs are masks
INDUCTOR = "torch._inductor.compile_fx.compile_fx"


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


def _normal(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _some(shape: Shape, g: torch.Generator, value: float) -> Tensor:
    """Zeros, with another value in 40% of the elements."""
    return torch.zeros(shape, dtype=torch.float64).masked_fill(_uniform(shape, g) < 0.4, value)


FLOATS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "normal": _normal,
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "ones": lambda shape, g: torch.ones(shape, dtype=torch.float64),
    "identity": lambda shape, g: torch.eye(*shape, dtype=torch.float64),
    "sixty": lambda shape, g: torch.full(shape, 60.0, dtype=torch.float64),
    "minus sixty": lambda shape, g: torch.full(shape, -60.0, dtype=torch.float64),
    "large": lambda shape, g: 50 * _normal(shape, g),
    "larger": lambda shape, g: 3 * _normal(shape, g),
    "small": lambda shape, g: 0.01 * _normal(shape, g),
    "positive": lambda shape, g: _uniform(shape, g) * 2 + 0.25,
    "negative": lambda shape, g: -_uniform(shape, g) - 0.25,
    "zero or one": lambda shape, g: (_uniform(shape, g) < 0.6).double(),
    "0 or -inf": lambda shape, g: _some(shape, g, -math.inf),
    "0 or lowest": lambda shape, g: _some(shape, g, torch.finfo(torch.float32).min),
    "0 or -1e4": lambda shape, g: _some(shape, g, -1e4),
    "0 or -1e9": lambda shape, g: _some(shape, g, -1e9),
    "some infinite": lambda shape, g: _normal(shape, g) + _some(shape, g, math.inf),
    "some nan": lambda shape, g: _normal(shape, g) + _some(shape, g, math.nan),
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
    given = [_normal(tuple(x.shape), generator).to(x.dtype) for x in ends]
    return torch.autograd.grad(ends, wanted, given, allow_unused=True)


# --------------------------------------------------------------------------------------------------- comparing


class WrongProgram(AssertionError):
    """The compiled program is wrong; the message contains its source."""

    def __init__(self, program: AttentionProgram, call: int, problem: str) -> None:
        super().__init__(f"call {call + 1} of {len(program.calls)}: {problem}\n\n{program}")
        self.program, self.call, self.problem = program, call, problem


class Invalid(Exception):
    """The program cannot run in eager mode, or aot_eager is wrong as well."""


@dataclass(frozen=True)
class CompiledAs:
    """How a correct program was compiled. sites: calls of fhopt functions in the compiled graphs."""

    sites: int
    graphs: int


@dataclass(frozen=True)
class Expected:
    """Eager results of one call, and float64 results with the error that rounding may cause."""

    plain: CallResult
    precise: CallResult
    errors: tuple[tuple[float, ...], ...]


def check(program: AttentionProgram) -> CompiledAs:
    """Compile a program once and run all its calls. Raises Wrong, or Invalid if nothing can be compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _leave_transforms()
        try:
            expected = [_expected(program, call) for call in range(len(program.calls))]
        except Exception as error:
            raise Invalid(f"eager: {type(error).__name__}: {error}") from error
        seen: list[int] = []

        def compile_fx(module: Any, inputs: Any, **_: Any) -> Any:
            seen.append(_rewritten(module))
            is_traced = program.aot or any(name in program.source for name in TRACED)
            return aot_eager(module, inputs) if is_traced else module.forward

        with mock.patch(INDUCTOR, compile_fx):
            failure = _first_problem(program, expected, dict(backend="flashhead", options={"ratio": 1}))
        if failure is None:
            return CompiledAs(sum(seen), len(seen))
        again = _first_problem(program, expected[: failure[0] + 1], dict(backend="aot_eager"))
        if again is not None and again[0] <= failure[0]:
            raise Invalid(f"aot_eager: {again[1]}")
    raise WrongProgram(program, *failure)


def _leave_transforms() -> None:
    """Exit torch.func transforms that an exception in an earlier program left open."""
    forward_ad._current_level = -1
    with contextlib.suppress(RuntimeError):  # raised if there is no such level
        torch._C._exit_dual_level(level=0)
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)


def _rewritten(module: Any) -> int:
    """Count the calls of fhopt functions in a graph."""
    if not hasattr(module, "graph"):
        return 0
    names = [str(getattr(n.target, "__module__", "")) + str(n.target) for n in module.graph.nodes]
    return sum("attention" in name and name.startswith(("fhopt", "torch._opsfhopt")) for name in names)


def _first_problem(
    program: AttentionProgram, expected: Sequence[Expected], how: dict[str, Any]
) -> tuple[int, str] | None:
    torch._dynamo.reset()
    is_held = any(i.held != "argument" for i in program.inputs)
    values = converted(program, program.values(0), None)
    target = Holder(program, values) if is_held else program.function
    runner = torch.compile(target, dynamic=program.dynamic, fullgraph=True, **how)
    for call, known in enumerate(expected):
        _leave_transforms()
        try:
            found = run(program, runner, converted(program, program.values(call), None), program.calls[call].mode)
        except Exception as error:
            return call, f"raises {type(error).__name__}: {str(error)[:600]}"
        problem = difference(known, found)
        if problem is not None:
            return call, problem
    return None


def _expected(program: AttentionProgram, call: int) -> Expected:
    mode, values = program.calls[call].mode, program.values(call)
    plain_mode = mode.removeprefix("autocast ") if mode != "autocast" else "train"
    plain = run(program, program.function, converted(program, values, None), mode)
    precise = run(program, program.function, converted(program, values, torch.float64), plain_mode)
    single = run(program, program.function, converted(program, values, torch.float32), plain_mode)
    generator = torch.Generator().manual_seed(call)
    epsilon = program.precision
    noisy = [
        v * (1 + epsilon * _normal(tuple(v.shape), generator)) if v.is_floating_point() else v
        for v in converted(program, values, torch.float64)
    ]
    moved = run(program, program.function, noisy, plain_mode)
    wide = replace(program, source=program.source.replace("torch.float32", "torch.float64"))
    widened = run(wide, wide.function, converted(program, values, torch.float64), plain_mode)
    return Expected(plain, precise, _errors(epsilon, max(program.level, 1.0), plain, precise, single, moved, widened))


def _errors(
    epsilon: float, level: float, plain: CallResult, precise: CallResult, single: CallResult, moved: CallResult,
    widened: CallResult,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Estimate how much rounding changes each tensor of a result.

    The estimate sums four changes: by rounding in eager mode, by input noise of one rounding error, by float32, scaled
    to the precision in use, and by casts to float32 in the program. A multiple of the precision is added, because
    operations may run in another order: relative to the tensor's own elements, and to inputs. The gradient of a
    projection sums products of four operands, which cancel in a saturated softmax: its floor is that power of the
    largest operand. A mask level costs as many digits as the scores added to it lose.
    """
    least = MIN_TOLERANCE[max(e for e in MIN_TOLERANCE if e <= epsilon)]
    inputs = torch.cat([torch.zeros(1, dtype=torch.float64), *(x.flatten().double() for x in precise.inputs)]).abs()
    size = float(inputs[inputs < LARGEST_OPERAND].max())
    unit = 8 * epsilon * level
    floors = {"outputs": unit * size, "gradients": unit * max(size, size**4), "inputs": 0.0}
    results: list[tuple[float, ...]] = []
    for field in fields(CallResult):
        lists = [getattr(r, field.name) for r in (plain, precise, single, moved, widened)]
        floor = floors[field.name]
        results.append(tuple(_error(epsilon, least, floor, *tensors) for tensors in zip(*lists, strict=False)))
    return tuple(results)


def _error(
    epsilon: float, least: float, floor: float, plain: Any, precise: Any, single: Any, moved: Any, widened: Any
) -> float:  # fmt: skip
    """Return the error of one tensor; infinite for an ill-conditioned one."""
    if (
        any(not isinstance(x, Tensor) for x in (plain, precise, single, moved, widened))
        or not precise.is_floating_point()
    ):
        return 0.0
    rounded, noise = _largest(plain.double() - precise), _largest(moved - precise) + _largest(widened - precise)
    share = min(1.0, epsilon / torch.finfo(torch.float32).eps)
    measured, size = 8 * (rounded + noise + share * _largest(single.double() - precise)), _largest(precise)
    return math.inf if measured > ILL_CONDITIONED * size > ILL_CONDITIONED * floor else measured + least * size + floor


def _largest(x: Tensor) -> float:
    """Return the largest magnitude of the finite elements."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def difference(expected: Expected, found: CallResult) -> str | None:
    """Describe the first difference between the expected and the actual result; None if they agree."""
    has_nan = any(
        isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in expected.plain.outputs
    )
    for field, errors in zip(fields(CallResult), expected.errors, strict=True):
        if has_nan and field.name == "gradients":
            continue  # which gradients NaN reaches depends on the order of operations
        plain, precise, mine = (getattr(r, field.name) for r in (expected.plain, expected.precise, found))
        if len(plain) != len(mine):
            return f"{len(mine)} {field.name}; eager gives {len(plain)}"
        for place, (p, e, m) in enumerate(zip(plain, precise, mine, strict=False)):
            error = errors[place] if place < len(errors) else 0.0
            problem = _difference(p, e, m, error)
            if problem is not None:
                return f"{field.name}[{place}]: {problem}"
    return None


def _difference(plain: Any, precise: Any, mine: Any, error: float) -> str | None:
    if not isinstance(plain, Tensor) or not isinstance(mine, Tensor):
        return None if type(plain) is type(mine) else f"{_named(mine)}; eager gives {_named(plain)}"
    if (plain.shape, plain.dtype, plain.requires_grad) != (mine.shape, mine.dtype, mine.requires_grad):
        return f"{_named(mine)}; eager gives {_named(plain)}"
    plain, mine = plain.detach(), mine.detach()
    if not plain.is_floating_point():
        return None if torch.equal(plain, mine) else "other elements than in eager mode"
    if not torch.equal(plain.isnan(), mine.isnan()):
        return f"{int(mine.isnan().sum())} elements are NaN; in eager mode {int(plain.isnan().sum())}"
    if not torch.equal(plain.isinf(), mine.isinf()) or not torch.equal(plain[plain.isinf()], mine[mine.isinf()]):
        return "other elements are infinite than in eager mode"
    apart = (mine.double() - plain.double()).abs()
    if isinstance(precise, Tensor):
        apart = torch.minimum(apart, (mine.double() - precise.detach().double()).abs().nan_to_num(math.inf, math.inf))
    largest = _largest(apart)
    if largest > error:
        return f"differs by {largest:.2e} where rounding explains {error:.2e} (largest element {_largest(plain):.2e})"
    return None


def _named(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{x.dtype} {tuple(x.shape)}{' with a gradient' if x.requires_grad else ''}".removeprefix("torch.")
