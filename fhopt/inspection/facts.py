"""Facts of a model's attention, as one object with a JSON form, from which tables and pages are made.

    inspect(loaded, outcome, plan)  ->  Inspection      for `fhopt inspect`, its --json, and reports

All displayed text is made from these values, so pages, tables and JSON agree.

Dimensions: B batch, S new queries (here 1), T cached tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fhopt.errors import FhoptError
from fhopt.fitting.fit_summary import KEY, Evidence, PlanSize, SideEvidence, evidence_of
from fhopt.fitting.loss_interval import CHECKS, LossCheck, checks_of, loss_interval
from fhopt.hardware import cost_model
from fhopt.hardware import devices as hardware_devices
from fhopt.hardware.devices import SHOWN, find_device
from fhopt.models.cache_layers import measured_layers
from fhopt.models.model_facts import decoder_sites, encoder_path
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.plan.cache_size import KEY as LAYERS_KEY
from fhopt.plan.cache_size import CacheLayer, CacheSize, cache_size, compressed_sites
from fhopt.plan.display import mask_words, rope_words, tiers
from fhopt.plan.expected_loss import EXPECTED, calibration_warning, expected_loss
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import QUALITY, QualityCard, quality_card
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan
from fhopt.plan.window import COUNTED_AT

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel


TOKENS = COUNTED_AT  # cached tokens for displayed sizes and times
DTYPE = "bfloat16"  # of full-precision keys and values


@dataclass(frozen=True)
class Formulas:
    """Bytes and operations of attention in a decode step, in B, S, T and T_quantized."""

    bytes: str
    operations: str


@dataclass(frozen=True)
class PaysFrom:
    """Break-even context: cached tokens from which a plan is faster than exact attention, by the roofline model.

    verdict: "from", "always" or "never"; tokens: set for "from".
    """

    device: str
    verdict: str
    tokens: float | None

    @property
    def words(self) -> str:
        """`from 236`, `always` or `never`."""
        return f"from {self.tokens:,.0f}" if self.tokens is not None else self.verdict


@dataclass(frozen=True)
class PlannedSide:
    """Keys or values of a site under a plan: J latent heads of R channels, [bits, channels] of each bit group."""

    side: str
    latent_heads: int
    width: int
    tiers: tuple[tuple[int, int], ...]
    words: str
    bytes: int
    evidence: SideEvidence | None = None


@dataclass(frozen=True)
class PlannedSite:
    """A site under a plan.

    bytes: per quantized token. expected_nats: expected KL in nats/token, None if not measured. page_read: average share
    of pages that a decode step loads, measured in calibration; page_share: at most; 1: all. Formulas and break-even
    contexts count all pages.
    """

    layout: str
    sides: tuple[PlannedSide, ...]
    bytes: int
    ratio: float
    expected_nats: float | None
    page_read: float
    page_share: float
    formulas: Formulas
    pays: tuple[PaysFrom, ...]


@dataclass(frozen=True)
class InspectedSite:
    """A site as text and values.

    exact_bytes: of a token's keys and values, in 16 bits; 0 if the site uses those of another layer. plan: None if the
    cache leaves its layer in full precision.
    """

    site: AttentionSite
    rope: str
    mask: str
    exact_bytes: int
    formulas: Formulas
    plan: PlannedSite | None

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the site, and what follows from them and from the plan."""
        words = {"rope_words": self.rope, "mask_words": self.mask, "exact_bytes": self.exact_bytes}
        planned = asdict(self.plan) if self.plan else None
        return asdict(self.site) | words | {"formulas": asdict(self.formulas), "plan": planned}


@dataclass(frozen=True)
class PlanFacts:
    """The plan as a whole. expected_nats, expected_interval, expected_words: from `ExpectedLoss`.

    warning: set if the plan was fitted to few tokens. mean_tokens: tokens whose mean is subtracted before quantization;
    0: none. segment: tokens per segment to which quantized keys are relative; 0: none. has_trellis: whether some bit
    groups have trellis codes. ratio, bytes_per_token: of the layers that the plan compresses, everything included, at
    `tokens` cached tokens. whole_ratio, cache: of the whole model, including full-precision layers.
    """

    ratio: float
    bytes_per_token: float
    tokens: int
    whole_ratio: float
    cache: CacheSize
    sinks: int
    recent: int
    block: int
    window_bits: int
    mean_tokens: int
    segment: int
    has_trellis: bool
    expected_nats: float | None
    expected_interval: tuple[float, float] | None
    expected_words: str
    warning: str | None
    digest: str
    formulas: Formulas
    curve: tuple[PlanSize, ...]
    provenance: Mapping[str, Any]  # without what other fields show
    card: QualityCard


