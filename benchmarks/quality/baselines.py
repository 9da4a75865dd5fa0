"""The methods that plans are compared with, by family, and the calibration statistics that they need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, arange, zeros

from benchmarks.quality.measurement import COUNTED_AT, progress_bar
from benchmarks.quality.methods.calibration_moments import (
    AttentionMoments,
    TokenMoments,
    attention_moments,
    head_moments,
    token_moments,
)
from benchmarks.quality.methods.evicting_caches import Eviction, ExpectedAttention, Scorer, SnapKV, share_for
from benchmarks.quality.methods.float_codecs import NVFP4_BLOCK, Fp8, Nvfp4
from benchmarks.quality.methods.joint_caches import JointBlocks
from benchmarks.quality.methods.kvtc import Components, Kvtc, kvtc
from benchmarks.quality.methods.quantized_caches import (
    Baseline,
    CacheShape,
    Codec,
    Kivi,
    QuantizedBlocks,
    RoundToNearest,
    Schedule,
    Transformers,
)
from benchmarks.quality.methods.rotary_embedding import Rotary
from benchmarks.quality.methods.rotated_codecs import BLOCK, GgmlBlocks, QuaRot, TurboQuant, oscar
from benchmarks.quality.methods.transform_codecs import aatc, low_rank, rank_for
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan

QUICK = ("kivi", "low-rank")
TRANSFORM_BITS = (4, 3, 2, 1.5)


@dataclass(frozen=True)
class LeftOut:
    """A method that cannot run here, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} is left out: {self.reason}"


ABSENT = (
    LeftOut(
        "kvpress",
        "its release 0.5.5 needs transformers below 5.3, this project 5.20. snapkv and expected-attention are written "
        "after their papers instead.",
    ),
    LeftOut("KVzap", "it needs a surrogate that is trained for each model."),
)


@dataclass(frozen=True, eq=False)
class CalibratedModel:
    """A model, its plans by ratio, and its calibration tokens; calibration statistics are collected on demand."""

    model: Any
    plans: dict[float, LatentPlan]
    read_ids: Callable[[], Tensor]

    @property
    def schedule(self) -> Schedule:
        """The full-precision tokens of the plans."""
        plan = next(iter(self.plans.values()))
        return Schedule(plan.sinks, plan.recent, plan.block)

    @cached_property
    def shape(self) -> CacheShape:
        """The shape of the model's cache."""
        return CacheShape.of(self.model)

    @cached_property
    def ids(self) -> Tensor:
        """Calibration tokens [N, T]."""
        return self.read_ids()

    def _collected(self, collect: Callable[..., Any], what: str) -> Any:
        with progress_bar(what) as bar:
            return collect(self.model, self.ids, self.schedule.sinks, lambda done: bar(done, len(self.ids)))

    @cached_property
    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """Second moments of keys and values of each head."""
        found: list[tuple[Tensor, Tensor]] = self._collected(head_moments, "second moments")
        return found

    @cached_property
    def attention(self) -> list[AttentionMoments]:
        """The effect of errors on attention in each head."""
        found: list[AttentionMoments] = self._collected(attention_moments, "moments of attention")
        return found

    @cached_property
    def tokens(self) -> tuple[TokenMoments, TokenMoments]:
        """Covariances of the keys and the values of all heads."""
        found: tuple[TokenMoments, TokenMoments] = self._collected(token_moments, "moments of tokens")
        return found

    @cached_property
    def coders(self) -> list[Kvtc]:
        """KVTC without its entropy coder, in all sizes."""
        keys, values = (Components.of(side) for side in self.tokens)
        return [kvtc(keys, values, bits) for bits in TRANSFORM_BITS]

    @cached_property
    def rotary_size(self) -> int:
        """The number of rotated channels per head."""
        found = Rotary.of(self.model).angles(zeros(1), arange(1))
        return 0 if found is None else found[0].shape[-1]


Offer = Iterable[Baseline | LeftOut]


def _blocks(field: CalibratedModel, codecs: Iterable[Codec]) -> list[Baseline | LeftOut]:
    return [QuantizedBlocks(codec, field.schedule) for codec in codecs]


def _kivi_of_128(field: CalibratedModel) -> Offer:
    """Return KIVI with a window of 128 tokens and 4 attention sinks, regardless of the plans."""
    return [QuantizedBlocks(Kivi(bits, family="kivi-w128"), Schedule(sinks=4, recent=128)) for bits in (4, 3, 2)]


def _transformers(field: CalibratedModel, backend: str) -> Offer:
    for bits in (4, 2):
        baseline = Transformers(backend, bits, field.schedule.first_step)
        yield baseline if baseline.missing is None else LeftOut(baseline.name, baseline.missing)


def _low_rank(field: CalibratedModel) -> Offer:
    ranks = {rank_for(ratio, field.shape, field.schedule, COUNTED_AT) for ratio in field.plans}
    return _blocks(field, [low_rank(field.heads, rank) for rank in sorted(ranks, reverse=True)])


def _ggml(field: CalibratedModel, bits: int, rotated: bool = False) -> Offer:
    codec = GgmlBlocks(bits, rotated)
    if field.shape.kv_heads * field.shape.head_dim % BLOCK:
        return [LeftOut(codec.name, f"blocks of {BLOCK} numbers do not divide the heads of a layer.")]
    return _blocks(field, [codec])


