"""Queries that are a parameter, as in attention pooling and Perceiver's latents.

    s = self.queries @ k_proj(x).mT * c         the product looks like a projection of the keys by a weight
    o = softmax(s, -1) @ v                      but its softmax runs over tokens, not over features

A router's softmax runs over features of the weight, one for each expert: that is a real projection.
"""

from __future__ import annotations

from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.graph.nodes import fake
from fhopt.passes.recognize.axes import key_label
from fhopt.passes.recognize.contraction import Contraction, read_contraction
from fhopt.passes.recognize.node_roles import Kind, Projection, Roles
from fhopt.passes.recognize.softmax import Softmax


def learned_product(apparent: Projection, softmax: Softmax, roles: Roles, base: Evaluator) -> Contraction | None:
    """Return an apparent projection as the product of learned queries with projected keys.

    None if the softmax runs over features of the weight, or the keys are not a projection of tokens.
    """
    product = read_contraction(apparent.node)
    if product is None or not _are_projected(apparent.activation, roles):
        return None
    product = product if roles.kind(product.left) == Kind.WEIGHT else product.swapped()
    try:
        return product if key_label(softmax, product, base) in product.right_axes else None
    except Miss:
        return None


def _are_projected(keys: fx.Node, roles: Roles) -> bool:
    """Return whether the keys come from exactly one projection; position inputs are allowed."""
    found: set[fx.Node] = set()
    seen, stack = {keys}, [keys]
    while stack:
        node = stack.pop()
        if roles.projection(node) is not None:
            found.add(node)
            continue
        if not node.all_input_nodes and isinstance(fake(node), Tensor) and fake(node).is_floating_point():
            return False
        sources = [n for n in node.all_input_nodes if n not in seen and roles.kind(n) == Kind.ACTIVATION]
        seen.update(sources)
        stack.extend(sources)
    return len(found) == 1
