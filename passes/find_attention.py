"""Describe every `fhopt::attention` node as an `AttentionSite`: what projects into it, how it rotates, what it caches.

    q = rope(q_proj(x))   k = rope(k_proj(x))   v = v_proj(x)           AttentionSite(
    o = fhopt.attention(q, k, v, mask)                         ->          "model.layers.0.self_attn", H=9, G=3, D=64,
    y = o_proj(o)                                                          rope half of 64, mask causal, ...)

A cut point is a projection (an activation contracted with a tensor that is a view of a parameter) or a cache input.
What lies between cut and core is classified by running it on random float64 numbers: is it affine? does it depend on
the position, and if so, is it a rotation, of which pairs and by which angles? No spelling of RoPE is matched.

Letters: B batch, H query heads, G kv heads, T keys, D head size, F rotary frequencies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph import (
    VIEWS,
    Evaluator,
    Program,
    example_shape,
    fake,
    is_in_place,
    op_name,
    run_region,
    shape,
    source_line,
)
from fhopt.spec import AttentionSite, Rope

PROJECTION = frozenset(
    {"linear", "addmm", "matmul", "bmm", "einsum", "conv1d", "conv2d", "convolution", "baddbmm", "mm"}
)


@dataclass(frozen=True)
class Cut:
    """Where a path from a core ends: projections (with the parameter of each) and cache inputs."""

    projections: tuple[tuple[fx.Node, str], ...]
    caches: tuple[fx.Node, ...]
    appends: tuple[fx.Node, ...]  # nodes that join a cache with new tokens


@dataclass(frozen=True)
class FindAttention:
    """The pass: it only reads. `tolerance` is relative, for the tests on float64 numbers with float32 side inputs."""

    name: str = "find_attention"
    tolerance: float = 1e-5

    def candidates(self, program: Program) -> list[fx.Node]:
        """The canonical attention nodes."""
        return [n for n in program.graph.nodes if n.target is torch.ops.fhopt.attention.default]

    def match(self, node: fx.Node, program: Program, base: Evaluator) -> AttentionSite:
        """The site at `node`. Raises Miss when no projection leads to it."""
        query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
        cuts = {"q": cut_points(query, program), "k": cut_points(key, program), "v": cut_points(value, program)}
        names = {role: tuple(name for _, name in cut.projections) for role, cut in cuts.items()}
        if not names["q"] or not (names["k"] or cuts["k"].caches):
            raise Miss("no projection leads to the queries or to the keys", node)
        names["o"] = _output_projection(node, program)
        q, k, v = (shape(n) for n in (query, key, value))
        assert q is not None and k is not None and v is not None
        affine, rope = self._classify(key, cuts["k"], base)
        return AttentionSite(
            name=_common_path(n for role in names.values() for n in role) or _module_path(names["q"][0]),
            projections=names,
            kind=_kind(cuts),
            heads=int(q[1]),
            kv_heads=int(k[1]),
            key_dim=int(k[3]),
            value_dim=int(v[3]),
            scale=float(node.kwargs["scale"]),  # type: ignore[arg-type]
            rope=rope,
            key_norm=not affine,
            mask=_mask_kind(node, base),
            softcap=float(node.kwargs.get("softcap", 0.0)),  # type: ignore[arg-type]
            cache=_cache_kind(cuts["k"]),
            source=source_line(node),
        )

    def _classify(self, key: fx.Node, cut: Cut, base: Evaluator) -> tuple[bool, Rope | None]:
        """(affine in the projection?, rotation) of the segment from the key projection to the key."""
        if not cut.projections or cut.caches:
            return True, None  # the new token alone shows no rotation: prefill is where it is seen
        generator = torch.Generator().manual_seed(1)
        shapes = {node: example_shape(node) for node, _ in cut.projections}
        rows = [
            {n: torch.randn(size[-1], generator=generator, dtype=torch.float64) for n, size in shapes.items()}
            for _ in range(2)
        ]

        def run(first_share: float, second_share: float) -> Tensor:  # the same row at every token
            given = {
                n: (first_share * rows[0][n] + second_share * rows[1][n]).to(fake(n).device).expand(size)
                for n, size in shapes.items()
            }
            try:
                return run_region(base, given, key)
            except Exception as error:  # whatever a user's node may raise
                raise Miss(f"the way from the key projection could not be run ({error})", key) from error

        first, second, zero, both = run(1, 0), run(0, 1), run(0, 0), run(1, 1)
        largest = first.abs().max().clamp_min(1e-30)
        affine = bool((both - first - second + zero).abs().max() <= self.tolerance * largest)
        return affine, rotation(first - zero if affine else first, self.tolerance)


# --------------------------------------------------------------------------------------------------- roles


def cut_points(node: fx.Node, program: Program) -> Cut:
    """Walk back from `node` to the nearest projections and cache inputs."""
    projections: dict[fx.Node, str] = {}
    caches: dict[fx.Node, None] = {}
    appends: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        name = projected_by(current, program)
        if name:
            projections[current] = name
            continue
        if current.op == "placeholder":
            if _is_cache(current, program):
                caches[current] = None
                writers = [u for u in current.users if is_in_place(u)]
                appends.update(dict.fromkeys(writers))
                stack.extend(s for w in writers for s in w.all_input_nodes)
            continue
        if op_name(current) == "cat" and any(_is_cache(s, program) for s in current.all_input_nodes):
            appends[current] = None
        stack.extend(current.all_input_nodes)
    return Cut(tuple(sorted(projections.items())), tuple(caches), tuple(appends))


def _is_cache(node: fx.Node, program: Program) -> bool:
    value = fake(node)
    is_state = node.op == "placeholder" and not program.is_parameter(node)
    if not is_state or not isinstance(value, Tensor) or value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    grows = any(is_in_place(user) or op_name(user) == "cat" for user in node.users)
    return grows or (value.dim() == 4 and value.shape[1] > 1)  # a rotation's table has one head


def projected_by(node: fx.Node, program: Program) -> str:
    """Qualified name of the parameter that `node` contracts an activation with, "" if it does not."""
    if op_name(node) not in PROJECTION:
        return ""
    for source in reversed(node.all_input_nodes):
        root = _view_root(source)
        value = fake(source)
        if program.is_parameter(root) and isinstance(value, Tensor) and value.dim() >= 2:
            return program.parameters[root.name]
    return ""


def _view_root(node: fx.Node) -> fx.Node:
    while op_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _output_projection(node: fx.Node, program: Program) -> tuple[str, ...]:
    """The first projection that the result of the attention reaches."""
    current = node
    for _ in range(16):
        for user in current.users:
            name = projected_by(user, program)
            if name:
                return (name,)
        followers = [u for u in current.users if isinstance(fake(u), Tensor)]
        if len(followers) != 1:
            return ()
        current = followers[0]
    return ()


def _common_path(names: Iterable[str]) -> str:
    """Longest common module path: the parameter's own name never belongs to it."""
    paths = [tuple(n.split(".")[:-1]) for n in names]
    if len(set(paths)) == 1:
        return ".".join(paths[0][:-1] or paths[0])  # one fused projection and nothing else: name its parent
    steps = itertools.takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False))
    return ".".join(step[0] for step in steps)


