"""Gradient checkpointing of large graphs: only one segment's activations exist at a time.

    forward     [seg 0] h1 [seg 1] h2 [seg 2]      without gradients; h1, h2 are stored
    backward    seg 2 again, from h2, with gradients -> d h2;   seg 1 again, from h1 -> d h1;   seg 0

The graph is cut once between two attention sites, where the fewest live tensors depend on attention: in a transformer,
only the residual stream. This costs one more forward pass and saves the activations of all segments but one.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.nodes import VIEWS, fake, is_in_place, op_name

Environment = dict[fx.Node, Any]
RunNode = Callable[[fx.Node, Environment], Any]
leaves = torch.utils._pytree.tree_leaves


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that are differentiated at once.

    inputs: nodes of earlier segments that it uses. variables: those inputs that depend on attention. outputs: its own
    nodes that later segments use, or the graph's result.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    variables: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]


def activation_bytes(graph: fx.Graph, sites: Collection[str]) -> int:
    """Return the bytes of all tensors but views that depend on attention at `sites` (node names): an upper bound."""
    counted = [node for node in _dependent(graph, sites) if op_name(node) not in VIEWS]
    tensors = [t for node in counted for t in leaves(fake(node)) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())


def split_graph(graph: fx.Graph, sites: Collection[str], result: fx.Node) -> list[Segment]:
    """Cut the graph up to `result` between the attention nodes named in `sites`; one segment if it cannot be cut.

    A graph that modifies tensors in place is not cut, since recomputation would modify them twice.
    """
    nodes = [n for n in graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]
    places = [i for i, node in enumerate(nodes) if node.name in sites]
    if any(map(changes_inputs, nodes)) or result not in nodes:
        places = []
    last, dependent = _last_uses(nodes, result), _dependent(graph, sites)
    bounds = [0, *(_best_cut(nodes, last, dependent, *gap) for gap in itertools.pairwise(places)), len(nodes)]
    computed = set(nodes)
    return [_segment(nodes[start:stop], computed, dependent, result) for start, stop in itertools.pairwise(bounds)]


def _dependent(graph: fx.Graph, sites: Collection[str]) -> set[fx.Node]:
    """Return attention nodes at the sites and all nodes that depend on them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "output" and (node.name in sites or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def changes_inputs(node: fx.Node) -> bool:
    """Return whether running a node writes to one of its inputs."""
    return is_in_place(node) or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def _last_uses(nodes: Sequence[fx.Node], result: fx.Node) -> dict[fx.Node, int]:
    """Return the position of each node's last use; that of the result is past the end."""
    last = {source: place for place, node in enumerate(nodes) for source in node.all_input_nodes}
    return last | {result: len(nodes)}


def _best_cut(
    nodes: Sequence[fx.Node], last: Mapping[fx.Node, int], dependent: set[fx.Node], start: int, stop: int
) -> int:
    """Return the first position between two sites where the fewest live tensors depend on attention."""
    alive = dict.fromkeys(range(start + 1, stop + 1), 0)
    for made, node in enumerate(nodes[:stop]):
        if node in dependent:
            for place in range(max(made, start) + 1, min(last.get(node, -1), stop) + 1):
                alive[place] += 1
    return min(alive, key=lambda place: (alive[place], place))


def _segment(nodes: Sequence[fx.Node], computed: set[fx.Node], dependent: set[fx.Node], result: fx.Node) -> Segment:
    own = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n in computed - own)
    outputs = [n for n in nodes if n is result or any(u not in own and u in computed for u in n.users)]
    return Segment(tuple(nodes), tuple(inputs), frozenset(dependent & inputs.keys()), tuple(outputs))


# --------------------------------------------------------------------------------------------------- running


def backward(
    segments: Sequence[Segment], constants: Environment, run_node: RunNode, result: fx.Node,
    likelihood: Callable[[Tensor], Tensor], leaf: Tensor,
) -> None:  # fmt: skip
    """Run backward from `likelihood` of the result to `leaf`, which every attention adds, segment by segment.

    Only the side effects in the backward passes of attention matter. constants: values of placeholders and attributes.
    run_node: runs a node on an environment that has its inputs.
    """
    held: list[Environment] = [{}]
    with torch.no_grad():
        alive: Environment = {}
        for segment, following in itertools.pairwise(segments):
            values = _run(segment, constants | held[-1], run_node)
            alive |= {node: values[node] for node in segment.outputs}
            held.append({node: alive[node] for node in following.inputs})
    gradients: dict[tuple[fx.Node, int], Tensor] = {}
    with torch.enable_grad():
        for segment in reversed(segments):
            _run_back(segment, constants, held.pop(), run_node, result, likelihood, leaf, gradients)


def _run(segment: Segment, values: Environment, run_node: RunNode) -> Environment:
    """Run a segment's nodes and return the values of its outputs; free others after their last use."""
    last = _last_uses(segment.nodes, segment.nodes[-1])
    ends: dict[int, list[fx.Node]] = {}
    for node in segment.nodes:
        ends.setdefault(last.get(node, -1), []).append(node)
    kept = set(segment.outputs)
    for place, node in enumerate(segment.nodes):
        values[node] = run_node(node, values)
        for past in ends.get(place, ()):
            if past not in kept:
                del values[past]
    return {node: values[node] for node in segment.outputs}


def _run_back(
    segment: Segment, constants: Environment, held: Environment, run_node: RunNode, result: fx.Node,
    likelihood: Callable[[Tensor], Tensor], leaf: Tensor, gradients: dict[tuple[fx.Node, int], Tensor],
) -> None:  # fmt: skip
    """Recompute a segment and add the gradients of its inputs to `gradients`, by (node, leaf index of its value)."""
    own = {node: torch.utils._pytree.tree_map(_variable, held[node]) for node in segment.variables}
    outputs = _run(segment, constants | held | own, run_node)
    ends, given = [], []
    for node, value in outputs.items():
        if node is result:
            ends.append(likelihood(value))
            given.append(torch.ones_like(ends[-1]))
        for i, tensor in enumerate(leaves(value)):
            gradient = gradients.pop((node, i), None)
            if gradient is not None and tensor.requires_grad:
                ends.append(tensor)
                given.append(gradient)
    outputs.clear()
    variables = {
        (node, i): tensor
        for node, value in own.items()
        for i, tensor in enumerate(leaves(value))
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }
    if not any(end.requires_grad for end in ends):
        return
    found = torch.autograd.grad(ends, [leaf, *variables.values()], given, allow_unused=True)[1:]
    for key, gradient in zip(variables, found, strict=True):
        if gradient is not None:
            gradients[key] = gradients[key] + gradient if key in gradients else gradient


def _variable(value: Any) -> Any:
    """Detach a floating-point tensor so that it gets its own gradient; return any other value unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value
