"""Descriptions of `fhopt::attention` nodes as `AttentionSite`: projections, rotation, mask, cache.

    q = rope(q_proj(x))   k = rope(k_proj(x))   v = v_proj(x)           AttentionSite(
    o = fhopt.attention(q, k, v, mask)                         ->          "model.layers.0.self_attn", H=9, G=3, D=64,
    y = o_proj(o)                                                          rope half of 64, mask causal, ...)

A cut point is a projection or a cache input (`roles`). The nodes between cut and core are classified by running them
on random float64 values: are they affine? do they depend on the position, and if so, are they a rotation, of which
pairs and by which angles? No spelling of RoPE is matched.

Letters: B batch, H query heads, G kv heads, T keys, D head size, F rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, signature
from fhopt.passes.graph.nodes import fake, op_name, shape, source_line
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.contraction import read_contraction
from fhopt.passes.recognize.masks import mask_kind
from fhopt.passes.recognize.node_roles import (
    ATTENTION,
    CONVOLUTION,
    Cut,
    Kind,
    Projection,
    Roles,
    common_path,
    view_root,
)
from fhopt.plan.site import AttentionSite, Rope

NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "native_layer_norm"})
FORWARD = 24  # search depth from a core to its output projection, in nodes
ROUNDED, ROUNDED_STEPS = 2.0**-7, 7  # 16-bit sines and cosines: relative error; min positions


@dataclass(frozen=True)
class FindAttention:
    """The analysis pass `find_attention`. tolerance: relative, for float64 runs with float32 side inputs."""

    name: str = "find_attention"
    tolerance: float = 1e-5

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the canonical attention nodes."""
        return [n for n in program.graph.nodes if n.target is torch.ops.fhopt.attention.default]

    def match(self, node: fx.Node, program: Program, roles: Roles, base: Evaluator) -> AttentionSite:
        """Describe the site at `node`. Raises Miss without projections, or if it already runs on a latent."""
        query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
        cuts, names = _cuts(node, roles)
        _check_cuts(node, cuts, names)
        q, k, v = (shape(n) for n in (query, key, value))
        assert q is not None and k is not None and v is not None
        latent = _latent_width(cuts, roles)
        if latent:
            full = int(k[1]) * (int(k[3]) + int(v[3]))
            raise Miss(
                f"already latent: keys and values of {full} elements per token are expanded from {latent}; "
                "expected projections of the hidden states",
                node,
            )
        affine, rope = self._classify(key, cuts["k"], roles, base)
        mask, window = _mask_kind(node, roles, base)
        return AttentionSite(
            name=_site_name(names),
            projections=names,
            kind=_kind(cuts),
            heads=int(q[1]),
            kv_heads=int(k[1]),
            key_dim=int(k[3]),
            value_dim=int(v[3]),
            scale=float(node.kwargs["scale"]),  # type: ignore[arg-type]
            rope=rope,
            key_norm=not affine,
            mask=mask,
            softcap=float(node.kwargs.get("softcap", 0.0)),  # type: ignore[arg-type]
            cache=_cache_kind(cuts["k"], roles),
            source=source_line(node),
            window=window,
            sinks=len(node.args) > 4 and node.args[4] is not None,
        )

    def _classify(self, key: fx.Node, cut: Cut, roles: Roles, base: Evaluator) -> tuple[bool, Rope | None]:
        """Return (whether the key is affine in its projection, the rotation between them)."""
        if not cut.projections or cut.caches:
            return True, None  # decode shows no rotation of a single new token; prefill does
        region = Region(base, [p.node for p in cut.projections], key)
        features = tuple(p.features for p in cut.projections)
        structure = (
            "path",
            signature(region, lambda s: _describe_side(s, roles)),
            features,
            region.inputs.index(key) if key in region.inputs else -1,
        )
        if structure not in roles.known:
            roles.known[structure] = self._measured(key, cut, region)
        return roles.known[structure]

    def _measured(self, key: fx.Node, cut: Cut, region: Region) -> tuple[bool, Rope | None]:
        rows = [[_row(p, 2 * i + j) for i, p in enumerate(cut.projections)] for j in range(2)]

        def run(first_share: float, second_share: float) -> Tensor:  # the same row at every token
            values = {
                p.node: (first_share * a + second_share * b).expand(example_shape(p.node))
                for p, a, b in zip(cut.projections, *rows, strict=True)
            }
            try:
                return region.run(values) if region.nodes else values[key]
            except Exception as error:  # user code may raise anything
                raise Miss(f"the part between key projection and attention could not be run ({error})", key) from error

        first, second, zero, both = run(1, 0), run(0, 1), run(0, 0), run(1, 1)
        largest = first.abs().max().clamp_min(1e-30)
        affine = bool((both - first - second + zero).abs().max() <= self.tolerance * largest)
        return affine, rotation(first - zero if affine else first, self.tolerance)


