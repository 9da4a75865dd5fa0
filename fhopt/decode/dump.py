"""The text of a decode program: fx nodes, their instructions, and why some nodes have none.

With FHOPT_DUMP=FOLDER, each program that is captured is written to `decode-N.txt` there.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.fx import Node

from fhopt.codegen.cpu.calls.caches import Code, PackedInstruction, View
from fhopt.codegen.cpu.calls.kernels import FORMATS, SIGNED_BYTES, Type
from fhopt.codegen.programs.schedule import AttentionNode, EagerNode, Item, NativeSegment
from fhopt.decode.program import DecodeProgram
from fhopt.passes.graph.printing import print_node

_HEAD = """\
# {model}: {native} native {calls} per step
# {eager} eager nodes, {segments} segments ({kinds} different), {attentions} attentions
#
# %name: type[shape] = operation(operands)     a node of the captured fx graph
#   number  code [sizes]  result <- operands   its instructions, in float32; none: a view, which is free
# x0, x1, ...: tensors outside the segment     @offset(strides): floats in the arena of the segment
"""


def program_text(model: torch.nn.Module, program: DecodeProgram) -> str:
    """Return the text of a program of `model`. Instructions that several segments share are shown once."""
    items = program.schedule.items
    segments = [item for item in items if isinstance(item, NativeSegment)]
    kinds = Counter(type(item) for item in items)
    head = _HEAD.format(
        model=type(model).__name__, native=program.native_calls, calls="calls" if program.native_calls != 1 else "call",
        eager=kinds[EagerNode], segments=len(segments), kinds=len({id(s.program) for s in segments}),
        attentions=kinds[AttentionNode],
    )  # fmt: skip
    return head + "".join(f"{line}\n" for line in _lines(items, _weight_names(model)))


def dump_program(model: torch.nn.Module, program: DecodeProgram) -> None:
    """Write a program to `decode-N.txt` in the folder named by FHOPT_DUMP, if set; N is the next free number."""
    if folder := os.environ.get("FHOPT_DUMP"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        number = len(list(Path(folder).glob("decode-*.txt")))
        (Path(folder) / f"decode-{number}.txt").write_text(program_text(model, program), encoding="utf-8")


def _weight_names(model: torch.nn.Module) -> dict[int, str]:
    """Return the qualified name of each parameter and buffer, by the id of the tensor."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {id(tensor): name for name, tensor in reversed(named)}


def _lines(items: Sequence[Item], weights: dict[int, str]) -> Iterable[str]:
    numbers: dict[int, int] = {}  # of the first segment of each program
    segment = 0
    reason = ""
    for item in items:
        if isinstance(item, EagerNode):
            if item.node.target is not operator.getitem and item.reason != reason:
                yield f"\neager: {item.reason}"
                reason = item.reason
            yield f"  {print_node(item.node)}"
            continue
        reason = ""
        if isinstance(item, AttentionNode):
            yield f"\nattention of layer {item.node.meta['attention'].layer}: cache update and attention"
            yield f"  {print_node(item.node)}"
            continue
        first = numbers.setdefault(id(item.program), segment)
        if first == segment:
            yield from _segment_lines(segment, item, weights)
        else:
            yield f"\nsegment {segment}: the instructions of segment {first}, with"
            yield from _external_lines(item, weights)
        segment += 1


def _external_lines(item: NativeSegment, weights: dict[int, str]) -> Iterable[str]:
    """Yield the inputs and outputs of a segment, in the order of their numbers."""
    names = [_name(node, weights) for node in item.inputs] + [f"result %{node.name}" for node in item.outputs]
    for index, (name, node) in enumerate(zip(names, (*item.inputs, *item.outputs), strict=True)):
        value = node.meta["val"]
        yield f"  x{index} {name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _name(node: Node, weights: dict[int, str]) -> str:
    held = node.meta.get("weight")
    return f"%{node.name}" if held is None else weights.get(id(held.tensor), f"%{node.name}")


def _segment_lines(number: int, item: NativeSegment, weights: dict[int, str]) -> Iterable[str]:
    program = item.program
    yield f"\nsegment {number}: {len(program.instructions)} instructions, {program.arena * 4 / 1024:.1f} KiB"
    yield from _external_lines(item, weights)
    for node in item.nodes:
        yield f"  {print_node(node)}"
        for index, (instruction, source) in enumerate(zip(program.instructions, program.sources, strict=True)):
            if source == node.name:
                yield f"    {index:3d} {_instruction(instruction)}"


def _instruction(one: PackedInstruction) -> str:
    """Return an instruction as text."""
    code, sizes = Code(one.code), tuple(one.sizes)
    name = f"{code.name.lower():13s}"
    if code == Code.LINEAR:
        weight = f"x{one.external} ({_weight_type(one.type)})"
        more = [f"bias x{one.bias}"] * (one.bias >= 0) + [f"scales x{one.scale}"] * (one.scale >= 0)
        more += [f"{one.joined} in one loop"] * (one.joined > 1)
        return f"{name} {list(sizes[1:])}  @{one.out.offset} <- @{one.a.offset}, " + ", ".join([weight, *more])
    shown = f"{name} {_trimmed(sizes)} "
    if code == Code.STORE:
        return f"{shown} x{one.external} <- {_place(one.out, sizes)}"
    out = _place(one.out, sizes)
    if code == Code.LOAD:
        return (
            f"{shown} {out} <- x{one.external} from {one.offset}" if one.offset else f"{shown} {out} <- x{one.external}"
        )
    if code == Code.FILL:
        return f"{shown} {out} <- {one.number:g}"
    operands = [_place(one.a, sizes)]
    if code in (Code.ADD, Code.SUBTRACT, Code.MULTIPLY, Code.DIVIDE, Code.MAXIMUM, Code.MINIMUM):
        operands.append(_place(one.b, sizes))
    return f"{shown} {out} <- {', '.join(operands)}"


def _trimmed(sizes: Sequence[int]) -> list[int]:
    first = next((index for index, n in enumerate(sizes) if n != 1), len(sizes) - 1)
    return list(sizes[first:])


def _place(view: View, sizes: Sequence[int]) -> str:
    """Return where a value is in the arena, with its strides if it is not dense."""
    strides, dense = list(view.strides), 1
    is_dense = True
    for n, stride in zip(reversed(sizes), reversed(strides), strict=True):
        is_dense &= n == 1 or stride == dense
        dense *= n
    kept = len(_trimmed(sizes))
    return f"@{view.offset}" if is_dense else f"@{view.offset}({', '.join(map(str, strides[-kept:]))})"


def _weight_type(number: int) -> str:
    if number >= FORMATS:
        return f"GGUF format {number // FORMATS}"
    if number >= SIGNED_BYTES:
        return "int8"
    return Type(number).name.lower()
