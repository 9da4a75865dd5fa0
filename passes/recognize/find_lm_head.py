"""Detection of the LM head in a graph: its weight, its input, and the operations from product to logits.

    x      = norm(h)                                       HeadSite(
    y      = x @ embedding.weight.T  (+ bias)      ->        "lm_head.weight", V=49152, C=576, bias, scale, softcap,
    logits = softcap * tanh(scale * y / softcap)             hidden=%x, product=%y, logits=%logits)

No spelling is matched: the head is the only projection between the logits and the other projections. Runs on random
float64 values test that it is `x W^T` of one parameter as stored, and that later operations only add a bias, scale by a
positive number and cap. All of these preserve the order of logits, so the largest products are the largest logits.

Letters: V vocabulary, C width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like
from fhopt.passes.graph.nodes import argument, fake, op_name, source_line
from fhopt.passes.graph.program import Program, module_path
from fhopt.passes.recognize.node_roles import LOOKUP, Projection, Roles, view_root

MIN_VOCABULARY = 2
FAR = 1e6  # a logit in the flat part of a softcap
NEAR = 1e-3  # a logit in the linear part of a softcap


@dataclass(frozen=True)
class HeadSite:
    """A language-model head: logits = cap(scale * (x W^T + b)).

    weight: qualified name of the parameter [vocabulary, width]. bias: name of the parameter [vocabulary], "" without
    one; a bias added in a separate call is identified by its value. module: path of the module in whose forward the
    product is computed, "" for the whole model. tied: the weight is also an embedding table. scale: factor of the
    products; softcap: 0 without one. hidden, product, logits: node names.
    """

    weight: str
    bias: str
    module: str
    vocabulary: int
    width: int
    tied: bool
    scale: float
    softcap: float
    hidden: str
    product: str
    logits: str
    source: str


@dataclass(frozen=True)
class FindHead:
    """The analysis pass `find_head`. tolerance: relative, for float64 runs with float32 weights."""

    name: str = "find_head"
    tolerance: float = 1e-5

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the outputs of the graph that are floating-point tensors with at least two axes."""
        output = next(n for n in program.graph.nodes if n.op == "output")
        values = [(n, fake(n)) for n in output.all_input_nodes]
        return [n for n, v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]

    def match(self, node: fx.Node, program: Program, roles: Roles, base: Evaluator) -> HeadSite:
        """Describe the head that computes the logits `node`. Raises Miss."""
        projection = _only_projection(node, roles)
        weight, bias = _parameters(projection, program)
        self._check_product(projection, program.values[weight], base)
        scale, softcap, added = self._after(projection.node, node, base)
        if added is not None:
            bias = _added_bias(projection.node, node, program, added / scale, bias)
        path = program.parameters[weight]
        return HeadSite(
            weight=path,
            bias=program.parameters[bias] if bias else "",
            module=module_path(projection.node),
            vocabulary=int(program.values[weight].shape[0]),
            width=int(program.values[weight].shape[1]),
            tied=_is_tied(program, weight),
            scale=scale,
            softcap=softcap,
            hidden=projection.activation.name,
            product=projection.node.name,
            logits=node.name,
            source=source_line(projection.node),
        )

    def _check_product(self, projection: Projection, weight: Tensor, base: Evaluator) -> None:
        """Check that the product is x W^T (+ bias) of the parameter as stored. Raises Miss."""
        node, hidden = projection.node, projection.activation
        if example_shape(hidden)[-1] != weight.shape[1] or example_shape(node)[-1] != weight.shape[0]:
            raise Miss(
                f"the weight of the head is stored as {tuple(weight.shape)}; expected one row of "
                f"{example_shape(hidden)[-1]} elements for each of {example_shape(node)[-1]} tokens of the vocabulary",
                node,
            )
        region, x = Region(base, [hidden], node), random_like(hidden)
        zero = region.run({hidden: torch.zeros_like(x)})
        expected = torch.nn.functional.linear(x, weight.detach().double())
        if not self._same(region.run({hidden: x}) - zero, expected):
            raise Miss("the head is not a matmul of hidden states and a stored parameter", node)

    def _after(self, product: fx.Node, logits: fx.Node, base: Evaluator) -> tuple[float, float, Tensor | None]:
        """Return (scale, softcap, bias added after the product [V] or None). Raises Miss."""
        if product is logits:
            return 1.0, 0.0, None
        try:
            region = Region(base, [product], logits)
            zeros = torch.zeros_like(random_like(product))
            start = region.run({product: zeros})
        except Exception as error:  # user code may raise anything
            raise Miss(f"the part between head and logits could not be run ({error})", logits) from error
        if start.numel() != zeros.numel() or start.shape[-1] != zeros.shape[-1]:
            shape = tuple(zeros.shape)
            raise Miss(f"the logits have shape {tuple(start.shape)}; expected {shape}, as of the matmul", logits)
        added = start.reshape(-1, start.shape[-1])
        if not bool(added.isfinite().all()) or not self._same(added, added[:1].expand_as(added)):
            raise Miss(
                "the tensor added to the logits differs between positions or is not finite; expected one bias", logits
            )
        x = random_like(product)
        slope = float(((region.run({product: NEAR * x}) - start).flatten() / (NEAR * x).flatten()).median())
        scale, cap = slope, float((region.run({product: torch.full_like(x, FAR)}) - start).flatten()[0])
        if not slope > 0:
            raise Miss(f"the logits are {slope:.3g} times the matmul; expected a positive factor", logits)
        softcap = cap if cap < 0.5 * slope * FAR else 0.0
        for size in (1.0, 30.0):  # in the linear and the flat part of a cap
            result = region.run({product: size * x}) - start
            scaled = scale * size * x.reshape(result.shape)
            if not self._same(result, softcap * torch.tanh(scaled / softcap) if softcap else scaled):
                raise Miss(
                    "the logits are not softcap * tanh(scale * x / softcap) or scale * x, where x is the matmul", logits
                )
        if softcap and bool((added != 0).any()):
            raise Miss("a bias is added to logits with a softcap; expected no bias", logits)
        return _plain(scale), _plain(softcap), added[0] if bool((added != 0).any()) else None

    def _same(self, result: Tensor, expected: Tensor) -> bool:
        return bool((result - expected).abs().max() <= self.tolerance * expected.abs().max().clamp_min(1e-30))