@dataclass(frozen=True)
class Missed:
    """A candidate that was not rewritten. code: the line of the user's code, "" if tracing did not record it."""

    stage: str
    node: str
    reason: str
    source: str
    reached: str
    code: str = ""


@dataclass(frozen=True)
class Roofline:
    """A device's peak rates, and attention on it with each KV cache, with `tokens` cached tokens."""

    device: str
    bandwidth_gb_s: float
    tflops: float
    tokens: int
    points: tuple[RooflinePoint, ...]


@dataclass(frozen=True)
class RooflinePoint:
    """Attention of one decode step: operations per byte, and the TFLOP/s that the roofline allows."""

    cache: str
    bytes: float
    operations: float
    intensity: float
    tflops: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Inspection:
    """Facts that `site_facts` collects.

    exact_bytes: per token of a 16-bit cache of the whole model, at `cache.tokens` tokens. proofs: certificates of the
    rewrites, as text.
    """

    model: str
    parameters: int
    dtype: str
    sites: tuple[InspectedSite, ...]
    exact_bytes: int
    cache: CacheSize
    formulas: Formulas
    plan: PlanFacts | None
    rooflines: tuple[Roofline, ...]
    missed: tuple[Missed, ...]
    proofs: str = ""

    def site(self, name: str) -> InspectedSite:
        """Return the site called `name`, in full or as tables shorten it. Raises FhoptError if there is none."""
        names = tuple(site.site.name for site in self.sites)
        form = common_form(names)
        for wanted in (names, tuple(short_name(full, form) for full in names)):
            if name in wanted:
                return self.sites[wanted.index(name)]
        first = f", the first is {names[0]!r}" if names else ""
        raise FhoptError(f"site {name!r} does not exist; found {len(names)} sites{first}. Run fhopt inspect MODEL.")

    def as_json(self) -> dict[str, Any]:
        """Return one object for programs."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "totals": {"sites": len(self.sites), "exact_bytes": self.exact_bytes, "missed": len(self.missed)},
            "cache": self.cache.as_json(),
            "formulas": asdict(self.formulas),
            "sites": [site.as_json() for site in self.sites],
            "plan": asdict(self.plan) if self.plan else None,
            "rooflines": [asdict(r) for r in self.rooflines],
            "missed": [asdict(m) for m in self.missed],
            "proofs": self.proofs,
        }


# --------------------------------------------------------------------------------------------------- making it


def site_facts(
    loaded: LoadedModel, outcome: Outcome, plan: LatentPlan | None = None, devices: Sequence[str] = SHOWN,
    tokens: int = TOKENS,
) -> Inspection:  # fmt: skip
    """Collect the facts of the sites of `outcome`, and of `plan` if given.

    devices: for break-even contexts and rooflines. tokens: cached tokens of the rooflines. Raises FhoptError for an
    unknown device and for a plan of another model.
    """
    weights = loaded.weights()
    if plan is not None:
        check_fingerprint(plan, weights, loaded.name)
    parameters = sum({w.data_ptr(): w.numel() for w in weights.values()}.values())
    sites, layers = list(outcome.sites.values()), measured_layers(loaded.module) if loaded.module is not None else ()
    cached = {site.name for site in decoder_sites(sites, encoder_path(loaded.module))}
    return inspect_sites(
        loaded.name, sites, plan, devices, tokens, parameters, _missed(outcome), layers=layers, cached=cached
    )


def inspect_sites(
    model: str, sites: Sequence[AttentionSite], plan: LatentPlan | None = None, devices: Sequence[str] = SHOWN,
    tokens: int = TOKENS, parameters: int = 0, missed: Sequence[Missed] = (),
    layers: Sequence[CacheLayer] = (), cached: Collection[str] | None = None,
) -> Inspection:  # fmt: skip
    """Collect the facts of sites without a graph.

    layers: of the model's cache, as measured; if empty, one per site. cached: names of the sites whose keys and values
    are cached and that a decode step runs; None: all.
    """
    decoding = [site for site in sites if cached is None or site.name in cached]
    targets = [find_device(name) for name in devices]
    costs = {"exact": cost_model.model_cost(decoding, parameters=parameters)}
    if plan is not None:
        costs["plan"] = cost_model.model_cost(decoding, plan, parameters=parameters)
    inspect_one = _Inspector(plan, targets, layers, {site.name for site in decoding})
    size = cache_size(None, tokens, layers, sites=decoding)
    return Inspection(
        model=model,
        parameters=parameters,
        dtype=DTYPE,
        sites=tuple(inspect_one(site) for site in sites),
        exact_bytes=round(size.exact_bytes / tokens),
        cache=size,
        formulas=_formulas(costs["exact"]),
        plan=_plan_facts(plan, costs["plan"], cache_size(plan, tokens, layers)) if plan is not None else None,
        rooflines=tuple(_roofline(costs, device, tokens) for device in targets),
        missed=tuple(missed),
    )


class _Inspector:
    """Collector of facts, site by site, which caches results for sites of equal shapes."""

    def __init__(
        self, plan: LatentPlan | None, devices: Sequence[hardware_devices.Device],
        layers: Sequence[CacheLayer], cached: Collection[str],
    ) -> None:  # fmt: skip
        self.plan, self.devices, self.layers = plan, devices, layers
        self.cached = cached
        self.planned = {p.site.name: p for p in compressed_sites(plan, layers)} if plan else {}
        self.evidence = evidence_of(plan) if plan else None
        self.known: dict[Any, tuple[Formulas, tuple[PaysFrom, ...]]] = {}

    def __call__(self, site: AttentionSite) -> InspectedSite:
        planned = self.planned.get(site.name)
        formulas, _ = self._costs(site, None)
        is_cached = site.name in self.cached and all(x.numbers for x in self.layers if x.has(site.name))
        return InspectedSite(
            site, rope_words(site), mask_words(site), 2 * site.exact_numbers_per_token * is_cached, formulas,
            self._planned(planned) if planned else None,
        )  # fmt: skip

    def _planned(self, plan: SitePlan) -> PlannedSite:
        seen = self.evidence.sites.get(plan.site.name) if self.evidence else None
        formulas, pays = self._costs(plan.site, plan)
        size = plan.token_bytes()
        nats = sum(side.nats for side in seen) if seen else None
        ratio = 2 * plan.site.exact_numbers_per_token / size
        pages = (self.plan.page_read(plan), self.plan.page_share(plan)) if self.plan else (1.0, 1.0)
        return PlannedSite(plan.layout, _planned_sides(plan, seen), size, ratio, nats, *pages, formulas, pays)

    def _costs(self, site: AttentionSite, plan: SitePlan | None) -> tuple[Formulas, tuple[PaysFrom, ...]]:
        rows = cost_model.LatentSizes.planned(plan, cost_model.ITEMSIZES[DTYPE]) if plan else None
        unnamed = replace(site, name="", projections=(), source="", rope=None)  # type: ignore[arg-type]
        key = (repr(unnamed), rows)
        if key not in self.known:
            exact = cost_model.site_cost(site)
            latent = self._latent(site, plan) if plan else None
            pays = tuple(_pays(exact, latent, device) for device in self.devices) if latent else ()
            self.known[key] = _formulas(latent or exact), pays
        return self.known[key]

    def _latent(self, site: AttentionSite, plan: SitePlan) -> cost_model.Cost:
        whole = self.plan
        assert whole is not None
        return cost_model.site_cost(
            site, plan, open_tokens=whole.sinks + whole.recent + whole.block // 2,
            window_bits=whole.window_bits, sinks=whole.sinks,
        )  # fmt: skip


def _pays(exact: cost_model.Cost, latent: cost_model.Cost, device: hardware_devices.Device) -> PaysFrom:
    result = cost_model.break_even(exact, latent, device)
    return PaysFrom(device.name, result.verdict, result.tokens)


def _planned_sides(plan: SitePlan, seen: Sequence[SideEvidence] | None) -> tuple[PlannedSide, ...]:
    named: list[tuple[str, SidePlan]] = (
        [("keys and values", plan.key)] if plan.is_shared else [("keys", plan.key), ("values", plan.value)]
    )
    return tuple(
        PlannedSide(
            name, side.groups, side.width, tuple((t.bits, t.width) for t in side.tiers), tiers(side),
            side.token_bytes(), seen[i] if seen else None,
        )
        for i, (name, side) in enumerate(named)
    )  # fmt: skip


def _formulas(cost: cost_model.Cost) -> Formulas:
    return Formulas(cost_model.pretty(cost.bytes), cost_model.pretty(cost.operations))


_SHOWN = (KEY, "weights", QUALITY, LAYERS_KEY, CHECKS, EXPECTED)


def _plan_facts(plan: LatentPlan, planned: cost_model.Cost, size: CacheSize) -> PlanFacts:
    seen: Evidence | None = evidence_of(plan)
    expected = expected_loss(plan)
    provenance = {name: value for name, value in plan.provenance.items() if name not in _SHOWN}
    return PlanFacts(
        ratio=size.compressed_ratio,
        bytes_per_token=size.compressed_bytes / size.tokens,
        tokens=size.tokens,
        whole_ratio=size.ratio,
        cache=size,
        sinks=plan.sinks,
        recent=plan.recent,
        block=plan.block,
        window_bits=plan.window_bits,
        mean_tokens=plan.mean_tokens,
        segment=plan.segment,
        has_trellis=plan.has_trellis,
        expected_nats=expected.nats if expected else None,
        expected_interval=expected.interval if expected else None,
        expected_words=expected.words if expected else "unknown",
        warning=calibration_warning(plan),
        digest=plan.digest(),
        formulas=_formulas(planned),
        curve=_checked_curve(seen.curve if seen else (), checks_of(plan.provenance.get(CHECKS, ()))),
        provenance=provenance,
        card=quality_card(plan),
    )


def _checked_curve(curve: Sequence[PlanSize], checks: Sequence[LossCheck]) -> tuple[PlanSize, ...]:
    """Return plans of other sizes, with the KL that follows from measurements if there are any."""
    if not checks:
        return tuple(curve)
    return tuple(replace(size, nats=loss_interval(checks, size.nats)[0]) for size in curve)


def _roofline(costs: Mapping[str, cost_model.Cost], device: hardware_devices.Device, tokens: int) -> Roofline:
    points = []
    for name, one in costs.items():
        figures = one.on(device, tokens)
        points.append(
            RooflinePoint(
                name, figures.bytes, figures.operations, figures.operations / figures.bytes,
                figures.operations / figures.attention_seconds / 1e12, figures.attention_seconds, figures.bound,
            )
        )  # fmt: skip
    peak = device.matrix_tflops if costs["exact"].itemsize == 2 else device.vector_tflops
    return Roofline(device.name, device.bandwidth_gb_s, peak, tokens, tuple(points))


def _missed(outcome: Outcome) -> list[Missed]:
    nodes = {node.name: node for node in outcome.program.graph.nodes}
    return [Missed(m.stage, m.node, m.reason, m.source, m.reached, _code(nodes.get(m.node), m)) for m in outcome.missed]


def _code(node: Any, missed: Explanation) -> str:
    """Return the text of the line that `missed.source` names, from the node's stack trace."""
    trace = (node.meta.get("stack_trace") or "") if node is not None else ""
    frames = re.findall(r'File "[^"]+", line (\d+)[^\n]*\n([^\n]*)', trace)
    return next((text.strip() for line, text in reversed(frames) if missed.source.endswith(f":{line}")), "")


@functools.cache
def common_form(names: tuple[str, ...]) -> tuple[str, str]:
    """Return the common (prefix, suffix) of all names, cut at dots; ("", "") for one name."""
    if len(names) < 2:
        return "", ""
    split = [name.split(".") for name in names]
    least = min(map(len, split)) - 1
    head = next((i for i in range(least) if len({s[i] for s in split}) > 1), least)
    tail = next((i for i in range(least - head) if len({s[-1 - i] for s in split}) > 1), least - head)
    return ".".join(split[0][:head]), ".".join(split[0][len(split[0]) - tail :])


def short_name(name: str, form: tuple[str, str]) -> str:
    """Return a name without the prefix and suffix of `common_form`."""
    start, end = form
    cut = name[len(start) + 1 :] if start else name
    return cut[: len(cut) - len(end) - 1] if end else cut