def _module_path(parameter: str) -> str:
    """Path of the module that owns a parameter; the parameter itself where the model does."""
    return parameter.rpartition(".")[0] or parameter


def _kind(cuts: dict[str, Cut]) -> str:
    """ "self" when queries and keys are projected from the same activation."""

    def inputs(cut: Cut) -> set[fx.Node]:
        return {_view_root(source) for node, _ in cut.projections for source in node.all_input_nodes}

    cached = not cuts["k"].projections and cuts["k"].appends
    return "self" if inputs(cuts["q"]) & inputs(cuts["k"]) or cached else "cross"


def _cache_kind(cut: Cut) -> str:
    if not cut.caches:
        return "none"
    return "in-place" if any(is_in_place(n) for n in cut.appends) else "cat" if cut.appends else "bare"


def _mask_kind(node: fx.Node, base: Evaluator) -> str:
    """From the mask's value, not from its spelling: versions of torch and transformers differ in the latter."""
    if node.kwargs.get("is_causal"):
        return "causal"
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node):
        return "none"
    value = base.value(mask)
    allowed = value if value.dtype == torch.bool else value > -1e4
    if value.dtype != torch.bool and bool((value[allowed] != 0).any()):
        return "additive"
    queries, keys = allowed.shape[-2:]
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=allowed.device).tril(keys - queries)
    return "causal" if queries > 1 and bool((allowed == triangle).all()) else "bool"


# --------------------------------------------------------------------------------------------------- rotation


def rotation(key: Tensor, tolerance: float) -> Rope | None:
    """What rotates a key [B, G, T, D] that was made from the same row at every token; None if nothing does."""
    rows = key[0, 0]  # [T, D]
    if rows.shape[0] < 2:
        return None
    scale = rows.abs().max().clamp_min(1e-30)
    moves = (key - key[:, :, :1]).abs().amax((0, 1, 2)) > 1e-9 * scale  # [D]
    size = int(moves.nonzero().max()) + 1 if bool(moves.any()) else 0
    if size == 0 or size % 2:
        return None
    half = torch.arange(size // 2)
    for pairing, first, second in (("half", half, half + size // 2), ("interleaved", 2 * half, 2 * half + 1)):
        pairs = torch.complex(rows[:, first], rows[:, second])  # [T, F]
        length = pairs.abs()
        if bool(((length - length[:1]).abs() <= tolerance * scale).all()):
            angles = torch.angle(pairs[1] * pairs[0].conj())
            return Rope(pairing, size, tuple(float(a) for a in angles))
    return None
