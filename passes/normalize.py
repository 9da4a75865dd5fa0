"""Every spelling of attention becomes one `fhopt::attention` node.

    before                                              after
    s = q @ k.transpose(-1, -2)                         o = fhopt.attention(q, k, v, mask, sinks, scale=c)
    s = s * c + mask
    p = softmax(s, -1); p = dropout(p)
    o = p @ v

A core is a call of scaled_dot_product_attention, or a softmax between two contractions. No spelling is matched: the
contractions are read as labelled axes (`contraction`), the way from the first to the softmax is measured by running it
(`scores`), changes of axes are followed by coordinates (`layout`), repetition of kv heads is undone by running the
candidates. Each rewrite is checked the same way: the old region and the new node run on the same random numbers, and
on a mismatch the region stays as it is, with a reason.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D and E head sizes of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import attention_reference, blank_scores
from fhopt.passes.axes import Axes, key_label, read_axes, value_steps, weights_layout
from fhopt.passes.contraction import Contraction
from fhopt.passes.graph import (
    Evaluator,
    Program,
    Region,
    argument,
    call,
    call_method,
    copy_node,
    example_shape,
    fake,
    op_name,
    random_like,
    shape,
    signature,
    smaller,
    storage_root,
)
from fhopt.passes.heads import Operand, before_repetition
from fhopt.passes.layout import MOVEMENT, Steps, arrange
from fhopt.passes.roles import ATTENTION, Kind, Projection, Roles
from fhopt.passes.scores import LEAST, Scores, random_sides, read_scores
from fhopt.passes.softmax import OTHER_WEIGHTS, Softmax, is_candidate, read_softmax

CALL = frozenset({"scaled_dot_product_attention"})
DROPOUT = frozenset({"dropout", "native_dropout", "feature_dropout"})
ENOUGH = 40  # tokens that checks by execution run on
LARGEST = 2**26  # scores at most, where a check must run at full size
SEARCH = 200  # nodes looked at on the way back from a softmax


@dataclass
class Core:
    """What a rewrite needs: the operands, the score function, and the node whose users take the result.

    order: query heads in the order in which the kv heads serve them, where it is not the given one. bias_steps and
    blank_rank tell how a computed bias becomes [B, H, S, T]: from scores of zeros of full size, or from one number.
    """

    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    scale: float
    scores: Scores | None = None
    product: Contraction | None = None
    mask: Operand | None = None
    bias_steps: Steps = ()
    bias_is_small: bool = False
    extra: int = 0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    is_causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    order: tuple[int, ...] | None = None
    output_steps: Steps = ()
    is_call: bool = False  # a call of scaled_dot_product_attention, which says what it does

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the canonical op."""
        return dict(scale=self.scale, is_causal=self.is_causal, softcap=self.softcap, dropout=self.dropout)

    @property
    def sinks(self) -> int:
        """Columns of the softmax that belong to no key."""
        return self.extra + (self.scores.sinks if self.scores else 0)


