"""Function transforms traced into a graph: which nodes run inside `torch.func.grad`, `jvp` or `vmap`.

    _grad_increment_nesting()
    x_1 = _wrap_for_grad(x, 1)
    ...                                   runs on wrapped tensors, with state that no argument names
    g = _autograd_grad(y, [x_1])
    _grad_decrement_nesting()

The enclosing calls change functorch's global state and have no users: the nodes between them run as a whole or not at
all, and must not be rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch

VMAP = "torch.vmap"
_TRANSFORMS = {
    "_vmap": VMAP,
    "_grad": "torch.func.grad, vjp or jacrev",
    "_jvp": "torch.func.jvp or jacfwd",
    "_func": "torch.func.functionalize",
}  # by the prefix of their functorch functions
_DUAL = "torch.autograd.forward_ad"


@dataclass(frozen=True)
class Scope:
    """The nodes of one transform from its beginning to its end, including nested transforms.

    transforms: names of the outer transform and the nested ones.
    """

    nodes: frozenset[fx.Node]
    transforms: frozenset[str]

    @property
    def only_maps(self) -> bool:
        """Whether nothing inside takes gradients or tangents."""
        return self.transforms == {VMAP}

    @property
    def name(self) -> str:
        """Names of the transforms, for messages."""
        return " and ".join(sorted(self.transforms))


def _found(name: str) -> list[Any]:
    homes = (torch._C._functorch, predispatch)
    return [getattr(home, name) for home in homes if hasattr(home, name)]


_OPENS: dict[Any, str] = {
    **{f: name for kind, name in _TRANSFORMS.items() for f in _found(f"{kind}_increment_nesting")},
    **dict.fromkeys(_found("_enter_dual_level"), _DUAL),
}
_CLOSES = frozenset(
    f for name in (*(f"{kind}_decrement_nesting" for kind in _TRANSFORMS), "_exit_dual_level") for f in _found(name)
)


def transform_scopes(graph: fx.Graph) -> list[Scope]:
    """Return the scope of each outermost function transform, in graph order."""
    opens = [n for target in _OPENS for n in graph.find_nodes(op="call_function", target=target, sort=False)]
    scopes: list[Scope] = []
    for node in sorted(opens):
        if scopes and node in scopes[-1].nodes:
            continue
        scopes.append(_scope_from(node))
    return scopes


def _scope_from(node: fx.Node) -> Scope:
    nodes, names, depth = {node}, {_OPENS[node.target]}, 1
    while depth and node.next.op != "output":
        node = node.next
        nodes.add(node)
        if node.op == "call_function" and node.target in _OPENS:
            names.add(_OPENS[node.target])
            depth += 1
        elif node.op == "call_function" and node.target in _CLOSES:
            depth -= 1
    return Scope(frozenset(nodes), frozenset(names - {_DUAL} or names))


def scope_of(node: fx.Node) -> Scope | None:
    """Return the scope that contains a node, None outside of all transforms."""
    return next((scope for scope in transform_scopes(node.graph) if node in scope.nodes), None)


def transformed_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return all nodes inside transform scopes."""
    return frozenset[fx.Node]().union(*(scope.nodes for scope in transform_scopes(graph)))
