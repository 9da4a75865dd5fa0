"""Cost model of a decode step, full precision versus latents: formulas for bytes and operations.

    exact    bytes B T G (Dk + Dv) itemsize        operations 2 B H S T (Dk + Dv)
    latents  bytes B T_quantized (rows + scales)   operations 2 B H S T_quantized (R_K + R_V), one per unpacked value
    window   the exact formulas, for the T - T_quantized tokens of sinks and recent window; in an 8-bit window, all but
             the sinks count the bytes of their quantized values and scales, and one operation per value
    bases    bytes encode and decode, once a step  operations absorb, expand, and encode of the new tokens
    weights  bytes parameters itemsize, once       operations 2 B S parameters

T_quantized is the number of quantized tokens. Time follows the roofline model: each line takes max(bytes / bandwidth,
operations / throughput), one after the other. The results are bounds, because devices are described by peak rates:
kernels reach a part of these, and softmax, launches and partly filled matrix tiles are not counted. Every parameter
counts as loaded once per step, including those of idle experts. For cross attention T is the length of the encoder's
output.

Latents shared by keys and values count once in bytes and unpacked values, and twice in matmuls.

The recent window holds `recent` to `recent + block` tokens. Formulas use the middle, T_quantized = max(0, T - sinks -
recent - block // 2); `LatentPlan.cache_bytes` counts whole blocks. They differ by at most half a block.

Roofline: Williams, Waterman, Patterson 2009. Dimensions: B batch, H query heads, G kv heads, S new queries, T cached
tokens, D head size, J latent heads, R width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from fhopt.errors import FhoptError
from fhopt.hardware.devices import Device
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan
from fhopt.plan.window import DEFAULT_WINDOW, RECENT_PART

BATCH, QUERIES, TOKENS = sympy.symbols("B S T", positive=True)
QUANTIZED = sympy.Symbol("T_quantized", nonnegative=True)
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
RATIOS = (2, 4, 8)  # of hypothetical caches, without a plan
DEFAULT_OPEN_TOKENS = DEFAULT_WINDOW.sinks + DEFAULT_WINDOW.recent + DEFAULT_WINDOW.block // 2


# --------------------------------------------------------------------------------------------------- formulas


@dataclass(frozen=True)
class Work:
    """An operation of a decode step: expressions in B, S, T and T_quantized, one pass over `bytes`."""

    name: str
    bytes: Any
    operations: Any
    conversions: Any = sympy.S.Zero


@dataclass(frozen=True)
class Figures:
    """Evaluated cost of a decode step. bound: what limits most of the attention's time, "memory" or "arithmetic"."""

    bytes: float
    operations: float
    attention_seconds: float
    step_seconds: float
    bound: str
    fits: bool  # whether weights and KV cache fit into the device's memory