@dataclass(frozen=True)
class Normalize:
    """The pass. `tolerance` is the largest relative difference that the check by execution lets through."""

    name: str = "normalize"
    tolerance: float = 1e-6

    def candidates(self, program: Program) -> list[fx.Node]:
        """Nodes that may be the core of an attention, in graph order."""
        return [n for n in program.graph.nodes if op_name(n) in CALL | OTHER_WEIGHTS or is_candidate(n)]

    def match(self, node: fx.Node, roles: Roles, base: Evaluator) -> Core:
        """The core at `node`, checked by execution. Raises Miss with what had been recognised by then."""
        if op_name(node) in CALL:
            core = _match_call(node, roles, base)
            _undo_repetition(core, base)
            if core.query.steps or core.key.steps or core.key.node is not argument(node, 1, "key"):
                _verify(core, roles, base, self.tolerance)
            return core
        sizes = _smaller_sizes(node)
        if sizes:
            try:
                with smaller(sizes):
                    return self._match_softmax(node, roles, base)
            except Miss as miss:
                if math.prod(example_shape(node)) > LARGEST:
                    raise miss
        return self._match_softmax(node, roles, base)

    def _match_softmax(self, node: fx.Node, roles: Roles, base: Evaluator) -> Core:
        if op_name(node) in OTHER_WEIGHTS:
            raise _other_weights(node, roles)
        softmax = read_softmax(node, base)
        misses: list[Miss] = []
        for product in _products_before(softmax, roles):
            reached = "softmax, product of queries and keys"
            try:
                for mix, on_left in _mixes_after(softmax, roles):
                    reached = "softmax, both products"
                    core = _assemble(softmax, product, mix if on_left else mix.swapped(), roles, base)
                    reached = "softmax, both products, scores, layout"
                    _undo_repetition(core, base)
                    _verify(core, roles, base, self.tolerance)
                    return core
            except Miss as miss:
                misses.append(Miss(miss.reason, miss.node, miss.reached or reached))
        raise max(misses, key=lambda miss: len(miss.reached))

    def rewrite(self, program: Program, core: Core) -> fx.Node:
        """Put the canonical node in place of the core; returns it."""
        with program.graph.inserting_before(core.output):
            operands = [_insert(program, o.node, o.steps) for o in (core.query, core.key, core.value)]
            operands[0] = _scaled(program, operands[0], core)
            operands = _one_dtype(program, operands)
            mask, sinks = _insert_mask(program, core, operands)
            operands[0] = _only_seeing(program, operands[0], mask, core)
            options = {k: v for k, v in core.options.items() if v}
            rest = (mask, sinks) if sinks is not None else (mask,) if mask is not None else ()
            node = call(program, torch.ops.fhopt.attention.default, (*operands, *rest), options)
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in core.output.meta:
                    node.meta[key] = core.output.meta[key]
            result = _insert_result(program, node, core)
        core.output.replace_all_uses_with(result)
        return node


def _smaller_sizes(node: fx.Node) -> dict[int, int]:
    """Numbers of queries and keys that are enough to see what is done to them."""
    sizes: dict[int, int] = {}
    for index, size in enumerate(dict.fromkeys(example_shape(node)[-2:])):
        if size > ENOUGH:
            sizes |= {size + i: ENOUGH - 8 * index + i for i in (0, 1, -1) if size + i not in sizes}
    return sizes


# --------------------------------------------------------------------------------------------------- a call


def _match_call(node: fx.Node, roles: Roles, base: Evaluator) -> Core:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", default=0.0)
    scale = argument(node, 6, "scale")
    factors = ((scale, False),) if isinstance(scale, fx.Node) else ()
    number = 1.0 if factors else 1 / math.sqrt(example_shape(query)[-1]) if scale is None else float(scale)
    core = Core(
        node, Operand(query), Operand(key), Operand(value), number, factors=factors,
        mask=Operand(mask) if isinstance(mask, fx.Node) else None,
        is_causal=bool(argument(node, 5, "is_causal", default=False)), dropout=float(dropout), is_call=True,
    )  # fmt: skip
    shapes = [example_shape(n) for n in (query, key, value)]
    if len({len(s) for s in shapes}) > 1 or len(shapes[0]) < 2:
        raise Miss(f"operands have shapes {shapes}; expected three of the same rank", node)
    if len(shapes[0]) != 4 or len({s[0] for s in shapes}) > 1:
        _bring_to_rank_4(core, roles, base)
    return core