def site_name(node: fx.Node, roles: Roles) -> str:
    """Return the name of the site at an attention node, even if it is not an `AttentionSite`."""
    names = _cuts(node, roles)[1]
    return _site_name(names) if any(names.values()) else node.name


def reader_name(site: AttentionSite, others: Iterable[AttentionSite]) -> str:
    """Return a site's name; if it shares keys and values with one of `others`, the path of its own projections."""
    weights = site.cached_weights
    if weights and any(s.cached_weights == weights and s.projections["q"] != site.projections["q"] for s in others):
        return common_path([*site.projections["q"], *site.projections["o"]]) or site.name
    return site.name


def _describe_side(side: fx.Node, roles: Roles) -> object:
    """Describe a side input between projection and key: a norm weight by shape, an angle by value."""
    return roles.describe(side) if roles.kind(side) == Kind.WEIGHT else roles.number(side)


# --------------------------------------------------------------------------------------------------- roles


def _row(projection: Projection, seed: int) -> Tensor:
    """Draw random features, identical for all tokens, on the projection's device."""
    sizes = example_shape(projection.node)
    generator = torch.Generator().manual_seed(seed + 1)
    kept = [n if i in projection.features else 1 for i, n in enumerate(sizes)]
    return torch.randn(kept, generator=generator, dtype=torch.float64).to(fake(projection.node).device)


def _cuts(node: fx.Node, roles: Roles) -> tuple[dict[str, Cut], dict[str, tuple[str, ...]]]:
    """Return the cut points of queries, keys and values, and the weights of each and of the output projection."""
    query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
    cuts = {"q": roles.cut(query), "k": roles.cut(key), "v": roles.cut(value)}
    names = {role: cut.names for role, cut in cuts.items()} | {"o": _output_projection(node, roles)}
    if roles.kind(query) == Kind.WEIGHT and not names["q"]:
        names["q"] = roles.weight_names(query)  # learned queries
    return cuts, names


def _check_cuts(node: fx.Node, cuts: dict[str, Cut], names: dict[str, tuple[str, ...]]) -> None:
    """Raise Miss without projections: self-similarity of a tensor, pooling, lookups."""
    for role, what in (("q", "queries"), ("k", "keys")):
        if not names[role] and not (role == "k" and cuts["k"].caches):
            source = "which are embeddings" if cuts[role].lookups else "which are an input or a constant"
            raise Miss(f"no projection of the {what}, {source}; expected projected queries and keys", node)
    query, key, value = node.args[:3]
    if query is key and key is value:
        raise Miss("queries, keys and values are one tensor; expected a projection of each", node)


def _site_name(names: dict[str, tuple[str, ...]]) -> str:
    every = [n for role in names.values() for n in role]
    return common_path(every) or common_path(names["q"]) or every[0].rpartition(".")[0] or every[0]