@dataclass(frozen=True)
class Cost:
    """Formulas of one site or of a model: `works` of attention, and the model's `weights`.

    open_tokens: tokens in attention sinks and recent window; 0 for a full-precision cache.
    """

    works: tuple[Work, ...]
    itemsize: int
    open_tokens: int = 0
    weights: Work = Work("weights", sympy.S.Zero, sympy.S.Zero)

    @property
    def bytes(self) -> Any:
        """Bytes that attention loads per step."""
        return sympy.Add(*(w.bytes for w in self.works))

    @property
    def operations(self) -> Any:
        """Operations of attention per step, including conversions of quantized values."""
        return sympy.Add(*(w.operations + w.conversions for w in self.works))

    def time(self, device: Device) -> Any:
        """Return the seconds of attention per step as an expression."""
        terms = []
        for work, count in Counter(self.works).items():
            seconds = device.roofline(work.bytes, work.operations, work.conversions, self.itemsize)
            terms.append(count * sympy.Max(*seconds))
        return sympy.Add(*terms)

    def number(self, expression: Any, tokens: int, batch: int = 1, queries: int = 1) -> float:
        """Evaluate an expression of this cost."""
        quantized = max(0, tokens - self.open_tokens)
        return float(expression.subs({TOKENS: tokens, QUANTIZED: quantized, BATCH: batch, QUERIES: queries}))

    def on(self, device: Device, tokens: int, batch: int = 1, queries: int = 1) -> Figures:
        """Evaluate the step on a device, after `tokens` cached tokens of each of `batch` sequences."""
        size = operations = seconds = in_memory = 0.0
        for work, count in Counter(self.works).items():
            parts = (work.bytes, work.operations, work.conversions)
            read, computed, unpacked = (self.number(p, tokens, batch, queries) for p in parts)
            memory, arithmetic = device.roofline(read, computed, unpacked, self.itemsize)
            size, operations = size + count * read, operations + count * (computed + unpacked)
            seconds += count * max(memory, arithmetic)
            in_memory += count * memory if memory >= arithmetic else 0.0
        held = self.number(self.weights.bytes, tokens, batch, queries)
        computed = self.number(self.weights.operations, tokens, batch, queries)
        step = seconds + max(device.roofline(held, computed, 0, self.itemsize))
        bound = "memory" if 2 * in_memory >= seconds else "arithmetic"
        return Figures(size, operations, seconds, step, bound, held + size <= 1e9 * device.memory_gb)


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a site's latents, per token over all latent heads, and of its bases."""

    key_width: int  # R_K
    value_width: int  # R_V
    token_bytes: int
    quantized: int  # values to unpack
    encode: int  # elements of the encoder matrices
    decode: int

    @staticmethod
    def planned(plan: SitePlan, itemsize: int) -> LatentSizes:
        """Compute the sizes of a plan."""
        sides = (plan.key, plan.value)
        encode = sum(int(side.encode.numel()) for side in sides)
        decode = sum(int(side.decode.numel()) for side in sides)
        stored = sides[:1] if plan.is_shared else sides
        quantized = sum(side.groups * t.width for side in stored for t in side.tiers if t.bits < 16)
        return LatentSizes(plan.key.width, plan.value.width, plan.token_bytes(itemsize), quantized, encode, decode)

    @staticmethod
    def divided(site: AttentionSite, ratio: int, itemsize: int) -> LatentSizes:
        """Compute hypothetical sizes: a latent head per kv head, full width, `ratio` times fewer bytes (rounded up)."""
        numbers, bases = site.exact_numbers_per_token, site.kv_heads * (site.key_dim**2 + site.value_dim**2)
        size = -(-numbers * itemsize // ratio)
        return LatentSizes(site.key_dim, site.value_dim, size, numbers if ratio > 1 else 0, bases, bases)


def site_cost(
    site: AttentionSite, latents: SitePlan | LatentSizes | None = None, *, open_tokens: int = 0, itemsize: int = 2,
    window_bits: int = 16, sinks: int = 0,
) -> Cost:  # fmt: skip
    """Compute the cost of one site: exact without `latents`; a very short sliding window is always exact.

    itemsize: bytes per full-precision element and per element of the bases. window_bits: of a plan's recent window; the
    first `sinks` tokens are exact.
    """
    if latents is None or (site.slides and not site.sliding):
        return Cost((_exact(site, sympy.Min(TOKENS, site.window) if site.slides else TOKENS, itemsize),), itemsize)
    sizes = LatentSizes.planned(latents, itemsize) if isinstance(latents, SitePlan) else latents
    per_query = 2 * BATCH * site.heads * QUERIES
    quantized = Work(
        "latents",
        BATCH * QUANTIZED * sizes.token_bytes,
        per_query * QUANTIZED * (sizes.key_width + sizes.value_width),
        BATCH * QUANTIZED * sizes.quantized,
    )
    bases = Work(
        "bases",
        sympy.Integer((sizes.encode + sizes.decode) * itemsize),
        per_query * (site.key_dim * sizes.key_width + site.value_dim * sizes.value_width)
        + 2 * BATCH * QUERIES * sizes.encode,
    )
    window: tuple[Work, ...] = (_exact(site, TOKENS - QUANTIZED, itemsize),)
    if isinstance(latents, SitePlan) and window_bits < 16:
        window = _rounded_window(latents, window_bits, sinks, itemsize)
    works = (*window, quantized, bases)
    return Cost(tuple(_within(work, site.sliding) for work in works) if site.sliding else works, itemsize, open_tokens)


def _within(work: Work, sliding: int) -> Work:
    """Limit a work to the tokens of a sliding window."""
    least = {TOKENS: sympy.Min(TOKENS, sliding), QUANTIZED: sympy.Min(QUANTIZED, sliding - sliding // RECENT_PART)}
    parts = [sympy.sympify(part).subs(least) for part in (work.bytes, work.operations, work.conversions)]
    return Work(work.name, *parts)


def _rounded_window(plan: SitePlan, window_bits: int, sinks: int, itemsize: int) -> tuple[Work, ...]:
    """Compute the work of sinks and of a recent window that is rounded to `window_bits`."""
    first = sympy.Min(TOKENS - QUANTIZED, sinks)
    rounded = BATCH * (TOKENS - QUANTIZED - first)
    products = _exact(plan.site, TOKENS - QUANTIZED - first, itemsize).operations
    numbers, size = plan.site.exact_numbers_per_token, plan.window_bytes(window_bits, itemsize)
    return _exact(plan.site, first, itemsize), Work("window", rounded * size, products, rounded * numbers)


def _exact(site: AttentionSite, tokens: Any, itemsize: int) -> Work:
    operations = 2 * BATCH * site.heads * QUERIES * tokens * (site.key_dim + site.value_dim)
    return Work("exact", BATCH * tokens * site.exact_numbers_per_token * itemsize, operations)


def model_cost(
    sites: Iterable[AttentionSite], plan: LatentPlan | None = None, *, parameters: int = 0, itemsize: int = 2
) -> Cost:
    """Compute the cost of all sites, those of `plan` on latents, and of `parameters` weights of `itemsize` bytes.

    Raises FhoptError if the plan has a site that is not among `sites`.
    """
    planned = {p.site.name: p for p in plan.sites} if plan else {}
    all_sites = list(sites)
    unknown = set(planned) - {s.name for s in all_sites}
    if unknown:
        raise FhoptError(
            f"the plan has {len(unknown)} sites that the model does not have, such as {min(unknown)!r}; "
            f"expected only sites among the model's {len(all_sites)}. Fit a plan for this model: fhopt fit "
            "MODEL."
        )
    if plan is None:
        return _sum([site_cost(s, itemsize=itemsize) for s in all_sites], 0, parameters, itemsize)
    window: dict[str, int] = dict(window_bits=plan.window_bits, sinks=plan.sinks, itemsize=itemsize)
    costs = [site_cost(s, planned.get(s.name), **window) for s in all_sites]
    return _sum(costs, plan.sinks + plan.recent + plan.block // 2, parameters, itemsize)


def hypothetical_cost(sites: Iterable[AttentionSite], ratio: int, *, parameters: int = 0, itemsize: int = 2) -> Cost:
    """Compute the cost with hypothetical latents of `ratio` times fewer bytes, and a window of default size."""
    window: dict[str, int] = dict(window_bits=DEFAULT_WINDOW.bits, sinks=DEFAULT_WINDOW.sinks, itemsize=itemsize)
    costs = [site_cost(s, LatentSizes.divided(s, ratio, itemsize), **window) for s in sites]
    return _sum(costs, DEFAULT_OPEN_TOKENS, parameters, itemsize)


def _sum(costs: Sequence[Cost], open_tokens: int, parameters: int, itemsize: int) -> Cost:
    works = tuple(w for c in costs for w in c.works)
    weights = Work("weights", sympy.Integer(parameters * itemsize), 2 * BATCH * QUERIES * parameters)
    return Cost(works, itemsize, open_tokens, weights)


# --------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class BreakEven:
    """Break-even context: the length from which latents are faster than exact keys and values.

    verdict: "from" (`tokens`, and `formula` in B), "always" (latents are never slower) or "never".
    """

    verdict: str
    tokens: float | None = None
    formula: Any = None


def break_even(exact: Cost, latent: Cost, device: Device, batch: int = 1) -> BreakEven:
    """Compute the context at which attention takes equally long with both, by the roofline model.

    Past the recent window both times are linear in T_quantized; at its end they differ by the time of the bases:

        T = open tokens + time of the bases / (time of an exact token - time of a quantized token)

    If an 8-bit window has already saved more than that, they cross within it, by a similar formula.
    """
    gap, window = (latent.time(device) - exact.time(device)).subs(QUERIES, 1), latent.open_tokens
    start = gap.subs({TOKENS: window, QUANTIZED: 0})
    slope = sympy.expand(gap.subs({TOKENS: window + 1, QUANTIZED: 1}) - start)
    if slope.subs(BATCH, batch) >= 0:
        return BreakEven("never")
    if start.subs(BATCH, batch) <= 0:
        slope = sympy.expand(start - gap.subs({TOKENS: window - 1, QUANTIZED: 0}))
        if slope.subs(BATCH, batch) >= 0:
            return BreakEven("always")
    formula = latent.open_tokens - start / slope
    tokens = float(formula.subs(BATCH, batch))
    later = {TOKENS: math.ceil(tokens) + 1, QUANTIZED: max(0, math.ceil(tokens) + 1 - window), BATCH: batch}
    if gap.subs(later) > 0:  # a sliding window ends before that
        return BreakEven("never")
    return BreakEven("from", tokens, formula)


def upper_bound(weights: float, cache: float, ratio: float = math.inf) -> float:
    """Compute the max speedup of a step whose cache is `ratio` times smaller: (W + KV) / (W + KV/c).

    weights, cache: bytes loaded in a step, or seconds. Infinite for no weights and an infinite ratio.
    """
    rest = weights + cache / ratio
    return (weights + cache) / rest if rest else math.inf


@dataclass(frozen=True)
class CostRow:
    """A cache on a device at a context, compared with the full-precision cache there."""

    device: str
    tokens: int
    cache: str
    figures: Figures
    attention_speedup: float
    step_speedup: float
    pays: str  # `BreakEven.verdict`; "" for the full-precision cache
    pays_from: float | None


@dataclass(frozen=True)
class SpeedupBound:
    """The `upper_bound` of a cache by bytes; None if infinite. "none" is a cache of no bytes."""

    tokens: int
    cache: str
    step_speedup: float | None


@dataclass(frozen=True)
class CostComparison:
    """Results that `fhopt cost` shows."""

    rows: tuple[CostRow, ...]
    bounds: tuple[SpeedupBound, ...]


def compare(
    costs: Mapping[str, Cost], devices: Iterable[Device], tokens: Sequence[int], batch: int = 1
) -> CostComparison:
    """Compare costs by name, one of them "exact", on each device and at each context."""
    rows, bounds, exact = [], [], costs["exact"]
    for device in devices:
        pays = {n: break_even(exact, c, device, batch) for n, c in costs.items() if c is not exact}
        for count in tokens:
            base = exact.on(device, count, batch)
            for name, cost in costs.items():
                now, paying = cost.on(device, count, batch), pays.get(name, BreakEven(""))
                faster = base.attention_seconds / now.attention_seconds, base.step_seconds / now.step_seconds
                rows.append(CostRow(device.name, count, name, now, *faster, paying.verdict, paying.tokens))
    for count in tokens:
        weights, cache = (exact.number(e, count, batch) for e in (exact.weights.bytes, exact.bytes))
        rest = {n: sum(c.number(w.bytes, count, batch) for w in c.works if w.name != "bases") for n, c in costs.items()}
        ratios = {n: cache / size for n, size in rest.items() if n != "exact"} | {"none": math.inf}
        for name, ratio in ratios.items():
            bound = upper_bound(weights, cache, ratio)
            bounds.append(SpeedupBound(count, name, bound if bound < math.inf else None))
    return CostComparison(tuple(rows), tuple(bounds))


def pretty(expression: Any) -> str:
    """Format an expression on one line."""
    text: str = sympy.pretty(expression, wrap_line=False, use_unicode=True)
    return text