def _bring_to_rank_4(core: Core, roles: Roles, base: Evaluator) -> None:
    """Read the axes of a call as those of the product that it stands for. Raises Miss."""
    nodes = (core.query.node, core.key.node, core.value.node)
    shapes = [example_shape(n) for n in nodes]
    outer = range(len(shapes[0]) - 2)
    widest = [max(s[i] for s in shapes) for i in outer]
    if any(s[i] not in (1, widest[i]) for s in shapes for i in outer):
        raise Miss(f"batch axes of {shapes} do not broadcast", core.output)
    batch = [tuple(f"b{i}" if s[i] == widest[i] else "" for i in outer) for s in shapes]
    whole = tuple(f"b{i}" for i in outer)
    product = Contraction(core.output, *nodes[:2], (*batch[0], "m", "k"), (*batch[1], "n", "k"), (*whole, "m", "n"))
    mix = Contraction(core.output, nodes[0], nodes[2], product.axes, (*batch[2], "n", "e"), (*whole, "m", "e"))
    axes = read_axes(product, "n", roles, base)
    core.query, core.key = _query_and_key(product, axes)
    value, core.output_steps = value_steps(mix, axes.layout(product.axes), axes)
    core.value = Operand(nodes[2], value)
    if core.mask is not None and len(example_shape(core.mask.node)) > 2:
        sizes = example_shape(core.mask.node)
        labels = product.axes[len(product.axes) - len(sizes) :]
        whole_sizes = dict(zip(product.axes, (*widest, shapes[0][-2], shapes[1][-2]), strict=True))
        held = tuple(x if n == whole_sizes[x] else "" for x, n in zip(labels, sizes, strict=True))
        core.mask.steps = axes.steps(axes.layout(held), axes.canonical("scores"))


# --------------------------------------------------------------------------------------------------- two products


def _products_before(softmax: Softmax, roles: Roles) -> list[Contraction]:
    """Products of two activations from which the scores come, the nearest first. Raises Miss where there is none."""
    found, barrier = _search_products(softmax.scores, roles)
    if found:
        return found
    what = "nothing is multiplied before it, no product of queries and keys"
    if barrier is not None:
        what = f"it is over the projection by {barrier.names[0]}, no product of queries and keys"
        if _search_products(barrier.activation, roles)[0]:
            what = f"the scores pass through the weight {barrier.names[0]} first, heads are mixed"
    raise Miss(f"not the softmax of an attention: {what}", softmax.scores, "softmax")


def _search_products(start: fx.Node, roles: Roles) -> tuple[list[Contraction], Projection | None]:
    """Products of two activations behind `start`, and the first projection that ends a way."""
    found: list[Contraction] = []
    barrier: Projection | None = None
    seen, stack = {start}, [start]
    while stack and len(seen) < SEARCH:
        node = stack.pop(0)
        projection = roles.projection(node)
        if projection is not None:
            barrier = barrier or projection
            continue
        product = roles.is_score_product(node)
        if product is not None:
            found.append(product)
        elif op_name(node) not in ATTENTION:
            sources = [n for n in node.all_input_nodes if n not in seen and roles.kind(n) != Kind.CONSTANT]
            seen.update(sources)
            stack.extend(sources)
    return found, barrier


def _mixes_after(softmax: Softmax, roles: Roles) -> list[tuple[Contraction, bool]]:
    """Products of the weights with values, and whether the weights are the left operand. Raises Miss."""
    found: list[tuple[Contraction, bool]] = []
    known = {softmax.weights}
    frontier = [softmax.weights]
    for _ in range(SEARCH):
        if not frontier:
            break
        node = min(frontier)
        frontier.remove(node)
        for user in node.users:
            product = roles.is_score_product(user)
            if product is not None:
                found.extend(_sides_of(product, known))
            elif user not in known and _carries_weights(user, roles):
                known.add(user)
                frontier.append(user)
    if found:
        return found
    raise Miss("no product of the weights with values follows", softmax.weights, "softmax, product of queries and keys")


def _other_weights(node: fx.Node, roles: Roles) -> Miss:
    """Why a pointwise function is not the softmax of an attention; without a reason where it is nothing like one."""
    stand_in = Softmax(node.all_input_nodes[0], node, 0)
    try:
        scores, mixes = _products_before(stand_in, roles), _mixes_after(stand_in, roles)
    except Miss:
        return Miss("", node)
    if any(mix.node is score.node for mix, _ in mixes for score in scores):
        return Miss("", node)
    return Miss(f"the weights are made by {op_name(node)}; expected a softmax", node, "scores, both products")


def _sides_of(product: Contraction, known: set[fx.Node]) -> Iterator[tuple[Contraction, bool]]:
    """Whether the weights stand on the left or on the right of a product; where on both, it is none of ours."""
    left, right = product.left in known, product.right in known
    if left != right:
        yield product, left