def _latent_width(cuts: dict[str, Cut], roles: Roles) -> int:
    """Return the width of the latent from which keys and values are projected, 0 without one.

    DeepSeek-V2 (section 2.1.2): keys and values come from one narrow projection of the input from which queries are
    also projected, directly or through a narrow projection of their own. The cache stores this narrow projection.
    """
    if not cuts["k"].projections or not cuts["v"].projections:
        return 0
    inner = roles.cut(cuts["v"].projections[0].activation)
    if len(inner.projections) != 1 or inner.lookups:
        return 0
    down = inner.projections[0]
    sources = set()
    for projection in cuts["q"].projections:
        if view_root(projection.activation) is view_root(cuts["v"].projections[0].activation):
            return 0  # queries use the same activation: an ordinary block after a projection
        sources.add(view_root(projection.activation))
        sources |= {view_root(p.activation) for p in roles.cut(projection.activation).projections}
    narrow = sum(example_shape(down.node)[i] for i in down.features)
    if narrow >= _input_width(down):
        return 0  # a layer that only reduces tokens, such as the convolution of spatial-reduction attention
    wide = sum(example_shape(p.node)[i] for p in cuts["v"].projections for i in p.features)
    return narrow if view_root(down.activation) in sources and narrow < wide else 0


def _input_width(projection: Projection) -> int:
    """Return the number of input features per row of a projection."""
    sizes, node = example_shape(projection.activation), projection.node
    if op_name(node) in CONVOLUTION:
        return sizes[1] if len(sizes) == len(example_shape(node)) else sizes[0]
    product = read_contraction(node)
    if product is None:
        return sizes[-1]
    sized = zip(product.left_axes, example_shape(product.left), strict=True)
    return math.prod(n for x, n in sized if x in product.summed)


def _output_projection(node: fx.Node, roles: Roles) -> tuple[str, ...]:
    """Return the weights of the first projection after the attention, before it joins the residual stream."""
    frontier, seen = [node], {node}
    for _ in range(FORWARD):
        if not frontier:
            break
        current = min(frontier)
        frontier.remove(current)
        for user in current.users:
            projection = roles.projection(user)
            if projection is not None and projection.activation in seen:
                return projection.names
            if user not in seen and isinstance(fake(user), Tensor) and _stays_inside(user, seen, roles):
                seen.add(user)
                frontier.append(user)
    return ()


def _stays_inside(node: fx.Node, seen: set[fx.Node], roles: Roles) -> bool:
    name = op_name(node)
    if name in NORMS | ATTENTION:
        return False
    joins = name in {"add", "iadd"} and any(
        roles.kind(n) == Kind.ACTIVATION for n in node.all_input_nodes if n not in seen
    )
    return not joins


def _kind(cuts: dict[str, Cut]) -> str:
    """Return "self" if queries and keys are projected from the same activation, else "cross"."""

    def inputs(cut: Cut) -> set[fx.Node]:
        return {view_root(p.activation) for p in cut.projections}

    cached = not cuts["k"].projections and cuts["k"].appends
    return "self" if inputs(cuts["q"]) & inputs(cuts["k"]) or cached else "cross"


def _cache_kind(cut: Cut, roles: Roles) -> str:
    if not cut.caches:
        return "none"
    return "in-place" if any(n in roles.written for n in cut.caches) else "cat" if cut.appends else "bare"


def _mask_kind(node: fx.Node, roles: Roles, base: Evaluator) -> tuple[str, int]:
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node):
        return ("causal" if node.kwargs.get("is_causal") else "none"), 0
    queries, keys = example_shape(node.args[0])[2], example_shape(node.args[1])[2]  # type: ignore[arg-type]
    which = ("mask", roles.number(mask), queries, keys)
    if which not in roles.known:
        value = base.value(mask)
        roles.known[which] = mask_kind(value.expand(*value.shape[:-2], queries, keys))
    kind, window = roles.known[which]
    return ("causal" if kind == "none" and node.kwargs.get("is_causal") else kind), window


