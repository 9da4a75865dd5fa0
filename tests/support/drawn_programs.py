"""A hypothesis strategy of attention programs: every part in a random spelling, with steps between the parts.

    q, k, v -> STEPS on them -> product -> SCORE_STEPS -> softmax -> WEIGHT_STEPS -> mix -> OUTPUT_STEPS -> RETURNED

The parts and steps: program_steps.py.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from attention_spellings import REPEATED, statements
from graph_programs import AttentionProgram, Call, CallSizes, Input
from hypothesis import strategies as st
from program_steps import (
    LITERALS,
    MIXES,
    OPERAND_STEPS,
    OUTPUT_STEPS,
    PRODUCTS_HERE,
    RETURNED,
    SCORE_STEPS,
    SDPA,
    SIDES,
    SOFTMAXES,
    WEIGHT_STEPS,
    WRAPPED,
)


class ProgramWriter:
    """Collects the lines of a program and draws the inputs that they name."""

    def __init__(self, draw: st.DrawFn, can_hold: bool) -> None:
        self.draw, self.can_hold = draw, can_hold
        self.lines: list[str] = []
        self.inputs: list[Input] = []

    def pick(self, choices: Iterable[str]) -> str:
        """Draw one of several names."""
        return self.draw(st.sampled_from(list(choices)))

    def add(self, text: str, name: str = "") -> None:
        """Add lines; with a name, the last expression is assigned to it."""
        written = self.fill(text)
        if name:
            before, result = statements(written)
            written = "\n".join([*before, f"{name} = {result}"])
        self.lines += written.split("\n")

    def fill(self, text: str) -> str:
        """Replace the placeholders of a text by inputs and literals."""
        known: dict[str, str] = {}
        for place in dict.fromkeys(re.findall(r"\{(\w+)\}", text)):
            kind = place.rstrip("0123456789")
            known[place] = self.pick(LITERALS[kind]) if kind in LITERALS else self._side(kind, known.values())
        return re.sub(r"\{(\w+)\}", lambda m: known[m[1]], text)

    def _side(self, kind: str, taken: Iterable[str]) -> str:
        """Draw an input of a kind: a new one, or one that the program already has."""
        same = [i.name for i in self.inputs if i.name.rstrip("0123456789_") == kind and i.name not in taken]
        is_shared: bool = bool(same) and self.draw(st.booleans())
        if is_shared:
            return same[0]
        side = SIDES[kind]
        name = f"{kind}_{len(self.inputs)}"
        values = (self.pick(side.first), self.pick(side.later), self.pick(side.later))
        self.add_input(name, self.pick(side.shapes), values, side.below, not side.changed)
        return name

    def add_input(
        self, name: str, shape: str, values: tuple[str, ...], below: str = "", can_have_gradient: bool = True
    ) -> None:
        """Add an input that the caller passes or that a module holds."""
        is_fixed = self.can_hold or not set(shape) & set("BST")
        held = self.pick(["argument", "argument", "parameter", "buffer"] if is_fixed else ["argument"])
        held = "buffer" if held == "parameter" and not can_have_gradient else held
        if held == "parameter":  # parameters are finite: docs/explanation/exactness.md
            values = tuple("0 or lowest" if name == "0 or -inf" else name for name in values)
        if held != "argument" and not values[0].startswith("0 or "):  # a small bias does not become a mask: same page
            values = tuple("normal" if name.startswith("0 or ") else name for name in values)
        grad = can_have_gradient and held != "buffer" and self.draw(st.sampled_from([True, True, True, False]))
        self.inputs.append(Input(name, shape, values, held=held, below=below, grad=grad))


def _few(names: Iterable[str], often: int) -> st.SearchStrategy[list[str]]:
    """Draw a list of 0 to 3 names, mostly empty; a larger `often` makes longer lists rarer."""
    entries = st.sampled_from(list(names))
    short, long = st.lists(entries, max_size=1), st.lists(entries, max_size=3)
    return st.one_of(*[st.just([])] * (often + 1), *[short] * often, long)


OPERAND_VALUES = ("normal", "normal", "large", "small", "zeros", "positive")


@st.composite
def programs(draw: st.DrawFn, only: str = "") -> AttentionProgram:
    """Draw a program. only: a table and one of its entries, "TABLE.entry", which becomes the program's only step."""
    dynamic = draw(st.sampled_from([*[False] * 8, True, None]))
    sizes = draw(_all_sizes(varied=dynamic is not False))
    writer = ProgramWriter(draw, can_hold=dynamic is False)
    parts = _Parts(writer, only)
    wrapped = only.removeprefix("WRAPPED.") if only.startswith("WRAPPED.") else ""
    if not only:
        wrapped = draw(st.sampled_from(["", *[""] * 11, *WRAPPED]))
    _operands(writer, sizes[0])
    _attention(parts, is_single=bool(wrapped))
    mode = draw(st.sampled_from(["train", "train", "no_grad", "eval", "inference", "autocast", "autocast no_grad"]))
    last = draw(st.sampled_from([mode] * 6 + ["no_grad", "train"]))
    calls = tuple(Call(s, m) for s, m in zip(sizes, (mode, mode, last), strict=True))
    dtypes = ["float64", "float32", "float64", "float32", "float64", "bfloat16", "float16"]
    dtype = "float32" if mode.startswith("autocast") else draw(st.sampled_from(dtypes))
    if wrapped == "jvp" and any("baddbmm" in line for line in writer.lines):
        wrapped = "vjp"  # PyTorch 2.15 crashes in aot_eager of torch.func.jvp of baddbmm
    if wrapped and dtype in ("bfloat16", "float16"):
        dtype = "float32"
    is_coarse = mode.startswith("autocast") or dtype in ("bfloat16", "float16")
    is_tamed = is_coarse or _has_near_level(writer)
    inputs = tuple(
        sorted(map(_tamed, writer.inputs) if is_tamed else writer.inputs, key=lambda i: i.held != "argument")
    )
    source = _source([i.name for i in inputs], writer.lines, wrapped, writer.inputs[0].name)
    return AttentionProgram(
        source, inputs, calls, dtype, dynamic, draw(st.integers(0, 99)), draw(st.integers(0, 3)) == 3
    )