POINTWISE_NAMES = (
    "add sub rsub mul div truediv multiply divide subtract masked_fill where to type type_as float half bfloat16 double "
    "clone contiguous _to_copy alias detach tanh clamp clip neg nan_to_num maximum minimum"
)
POINTWISE = frozenset(POINTWISE_NAMES.split())  # one element of zeros serves as well as scores of full size
CARRIES_NAMES = (
    "to type type_as float half bfloat16 double clone contiguous _to_copy alias detach mul masked_fill where nan_to_num "
    "div truediv square pow"
)
CARRIES = MOVEMENT | DROPOUT | frozenset(CARRIES_NAMES.split())


def _carries_weights(node: fx.Node, roles: Roles) -> bool:
    return op_name(node) in CARRIES and isinstance(fake(node), Tensor)


def _assemble(softmax: Softmax, product: Contraction, mix: Contraction, roles: Roles, base: Evaluator) -> Core:
    """Roles and layouts of everything around one softmax. `mix` has the weights on the left."""
    keys = key_label(softmax, product, base)
    if keys in product.left_axes:
        product = product.swapped()
    axes = read_axes(product, keys, roles, base)
    key_axis = product.axes.index(keys)
    scores = read_scores(product.node, softmax.scores, softmax.axis, key_axis, roles, base)
    value, result = value_steps(mix, weights_layout(product, mix, axes, base), axes)
    core = Core(
        softmax.divider or mix.node, *_query_and_key(product, axes), Operand(mix.right, value),
        scores.scale * softmax.gain, scores, product, extra=softmax.extra, factors=scores.factors,
        softcap=scores.softcap * softmax.gain, output_steps=result, dropout=_dropout(softmax.weights, mix),
    )  # fmt: skip
    _place_mask(core, softmax, axes)
    return core


def _query_and_key(product: Contraction, axes: Axes) -> tuple[Operand, Operand]:
    return (
        Operand(product.left, axes.steps(axes.layout(product.left_axes), axes.canonical("query"))),
        Operand(product.right, axes.steps(axes.layout(product.right_axes), axes.canonical("key"))),
    )


def _dropout(weights: fx.Node, mix: Contraction) -> float:
    """Probability of the dropout that is active between the softmax and the second product."""
    node, rate = mix.left, 0.0
    while node is not weights and node.all_input_nodes:
        if op_name(node) in DROPOUT and argument(node, 2, "training", "train", default=True):
            rate = max(rate, float(argument(node, 1, "p", default=0.5)))
        node = node.all_input_nodes[0]
    return rate


def _place_mask(core: Core, softmax: Softmax, axes: Axes) -> None:
    """How the mask, or a computed bias, comes to [B, H, S, T]. Raises Miss."""
    scores, product = core.scores, core.product
    assert scores is not None and product is not None
    target = axes.canonical("scores")
    steps = axes.steps(axes.layout(product.axes), target)
    plain = not steps and all(len(axis) == 1 for axis in target)
    gain: Steps = (("mul", (softmax.gain,)),) if softmax.gain != 1 else ()
    if scores.mask is not None and plain:
        is_bool = fake(scores.mask).dtype == torch.bool
        core.mask = Operand(scores.mask, () if is_bool else gain)
    elif scores.form or scores.sinks:
        scores.form = "computed" if scores.form else ""
        size, end = example_shape(product.node), example_shape(softmax.scores)
        same = end[: softmax.axis] + end[softmax.axis + 1 :] == size[: softmax.axis] + size[softmax.axis + 1 :]
        if same and len(end) == len(size):
            pointwise = all(op_name(n) in POINTWISE for n in scores.region.nodes)
            core.bias_is_small, core.bias_steps = plain and pointwise and not scores.sinks, steps + gain
        elif scores.sinks or math.prod(size) != math.prod(end):
            raise Miss("the axes of the scores change before the softmax in a way that is not followed", core.output)
        else:
            core.bias_steps = (("reshape", (_sizes(product.node),)), *steps, *gain)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    sizes = shape(node) or ()
    if sum(not isinstance(n, int) for n in sizes) > 1:
        raise Miss("scores of several symbolic sizes change their axes", node)
    return tuple(n if isinstance(n, int) else -1 for n in sizes)


