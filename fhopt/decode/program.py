"""`DecodeProgram`: a captured decode step, lowered and bound to the weights of its model.

    run     guards and signature; then stages in order:
    eager   nodes without instructions, as one function of Python: embedding, angles, masks, opaque modules
    native  segments and attention of consecutive layers, as one call

Intermediate values are in tensors of the program: their addresses are constant. One thread at a time may run it.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.lowering import is_mutation
from fhopt.codegen.programs.program import SegmentCall, run_segment
from fhopt.codegen.programs.schedule import (
    AttentionNode,
    EagerNode,
    Item,
    NativeSegment,
    Scheduler,
    StepSchedule,
    changed_operands,
    value_storages,
)
from fhopt.decode.arguments import leaf
from fhopt.decode.cache_steps import CacheStep, joined_steps, run_steps
from fhopt.decode.capture import CapturedStep, is_attention
from fhopt.decode.guards import ModelGuards
from fhopt.decode.reference import check_segment
from fhopt.decode.step import Attend, AttentionStep

Values = dict[Node, Any]


class EagerStage:
    """Consecutive nodes without instructions. guards: numbers that they must compute."""

    def __init__(self, model: torch.nn.Module, nodes: Sequence[Node], used: set[Node]) -> None:
        inside = set(nodes)
        inputs = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside)
        self.guards = [(node, node.meta["guard"]) for node in nodes if "guard" in node.meta]
        outputs = [n for n in nodes if n in used or "guard" in n.meta or any(user not in inside for user in n.users)]
        graph, copies = Graph(), dict[Node, Node]()
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for node in nodes:
            copies[node] = graph.node_copy(node, lambda x: copies[x])
        graph.output(tuple(copies[node] for node in outputs))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.function: Callable[..., Any] = GraphModule(model, graph).forward

    def run(self, values: Values) -> bool:
        """Compute the values; return whether the guards pass."""
        results = self.function(*[values[node] for node in self.inputs])
        values.update(zip(self.outputs, results, strict=True))
        return all(values[node] == expected for node, expected in self.guards)


@dataclass(eq=False)
class BoundSegment:
    """A segment with its externals. given: inputs that eager nodes or the caller compute, with index, shape and dtype.

    returned: values that are new tensors in each run, with their index.
    """

    item: NativeSegment
    call: SegmentCall
    given: list[tuple[int, Node, tuple[Any, ...]]]
    returned: list[tuple[int, Node]]

    def place(self, values: Values) -> bool:
        """Set the addresses that differ between runs; return whether the inputs have the captured shapes."""
        externals = self.call.externals
        for index, node, look in self.given:
            x = values[node]
            if (x.shape, x.dtype) != look:
                return False
            if not x.is_contiguous():
                x = values[node] = x.contiguous()
            externals[index] = x.data_ptr()
        for index, node in self.returned:
            like = node.meta["val"]
            made = values[node] = torch.empty(like.shape, dtype=like.dtype)
            externals[index] = made.data_ptr()
        return True


class NativeStage:
    """Segments and attention of consecutive layers. pairs: a segment, if any, before each attention; tail: the last."""

    def __init__(self, pairs: Sequence[tuple[BoundSegment | None, AttentionStep]], tail: BoundSegment | None) -> None:
        self.pairs, self.tail = tuple(pairs), tail
        self.segments = [s for s in (*[segment for segment, _ in pairs], tail) if s is not None]
        self.steps = [step for _, step in pairs]
        for index, (segment, step) in enumerate(self.pairs):
            after = tail if index == len(self.pairs) - 1 else None
            step.calls = (None if segment is None else segment.call, None if after is None else after.call)

    def run(self, values: Values, cache: Any, threads: int) -> bool:
        """Run the stage; return False, without running it, if an input has another shape than the captured one."""
        if not all(segment.place(values) for segment in self.segments):
            return False
        steps = [step.prepared(cache, threads) for step in self.steps]
        if steps and None not in steps:
            _run_joined([step for step in steps if step is not None])
            return True
        for (segment, attention), step in zip(self.pairs, steps, strict=True):
            if step is not None:
                _run_joined([step])
                continue
            if segment is not None:
                run_segment(segment.call, threads)
            mask, sinks = (None if x is None else values[x] for x in (attention.mask, attention.sinks))
            attention.run(cache, mask, sinks)
        if self.tail is not None and (not steps or steps[-1] is None):
            run_segment(self.tail.call, threads)
        return True


def _run_joined(steps: list[CacheStep]) -> None:
    """Run steps as one call; the first one remembers it, so that it is freed with its cache."""
    first = steps[0]
    if first.joined is None or first.joined[0] != steps:
        first.joined = steps, joined_steps(steps)
    run_steps(steps, first.joined[1])


class DecodeProgram:
    """A captured step that runs. Raises UnsupportedError if its results differ from those of the captured call."""

    def __init__(self, model: torch.nn.Module, captured: CapturedStep, attend: Attend) -> None:
        self.captured = captured
        graph = captured.graph
        opaque = {
            node: f"{type(model.get_submodule(str(node.target))).__name__} runs as in the model"
            for node in graph.find_nodes(op="call_module")
        }
        self.schedule: StepSchedule = Scheduler(graph, is_attention, opaque).schedule()
        check_guards(self.schedule.items)
        self._placeholders = graph.find_nodes(op="placeholder")
        self._arguments = [(node, node.meta["path"]) for node in self._placeholders if "path" in node.meta]
        weights = [node for node in self._placeholders if "weight" in node.meta]
        self.guards = ModelGuards(model, [node.meta["weight"] for node in weights])
        (output,) = graph.find_nodes(op="output")
        self._returned = set(output.all_input_nodes)
        self._fixed: Values = {node: node.meta["val"] for node in self._placeholders if _is_fixed(node)}
        self._static: dict[Node, Tensor] = {}  # values in tensors of the program
        self._given: set[Node] = {node for node in self._placeholders if not _is_fixed(node)}
        self.attentions = {
            item.node: AttentionStep(item.node, attend)
            for item in self.schedule.items
            if isinstance(item, AttentionNode)
        }
        self.stages = self._stages(model)
        self._check()
        _forget(graph)

    # ---- binding

    def _stages(self, model: torch.nn.Module) -> list[EagerStage | NativeStage]:
        stages: list[EagerStage | NativeStage] = []
        eager: list[Node] = []
        native: list[Item] = []
        made = {node for item in self.schedule.items if isinstance(item, NativeSegment) for node in item.outputs}
        for node, step in self.attentions.items():
            self._static |= step.operands | {node: step.tensors.attended}
            if not made.issuperset(step.operands):
                raise UnsupportedError("queries, keys or values that native code cannot store")
        for item in (*self.schedule.items, None):
            if isinstance(item, EagerNode):
                if native:
                    stages.append(self._native(native))
                    native = []
                eager.append(item.node)
                continue
            if eager:
                stage = EagerStage(model, eager, self._returned)
                self._given.update(stage.outputs)
                stages.append(stage)
                eager = []
            if item is not None:
                native.append(item)
        if native:
            stages.append(self._native(native))
        return stages

    def _native(self, items: Iterable[Item]) -> NativeStage:
        pairs: list[tuple[BoundSegment | None, AttentionStep]] = []
        segment: BoundSegment | None = None
        for item in items:
            if isinstance(item, NativeSegment):
                segment = self._bound(item)
            elif isinstance(item, AttentionNode):
                pairs.append((segment, self.attentions[item.node]))
                segment = None
        return NativeStage(pairs, segment)

    def _bound(self, item: NativeSegment) -> BoundSegment:
        externals = (ctypes.c_int64 * item.program.externals)()
        given: list[tuple[int, Node, tuple[Any, ...]]] = []
        for index, node in enumerate(item.inputs):
            if "weight" in node.meta:
                externals[index] = node.meta["weight"].address
            elif node in self._static:
                externals[index] = self._static[node].data_ptr()
            elif node in self._fixed:
                externals[index] = self._fixed[node].data_ptr()
            else:
                like = node.meta["val"]
                given.append((index, node, (like.shape, like.dtype)))
        returned: list[tuple[int, Node]] = []
        for stored, node in zip(item.program.stored, item.outputs, strict=True):
            if node in self._returned and node not in self._static:
                returned.append((stored.external, node))
                continue
            if node not in self._static:
                self._static[node] = torch.empty(stored.shape, dtype=stored.dtype)
            externals[stored.external] = self._static[node].data_ptr()
        return BoundSegment(item, SegmentCall(item.program, externals), given, returned)

    def _check(self) -> None:
        """Compare the results of each segment with those of the captured call, on the captured inputs.

        Values that were changed in place after they were captured cannot be compared.
        """
        nodes = [node for node in self.captured.graph.nodes if is_mutation(node)]
        changed = {key for node in nodes for x in changed_operands(node) for key in value_storages(x)}
        for stage in self.stages:
            for segment in stage.segments if isinstance(stage, NativeStage) else ():
                given = segment.item
                if all(changed.isdisjoint(value_storages(x)) for x in (*given.inputs, *given.outputs)):
                    check_segment(given)

    # ---- running

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, length: int) -> tuple[bool, Any]:
        """Run the step; return whether its guards pass, and the result. If they fail, nothing is changed."""
        values: Values = {**self._fixed, **self._static}
        for node, path in self._arguments:
            values[node] = leaf(args, kwargs, path)
        values[self.captured.cache], values[self.captured.length] = cache, length
        threads = torch.get_num_threads()
        if getattr(cache, "warns", False):  # earlier steps may have quantized the first tokens
            cache.tell_unlike_text()
        is_changed = False  # the cache
        for stage in self.stages:
            fits = stage.run(values) if isinstance(stage, EagerStage) else stage.run(values, cache, threads)
            if not fits and is_changed:
                raise RuntimeError("a decode program computed another shape than when it was captured")
            if not fits:
                return False, None
            is_changed |= isinstance(stage, NativeStage) and bool(stage.steps)
        return True, self._result(self.captured.output, values)

    @property
    def native_calls(self) -> int:
        """The number of native calls per step."""
        return sum(isinstance(stage, NativeStage) for stage in self.stages)

    def reasons(self) -> list[str]:
        """Return why operations run eagerly between native calls, each reason once."""
        items = list(self.schedule.items)
        while items and isinstance(items[0], EagerNode):  # the prologue: embedding, angles, masks
            items.pop(0)
        while items and isinstance(items[-1], EagerNode):
            items.pop()
        eager = [item for item in items if isinstance(item, EagerNode)]
        return list(dict.fromkeys(item.reason for item in eager if item.node.target is not operator.getitem))

    def holds(self, length: int) -> bool:
        """Return whether the guards of the model and of the cache length pass."""
        return all(guard.holds(length) for guard in self.captured.guards) and self.guards.hold()

    def _result(self, x: Any, values: Values) -> Any:
        if isinstance(x, Node):
            value = values[x]
            return value.clone() if x in self._static else value
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], type):
            kind, parts = x
            if isinstance(parts, dict):
                return kind(**{name: self._result(part, values) for name, part in parts.items()})
            return kind(self._result(part, values) for part in parts)
        return x


def check_guards(items: Iterable[Item]) -> None:
    """Raise UnsupportedError if a number that guards the program is known only after native code has run."""
    is_native = False
    for item in items:
        is_native |= not isinstance(item, EagerNode)
        if is_native and isinstance(item, EagerNode) and "guard" in item.node.meta:
            raise UnsupportedError("its operations depend on values of tokens")


def _is_fixed(node: Node) -> bool:
    return "weight" in node.meta or "constant" in node.meta


def _forget(graph: Graph) -> None:
    """Drop the captured values, except their shapes; weights and constants stay."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor) and not _is_fixed(node):
            node.meta["val"] = node.meta["val"].to("meta")