def _has_near_level(writer: ProgramWriter) -> bool:
    """Return whether large scores reach a mask level: docs/explanation/exactness.md, Conditions."""
    texts = [*writer.lines, *(value for given in writer.inputs for value in given.values)]
    return any("-1e4" in text or "-5e4" in text for text in texts)


def _tamed(given: Input) -> Input:
    """Replace values that reach mask levels, or for which 16-bit rounding decides which key a query attends to."""
    return replace(given, values=tuple("larger" if name == "large" else name for name in given.values))


@st.composite
def _all_sizes(draw: st.DrawFn, varied: bool) -> tuple[CallSizes, ...]:
    heads = draw(st.sampled_from([(4, 4), (4, 2), (2, 1), (1, 1), (6, 3)]))
    size = draw(st.sampled_from([4, 8]))
    square = draw(st.booleans())
    results: list[CallSizes] = []
    for _ in range(3):
        if results and not varied:
            results.append(results[0])
            continue
        batch, queries, keys = (draw(st.sampled_from(c)) for c in ([2, 3, 1], [5, 7, 3, 2], [6, 5, 9, 4]))
        results.append(CallSizes(batch, *heads, queries, queries if square else keys, size))
    return tuple(results)


def _operands(writer: ProgramWriter, sizes: CallSizes) -> None:
    """Add lines that make q [B, H, S, D], k and v [B, H, T, D]."""
    repeats = sizes.H // sizes.G
    values = [("normal", writer.pick(OPERAND_VALUES), writer.pick(OPERAND_VALUES)) for _ in range(3)]
    if sizes.S == sizes.T and writer.draw(st.sampled_from([False, False, True])):
        writer.add_input("x", "B S C", values[0])
        for name, shape, heads in (("q", "C C", sizes.H), ("k", "C K", sizes.G), ("v", "C K", sizes.G)):
            writer.inputs.append(Input(f"w{name}", shape, ("normal", "normal", "normal"), held="parameter"))
            writer.lines.append(f"{name} = (x @ w{name} * 0.3).unflatten(-1, ({heads}, {sizes.D})).transpose(1, 2)")
    else:
        for name, shape, drawn in zip("qkv", ("B H S D", "B G T D", "B G T D"), values, strict=True):
            writer.inputs.append(Input(name, shape, drawn))
    if repeats > 1:
        filled = writer.fill(writer.pick([*REPEATED.values(), "x[:, {groups}]"]))
        for name in "kv":
            replaced = re.sub(r"\bx\b", name, re.sub(r"\bn\b", str(repeats), filled))
            writer.lines.append(f"{name} = {replaced}")


