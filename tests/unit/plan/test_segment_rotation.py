"""Segment-relative keys: their rotation, and attention by rotated queries."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hand_plans import CODED, in_segments, random_plan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fhopt.attention.attend import attend
from fhopt.attention.latent_tensor import LatentTensor
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.left_padding import ExpectedPadding
from fhopt.ops.attention import attention_reference
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site import Rope

ROPE = Rope("interleaved", 6, (1.0, 0.1, 0.01), offset=1)
CPU = torch.device("cpu")


def turned_by_hand(x: Tensor, position: int) -> Tensor:
    """Rotate one vector by RoFormer, equation 34."""
    out = x.clone()
    for (real, imaginary), angle in zip(ROPE.pairs, ROPE.angles, strict=True):
        turned = complex(x[real], x[imaginary]) * complex(math.cos(position * angle), math.sin(position * angle))
        out[real], out[imaginary] = turned.real, turned.imag
    return out


def test_relative_keys_are_those_of_a_segment_that_begins_at_position_0() -> None:
    rotation, raw = SegmentRotation.on(ROPE, 64, CPU), torch.randn(8, dtype=torch.float64)
    places = torch.tensor([0, 63, 64, 130, 1000])
    keys = torch.stack([turned_by_hand(raw, int(i)) for i in places])[None, None]
    expected = torch.stack([turned_by_hand(raw, int(i) % 64) for i in places])[None, None]
    torch.testing.assert_close(rotation.relative(keys, places), expected)
    torch.testing.assert_close(rotation.absolute(expected, places), keys)


def test_keys_after_padding_are_relative_to_their_own_position() -> None:
    raw, ahead = torch.randn(8, dtype=torch.float64), (0, 70, 300)
    places = torch.tensor([0, 63, 64, 130, 1000])
    rotation = SegmentRotation.on(ROPE, 64, CPU).after_padding(torch.tensor(ahead))
    keys = torch.stack([torch.stack([turned_by_hand(raw, int(i) - n) for i in places])[None] for n in ahead])
    expected = torch.stack([turned_by_hand(raw, int(i) % 64) for i in places])[None, None].expand(3, -1, -1, -1)
    torch.testing.assert_close(rotation.relative(keys, places), expected)
    torch.testing.assert_close(rotation.absolute(expected, places), keys)


@pytest.mark.parametrize("known", [True, False])
def test_queries_are_rotated_for_each_sequence_after_its_padding(known: bool) -> None:
    rotation, keys, query = SegmentRotation.on(ROPE, 64, CPU), torch.randn(2, 1, 200, 8), torch.randn(2, 1, 1, 8)
    rotation = (rotation.with_phases(4) if known else rotation).after_padding(torch.tensor([0, 100]))
    relative = rotation.relative(keys, torch.arange(200))
    by_phases = SegmentRotation.from_phases(64, rotation.pairs, rotation.phases(4))
    for number in range(rotation.segments(200)):
        part = slice(64 * number, 64 * (number + 1))
        expected = query @ keys[:, :, part].mT
        for reader in (rotation, by_phases):
            found = reader.rotate_query(query, number) @ relative[:, :, part].mT
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for b in range(2):
                one = reader.rotate_queries(query[b : b + 1], 4, b)[number] @ relative[b, :, part].mT
                torch.testing.assert_close(one, expected[b], rtol=1e-4, atol=1e-4)


def test_a_rotated_query_gives_the_same_logits_on_relative_keys() -> None:
    rotation, keys, query = SegmentRotation.on(ROPE, 64, CPU), torch.randn(1, 1, 200, 8), torch.randn(1, 1, 1, 8)
    relative = rotation.relative(keys, torch.arange(200))
    for number in range(rotation.segments(200)):
        part = slice(64 * number, 64 * (number + 1))
        phases_only = SegmentRotation.from_phases(64, rotation.pairs, rotation.phases(4))
        for reader in (rotation, rotation.with_phases(4), phases_only):
            found = reader.rotate_query(query, number) @ relative[:, :, part].mT
            torch.testing.assert_close(found, query @ keys[:, :, part].mT, rtol=1e-4, atol=1e-4)


def test_distant_positions_are_as_exact_as_near_ones() -> None:
    rotation, key = SegmentRotation.on(ROPE, 512, CPU), torch.randn(1, 1, 1, 8)
    place = torch.tensor([1_000_000])
    torch.testing.assert_close(rotation.absolute(rotation.relative(key, place), place), key)


def test_phases_are_cached_and_may_be_used_in_training() -> None:
    """Even if the first call is in inference mode or with fake tensors."""
    rope = Rope("half", 8, (0.7, 0.3, 0.2, 0.1))
    with FakeTensorMode():
        SegmentRotation.on(rope, 64, CPU).phases(3)
    with torch.inference_mode():
        rotation = SegmentRotation.on(rope, 64, CPU)
        rotation.phases(3)
    assert SegmentRotation.on(rope, 64, CPU) is copy.deepcopy(rotation) is rotation
    assert rotation.phases(5) is rotation.phases(3) and type(rotation.phases(3)) is Tensor
    query = torch.randn(1, 1, 1, 8, requires_grad=True)
    rotation.rotate_queries(query, 3).sum().backward()
    assert query.grad is not None


def read(
    plan: LatentPlan, dtype: torch.dtype, count: int, queries: int, padding: int = 0
) -> tuple[Any, Any, Any, Tensor]:
    """Make a cache of `count` tokens for attention, and queries. padding: of the second of two sequences."""
    torch.manual_seed(0)
    layer, site = LatentLayer(plan, plan.sites[0]), plan.sites[0].site
    if padding:
        ahead = torch.tensor([0, padding])
        layer.padding.expected = ExpectedPadding.of(ahead, ahead, plan.sinks, count - queries)
    keys = torch.randn(2, site.kv_heads, count, site.key_dim).to(dtype) + 1
    values = torch.randn(2, site.kv_heads, count, site.value_dim).to(dtype) + 1
    layer.update(keys[:, :, :-queries], values[:, :, :-queries])
    key, value = layer.update(keys[:, :, -queries:], values[:, :, -queries:])
    return key, value, layer, torch.randn(2, site.heads, queries, site.key_dim).to(dtype)


@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize(("means", "bits"), [(0, 16), (12, 8), (12, 16)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("padding", [0, 100])
def test_attention_equals_that_on_reconstructed_keys(
    layout: str, means: int, bits: int, queries: int, padding: int
) -> None:
    plan = in_segments(random_plan(layout, CODED, mean_tokens=means, window_bits=bits))
    key, value, layer, query = read(plan, torch.float64, 230, queries, padding)
    assert isinstance(key, LatentTensor) and layer.quantized > 3 * 64
    found = attend(query, key.exact, value.exact, key.latents, None, scale=0.25)
    mask = torch.ones(queries, 230, dtype=torch.bool).tril(230 - queries)
    expected = attention_reference(query, key.reconstruct(), value.reconstruct(), mask, scale=0.25)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("means", [0, 12])
@pytest.mark.parametrize(("count", "padding"), [(40, 0), (80, 0), (230, 0), (700, 0), (230, 100), (700, 300)])
def test_a_kernel_rotates_queries_like_torch_operations(
    dtype: torch.dtype, means: int, count: int, padding: int
) -> None:
    from fhopt.codegen import dispatch

    dispatch.register_kernels()
    with torch.inference_mode():
        dispatch.build_all()
        plan = in_segments(random_plan("head", CODED, mean_tokens=means, window_bits=8))
        key, value, _, query = read(plan, dtype, count, 1, padding)
        found = attend(query, key.exact, value.exact, key.latents, None, scale=0.25)
        expected = attend(query.double(), key.exact.double(), value.exact.double(), key.latents, None, scale=0.25)
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
