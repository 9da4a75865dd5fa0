"""Normalization of every spelling of attention to one `fhopt::attention` node.

    before                                              after
    s = q @ k.transpose(-1, -2)                         o = fhopt.attention(q, k, v, mask, sinks, scale=c)
    s = s * c + mask
    p = softmax(s, -1); p = dropout(p)
    o = p @ v

A core is a call of scaled_dot_product_attention, or a softmax between two contractions. No spelling is matched:
contractions become labelled axes (`contraction`), the path from the first one to the softmax is measured by running it
(`scores`), axis changes are traced with coordinates (`layout`), and kv-head repetition is undone by running candidate
ancestors. Each rewrite is checked the same way: the old region and the new node run on the same random values. On a
mismatch the region stays unchanged, and the reason is reported.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D and E head sizes of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, example_shape, smaller
from fhopt.passes.graph.nodes import argument, fake, op_name, shape
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.axes import Axes, key_label, layout_at, read_axes, value_steps
from fhopt.passes.recognize.canonical import Core, insert_canonical
from fhopt.passes.recognize.canonical_check import check_canonical
from fhopt.passes.recognize.contraction import Contraction
from fhopt.passes.recognize.kv_head_repetition import Operand, before_repetition
from fhopt.passes.recognize.layout import MOVEMENT, Steps
from fhopt.passes.recognize.learned_queries import learned_product
from fhopt.passes.recognize.node_roles import ATTENTION, Kind, Projection, Roles
from fhopt.passes.recognize.readable import check_readable
from fhopt.passes.recognize.scores import Scores, read_scores
from fhopt.passes.recognize.softmax import OTHER_WEIGHTS, Softmax, is_candidate, is_exponential, read_softmax

CALL = frozenset({"scaled_dot_product_attention"})
DROPOUT = frozenset({"dropout", "native_dropout", "feature_dropout"})
ENOUGH = 40  # tokens in numerical checks
LARGEST = 2**26  # max scores of a full-size check
SEARCH = 200  # search depth upstream of a softmax, in nodes


@dataclass(frozen=True)
class Normalize:
    """The pass `normalize`. tolerance: largest relative difference that the numerical check accepts.

    assume_finite: rewrite attention whose own arithmetic overflows for large scores, for which the model gives NaN.
    """

    name: str = "normalize"
    tolerance: float = 1e-6
    assume_finite: bool = False

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the possible attention cores, in graph order."""
        return [
            n for n in program.graph.nodes if op_name(n) in CALL | OTHER_WEIGHTS or is_candidate(n) or is_exponential(n)
        ]

    def match(self, node: fx.Node, roles: Roles, base: Evaluator) -> Core:
        """Match the core at `node` and check it numerically. Raises Miss with what was recognized up to then."""
        if op_name(node) in CALL or is_candidate(node):
            check_readable(node)
        if op_name(node) in CALL:
            core = _match_call(node, roles, base)
            _undo_repetition(core, base)
            if core.query.steps or core.key.steps or core.key.node is not argument(node, 1, "key"):
                check_canonical(core, roles, base, self.tolerance)
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
        if not is_candidate(node):
            raise _other_weights(node, roles)
        softmax = read_softmax(node, roles, base)
        misses: list[Miss] = []
        for product in _products_before(softmax, roles, base):
            reached = "softmax, query-key matmul"
            try:
                for mix, on_left in _mixes_after(softmax, roles):
                    reached = "softmax, both matmuls"
                    core = _assemble(softmax, product, mix if on_left else mix.swapped(), roles, base)
                    reached = "softmax, both matmuls, scores, layout"
                    _undo_repetition(core, base)
                    core.conditions = self._conditions(core, softmax)
                    check_canonical(core, roles, base, self.tolerance)
                    return core
            except Miss as miss:
                misses.append(Miss(miss.reason, miss.node, miss.reached or reached))
        raise max(misses, key=lambda miss: len(miss.reached))

    def _conditions(self, core: Core, softmax: Softmax) -> tuple[str, ...]:
        """Return the conditions for the rewrite to give the model's results. Raises Miss unless they are assumed."""
        conditions = []
        if softmax.overflows:
            conditions.append("the exponentials are not shifted by their maximum and overflow for large scores")
        if core.scores is not None and _is_half(core.scores, softmax):
            conditions.append("scores are computed in float16 and overflow beyond 65504")
        if conditions and not self.assume_finite:
            raise Miss(
                f"{conditions[0]}, where the model gives NaN; expected scores that cannot overflow. Set the option "
                "assume_finite to rewrite it for scores that do not",
                core.output,
            )
        return tuple(f"no overflow: {condition}" for condition in conditions)

    def rewrite(self, program: Program, core: Core) -> fx.Node:
        """Replace the core by the canonical node; return the node."""
        return insert_canonical(program, core)


def _is_half(scores: Scores, softmax: Softmax) -> bool:
    """Return whether scores are float16 anywhere between the product and the softmax."""
    nodes = (*scores.region.inputs, *scores.region.nodes, softmax.scores)
    return any(getattr(fake(n), "dtype", None) == torch.float16 for n in nodes)


