"""Operations that replace elements: by which mask or index, and with which values."""

from __future__ import annotations

from typing import Any

from torch import fx

from fhopt.passes.graph.nodes import argument, is_floating

SELECTION = frozenset({"masked_fill", "where", "index_fill", "written"})
REPLACING_NAMES = "setitem copy fill zero masked_fill index_fill index_copy index_put scatter masked_scatter tril triu"
REPLACING = frozenset(REPLACING_NAMES.split())  # in-place operations that replace elements, whatever their values


def conditions_of(node: fx.Node, name: str) -> list[fx.Node]:
    """Return the tensors that select which elements are replaced."""
    if name == "masked_fill":
        found = [argument(node, 1, "mask")]
    elif name == "where":
        found = [argument(node, 0, "condition")] if node.op == "call_function" else [argument(node, 1, "condition")]
    elif name == "index_fill":
        found = [argument(node, 2, "index")]
    else:
        found = [n for n in node.all_input_nodes if n is not node.args[0] and not is_floating(n)]
    return [n for n in found if isinstance(n, fx.Node)]


def written_operation(node: fx.Node) -> str:
    """Return the operation that a node `written` applies, without its underscore."""
    return str(node.args[2]).rpartition(".")[2].removesuffix("_")


def new_value(node: fx.Node, name: str) -> Any:
    """Return the value that an `index_fill` or `written` puts at an index."""
    if name == "index_fill":
        return argument(node, 3, "value")
    operands: Any = node.args[3]
    options: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("kwargs", {})
    return operands[-1] if operands else options.get("value")


def choices_of(node: fx.Node) -> tuple[Any, Any]:
    """Return the values that a `where` selects if its condition is true, and if it is false."""
    if node.op == "call_method":
        return node.args[0], argument(node, 2, "other")
    return argument(node, 1, "input", "self"), argument(node, 2, "other")
