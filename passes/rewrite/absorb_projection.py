"""Attend to the latents that a model already keeps: the projections behind them move onto queries and outputs.

before (DeepSeek-V2 decodes one token)                    after
z = cat(cache, norm(down(x)))       [B, 1, T, R]          q~ = absorb(q, D_K)                          [B, H, S, R + P]
r = cat(cache, rope(x))             [B, 1, T, P]          o~, lse = latent_attention(q~, cat(z, r), z, mask)
k, v = split(up(z)); k = cat(k, r)  [B, G, T, D or E]     o = expand(o~, D_V)
o = fhopt.attention(q, k, v, mask)

The latents are the narrowest tensors that keys and values follow from by affine steps, with one row a token: a minimum
cut of the graph behind them, nearest to the attention where several are as narrow. No spelling of a step is matched:
each is run on random float64 numbers, and is on the way if it is affine. What the steps do together is read off by
running them on unit vectors. It is checked on other numbers, with random weights in place of the model's: what holds
then holds for any weights. D_K and D_V are made of the weights at call time (`Bound`), never baked in.

Offsets: k = D_K z + c_K and v = D_V z + c_V. A q . c_K is the same for all tokens and leaves the softmax as it is; c_V
is added to the result.

Exact (DeepSeek-V2, section 2.1.2: weight absorption), and done where it takes fewer multiplications: for one query, or
a few, on many tokens. Prefill reads expanded keys as often as it has tokens, and stays as it is.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D and E head sizes of keys and values, R latent width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import algebra, masks
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, signature, smaller
from fhopt.passes.graph.nodes import (
    SIZED,
    add_constant,
    call,
    call_method,
    fake,
    is_in_place,
    op_name,
    remove_dead_code,
    shape,
    size_hint,
)
from fhopt.passes.graph.program import Bound, Program
from fhopt.passes.recognize.node_roles import Kind, Roles, view_root

BLANK = frozenset({"new_empty", "empty_like", "new_zeros", "zeros_like", "empty"})  # hold nothing yet: 0 is as good
REACH = 200  # nodes looked at on the way back from keys and values
ENOUGH = 40  # tokens that steps are run on, where fewer than the example's do
PLACES = 6  # readings of a latent's axes that are tried


@dataclass(frozen=True)
class Placed:
    """A latent among the inputs of an expansion: its sizes, and which axes are batch and tokens."""

    sizes: tuple[int, ...]
    batch: int
    tokens: int

    @property
    def order(self) -> tuple[int, ...]:
        """Axes as batch, tokens, channels."""
        rest = (i for i in range(len(self.sizes)) if i not in (self.batch, self.tokens))
        return (self.batch, self.tokens, *rest)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return math.prod(self.sizes) // (self.sizes[self.batch] * self.sizes[self.tokens])

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows [B, T, R] as the graph has them."""
        order = self.order
        return rows.reshape([self.sizes[i] for i in order]).permute([order.index(i) for i in range(len(order))])