def _undo_repetition(core: Core, base: Evaluator) -> None:
    """Move keys and values back to before a repetition of kv heads, where execution shows that there is one."""
    heads = core.query.sizes[1]
    key, value = (before_repetition(o, heads, base) for o in (core.key, core.value))
    if key and value and key.heads == value.heads:
        core.key, core.value, core.order = key.operand, value.operand, key.order
    groups = [o.sizes[1] for o in (core.key, core.value)]
    if groups[0] != groups[1]:
        raise Miss(f"keys have {groups[0]} heads and values {groups[1]}", core.output)
    if heads % groups[0]:
        raise Miss(f"{heads} query heads on {groups[0]} kv heads", core.output)


# --------------------------------------------------------------------------------------------------- checking


def _verify(core: Core, roles: Roles, base: Evaluator, tolerance: float) -> None:
    """Run the old region and the canonical op on the same random float64 operands. Raises Miss on a difference."""
    if core.dropout:
        if core.is_call:
            return  # the call says what it does, and two random masks never agree
        raise Miss("dropout on the attention weights is active; expected evaluation or dropout 0", core.output)
    operands = tuple(dict.fromkeys((core.query.node, core.key.node, core.value.node)))
    differences = []
    try:
        region = Region(base, operands, core.output)
        _check_untouched(region, roles)
        inside = set(region.nodes)
        beside = [s for s in core.scores.region.sides if s in inside] if core.scores else []  # a bias made of queries
        region = Region(base, (*operands, *beside), core.output)
        key = ("verified", signature(region, roles.tell), _facts(core, region))
        if key in roles.known:
            return
        given = {n: random_like(n, i) + 0.1 * i for i, n in enumerate((*operands, *beside))}
        for is_random in (True, False):
            sides = random_sides(region, roles) if is_random else {}
            known = {n: v for n, v in sides.items() if v.dtype != torch.bool} | given  # rows that see something
            old, (new, seen) = region.run(known), _canonical(core, known, base)
            differences.append(_difference(old, new, seen))
            if differences[-1] <= tolerance:
                if is_random:
                    roles.known[key] = True
                return
    except Miss:
        raise
    except Exception as error:
        raise Miss(
            f"the region could not be run for the check ({type(error).__name__}: {error})", core.output
        ) from error
    difference = min(differences)
    raise Miss(f"the canonical op differs by {difference:.1e} relative, more than {tolerance:.0e}", core.output)


def _facts(core: Core, region: Region) -> tuple[Any, ...]:
    """All of a core that the check depends on, in terms that another layer shares."""
    places = {n: i for i, n in enumerate((*region.given, *region.sides, *region.nodes))}
    operands = [(places.get(o.node), o.steps) for o in (core.query, core.key, core.value)]
    mask = (places.get(core.mask.node), core.mask.steps) if core.mask else None
    scores = core.scores and (core.scores.form, core.scores.sinks, core.scores.start)
    factors = tuple((places.get(n), divides) for n, divides in core.factors)
    rest = (core.order, core.bias_steps, core.output_steps, core.extra, factors)
    return (repr(operands), repr(mask), scores, repr(core.options), repr(rest))


def _check_untouched(region: Region, roles: Roles) -> None:
    """Raise Miss where something that could not be made functional changes a tensor of the region in place."""
    for node in (*region.given, *region.nodes) if roles.changed else ():
        writer = roles.changed.get(storage_root(node))
        if writer is not None:
            raise Miss(f"{op_name(writer)} changes {node.name} in place in a way that is not followed", writer)


def _difference(old: Tensor, new: Tensor, seen: Tensor) -> float:
    """Largest relative difference, of queries that see something."""
    if old.shape != new.shape:
        return math.inf
    known = seen & old.isfinite()
    if not bool(known.any()):
        return math.inf
    error = (old - new)[known].abs().max() / old[known].abs().max().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else math.inf