def _smaller_sizes(node: fx.Node) -> dict[int, int]:
    """Return smaller query and key counts that suffice to recognize the core."""
    sizes: dict[int, int] = {}
    for index, size in enumerate(dict.fromkeys(example_shape(node)[-2:])):
        if size > ENOUGH:
            sizes |= {size + i: ENOUGH - 8 * index + i for i in (0, 1, -1) if size + i not in sizes}
    return sizes


# --------------------------------------------------------------------------------------------------- SDPA calls


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
    """Derive the axes of a call from the query-key matmul that it computes. Raises Miss."""
    nodes = (core.query.node, core.key.node, core.value.node)
    shapes = [example_shape(n) for n in nodes]
    outer = range(len(shapes[0]) - 2)
    widest = [max(s[i] for s in shapes) for i in outer]
    if any(s[i] not in (1, widest[i]) for s in shapes for i in outer):
        raise Miss(f"operands have shapes {shapes}; expected batch axes that broadcast", core.output)
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


def _products_before(softmax: Softmax, roles: Roles, base: Evaluator | None = None) -> list[Contraction]:
    """Return the products of two activations that the scores come from, nearest first. Raises Miss without one.

    base: if given, a product of keys with learned queries counts, too.
    """
    result, barrier = _search_products(softmax.scores, roles)
    if result:
        return result
    learned = learned_product(barrier, softmax, roles, base) if barrier is not None and base is not None else None
    if learned is not None:
        return [learned]
    what = "no matmul precedes it; expected a matmul of queries and keys"
    if barrier is not None:
        what = f"it is over the projection by {barrier.names[0]}; expected a matmul of queries and keys"
        if _search_products(barrier.activation, roles)[0]:
            what = f"the scores pass through the weight {barrier.names[0]}, which mixes heads"
    raise Miss(f"not the softmax of an attention: {what}", softmax.scores, "softmax")


def _search_products(start: fx.Node, roles: Roles) -> tuple[list[Contraction], Projection | None]:
    """Return the products of two activations upstream of `start`, and the first projection that ends a path."""
    results: list[Contraction] = []
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
            results.append(product)
        elif op_name(node) not in ATTENTION:
            sources = [n for n in node.all_input_nodes if n not in seen and roles.kind(n) != Kind.CONSTANT]
            seen.update(sources)
            stack.extend(sources)
    return results, barrier


def _mixes_after(softmax: Softmax, roles: Roles) -> list[tuple[Contraction, bool]]:
    """Return the products of weights with values, and whether the weights are the left operand. Raises Miss."""
    results: list[tuple[Contraction, bool]] = []
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
                results.extend(_sides_of(product, known))
            elif user not in known and _carries_weights(user, roles):
                known.add(user)
                frontier.append(user)
    if results:
        return results
    reached = "softmax, query-key matmul"
    step = next((u for node in sorted(known) for u in node.users if u not in known and _meets_product(u, roles)), None)
    if step is not None:
        raise Miss(
            f"the weights pass through {op_name(step)} before the second matmul; expected steps that "
            "preserve each weight",
            softmax.weights,
            reached,
        )
    users = [u for node in sorted(known) for u in node.users if roles.projection(u) is not None]
    if any(_meets_product(after, roles) for user in users for after in user.users):
        raise Miss(
            "the weights are multiplied by a parameter before the second matmul, as if heads are mixed (talking "
            "heads, DeepViT); expected steps that preserve each weight",
            softmax.weights,
            reached,
        )
    raise Miss("no matmul of the weights and values follows the softmax", softmax.weights, reached)


def _meets_product(start: fx.Node, roles: Roles) -> bool:
    """Return whether a product of two activations follows `start`, before any projection."""
    seen, stack = {start}, [start]
    while stack and len(seen) < SEARCH:
        node = stack.pop(0)
        if roles.is_score_product(node) is not None:
            return True
        if roles.projection(node) is None and op_name(node) not in ATTENTION:
            users = [u for u in node.users if u not in seen]
            seen.update(users)
            stack.extend(users)
    return False


def _other_weights(node: fx.Node, roles: Roles) -> Miss:
    """Return a Miss that names the function used instead of a softmax; without a reason if this is not attention."""
    source = node.all_input_nodes[0]
    while op_name(source) in CARRIES and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if is_candidate(source):  # already softmax weights
        return Miss("", node)
    stand_in = Softmax(node.all_input_nodes[0], node, 0)
    try:
        scores = _products_before(stand_in, roles)
        size = math.prod(example_shape(node))
        are_weights = is_exponential(node) and any(math.prod(example_shape(s.node)) == size for s in scores)
        if are_weights and _meets_product(node, roles):
            return Miss("no sum of the exponentials divides them; expected softmax, or e / e.sum(dim)", node, "scores")
        mixes = _mixes_after(stand_in, roles)
    except Miss:
        return Miss("", node)
    if any(mix.node is score.node for mix, _ in mixes for score in scores):
        return Miss("", node)
    return Miss(f"the weights are computed by {op_name(node)}; expected a softmax", node, "scores, both matmuls")


