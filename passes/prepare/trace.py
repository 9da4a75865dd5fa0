"""Tracing of composites on fake values into a graph of ATen operations.

    trace_composite(composites.baddbmm, node, program)  -> graph(input, batch1, batch2): bmm, mul, add
    trace_flex(node, program)                           -> graph(q, k, v, ...): matmul, mul, softmax, matmul

The placeholders of a graph are `node.all_input_nodes`, in that order, and every node has its fake value. Tracing
happens above autograd, autocast and torch's decompositions: dropout, `linear` and SDPA stay single nodes, and
gradients flow. A symbolic size becomes a node that queries its tensor's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import VIEWS, fake, fake_mode, is_in_place, on_fakes, op_name, size_hint
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.composites import Composite
from fhopt.passes.prepare.flex import body_of, plain_flex


def trace_composite(composite: Composite, node: fx.Node, program: Program) -> fx.Graph:
    """Trace `composite` on the fake values of the node's arguments. Raises Miss."""
    nodes = node.all_input_nodes
    args, kwargs = _bound_by_name(node)

    def run(*values: Any) -> Any:
        known = dict(zip(nodes, values, strict=True))
        return composite(*fx.node.map_arg(args, known.__getitem__), **fx.node.map_arg(kwargs, known.__getitem__))

    with _on_fakes(node, program):
        graph = make_fx(run, pre_dispatch=True)(*map(fake, nodes)).graph
        _make_out_of_place(graph)
        _restore_layout(graph, node)
    if any(n.op == "get_attr" for n in graph.nodes):
        raise Miss(f"{op_name(node)} creates a constant tensor; expected operations on its inputs", node)
    return graph


def trace_flex(node: fx.Node, program: Program) -> fx.Graph:
    """Trace the plain form of a flex_attention node, with fake values. Raises Miss."""
    with _explained(node):
        graph = plain_flex(node, program)
    with _on_fakes(node, program):
        values = [body_of(n, program) if n.op == "get_attr" else fake(n) for n in node.all_input_nodes]
        _Annotate(torch.nn.Module(), graph=graph).run(*values)
        _restore_layout(graph, node)
    return graph


class _Annotate(fx.Interpreter):
    """An interpreter that stores each value on its node."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


@contextlib.contextmanager
def _on_fakes(node: fx.Node, program: Program) -> Iterator[None]:
    """Run operations within on the program's fake values; exceptions become a Miss."""
    mode = fake_mode(program)
    if mode is None:
        raise Miss(f"the graph around {op_name(node)} has no fake values; expected a traced graph", node)
    with contextlib.ExitStack() as stack:
        contexts = (_explained(node), torch._guards.tracing(None), on_fakes(mode), *_autocasts(node))
        for context in contexts:
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _explained(node: fx.Node) -> Iterator[None]:
    """Convert any exception raised within into a Miss."""
    try:
        yield
    except Miss as miss:
        raise Miss(f"{op_name(node)}: {miss.reason}", node) from miss
    except Exception as error:  # the composite's own code may raise anything
        first = (str(error).splitlines() or [""])[0]
        raise Miss(f"{op_name(node)} could not be traced ({type(error).__name__}: {first})", node) from error


def _autocasts(node: fx.Node) -> list[Any]:
    """Return the autocast contexts that enclose the node."""
    regions: list[Any] = []
    for before in node.graph.nodes:
        if before is node:
            break
        if before.target is _enter_autocast:
            regions.append(torch.autocast(*before.args, **before.kwargs))
        elif before.target is _exit_autocast:
            regions.pop()
    return regions


def _bound_by_name(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a node; for a registered operator by name, since their order depends on its version."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        return node.args, dict(node.kwargs)
    names = [argument.name for argument in target._schema.arguments]
    named: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return (named.pop("self"),) if "self" in named else (), named


# --------------------------------------------------------------------------------------------------- postprocessing


def _make_out_of_place(graph: fx.Graph) -> None:
    """Replace in-place writes to new tensors without other users: `zeros(n).masked_fill_(m)` -> `masked_fill`."""
    for node in graph.nodes:
        if not is_in_place(node) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        written, name = node.all_input_nodes[0], node.target._schema.name.split("::")[1]
        is_new = written.op != "placeholder" and op_name(written) not in VIEWS and len(written.users) == 1
        if is_new and name.endswith("_"):
            node.target = getattr(getattr(torch.ops.aten, name[:-1]), node.target._overloadname)


def _restore_layout(graph: fx.Graph, node: fx.Node) -> None:
    """Give each result the stride order of the composite's result, on which a later `view` may rely."""
    output, known = graph.output_node(), fake(node)
    results, expected = (r if isinstance(r, (tuple, list)) else (r,) for r in (output.args[0], known))
    with graph.inserting_before(output):
        restored = [_in_order_of(r, e) if isinstance(e, Tensor) else r for r, e in zip(results, expected, strict=False)]
    output.args = (restored[0] if isinstance(output.args[0], fx.Node) else tuple(restored),)


def _in_order_of(result: Any, expected: Tensor) -> Any:
    value = fake(result) if isinstance(result, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != expected.dim() or _order(value) == _order(expected):
        return result
    order = _order(expected, whole=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    for target, *args in (("permute", order), ("contiguous",), ("permute", back)):
        result = result.graph.call_method(target, (result, *args))
        value = result.meta["val"] = getattr(value, target)(*args)
    return result


def _order(value: Tensor, whole: bool = False) -> list[int]:
    """Return the axes from the largest stride to the smallest; axes of size 1 only with `whole`."""
    sizes, strides = ([size_hint(n) for n in numbers] for numbers in (value.shape, value.stride()))
    axes = [axis for axis in range(value.dim()) if whole or sizes[axis] != 1]
    return sorted(axes, key=lambda axis: -strides[axis])