def _canonical(core: Core, values: Mapping[fx.Node, Tensor], base: Evaluator) -> tuple[Tensor, Tensor]:
    """Result of the canonical op for these values, in the layout of the old one, and where its query sees anything."""

    def value(node: fx.Node) -> Tensor:
        known = values[node] if node in values else base.example(node)
        known = torch.as_tensor(known)
        return known.double() if known.is_floating_point() else known

    query, key, given = (arrange(value(o.node), o.steps) for o in (core.query, core.key, core.value))
    for node, divides in core.factors:
        query = query / value(node) if divides else query * value(node)
    mask, sinks = _canonical_mask(core, value)
    if core.order is not None:
        query = query[:, list(core.order)]
        mask, sinks = (None if m is None else _by_head(m, core.order) for m in (mask, sinks))
    result = attention_reference(query, key, given, mask, sinks, **core.options)
    if core.order is not None:
        result = result[:, list(_inverse(core.order))]
    return arrange(result, core.output_steps), arrange(_seen(mask, result), core.output_steps)


def _seen(mask: Tensor | None, result: Tensor) -> Tensor:
    """Bool, of the shape of the result: rows whose query may attend to at least one key."""
    if mask is None:
        return torch.ones_like(result, dtype=torch.bool)
    allowed = mask if mask.dtype == torch.bool else mask > -LEAST
    return allowed.any(-1, keepdim=True).expand(*result.shape[:-1], 1).expand(result.shape)


def _canonical_mask(core: Core, value: Any) -> tuple[Tensor | None, Tensor | None]:
    mask: Tensor | None = None
    sinks: Tensor | None = None
    if core.mask is not None:
        mask = arrange(value(core.mask.node), core.mask.steps)
        mask = ~mask if core.scores is not None and core.scores.form == "fill" else mask
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        assert core.product is not None
        region = core.scores.region
        zero = torch.zeros(example_shape(core.product.node), dtype=torch.float64)
        bias = region.run({core.product.node: zero, **{s: value(s) for s in region.sides if _is_tensor(s)}})
        mask, sinks = _split_sinks(arrange(bias, core.bias_steps), core.scores)
    if core.extra:
        sinks = torch.zeros((1, 1, 1, 1), dtype=torch.float64)
    return mask, sinks


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(fake(node), Tensor)