def _sides_of(product: Contraction, known: set[fx.Node]) -> Iterator[tuple[Contraction, bool]]:
    """Yield a product and whether the weights are its left operand; nothing if they are both operands."""
    left, right = product.left in known, product.right in known
    if left != right:
        yield product, left


POINTWISE_NAMES = (
    "add sub rsub mul div truediv multiply divide subtract masked_fill where to type type_as float half bfloat16 "
    "double clone contiguous _to_copy alias detach tanh clamp clip neg nan_to_num maximum minimum"
)
POINTWISE = frozenset(POINTWISE_NAMES.split())  # one zero element can replace full-size scores
CARRIES_NAMES = (
    "to type type_as float half bfloat16 double clone contiguous _to_copy alias detach mul masked_fill where "
    "nan_to_num div truediv square pow relu abs clamp clip clamp_min clamp_max minimum maximum"
)
CARRIES = MOVEMENT | DROPOUT | frozenset(CARRIES_NAMES.split())


def _carries_weights(node: fx.Node, roles: Roles) -> bool:
    return op_name(node) in CARRIES and isinstance(fake(node), Tensor)


def _assemble(softmax: Softmax, product: Contraction, mix: Contraction, roles: Roles, base: Evaluator) -> Core:
    """Assemble the core around one softmax; `mix` has the weights on the left. Raises Miss."""
    keys = key_label(softmax, product, base)
    if keys in product.left_axes:
        product = product.swapped()
    axes = read_axes(product, keys, roles, base)
    key_axis = product.axes.index(keys)
    scores = read_scores(product.node, softmax.scores, softmax.axis, key_axis, roles, base)
    value, result = value_steps(mix, layout_at(mix.left, product, axes, base), axes)
    core = Core(
        softmax.divider or mix.node, *_query_and_key(product, axes), Operand(mix.right, value),
        scores.scale * softmax.gain, scores, product, softmax=softmax, extra=softmax.extra, factors=scores.factors,
        softcap=scores.softcap * softmax.gain, output_steps=result, dropout=_dropout(softmax.weights, mix),
    )  # fmt: skip
    _place_mask(core, softmax, axes, base)
    return core


def _query_and_key(product: Contraction, axes: Axes) -> tuple[Operand, Operand]:
    return (
        Operand(product.left, axes.steps(axes.layout(product.left_axes), axes.canonical("query"))),
        Operand(product.right, axes.steps(axes.layout(product.right_axes), axes.canonical("key"))),
    )


def _dropout(weights: fx.Node, mix: Contraction) -> float:
    """Return the active dropout probability between the softmax and the second matmul."""
    node, rate = mix.left, 0.0
    while node is not weights and node.all_input_nodes:
        if op_name(node) in DROPOUT and argument(node, 2, "training", "train", default=True):
            rate = max(rate, float(argument(node, 1, "p", default=0.5)))
        node = node.all_input_nodes[0]
    return rate


def _place_mask(core: Core, softmax: Softmax, axes: Axes, base: Evaluator) -> None:
    """Set the conversion of the mask, or of a computed bias, to [B, H, S, T]. Raises Miss."""
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
        if len(end) == len(size) and not scores.sinks:
            pointwise = all(op_name(n) in POINTWISE for n in scores.region.nodes)
            core.bias_is_small = plain and pointwise
            core.bias_steps = axes.steps(layout_at(softmax.scores, product, axes, base), target) + gain
        elif same and len(end) == len(size):
            core.bias_steps = steps + gain
        elif scores.sinks or math.prod(size) != math.prod(end):
            raise Miss(
                "the axes of the scores are permuted before the softmax; expected the order of the matmul", core.output
            )
        else:
            core.bias_steps = (("reshape", (_sizes(product.node),)), *steps, *gain)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    sizes = shape(node) or ()
    if sum(not isinstance(n, int) for n in sizes) > 1:
        raise Miss("scores with several symbolic sizes change their axes; expected at most one", node)
    return tuple(n if isinstance(n, int) else -1 for n in sizes)


def _undo_repetition(core: Core, base: Evaluator) -> None:
    """Replace keys and values by those before a kv-head repetition, if execution shows one."""
    heads = core.query.sizes[1]
    key, value = (before_repetition(o, heads, base) for o in (core.key, core.value))
    if key and value and key.heads == value.heads and value.factor == 1:
        core.key, core.value, core.order = key.operand, value.operand, key.order
        core.scale *= key.factor
    groups = [o.sizes[1] for o in (core.key, core.value)]
    if groups[0] != groups[1]:
        raise Miss(f"keys have {groups[0]} heads and values {groups[1]}; expected the same number", core.output)
    if heads % groups[0]:
        raise Miss(f"{heads} query heads on {groups[0]} kv heads; expected a multiple", core.output)
