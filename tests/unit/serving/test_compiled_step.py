"""Native decode steps in one call, against torch operations on the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_blocks import Engine, random_tokens
from hand_plans import CODED, in_segments, random_plan
from needs import needs_compiler
from torch import Tensor

from fhopt import codegen
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan
from fhopt.serving.block_sizes import BlockSizes

SIZES = BlockSizes(12, 4, 24)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # torch rounds between operations
FLIPS = 0.001  # share of bytes: latents near a rounding boundary, summed in another order

RINGS = (BitGroup(4, 8, -0.031), BitGroup(4, 8, -0.031))
pytestmark = needs_compiler


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def plan_of(layout: str = "head", tiers: Any = CODED, **options: Any) -> LatentPlan:
    """A handmade float32 plan, as plans of models are. layout "joint": one latent for all heads of a side."""
    plan = random_plan("head" if layout == "joint" else layout, tiers, **options)

    def single(side: SidePlan) -> SidePlan:
        encode = side.encode.float()
        if layout == "joint":
            encode = torch.cat(list(encode), 1).unsqueeze(0)  # [1, R, G*D]
        return SidePlan(encode, side.decode.float(), side.tiers)

    sites = tuple(replace(s, key=single(s.key), value=single(s.value)) for s in plan.sites)
    return replace(plan, sites=sites)


PLANS: dict[str, LatentPlan] = {
    "a latent for each head": plan_of(),
    "one latent for the heads of a side": plan_of("joint"),
    "one latent for keys and values": plan_of("input", window_bits=8),
    "means, window of 8 bits": plan_of(mean_tokens=12, window_bits=8),
    "means, one latent": plan_of("joint", mean_tokens=12),
    "trellis codes": plan_of("joint", RINGS, mean_tokens=12, window_bits=8),
    "not quantized": plan_of(tiers=()),
    "relative to segments": in_segments(plan_of("joint", mean_tokens=12, window_bits=8)),
    "relative to segments, no means": in_segments(plan_of(sinks=5, recent=7, block=16)),
    "no sinks": plan_of(sinks=0, window_bits=8),
    "odd sinks": plan_of("joint", sinks=5, recent=7, block=16),
}


def engines(plan: LatentPlan, dtype: torch.dtype, **options: Any) -> tuple[Engine, Engine]:
    """Make two engines with the same blocks, one of them compiled."""
    codegen.register_kernels()
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(Engine(plan, SIZES, dtype=dtype, **options))
    made[1].layer.compile()
    assert made[1].layer.compiled is not None
    return made[0], made[1]


def close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(outputs, expected, strict=True):
        assert float((a - b).abs().max()) < ROUNDING[b.dtype] * float(b.abs().max())


def same_blocks(engine: Engine, other: Engine) -> None:
    for a, b in zip(engine.caches, other.caches, strict=True):
        assert float((a != b).float().mean()) <= FLIPS


CASES = [(name, torch.float32) for name in PLANS] + [
    (name, dtype)
    for name in ("means, one latent", "not quantized", "relative to segments")
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_it_agrees_with_torch_operations(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    torch.manual_seed(0)
    tokens = [tuple(x.to(dtype) for x in random_tokens(plan, 180)) for _ in range(3)]
    reference, compiled = engines(plan, dtype)
    lengths = [150, 1, 70]  # the second has no quantized tokens at first
    spans = [(0, length) for length in lengths]
    for step in range(20):
        expected = reference.step(tokens, spans)  # type: ignore[arg-type]
        close(compiled.step(tokens, spans), expected)  # type: ignore[arg-type]
        spans = [(length + step, length + step + 1) for length in lengths]
    if plan.sites[0].key.tiers:
        same_blocks(compiled, reference)


def test_sequences_with_one_new_token_are_mixed_with_others() -> None:
    plan = PLANS["means, window of 8 bits"]
    tokens = [random_tokens(plan, 90) for _ in range(3)]
    reference, compiled = engines(plan, torch.float32)
    for spans in ([(0, 30), (0, 10), (0, 14)], [(30, 31), (10, 60), (14, 15)], [(31, 32), (60, 61), (15, 90)]):
        close(compiled.step(tokens, spans), reference.step(tokens, spans))
    same_blocks(compiled, reference)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", ["head", "joint"])
def test_long_sequences_are_processed_in_ranges(layout: str) -> None:
    plan = plan_of(layout, window_bits=8, mean_tokens=12)
    tokens = [random_tokens(plan, 6005), random_tokens(plan, 205)]
    reference, compiled = engines(plan, torch.float32, most=6016, count=2)
    compiled.caches = reference.caches
    spans = [(0, 6000), (0, 200)]
    for step in range(2):
        expected = reference.step(tokens, spans)
        if step:
            close(compiled.step(tokens, spans), expected)
        spans = [(stop, stop + 1) for _, stop in spans]


def test_tokens_without_a_block_are_not_written() -> None:
    plan = PLANS["one latent for the heads of a side"]
    tokens = random_tokens(plan, 40)
    _, compiled = engines(plan, torch.float32)
    compiled.step([tokens], [(0, 39)])
    caches = compiled.caches_of([0, 1], [40], kept=40)
    before = compiled.caches[1].clone()
    query, key, value = (x[39:] for x in tokens)
    compiled.layer.write_and_attend(caches, query, key, value, query.new_empty((1, 4, 8)))
    assert torch.equal(compiled.caches[1], before)


def test_other_dtypes_are_left_to_torch() -> None:
    _, compiled = engines(PLANS["a latent for each head"], torch.float32)
    step = compiled.layer.compiled
    caches = compiled.caches_of([0, 1], [40])
    query = torch.zeros(1, 4, 16)
    assert step is not None and step.serves(caches, query)
    assert not step.serves(caches, query.bfloat16())
    assert not step.serves(compiled.caches_of([0, 2], [40]), query)  # no sequence has one new token


def test_the_step_that_computes_means_is_written_by_torch() -> None:
    _, compiled = engines(PLANS["means, window of 8 bits"], torch.float32)
    step = compiled.layer.compiled
    assert step is not None
    assert step.writes(compiled.caches_of([0, 1], [40]).batch)
    assert not step.writes(compiled.caches_of([0, 1], [16]).batch)  # 4 sinks and 12 tokens of the mean
    assert not step.writes(compiled.caches_of([0, 1], [3]).batch)  # a sink
    assert not step.writes(compiled.caches_of([0, 1, 4], [40, 30]).batch)
