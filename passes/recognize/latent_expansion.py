"""The expansion of latents to keys or values, as one affine map for all tokens: x = D z + c.

    x = split(up(z)); x = cat(x, r)      ->     x = D cat(z, r) + c      D [G, D, R], c [G, D], computed from weights

The part of the graph between latents and keys (or values) is extracted as a program and run on unit vectors, which
gives D and c. It is checked on other values with random weights instead of the model's, so that the result holds for
any weights. D and c are computed from the weights of each call (`Bound`), never baked into the graph.

Letters: B batch, G kv heads, T tokens, D head size, R latent width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, example_shape, smaller
from fhopt.passes.graph.nodes import SIZED, fake, is_in_place, op_name, size_hint
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.kept_latents import BLANK, ENOUGH, numbers_per_token, token_axes
from fhopt.passes.recognize.node_roles import Kind, Roles

CHOICES = 6  # max combinations of batch and token axes to try


@dataclass(frozen=True)
class LatentAxes:
    """The sizes of a latent, and its batch and token axes."""

    sizes: tuple[int, ...]
    batch: int
    tokens: int

    @property
    def order(self) -> tuple[int, ...]:
        """Axes in the order batch, tokens, channels."""
        rest = (i for i in range(len(self.sizes)) if i not in (self.batch, self.tokens))
        return (self.batch, self.tokens, *rest)

    @property
    def width(self) -> int:
        """Channels per token."""
        return math.prod(self.sizes) // (self.sizes[self.batch] * self.sizes[self.tokens])

    def arranged(self, rows: Tensor) -> Tensor:
        """Return rows [B, T, R] in the layout of the graph."""
        order = self.order
        return rows.reshape([self.sizes[i] for i in order]).permute([order.index(i) for i in range(len(order))])


@dataclass(frozen=True)
class LatentExpansion:
    """Keys or values as a function of latents and weights, extracted from a graph.

    program: its inputs are the latents, then the weights. reduced: sizes to run it with instead of the example's
    (`graph.evaluate.smaller`).
    """

    program: Program
    latents: tuple[LatentAxes, ...]
    reduced: Mapping[int, int]

    @torch.no_grad()
    def run(self, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Expand latents [B, T, R], concatenated along channels, to [B, G, T, D] in float64."""
        parts = rows.split([p.width for p in self.latents], -1)
        values = [*(p.arranged(x) for p, x in zip(self.latents, parts, strict=True)), *weights]
        nodes = list(self.program.graph.nodes)
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in zip(nodes, values, strict=False)}
        with smaller(self.reduced):
            result: Tensor = Evaluator(self.program, inputs, promote=True).value(nodes[-1].args[0])
        return result

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, T, R of its latents, concatenated along channels."""
        first = self.latents[0]
        return first.sizes[first.batch], first.sizes[first.tokens], sum(p.width for p in self.latents)

    def maps(self, weights: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (D [G, D, R], c [G, D]) of x = D z + c in float64, by evaluation on unit vectors and on 0."""
        batch, tokens, width = self.sizes
        slots = batch * tokens
        units = torch.zeros(-(-(width + 1) // slots) * slots, width, dtype=torch.float64, device=device)
        units.fill_diagonal_(1)
        runs = [self.run(some.view(self.sizes), weights) for some in units.split(slots)]  # [B, G, T, D]
        rows = torch.cat([result.transpose(1, 2).flatten(0, 1) for result in runs])  # [slots, G, D]
        offset = rows[width]
        return (rows[:width] - offset).permute(1, 2, 0), offset


@dataclass(frozen=True)
class ExpansionFacts:
    """Facts about an expansion for any weights: axes and sizes of its latents, and the nonzero elements of D."""

    latents: tuple[LatentAxes, ...]
    reduced: Mapping[int, int]
    first: int  # channels that D uses: first <= r < last
    last: int
    products: int  # multiplications per expanded token
    shifted: bool  # c is not 0


@dataclass(frozen=True)
class LatentSide:
    """Keys or values: the nodes of their latents, their expansion, and the weights that determine D and c."""

    nodes: tuple[fx.Node, ...]
    expansion: LatentExpansion
    sources: tuple[str, ...]
    facts: ExpansionFacts

    @property
    def width(self) -> int:
        """R, the number of latent channels that D uses."""
        return self.facts.last - self.facts.first


def read_side(
    operand: fx.Node, latents: tuple[fx.Node, ...], key: fx.Node, program: Program, roles: Roles, tolerance: float
) -> LatentSide:
    """Describe the expansion of latents to keys or values. Raises Miss unless it is one affine map for all tokens."""
    part, nodes, sources = cut_out(operand, latents, program, roles)
    weights = [program.values[name].detach() for name in sources]
    fact = ("expansion", _text(part), tuple(map(example_shape, nodes)), tuple((w.shape, w.dtype) for w in weights))
    if fact not in roles.known:
        roles.known[fact] = _measure(part, nodes, weights, key, tolerance)
    facts: ExpansionFacts | Miss = roles.known[fact]
    if isinstance(facts, Miss):
        raise Miss(facts.reason, operand)
    return LatentSide(nodes, LatentExpansion(part, facts.latents, facts.reduced), sources, facts)


def _measure(
    part: Program, nodes: tuple[fx.Node, ...], weights: list[Tensor], key: fx.Node, tolerance: float
) -> ExpansionFacts | Miss:
    """Return the facts for the fewest tokens and the first choice of axes that succeed, else the last failure."""
    tokens = example_shape(key)[2]
    others = [_random(w.shape, i, w.device) if w.is_floating_point() else w for i, w in enumerate(weights)]
    miss = Miss("the latent has no axes of batch and tokens")
    enough = max(ENOUGH, sum(numbers_per_token(n, key) for n in nodes) + 1)  # all unit vectors in one run
    for reduced in ({tokens: enough}, {}) if tokens > enough else ({},):
        with smaller(reduced):
            sizes = [example_shape(n) for n in nodes]
        choices = ([LatentAxes(s, *axes) for axes in token_axes(n, key)] for n, s in zip(nodes, sizes, strict=True))
        for latents in itertools.islice(itertools.product(*choices), CHOICES):
            try:
                return _check_affine(LatentExpansion(part, latents, reduced), others, fake(key).device, tolerance)
            except Miss as failure:
                miss = failure
            except Exception as error:  # user code may raise anything
                miss = Miss(f"the expansion of the latent could not be run ({type(error).__name__}: {error})")
    return miss


def _check_affine(
    expansion: LatentExpansion, weights: list[Tensor], device: torch.device, tolerance: float
) -> ExpansionFacts:
    """Compare the expansion with D z + c on random latents. Raises Miss if they differ."""
    basis, offset = expansion.maps(weights, device)
    first, second = (_random(expansion.sizes, seed, device) for seed in (1, 2))
    results = [expansion.run(rows, weights) for rows in (first, second, first + second, first * 0)]
    bound = tolerance * float(results[0].abs().max().clamp_min(1e-30))
    if not bool(((results[2] - results[0] - results[1] + results[3]).abs() <= bound).all()):
        raise Miss("keys or values are not affine in the latent")
    expected = torch.einsum("gdr,btr->bgtd", basis, first) + offset[:, None]
    if not bool(((results[0] - expected).abs() <= bound).all()):
        raise Miss("keys or values are not the same function of the latent at every token")
    products = int(basis.ne(0).sum())
    if not all(w.is_floating_point() for w in weights):  # integers were not drawn: others may be 0
        return ExpansionFacts(expansion.latents, expansion.reduced, 0, basis.shape[-1], products, True)
    used = basis.ne(0).any(0).any(0).nonzero().flatten().tolist() or [0]
    return ExpansionFacts(
        expansion.latents, expansion.reduced, used[0], used[-1] + 1, products, bool(offset.ne(0).any())
    )


# ------------------------------------------------------------------------------------------------------- extraction


def cut_out(
    end: fx.Node, latents: tuple[fx.Node, ...], program: Program, roles: Roles
) -> tuple[Program, tuple[fx.Node, ...], tuple[str, ...]]:
    """Return (`end` as a separate program, the latents it uses, the names of the weights it uses).

    Sizes are those of the example. Raises Miss if it uses anything else.
    """
    between = behind(end, latents)
    nodes = tuple(n for n in latents if n in between)
    weights = tuple(n for n in between if n.op == "placeholder" and n not in latents and example_size(n) is None)
    for node in between:
        if node not in latents and (is_in_place(node) or (node in weights and roles.kind(node) == Kind.ACTIVATION)):
            raise Miss(f"keys or values depend on {node.name} besides the latent", node)
        sized = op_name(node) in SIZED or example_size(node) is not None
        if not sized and any(example_size(n) is not None for n in node.all_input_nodes):
            raise Miss(f"{node.name} computes with a size, which may change between calls", node)
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {n: graph.placeholder(f"z{i}") for i, n in enumerate(nodes)}
    mapping |= {n: graph.placeholder(f"w{i}") for i, n in enumerate(weights)}
    for node in between:
        if node not in mapping:
            mapping[node] = _copied(graph, node, mapping)
    graph.output(mapping[end])
    return Program(fx.GraphModule(program.module, graph), {}), nodes, tuple(n.name for n in weights)


def _copied(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> Any:
    known = example_size(node)
    if known is not None:
        return known
    if op_name(node) in BLANK:
        value = fake(node)
        return graph.call_function(torch.zeros, (example_shape(node),), dict(dtype=value.dtype, device=value.device))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: mapping[n])
    return graph.create_node(node.op, node.target, args, kwargs)


def behind(end: fx.Node, latents: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Return `end` and the nodes it is computed from, back to the latents, in graph order."""
    seen, stack = set[fx.Node](), [end]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            is_end = node in latents or example_size(node) is not None or op_name(node) in BLANK
            stack.extend(() if is_end else node.all_input_nodes)
    return sorted(seen)


def example_size(node: fx.Node) -> Any:
    """Return the example value of a size, None for anything else."""
    value = fake(node)
    if isinstance(value, torch.Size):
        return tuple(size_hint(n) if isinstance(n, torch.SymInt) else n for n in value)
    return value.node.hint if isinstance(value, torch.SymInt) else value if isinstance(value, int) else None


def _text(part: Program) -> str:
    return "\n".join(f"{n} {n.op} {n.target} {n.args} {n.kwargs}" for n in part.graph.nodes)


def _random(sizes: Sequence[int], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(list(sizes), generator=generator, dtype=torch.float64).to(device)