def _only_projection(node: fx.Node, roles: Roles) -> Projection:
    cut = roles.cut(node)
    if not cut.projections:
        raise Miss("no projection leads to the logits; expected a language-model head", node)
    if len(cut.projections) > 1:
        names = ", ".join(cut.names[:4])
        raise Miss(f"logits come from {len(cut.projections)} matmuls ({names}); expected one head", node)
    return cut.projections[0]


def _parameters(projection: Projection, program: Program) -> tuple[str, str]:
    """Return the placeholders of weight and bias ("" without one) of the product. Raises Miss."""
    if len(projection.names) != 1:
        raise Miss(
            f"the weight of the head is computed from {', '.join(projection.names[:4])}; expected one parameter",
            projection.node,
        )
    (name,) = projection.names
    weights = [node for node, known in program.parameters.items() if known == name]
    if not weights or program.values[weights[0]].dim() != 2:
        raise Miss(f"{name} is not a matrix; expected a weight [vocabulary, width]", projection.node)
    vocabulary = example_shape(projection.node)[-1]
    if vocabulary < MIN_VOCABULARY:
        raise Miss(f"the last matmul has {vocabulary} outputs; expected a vocabulary", projection.node)
    place = {"linear": 2, "addmm": 0}.get(op_name(projection.node))
    bias = None if place is None else argument(projection.node, place, "bias")
    root = view_root(bias) if isinstance(bias, fx.Node) else None
    return weights[0], root.name if root is not None and root.name in program.parameters else ""


def _added_bias(product: fx.Node, logits: fx.Node, program: Program, value: Tensor, known: str) -> str:
    """Return the placeholder of the parameter that is added after the product. Raises Miss."""
    for name in program.parameters:
        candidate = program.values[name]
        if candidate.shape == value.shape and torch.allclose(candidate.detach().double(), value, rtol=1e-5, atol=0):
            if known:
                break
            return name
    raise Miss("a tensor other than one parameter is added to the logits; expected one bias", logits)


def _is_tied(program: Program, weight: str) -> bool:
    node = next(n for n in program.graph.nodes if n.name == weight)
    return any(op_name(user) in LOOKUP for user in node.users)


def _plain(number: float) -> float:
    """Round away the float32 error of a measured factor."""
    return float(f"{number:.6g}")


__all__ = ["FindHead", "HeadSite"]