def _split_sinks(bias: Tensor, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
    if not scores.sinks:
        return bias, None
    keys = bias.shape[-1] - scores.sinks
    mask = bias.narrow(-1, scores.start, keys) if scores.form else None
    return mask, _around(bias, scores.start, keys)


def _around(bias: Tensor, start: int, keys: int) -> Tensor:
    """The columns before and behind those of the keys."""
    return torch.cat((bias[..., :start], bias[..., start + keys :]), -1)


def _by_head(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor if tensor.dim() < 3 or tensor.shape[-3] == 1 else tensor.index_select(-3, torch.tensor(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(h) for h in range(len(order)))


# --------------------------------------------------------------------------------------------------- rewriting


def _insert(program: Program, node: fx.Node, steps: Steps) -> fx.Node:
    for method, arguments in steps:
        node = call_method(program, method, node, *arguments)
    return node


def _scaled(program: Program, query: fx.Node, core: Core) -> fx.Node:
    """Factors of the scores go onto the queries, and heads into the order of their kv heads."""
    for node, divides in core.factors:
        query = call(program, torch.div if divides else torch.mul, (query, node))
    return query if core.order is None else call(program, _take_heads, (query, list(core.order)))


def _only_seeing(program: Program, query: fx.Node, mask: fx.Node | None, core: Core) -> fx.Node:
    """Queries that may attend to nothing become zeros, where a filled mask lets no gradient through for them.

    Their scores are all equal either way.
    """
    fills = core.scores is not None and core.scores.replaces and mask is not None and core.product is not None
    if not fills or not fake(core.product.node).requires_grad:  # type: ignore[union-attr]
        return query
    return call(program, seeing, (query, mask))


def seeing(query: Tensor, mask: Tensor) -> Tensor:
    """query [B,H,S,D] with zeros where mask [B,H,S,T] (additive) leaves no key."""
    return query * (mask > -LEAST).any(-1, keepdim=True).to(query.dtype)


def _take_heads(tensor: Tensor, order: list[int]) -> Tensor:
    """Heads of [B, H, ., .] in another order."""
    return tensor.index_select(1, torch.tensor(order, device=tensor.device))


def _one_dtype(program: Program, operands: list[fx.Node]) -> list[fx.Node]:
    """Casts to the widest type, where queries, keys and values differ."""
    types = [fake(n).dtype for n in operands]
    widest = types[0]
    for other in types[1:]:
        widest = torch.promote_types(widest, other)
    return [n if t == widest else call_method(program, "to", n, widest) for n, t in zip(operands, types, strict=True)]


def _insert_mask(program: Program, core: Core, operands: list[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    if core.mask is not None:
        mask = _insert(program, core.mask.node, core.mask.steps)
        if core.scores is not None and core.scores.form == "fill":
            mask = call(program, torch.logical_not, (mask,))
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        mask, sinks = _insert_bias(program, core)
    if core.extra:
        sinks = call_method(program, "new_zeros", operands[0], (1, 1, 1, 1))
    dtype = fake(operands[0]).dtype
    if mask is not None and fake(mask).dtype not in (torch.bool, dtype):
        mask = call_method(program, "to", mask, dtype)
    if core.order is not None:
        mask, sinks = (_in_order(program, n, core.order) for n in (mask, sinks))
    return mask, sinks


def _in_order(program: Program, node: fx.Node | None, order: tuple[int, ...]) -> fx.Node | None:
    sizes = example_shape(node) if node is not None else ()
    return node if len(sizes) < 4 or sizes[1] == 1 or node is None else call(program, _take_heads, (node, list(order)))


def _insert_bias(program: Program, core: Core) -> tuple[fx.Node | None, fx.Node | None]:
    """The region again, on scores of zeros: of one element where everything broadcasts, else of full size."""
    assert core.scores is not None and core.product is not None
    bias = None
    if core.bias_is_small:
        bias = _try_small_bias(program, core)
    if bias is None:
        product = core.product
        axes = [list(a) for a in (product.left_axes, product.right_axes, product.axes)]
        zeros = call(program, blank_scores, (product.left, product.right, *axes))
        bias = _repeat_region(program, core, zeros)
    bias = _insert(program, bias, core.bias_steps)
    if not core.scores.sinks:
        return bias, None
    columns = shape(bias)[-1]  # type: ignore[index]
    if not isinstance(columns, int):
        raise Miss("sinks beside a symbolic number of keys", core.output)
    keys, start = columns - core.scores.sinks, core.scores.start
    sinks = call(program, _around, (bias, start, keys))
    return (call_method(program, "narrow", bias, -1, start, keys) if core.scores.form else None), sinks


def _try_small_bias(program: Program, core: Core) -> fx.Node | None:
    assert core.product is not None
    before = core.output.prev
    try:
        kind = fake(core.product.node)  # nothing of the queries: the mask stays a matter of its own
        zeros = call(program, torch.zeros, ((1, 1, 1, 1),), {"dtype": kind.dtype, "device": kind.device})
        bias = _repeat_region(program, core, zeros)
        if len(example_shape(bias)) == 4:
            return bias
    except Exception:  # an operation that needs the full shape
        pass
    while core.output.prev is not before:
        program.graph.erase_node(core.output.prev)
    return None


def _repeat_region(program: Program, core: Core, zeros: fx.Node) -> fx.Node:
    assert core.scores is not None and core.product is not None
    mapping: dict[fx.Node, Any] = {core.product.node: zeros}
    for node in core.scores.region.nodes:
        mapping[node] = copy_node(program, node, mapping)
    return mapping[core.scores.region.end]


def _insert_result(program: Program, node: fx.Node, core: Core) -> fx.Node:
    result = node
    if core.order is not None:
        result = call(program, _take_heads, (result, list(_inverse(core.order))))
    result = _insert(program, result, core.output_steps)
    wanted = fake(core.output).dtype
    return result if fake(result).dtype == wanted else call_method(program, "to", result, wanted)
