"""Decomposition of opaque composites into plain torch operations, in the same graph, with the same results.

    before                                              after
    o = multi_head_attention_forward(x, x, x, W, ...)   q, k, v = linear(x, W, b)...; o = linear(sdpa(q, k, v), ...)
    y = _transformer_encoder_layer_fwd(x, ...)          layer_norm, linear, matmul, softmax, matmul, linear, ...
    w = normalize(exp(s), p=1, dim=-1)                  w = e / e.abs().sum(-1, True).clamp_min(1e-12)
    s = baddbmm(m, q, k, beta=b, alpha=c)               s = add(mul(bmm(q, k), c), mul(m, b))
    o = einsum("bhst,bhtd,hde->bse", p, v, W)           o = einsum("bhsd,hde->bse", einsum("bhst,bhtd->bhsd", p, v), W)
    o = getitem(_scaled_dot_product_flash..(q, ..), 0)  o = scaled_dot_product_attention(q, ...)
    y = getitem(tag_activation_checkpoint(f, x), 0)     the nodes of f
    o = getitem(flex_attention(q, k, v, f, ...), 0)     see flex.py

`composites.py` computes each composite in plain torch; tracing it on the node's own fake values gives the inserted
nodes. Symbolic sizes stay symbolic. `match` traces, so that `rewrite` cannot fail. A composite inside an inserted body
becomes a candidate itself; one inside a function transform stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import argument, fake, is_in_place, op_name
from fhopt.passes.graph.program import Program
from fhopt.passes.graph.transforms import scope_of
from fhopt.passes.prepare.composites import COMPOSITES
from fhopt.passes.prepare.flex import body_of, graph_at, remove_makers
from fhopt.passes.prepare.trace import trace_composite, trace_flex

BODIES = {  # higher-order op -> (position of its body, of the body's first argument)
    "tag_activation_checkpoint": (0, 1),
    "wrap_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
}
HINTS = ("softmax", "attention", "attn", "encoder_layer")  # parts of names that indicate attention
PARTS = frozenset({"einsum", "baddbmm", "chain_matmul", "linalg_multi_dot", "normalize"})  # rarely part of attention
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass
class Decomposition:
    """A composite and its decomposition: `body`, a graph with fake values whose placeholders are bound to `inputs`."""

    node: fx.Node
    body: fx.Graph
    inputs: tuple[Any, ...]
    prefix: str = ""  # path of the body's attributes in the program's module


@dataclass(frozen=True)
class Decompose:
    """The pass `decompose`. inline_checkpoints: if False, activation checkpoints save memory and hide attention."""

    name: str = "decompose"
    inline_checkpoints: bool = True

    def candidates(self, program: Program) -> Iterator[fx.Node]:
        """Yield each composite once, then those that a rewrite uncovers."""
        seen: set[fx.Node] = set()
        while new := [n for n in program.graph.nodes if n not in seen and _is_candidate(n, program)]:
            seen.update(new)
            yield from new

    def match(self, node: fx.Node, program: Program) -> Decomposition:
        """Trace the computation of `node`. Raises Miss."""
        name = qualified_name(node)
        if any(isinstance(value, Tensor) and value.is_nested for value in map(fake, node.all_input_nodes)):
            raise Miss(f"{name} takes nested tensors; expected dense ones", node)
        if (scope := scope_of(node)) is not None:
            if name in PARTS:
                raise Miss("", node)
            raise Miss(f"{name} runs inside {scope.name}; expected it outside", node)
        if name in BODIES or _bodies(node, program):
            return self._called_body(node, program, name)
        is_flex = name == "flex_attention"
        body = trace_flex(node, program) if is_flex else trace_composite(COMPOSITES[name], node, program)
        _check_results(node, body)
        return Decomposition(node, body, tuple(node.all_input_nodes))

    def rewrite(self, program: Program, expansion: Decomposition) -> None:
        """Replace the node by the body."""
        node, inputs = expansion.node, expansion.node.all_input_nodes
        with program.graph.inserting_before(node):
            copies, result = _copy(program.graph, expansion)
        for user in list(node.users) if isinstance(result, (tuple, list)) else []:
            user.replace_all_uses_with(result[user.args[1]])
            program.graph.erase_node(user)
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        _erase_unused(program.graph, [*(n for n in inputs if n.op == "get_attr"), *copies])
        remove_makers(program.graph, inputs if qualified_name(node) == "flex_attention" else [])

    def _called_body(self, node: fx.Node, program: Program, name: str) -> Decomposition:
        if "checkpoint" in name and not self.inline_checkpoints:
            raise Miss("attention inside an activation checkpoint is not rewritten while training", node)
        if name not in BODIES:
            raise Miss(f"attention inside {name} is not rewritten", node)
        place, first = BODIES[name]
        graph = body_of(node.args[place], program).graph
        arguments = tuple(node.args[first:])
        expected = sum(n.op == "placeholder" for n in graph.nodes)
        if len(arguments) != expected:
            raise Miss(f"{name} passes {len(arguments)} arguments to its body; expected {expected}", node)
        _check_users(node, graph.output_node().args[0])
        graph = _framed(graph, node) if name.startswith("wrap_with") else graph
        assert isinstance(node.args[place], fx.Node)
        return Decomposition(node, graph, arguments, f"{node.args[place].target}.")  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------- candidates


def qualified_name(node: fx.Node) -> str:
    """Return the bare name of a torch function that a node calls, `package::name` for another package."""
    target: Any = node.target
    if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
        return op_name(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet: Any = getattr(target, "overloadpacket", target)
        package = packet._qualified_op_name.split("::")[0]
    else:
        package = (getattr(target, "__module__", None) or "torch").split(".")[0]
    torch_owned = package in ("torch", "aten", "_operator", "builtins", "math")
    return op_name(node) if torch_owned else f"{package}::{op_name(node)}"


def _is_candidate(node: fx.Node, program: Program) -> bool:
    name = qualified_name(node)
    if name == "einsum":
        return _operand_count(node) > 2
    if name == "normalize":
        return bool(argument(node, 1, "p", default=2.0) == 1)
    if isinstance(node.target, torch._ops.HigherOrderOperator) and name != "flex_attention":
        return any(_hints(n) for body in _bodies(node, program) for graph in _graphs(body) for n in graph.nodes)
    return name in COMPOSITES or name == "flex_attention"


def _operand_count(node: fx.Node) -> int:
    operands = node.args[1:]
    return len(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else len(operands)


def _bodies(node: fx.Node, program: Program) -> list[fx.GraphModule]:
    """Return the graphs that a higher-order op calls; those of flex_attention are not part of the program."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or op_name(node) == "flex_attention":
        return []
    results = (graph_at(n, program) for n in node.all_input_nodes)
    return [body for body in results if body is not None]