@dataclass(frozen=True)
class Expansion:
    """Keys or values as a function of latents and weights, cut out of a graph: the inputs of `program` in this order.

    few: sizes to run it with in place of those of the example (`graph.smaller`).
    """

    program: Program
    latents: tuple[Placed, ...]
    few: Mapping[int, int]

    @torch.no_grad()
    def run(self, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Latents [B, T, R], side by side -> [B, G, T, D], in float64."""
        parts = rows.split([p.width for p in self.latents], -1)
        values = [*(p.arranged(x) for p, x in zip(self.latents, parts, strict=True)), *weights]
        nodes = list(self.program.graph.nodes)
        given = {n: v.double() if v.is_floating_point() else v for n, v in zip(nodes, values, strict=False)}
        with smaller(self.few):
            result: Tensor = Evaluator(self.program, given, promote=True).value(nodes[-1].args[0])
        return result

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, T, R of the latents that it is run on, side by side."""
        first = self.latents[0]
        return first.sizes[first.batch], first.sizes[first.tokens], sum(p.width for p in self.latents)

    def maps(self, weights: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """(D [G, D, R], c [G, D]) of x = D z + c, in float64: each token has another unit vector, the last has 0."""
        batch, tokens, width = self.sizes
        slots = batch * tokens
        units = torch.zeros(-(-(width + 1) // slots) * slots, width, dtype=torch.float64, device=device)
        units.fill_diagonal_(1)
        runs = [self.run(some.view(self.sizes), weights) for some in units.split(slots)]  # [B, G, T, D]
        rows = torch.cat([result.transpose(1, 2).flatten(0, 1) for result in runs])  # [slots, G, D]
        offset = rows[width]
        return (rows[:width] - offset).permute(1, 2, 0), offset


@dataclass(frozen=True)
class Measured:
    """What is true of an expansion for any weights: places of its latents, sizes, and of D the channels and numbers."""

    latents: tuple[Placed, ...]
    few: Mapping[int, int]
    first: int  # channels that D reads: first <= r < last
    last: int
    products: int  # multiplications that expand a token
    shifted: bool  # c is not 0


@dataclass(frozen=True)
class Side:
    """Keys or values: the nodes of their latents, the way from them, the inputs that D and c are made of."""

    nodes: tuple[fx.Node, ...]
    expansion: Expansion
    sources: tuple[str, ...]
    facts: Measured

    @property
    def width(self) -> int:
        """R: channels of the latent that D reads."""
        return self.facts.last - self.facts.first


@dataclass(frozen=True)
class Latents:
    """An attention whose keys and values follow from latents."""

    node: fx.Node
    key: Side
    value: Side


@dataclass(frozen=True)
class AbsorbProjection:
    """The pass, for inference. `margin`: how many times cheaper it must be where the number of queries is not fixed."""

    name: str = "absorb_projection"
    tolerance: float = 1e-9
    margin: float = 4.0

    def candidates(self, program: Program) -> list[fx.Node]:
        """The canonical attention nodes."""
        return [n for n in program.graph.nodes if n.target is torch.ops.fhopt.attention.default]

    def match(self, node: fx.Node, program: Program, roles: Roles, base: Evaluator) -> Latents:
        """What keys and values of `node` follow from. Raises Miss where that is nothing narrower, or does not pay."""
        _check_options(node)
        _check_lengths(node)
        key, value = _operands(node)[1:]
        cut = _narrowest(key, value, roles, base)
        _check_alone(node, cut, roles)
        latents = Latents(node, *(self._side(x, cut, key, program, roles) for x in (key, value)))
        if latents.key.facts.shifted and node.kwargs.get("softcap"):
            raise Miss("keys have an offset, which a softcap does not let out of the softmax", node)
        self._check_cost(latents)
        return latents

    def rewrite(self, program: Program, found: Latents) -> fx.Node:
        """Attend to the latents; returns the latent_attention node."""
        node, query = found.node, _operands(found.node)[0]
        mask = node.args[3] if len(node.args) > 3 else None
        with program.graph.inserting_before(node):
            key, value = _both_sides(program, found, fake(query).dtype)
            if node.kwargs.get("is_causal"):
                mask = call(program, masks.total_mask, (query, key, mask, True))
            decode_k = _constant(program, node, found.key, "key_decode", 0)
            absorbed = call(program, algebra.absorb, (query, decode_k))
            shared = dict(scale=node.kwargs["scale"], softcap=node.kwargs.get("softcap", 0.0))
            options = {**algebra.uncoded_options(), **shared}
            arguments = (absorbed, key, None, value, None, mask)
            latent = call(program, torch.ops.fhopt.latent_attention.default, arguments, options)
            decode_v = _constant(program, node, found.value, "value_decode", 0)
            output = call(program, algebra.expand, (call(program, algebra.first, (latent,)), decode_v))
            if found.value.facts.shifted:
                offset = _constant(program, node, found.value, "value_offset", 1)
                output = call(program, shifted, (output, call(program, algebra.second, (latent,)), offset))
        node.replace_all_uses_with(output)
        program.graph.erase_node(node)
        remove_dead_code(program)
        return latent

    def _side(self, operand: fx.Node, cut: tuple[fx.Node, ...], key: fx.Node, program: Program, roles: Roles) -> Side:
        """Keys or values from the nodes of the cut. Raises Miss when this is not one affine map for all tokens."""
        part, nodes, sources = _cut_out(operand, cut, program, roles)
        weights = [program.values[name].detach() for name in sources]
        what = ("expansion", _text(part), tuple(map(example_shape, nodes)), tuple((w.shape, w.dtype) for w in weights))
        if what not in roles.known:
            roles.known[what] = self._measured(part, nodes, weights, key)
        facts: Measured | Miss = roles.known[what]
        if isinstance(facts, Miss):
            raise Miss(facts.reason, operand)
        return Side(nodes, Expansion(part, facts.latents, facts.few), sources, facts)

    def _measured(
        self, part: Program, nodes: tuple[fx.Node, ...], weights: list[Tensor], key: fx.Node
    ) -> Measured | Miss:
        """The facts, with the fewest tokens and the first reading of the axes that hold; else why the last does not."""
        tokens = example_shape(key)[2]
        others = [_random(w.shape, i, w.device) if w.is_floating_point() else w for i, w in enumerate(weights)]
        miss = Miss("no axes of the latent are batch and tokens")
        enough = max(ENOUGH, sum(_width(n, key) for n in nodes) + 1)  # all unit vectors in one run
        for few in ({tokens: enough}, {}) if tokens > enough else ({},):
            with smaller(few):
                sizes = [example_shape(n) for n in nodes]
            choices = ([Placed(s, *axes) for axes in _axes(n, key)] for n, s in zip(nodes, sizes, strict=True))
            for latents in itertools.islice(itertools.product(*choices), PLACES):
                try:
                    return self._facts(Expansion(part, latents, few), others, fake(key).device)
                except Miss as found:
                    miss = found
                except Exception as error:  # whatever a user's node may raise
                    miss = Miss(f"the way from the latent could not be run ({type(error).__name__}: {error})")
        return miss

    def _facts(self, expansion: Expansion, weights: list[Tensor], device: torch.device) -> Measured:
        """Compare with D z + c on random latents. Raises Miss when they differ."""
        basis, offset = expansion.maps(weights, device)
        first, second = (_random(expansion.sizes, seed, device) for seed in (1, 2))
        results = [expansion.run(rows, weights) for rows in (first, second, first + second, first * 0)]
        bound = self.tolerance * float(results[0].abs().max().clamp_min(1e-30))
        if not bool(((results[2] - results[0] - results[1] + results[3]).abs() <= bound).all()):
            raise Miss("keys or values are not affine in the latent")
        expected = torch.einsum("gdr,btr->bgtd", basis, first) + offset[:, None]
        if not bool(((results[0] - expected).abs() <= bound).all()):
            raise Miss("keys or values are not the same function of the latent at every token")
        products = int(basis.ne(0).sum())
        if not all(w.is_floating_point() for w in weights):  # whole numbers were not drawn: others may be 0
            return Measured(expansion.latents, expansion.few, 0, basis.shape[-1], products, True)
        used = basis.ne(0).any(0).any(0).nonzero().flatten().tolist() or [0]
        return Measured(expansion.latents, expansion.few, used[0], used[-1] + 1, products, bool(offset.ne(0).any()))

    def _check_cost(self, found: Latents) -> None:
        """Raise Miss where attention on latents takes more multiplications than expanding them does."""
        query, key, value = _operands(found.node)
        _, heads, queries, size_k = example_shape(query)
        size_v, tokens = example_shape(value)[3], example_shape(key)[2]
        width_k, width_v = found.key.width, found.value.width
        products = found.key.facts.products + found.value.facts.products
        expanded = tokens * products + queries * tokens * heads * (size_k + size_v)
        absorbed = queries * heads * (size_k * width_k + size_v * width_v + tokens * (width_k + width_v))
        is_fixed = isinstance(shape(query)[2], int)  # type: ignore[index]
        margin = 1.0 if is_fixed else self.margin
        if absorbed * margin >= expanded:
            counts = f"{absorbed} multiplications on latents, {expanded} on what they expand to"
            wanted = "fewer" if is_fixed else f"{margin:g} times fewer, as the number of queries is not fixed"
            raise Miss(f"does not pay: {counts} ({queries} queries, {tokens} tokens); expected {wanted}", found.node)


def shifted(output: Tensor, lse: Tensor, offset: Tensor) -> Tensor:
    """O [B, H, S, E] + c [G, E], but where a query attends to nothing (lse [B, H, S] is -inf)."""
    each = offset.to(output.dtype).repeat_interleave(output.shape[1] // offset.shape[0], 0).unsqueeze(1)  # [H, 1, E]
    return output + each.where(lse.unsqueeze(-1) > -math.inf, 0.0)


# ------------------------------------------------------------------------------------------------- finding the latents


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
    return query, key, value


def _check_options(node: fx.Node) -> None:
    if len(node.args) > 4 and node.args[4] is not None:
        raise Miss("attention sinks take weight beside the keys; latents do not hold them yet", node)
    if node.kwargs.get("dropout"):
        raise Miss("attention dropout is active; expected evaluation or dropout 0", node)
    if len({example_shape(operand)[0] for operand in _operands(node)}) > 1:
        raise Miss("queries, keys and values have different batch sizes", node)


def _check_lengths(node: fx.Node) -> None:
    """Raise Miss for a prefill: what would be saved on tokens is spent on queries."""
    queries, tokens = (example_shape(operand)[2] for operand in _operands(node)[:2])
    if queries >= tokens:
        raise Miss(f"does not pay: {queries} queries on {tokens} tokens; expected fewer queries than tokens", node)


def _narrowest(key: fx.Node, value: fx.Node, roles: Roles, base: Evaluator) -> tuple[fx.Node, ...]:
    """The latents, those of the values first. Raises Miss when keys and values themselves are as narrow."""
    flow, stops = _flow(key, value, roles, base)
    own = [_width(n, key) for n in dict.fromkeys((key, value))]
    alone = [_cut(flow, [n], key) for n in (key, value)]
    narrow = [sum(_width(n, key) for n in cut) for cut in alone]
    if narrow[0] >= own[0] and narrow[1] < own[-1] and stops:
        raise Miss(f"keys or values are not affine in a latent: {max(stops).name} is not", max(stops))
    cut = _cut(flow, [key, value], key)
    width = sum(_width(n, key) for n in cut)
    if width >= sum(own):
        raise Miss(f"nothing to gain: keys and values of {sum(own)} numbers a token follow from {width}", key)
    return tuple(sorted(cut, key=lambda n: (n not in alone[1], n)))


def _flow(key: fx.Node, value: fx.Node, roles: Roles, base: Evaluator) -> tuple[nx.DiGraph, list[fx.Node]]:
    """(where keys and values come from by affine steps, what is not affine).

    A node is an edge from (node, 0) to (node, 1) that carries as much as it has numbers a token; "start" is behind all.
    """
    flow: nx.DiGraph = nx.DiGraph()
    stops: list[fx.Node] = []
    seen, stack = set[fx.Node](), [key, value]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        width = _width(node, key)
        flow.add_edge((node, 0), (node, 1), **({"capacity": 2**20 * width + 1} if width else {}))  # few tensors, too
        inputs = _moving(node, roles)
        if not inputs or len(seen) > REACH or not _is_affine(node, key, roles, base):
            flow.add_edge("start", (node, 0))
            stops += [node] if inputs else []
            continue
        flow.add_edges_from(((source, 1), (node, 0)) for source in inputs)
        stack.extend(inputs)
    return flow, stops


def _cut(flow: nx.DiGraph, ends: list[fx.Node], key: fx.Node) -> list[fx.Node]:
    """The narrowest nodes between "start" and `ends`; of several such sets the one nearest to `ends`."""
    whole = flow.copy()
    whole.add_edges_from(((end, 1), "end") for end in ends)
    try:
        _, (far, near) = nx.minimum_cut(whole, "start", "end")  # near: as few nodes as can be
    except nx.NetworkXUnbounded as error:
        raise Miss("keys or values are made of something that has no tokens, without a latent between", key) from error
    return [n for n in dict.fromkeys(n[0] for n in near if n != "end") if (n, 0) in far]


def _moving(node: fx.Node, roles: Roles) -> list[fx.Node]:
    """Tensors that `node` is made of, but for weights, indices, and what only lends its shape."""
    found: dict[fx.Node, None] = {}
    stack = [] if op_name(node) in BLANK else list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        value = fake(source)
        if isinstance(value, Tensor):
            if roles.kind(source) == Kind.ACTIVATION and not _is_whole(value) and op_name(source) not in BLANK:
                found[source] = None
        elif isinstance(value, (tuple, list)):  # of several tensors, such as a split
            stack.extend(source.all_input_nodes)
    return list(found)


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _is_affine(node: fx.Node, key: fx.Node, roles: Roles, base: Evaluator) -> bool:
    """True when `node` is affine in what it is made of, whatever the position: by running it on random numbers."""
    if is_in_place(node) or not isinstance(fake(node), Tensor):
        return False
    inputs = _moving(node, roles)
    blank = [n for n in node.all_input_nodes if op_name(n) in BLANK]
    region = Region(base, [*inputs, *blank], node)
    if any(_tells_position(side, key) for side in region.sides):
        return False
    what = ("affine", signature(region, roles.tell))
    if what not in roles.known:
        tokens = example_shape(key)[2]
        tries = ({tokens: ENOUGH}, {}) if tokens > ENOUGH else ({},)
        roles.known[what] = any(_holds(region, inputs, blank, few) for few in tries)
    return bool(roles.known[what])


def _holds(region: Region, inputs: list[fx.Node], blank: list[fx.Node], few: Mapping[int, int]) -> bool:
    """f(a + b) = f(a) + f(b) - f(0)?"""
    try:
        with smaller(few):
            nothing = {n: torch.zeros_like(random_like(n)) for n in (*inputs, *blank)}
            first, second = ({n: random_like(n, 2 * i + j) for i, n in enumerate(inputs)} for j in range(2))
            both = {n: first[n] + second[n] for n in inputs}
            one, other, total, zero = (region.run(nothing | x) for x in (first, second, both, {}))
    except Exception:  # whatever a user's node may raise
        return False
    bound = 1e-6 * float(total.abs().max().clamp_min(1e-30))  # sides are float32
    return bool(((total - one - other + zero).abs() <= bound).all())


def _tells_position(side: fx.Node, key: fx.Node) -> bool:
    """True for what may be another number for each token: it has an axis of tokens and is not stored."""
    sizes = shape(side)
    stored = view_root(side).op in {"placeholder", "get_attr"}
    return sizes is not None and not stored and any(_is_same(n, shape(key)[2]) for n in sizes)  # type: ignore[index]


def _is_same(one: Any, other: Any) -> bool:
    """Equal sizes; nothing is asked of a symbol."""
    left, right = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (one, other))
    return bool(left == right)


def _axes(node: fx.Node, key: fx.Node) -> list[tuple[int, int]]:
    """Pairs of axes of `node` that may be batch and tokens."""
    sizes, wanted = shape(node), shape(key)
    if sizes is None or wanted is None:
        return []
    batch, tokens = ([i for i, n in enumerate(sizes) if _is_same(n, wanted[axis])] for axis in (0, 2))
    return [(b, t) for b in batch for t in tokens if b != t]


def _width(node: fx.Node, key: fx.Node) -> int:
    """Numbers a token; 0 when it has no rows of tokens."""
    value = fake(node)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not _axes(node, key):
        return 0
    return math.prod(example_shape(node)) // (example_shape(key)[0] * example_shape(key)[2])


# -------------------------------------------------------------------------------------------------- cutting a part out


def _cut_out(
    end: fx.Node, cut: tuple[fx.Node, ...], program: Program, roles: Roles
) -> tuple[Program, tuple[fx.Node, ...], tuple[str, ...]]:
    """(`end` as a program of its own, the nodes of the cut that it reads, the weights that it reads): its inputs.

    Sizes are those of the example. Raises Miss when it reads anything else.
    """
    between = _behind(end, cut)
    nodes = tuple(n for n in cut if n in between)
    weights = tuple(n for n in between if n.op == "placeholder" and n not in cut and _example(n) is None)
    for node in between:
        if node not in cut and (is_in_place(node) or (node in weights and roles.kind(node) == Kind.ACTIVATION)):
            raise Miss(f"keys or values depend on {node.name} beside the latent", node)
        sized = op_name(node) in SIZED or _example(node) is not None
        if not sized and any(_example(n) is not None for n in node.all_input_nodes):
            raise Miss(f"{node.name} reckons with a size, which may be another at the next call", node)
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {n: graph.placeholder(f"z{i}") for i, n in enumerate(nodes)}
    mapping |= {n: graph.placeholder(f"w{i}") for i, n in enumerate(weights)}
    for node in between:
        if node not in mapping:
            mapping[node] = _copied(graph, node, mapping)
    graph.output(mapping[end])
    return Program(fx.GraphModule(program.module, graph), {}), nodes, tuple(n.name for n in weights)


def _copied(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> Any:
    known = _example(node)
    if known is not None:
        return known
    if op_name(node) in BLANK:
        value = fake(node)
        return graph.call_function(torch.zeros, (example_shape(node),), dict(dtype=value.dtype, device=value.device))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: mapping[n])
    return graph.create_node(node.op, node.target, args, kwargs)


def _behind(end: fx.Node, cut: tuple[fx.Node, ...]) -> list[fx.Node]:
    """`end` and what it is made of, no further than the cut, in graph order."""
    seen, stack = set[fx.Node](), [end]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            is_end = node in cut or _example(node) is not None or op_name(node) in BLANK
            stack.extend(() if is_end else node.all_input_nodes)
    return sorted(seen)


def _example(node: fx.Node) -> Any:
    """Of a size its example, None for anything else."""
    value = fake(node)
    if isinstance(value, torch.Size):
        return tuple(size_hint(n) if isinstance(n, torch.SymInt) else n for n in value)
    return value.node.hint if isinstance(value, torch.SymInt) else value if isinstance(value, int) else None


def _check_alone(node: fx.Node, cut: tuple[fx.Node, ...], roles: Roles) -> None:
    """Raise Miss when anything else reads what need not be computed any more."""
    operands = _operands(node)[1:]
    behind = {n for end in operands for n in _behind(end, cut) if _example(n) is None}
    inside = {n for n in behind if roles.kind(n) == Kind.ACTIVATION} - {*cut}
    for user in sorted({user for one in inside for user in one.users} - inside - {node, *cut}):
        for one in cut:
            if user in _behind(one, ()):
                raise Miss(f"keys or values are not affine in a latent: {one.name} is not", one)
        raise Miss(f"{user.name} reads the expanded keys or values, too", user)


def _text(part: Program) -> str:
    return "\n".join(f"{n} {n.op} {n.target} {n.args} {n.kwargs}" for n in part.graph.nodes)


def _random(sizes: Sequence[int], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(list(sizes), generator=generator, dtype=torch.float64).to(device)


# ----------------------------------------------------------------------------------------------------------- rewriting


def _joined(program: Program, side: Side, dtype: torch.dtype) -> fx.Node:
    """The latents of a side as [B, 1, T, R], in the type of the queries."""
    parts = [_rows(program, n, p, dtype) for n, p in zip(side.nodes, side.expansion.latents, strict=True)]
    return parts[0] if len(parts) == 1 else call(program, torch.cat, (parts, -1))


def _rows(program: Program, node: fx.Node, placed: Placed, dtype: torch.dtype) -> fx.Node:
    """[B, 1, T, R]: as it is where it is that already."""
    if fake(node).dtype != dtype:
        node = call_method(program, "to", node, dtype)
    if (placed.order, len(placed.sizes)) == ((0, 2, 1, 3), 4) and placed.sizes[1] == 1:
        return node
    if placed.order != tuple(range(len(placed.sizes))):
        node = call_method(program, "permute", node, placed.order)
    if len(placed.sizes) == 2:
        node = call_method(program, "unsqueeze", node, -1)
    elif len(placed.sizes) > 3:
        node = call_method(program, "flatten", node, 2)
    return call_method(program, "unsqueeze", node, 1)


def _both_sides(program: Program, found: Latents, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """What is attended to, and what is mixed: one node where they are the same."""
    joined = {side.nodes: _joined(program, side, dtype) for side in (found.key, found.value)}
    key, value = (_channels(program, joined[side.nodes], side) for side in (found.key, found.value))
    return key, value


def _channels(program: Program, latent: fx.Node, side: Side) -> fx.Node:
    """Those that the side reads."""
    if side.width == sum(p.width for p in side.expansion.latents):
        return latent
    return call_method(program, "narrow", latent, -1, side.facts.first, side.width)


def _constant(program: Program, node: fx.Node, side: Side, name: str, which: int) -> fx.Node:
    """An input that holds D (0) or c (1) of these weights."""
    expansion, facts = side.expansion, side.facts
    value = fake(node)
    dtype, device = value.dtype, value.device

    def make(*weights: Tensor) -> Tensor:
        found = expansion.maps(weights, device)[which]
        found = found[..., facts.first : facts.last] if which == 0 else found
        return found.to(dtype).contiguous()

    example = make(*(program.values[source].detach() for source in side.sources))
    return add_constant(program, f"{node.name}_{name}", example, Bound(side.sources, make))