# --------------------------------------------------------------------------------------------------- rotation


def rotation(key: Tensor, tolerance: float) -> Rope | None:
    """Return the rotation of a key [B, G, T, D] with identical rows at all tokens, None without one."""
    rows = key[0, 0]  # [T, D]
    if rows.shape[0] < 2:
        return None
    scale = rows.abs().max().clamp_min(1e-30)
    moves = ((key - key[:, :, :1]).abs().amax((0, 1, 2)) > 1e-9 * scale).nonzero().flatten()
    if not moves.numel():
        return None
    offset, size = int(moves[0]), int(moves[-1]) + 1 - int(moves[0])
    spans = (offset, size), (0, offset + size)  # the slowest frequencies may seem constant
    for pairing, blocks in (("half", 1), ("interleaved", 1), ("half", 2), ("half", 3)):
        for start, length in spans:
            rope = _as_rotation(rows, pairing, blocks, start, length, tolerance * float(scale))
            if rope is not None:
                return rope
    for pairing in ("half", "interleaved"):
        for start, length in spans:
            rope = _as_rounded_rotation(rows, pairing, start, length)
            if rope is not None:
                return rope
    return None


def _as_rounded_rotation(rows: Tensor, pairing: str, offset: int, size: int) -> Rope | None:
    """Return the rotation if the graph rounds sines and cosines to 16 bits, as bfloat16 models do.

    Each angle is measured over one step, two, four and so on up to the last, which divides the rounding error by the
    number of steps, then fitted by least squares over all positions: keys are rotated by it over many thousands.
    """
    last = len(rows) - 1
    if size % 2 or last < ROUNDED_STEPS:
        return None
    guess = Rope(pairing, size, (), offset)
    first, second = torch.tensor(guess.pairs).T
    pairs = torch.complex(rows[:, first], rows[:, second])  # [T, F]
    bound = ROUNDED * pairs[:1].abs()
    if bool(((pairs.abs() - pairs[:1].abs()).abs() > bound).any()):
        return None
    angles, at = torch.zeros(len(first), dtype=torch.float64), torch.arange(last + 1).unsqueeze(1).double()
    for steps in sorted({1 << i for i in range(last.bit_length())} | {last}):
        left = pairs[steps] * pairs[0].conj() * torch.polar(torch.ones(1).double(), -angles * steps)
        angles += torch.angle(left) / steps
    rest = torch.angle(pairs * pairs[:1].conj() * torch.polar(torch.ones(1).double(), -at * angles))
    angles += ((at - at.mean()) * rest).sum(0) / (at - at.mean()).square().sum()
    turns = torch.polar(torch.ones(1).double(), at * angles)
    if bool(((pairs - pairs[:1] * turns).abs() > 3 * bound).any()) or float(angles.abs().max()) * last < 1:
        return None
    return Rope(pairing, size, tuple(float(a) for a in angles), offset)


def _as_rotation(rows: Tensor, pairing: str, blocks: int, offset: int, size: int, bound: float) -> Rope | None:
    if size % (2 * blocks):
        return None
    guess = Rope(pairing, size, (), offset, blocks)
    first, second = torch.tensor(guess.pairs).T
    pairs = torch.complex(rows[:, first], rows[:, second])  # [T, F]
    if bool(((pairs.abs() - pairs.abs()[:1]).abs() > bound).any()):
        return None
    turns = torch.angle(pairs[1:] * pairs[:-1].conj())  # [T - 1, F]
    steady = bool(((pairs[1:] - pairs[:-1] * torch.polar(torch.ones(1).double(), turns[:1])).abs() <= 10 * bound).all())
    turning = turns.abs() > 1e-12
    first_turn = turns[turning.double().argmax(0), torch.arange(turns.shape[1])]
    angles = turns[0] if steady else first_turn
    return Rope(pairing, size, tuple(float(a) for a in angles), offset, blocks, "sequence" if steady else "grid")