def _graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    return (m.graph for m in module.modules() if isinstance(m, fx.GraphModule))


def _hints(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "exp" or any(hint in name for hint in HINTS)


# --------------------------------------------------------------------------------------------------- bodies


def _framed(body: fx.Graph, node: fx.Node) -> fx.Graph:
    """Copy `body` between calls that set and reset the gradient mode or autocast."""
    graph = fx.Graph()
    known = {n: graph.node_copy(n) for n in body.nodes if n.op == "placeholder"}
    if op_name(node) == "wrap_with_autocast":
        before = graph.call_function(_enter_autocast, node.args[:4])
        leave = _exit_autocast
    else:
        before = graph.call_function(torch.is_grad_enabled)
        graph.call_function(torch._C._set_grad_enabled, node.args[:1])
        leave = torch._C._set_grad_enabled
    result = graph.graph_copy(body, known)
    graph.call_function(leave, (before,))
    graph.output(result)
    return graph


# --------------------------------------------------------------------------------------------------- checks


def _check_results(node: fx.Node, body: fx.Graph) -> None:
    """Check that the body computes all used results, in the composite's dtype. Raises Miss."""
    result: Any = body.output_node().args[0]
    expected = fake(node)
    _check_users(node, result)
    pairs = [(result, expected)] if isinstance(result, fx.Node) else zip(result, expected, strict=False)
    for candidate, value in pairs:
        if isinstance(candidate, fx.Node) and isinstance(value, Tensor) and fake(candidate).dtype != value.dtype:
            raise Miss(
                f"the decomposition of {op_name(node)} returns {fake(candidate).dtype}; expected {value.dtype}", node
            )


def _check_users(node: fx.Node, result: Any) -> None:
    """Check that `result` can replace every use of the node. Raises Miss."""
    if isinstance(result, fx.Node):
        return
    for user in node.users:
        if user.target is not operator.getitem:
            raise Miss(f"the results of {op_name(node)} are used as a tuple; expected uses of single results", user)
        index = user.args[1]
        if not (isinstance(index, int) and index < len(result) and isinstance(result[index], fx.Node)):
            raise Miss(f"result {index} of {op_name(node)} is used, which its decomposition does not compute", user)


# --------------------------------------------------------------------------------------------------- insertion


def _copy(graph: fx.Graph, expansion: Decomposition) -> tuple[list[fx.Node], Any]:
    """Copy the body to the insertion point; return (copies, results)."""
    inputs = iter(expansion.inputs)
    known: dict[fx.Node, Any] = {}
    copies = []
    for node in expansion.body.nodes:
        if node.op == "placeholder":
            known[node] = next(inputs)
        elif node.op != "output":
            known[node] = graph.node_copy(node, known.__getitem__)
            copies.append(known[node])
            _describe(known[node], node, expansion)
    return copies, fx.node.map_arg(expansion.body.output_node().args[0], known.__getitem__)


def _describe(copy: fx.Node, original: fx.Node, expansion: Decomposition) -> None:
    """Set the fake value and the source line of a copied node: the body's, or else the composite's."""
    copy.meta = dict(original.meta) if expansion.prefix else {}
    if copy.op == "get_attr":
        copy.target = f"{expansion.prefix}{copy.target}"
    if fake(original) is not None:
        copy.meta["example_value"] = copy.meta["val"] = fake(original)
    for key in KEPT_META:
        if key not in copy.meta and key in expansion.node.meta:
            copy.meta[key] = expansion.node.meta[key]


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node.users and not node.is_impure() and not is_in_place(node):
            graph.erase_node(node)
