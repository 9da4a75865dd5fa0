"""The canonical ops against slow, obvious references in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt import ops
from fhopt.fitting import DISTORTION, STEP
from fhopt.spec import KernelSpec

NO_TIERS = ops.latent_options(None, None)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """float64, one head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        logits = q[:, head] @ k[:, group].mT * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        if mask is not None:
            logits = logits.masked_fill(~mask.expand(q.shape[0], q.shape[1], *logits.shape[1:])[:, head], -math.inf)
        outputs.append(logits.softmax(-1) @ v[:, head * v.shape[1] // q.shape[1]])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_equals_a_loop_over_heads(heads: tuple[int, int], cap: float) -> None:
    h, g = heads
    q, k, v = torch.randn(2, h, 5, 8), torch.randn(2, g, 7, 8), torch.randn(2, g, 7, 6)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    out = torch.ops.fhopt.attention(q, k, v, mask, scale=0.4, softcap=cap)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.4, cap), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        torch.ops.fhopt.attention(q, k, k, scale=1.0)


def test_uncoded_latent_attention_is_grouped_query_attention() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 3, 9, 5)
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, v, None, None, **NO_TIERS, scale=0.3)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, None, 0.3, 0.0), rtol=1e-5, atol=1e-5)
    logits = q.double() @ k.repeat_interleave(3, 1).double().mT * 0.3
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_query_that_may_see_nothing_gives_zero_and_minus_infinity() -> None:
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, k, None, mask, **NO_TIERS, scale=1.0)
    assert bool((out[:, :, 1] == 0).all()) and bool((lse[:, :, 1] == -math.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[:, :, 0].isfinite().all())


def test_parts_merge_to_the_whole_and_an_empty_part_changes_nothing() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)

    def part(a: int, b: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.ops.fhopt.latent_attention(q, k[:, :, a:b], None, v[:, :, a:b], None, mask, **NO_TIERS, scale=0.5)
        return rows[0], rows[1]

    whole, _ = part(0, 10)
    torch.testing.assert_close(ops.merge([part(0, 4), part(4, 10)]), whole, rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(ops.merge([part(0, 10), part(0, 4, nothing)]), whole, rtol=1e-6, atol=1e-6)


# ---- codes

TIERS = st.lists(
    st.tuples(st.sampled_from([2, 4, 8, 16]), st.integers(1, 4).map(lambda n: 8 * n)), min_size=1, max_size=4
)


@given(tiers=TIERS, seed=st.integers(0, 1000), size=st.sampled_from([0.01, 1.0, 300.0]))
@settings(max_examples=40, deadline=None)
def test_codes_come_back_within_half_a_step_or_at_the_end_of_the_range(
    tiers: list[tuple[int, int]], seed: int, size: float
) -> None:
    bits, widths = [b for b, _ in tiers], [w for _, w in tiers]
    steps = [STEP.get(b, 1.0) for b in bits]
    x = torch.randn(2, 3, sum(widths), generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = torch.ops.fhopt.pack(x, bits, widths, steps)
    assert codes.shape[-1] == sum(b * w for b, w in tiers) // 8
    z = torch.ops.fhopt.unpack(codes, scale, bits, widths, steps)
    for part, back, b, step in zip(x.split(widths, -1), z.split(widths, -1), bits, steps, strict=True):
        if b == 16:
            torch.testing.assert_close(back, part, rtol=1e-3, atol=1e-6)  # float16 has 11 bits
            continue
        unit = scale.float().unsqueeze(-1)
        reach = (2**b - 1) / 2 * step
        inside = (part / unit).abs() <= reach
        assert bool(((back - part).abs() / unit)[inside].le(step / 2 * 1.001 + 1e-6).all())
        assert bool((back.abs() / unit).le(reach * 1.001).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_distortion_of_a_gaussian_is_the_one_that_allocation_uses(bits: int) -> None:
    x = torch.randn(2000, 64)
    codes, scale = torch.ops.fhopt.pack(x, [bits], [64], [STEP[bits]])
    error = (torch.ops.fhopt.unpack(codes, scale, [bits], [64], [STEP[bits]]) - x).square().mean()
    assert float(error) == pytest.approx(DISTORTION[bits], rel=0.15)  # the scale is measured on 64 channels


def test_a_token_of_zeros_stays_small() -> None:
    codes, scale = torch.ops.fhopt.pack(torch.zeros(1, 16), [4], [16], [0.3])
    assert float(torch.ops.fhopt.unpack(codes, scale, [4], [16], [0.3]).abs().max()) < 1e-4


@pytest.mark.parametrize("tiers", [[(8, 8), (4, 16), (2, 8)], [(16, 8), (4, 24)]])
def test_attention_on_codes_equals_attention_on_what_they_stand_for(tiers: list[tuple[int, int]]) -> None:
    bits, widths = [b for b, _ in tiers], [w for _, w in tiers]
    steps = [STEP.get(b, 1.0) for b in bits]
    q = torch.randn(2, 6, 3, sum(widths))
    key, key_scale = torch.ops.fhopt.pack(torch.randn(2, 2, 20, sum(widths)), bits, widths, steps)
    value, value_scale = torch.ops.fhopt.pack(torch.randn(2, 1, 20, sum(widths)) * 7, bits, widths, steps)
    options = dict(key_bits=bits, key_widths=widths, key_steps=steps)
    options |= dict(value_bits=bits, value_widths=widths, value_steps=steps)
    mask = torch.rand(2, 1, 3, 20) > 0.2
    out, _ = torch.ops.fhopt.latent_attention(q, key, key_scale, value, value_scale, mask, **options, scale=0.2)
    k = torch.ops.fhopt.unpack(key, key_scale, bits, widths, steps)
    v = torch.ops.fhopt.unpack(value, value_scale, bits, widths, steps)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.2, 0.0), rtol=1e-4, atol=1e-4)


def test_ops_keep_the_rules_of_torch_library() -> None:
    x = torch.randn(1, 1, 4, 16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fhopt.pack.default, (x, [4, 2], [8, 8], [0.3, 0.9]), test_utils=checks)
    codes, scale = torch.ops.fhopt.pack(x, [4, 2], [8, 8], [0.3, 0.9])
    torch.library.opcheck(torch.ops.fhopt.unpack.default, (codes, scale, [4, 2], [8, 8], [0.3, 0.9]), test_utils=checks)
    q = torch.randn(1, 2, 1, 16)
    arguments = (q, x, None, x, None, None)
    options = {**NO_TIERS, "scale": 1.0}
    torch.library.opcheck(torch.ops.fhopt.latent_attention.default, arguments, options, test_utils=checks)


def test_a_kernel_spec_names_itself_by_what_its_text_depends_on() -> None:
    spec = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.3),), 48, 64, "float32", False)
    other = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.4),), 48, 64, "float32", False)
    assert spec.name.startswith("latent_k16b8x32b4_v64b4_float32_")
    assert spec.name != other.name