@dataclass(frozen=True)
class _Parts:
    """Adds table entries to a program: drawn ones, or the plain ones except for `only`."""

    writer: ProgramWriter
    only: str

    def add_steps(self, name: str, table: Mapping[str, str], often: int) -> None:
        """Add a few steps."""
        names = [self._entry] if self._is_for(name) else [] if self.only else self.writer.draw(_few(table, often))
        for entry in names:
            self.writer.add(table[entry])

    def add(self, name: str, table: Mapping[str, str], result: str) -> None:
        """Add one entry and assign its value to `result`."""
        self.writer.add(self.pick(name, table), result)

    def pick(self, name: str, table: Mapping[str, str]) -> str:
        """Return the text of one entry."""
        if self._is_for(name):
            return table[self._entry]
        plain = next(iter(table.values()))
        is_plain = self.only or self.writer.draw(st.booleans())  # most other entries are not rewritten
        return plain if is_plain else self.writer.pick(table.values())

    def is_drawn(self, name: str, of: int) -> bool:
        """Draw whether to use an unusual part: in one of `of` programs."""
        return self._is_for(name) or (not self.only and self.writer.draw(st.integers(0, of - 1)) == of - 1)

    @property
    def _entry(self) -> str:
        return self.only.partition(".")[2]

    def _is_for(self, name: str) -> bool:
        return self.only.partition(".")[0] == name


def _attention(parts: _Parts, is_single: bool) -> None:
    """Add lines from q, k and v to the result. is_single: it is one tensor."""
    parts.add_steps("OPERAND_STEPS", OPERAND_STEPS, 3)
    is_fused = parts.is_drawn("SDPA", 12)
    if is_fused:
        parts.add("SDPA", SDPA, "o")
    else:
        parts.add("PRODUCTS_HERE", PRODUCTS_HERE, "s")
        parts.add_steps("SCORE_STEPS", SCORE_STEPS, 1)
        parts.add("SOFTMAXES", SOFTMAXES, "p")
        parts.add_steps("WEIGHT_STEPS", WEIGHT_STEPS, 2)
        parts.add("MIXES", MIXES, "o")
    parts.add_steps("OUTPUT_STEPS", OUTPUT_STEPS, 2)
    results = {name: text for name, text in RETURNED.items() if not (is_single or is_fused) or ", " not in text}
    parts.writer.lines.append(f"return {parts.pick('RETURNED', results)}")


def _source(names: Sequence[str], lines: Sequence[str], wrapped: str, first: str) -> str:
    """Write the function `program`; wrapped: an entry of WRAPPED, which calls it as a function of its first input."""
    arguments, body = ", ".join(names), textwrap.indent("\n".join(lines), "    ")
    if not wrapped:
        return f"def program({arguments}):\n{body}"
    passed = ", ".join("x" if name == first else name for name in names)
    call = WRAPPED[wrapped].replace("attend", f"(lambda x: attend({passed}))").replace("{first}", first)
    return f"def attend({arguments}):\n{body}\n\n\ndef program({arguments}):\n    return {call}"