def _nvfp4(field: CalibratedModel) -> Offer:
    if field.shape.head_dim % NVFP4_BLOCK:
        return [LeftOut("nvfp4", f"blocks of {NVFP4_BLOCK} numbers do not divide a head of {field.shape.head_dim}.")]
    return _blocks(field, [Nvfp4(field.schedule.block)])


def _oscar(field: CalibratedModel) -> Offer:
    return _blocks(field, [oscar([(layer.queries, layer.scored_values) for layer in field.attention])])


def _aatc(field: CalibratedModel) -> Offer:
    for bits in TRANSFORM_BITS:
        yield JointBlocks(aatc(field.tokens, field.attention, field.shape, bits, field.rotary_size), field.schedule)


def _kvtc(field: CalibratedModel) -> Offer:
    return [JointBlocks(coder, field.schedule) for coder in field.coders]


def _kvtc_deflate(field: CalibratedModel) -> Offer:
    samples = (field.tokens[0].sample, field.tokens[1].sample)
    return [JointBlocks(coder.deflated(samples), field.schedule) for coder in field.coders]


def _eviction(field: CalibratedModel, family: str, scorer: Callable[[Rotary, Schedule], Scorer]) -> Offer:
    for ratio, plan in field.plans.items():
        share = share_for(plan.cache_bytes(COUNTED_AT), field.shape, field.schedule, COUNTED_AT)
        if share is None:
            yield LeftOut(f"{family}-{ratio:g}x", "attention sinks and residual window alone are larger than the plan.")
        else:
            yield Eviction(family, scorer, field.schedule, share, ratio)


FAMILIES: dict[str, Callable[[CalibratedModel], Offer]] = {
    "kivi": lambda field: _blocks(field, [Kivi(bits) for bits in (4, 3, 2)]),
    "rtn": lambda field: _blocks(field, [RoundToNearest(bits) for bits in (8, 4)]),
    "quanto": lambda field: _transformers(field, "quanto"),  # quantized_caches.PACKAGES
    "hqq": lambda field: _transformers(field, "hqq"),
    "low-rank": _low_rank,
    "fp8": lambda field: _blocks(field, [Fp8(field.schedule.block)]),
    "nvfp4": _nvfp4,
    "q8_0": lambda field: _ggml(field, 8),
    "q4_0": lambda field: _ggml(field, 4),
    "q4_0-hadamard": lambda field: _ggml(field, 4, rotated=True),
    "quarot": lambda field: _blocks(field, [QuaRot(bits) for bits in (4, 3, 2)]),
    "turboquant": lambda field: _blocks(field, [TurboQuant(bits) for bits in (4, 3.5, 3, 2.5, 2)]),
    "turboquant-ip": lambda field: _blocks(field, [TurboQuant(bits, inner_product=True) for bits in (4, 3, 2)]),
    "oscar": _oscar,
    "aatc": _aatc,
    "kvtc": _kvtc,
    "kvtc-deflate": _kvtc_deflate,
    "snapkv": lambda field: _eviction(field, "snapkv", SnapKV),
    "expected-attention": lambda field: _eviction(field, "expected-attention", ExpectedAttention),
    "kivi-w128": _kivi_of_128,
}


def check_families(wanted: Iterable[str]) -> set[str]:
    """Return the families of the wanted names. Raises FhoptError for a name that begins with no family."""
    named: set[str] = set()
    for name in wanted:
        families = {family for family in FAMILIES if name == family or name.startswith(f"{family}-")}
        if not families:
            raise FhoptError(f"unknown method {name!r}; choose from the families {', '.join(FAMILIES)}.")
        named |= families
    return named


def offered(field: CalibratedModel, wanted: Collection[str], quick: bool) -> tuple[list[Baseline], list[LeftOut]]:
    """Return the methods selected by family or name, and those that cannot run.

    Without a selection: all, or, in a quick run, two families. Raises FhoptError for an unknown name.
    """
    named = check_families(wanted)
    families = [f for f in FAMILIES if f in (named if wanted else QUICK if quick else FAMILIES)]
    found = [baseline for family in families for baseline in FAMILIES[family](field)]
    methods = [baseline for baseline in found if not isinstance(baseline, LeftOut)]
    left_out = [baseline for baseline in found if isinstance(baseline, LeftOut)]
    _check_names(wanted, methods, left_out)
    if wanted:
        return [baseline for baseline in methods if {baseline.family, baseline.name} & set(wanted)], left_out
    if not quick:
        return methods, left_out + list(ABSENT)
    quick_ones = [baseline for baseline in methods if baseline.family != "kivi" or baseline.name == "kivi-2bit"]
    return quick_ones, [LeftOut("every other method", "the run is a quick one. Pick some with --baseline.")]


def _check_names(wanted: Iterable[str], methods: Sequence[Baseline], left_out: Sequence[LeftOut]) -> None:
    sizes = [baseline.name for baseline in methods]
    known = {*FAMILIES, *sizes, *(baseline.family for baseline in methods), *(baseline.name for baseline in left_out)}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise FhoptError(f"unknown size {unknown[0]!r}; its family has {', '.join(sizes) or 'none here'}.")
