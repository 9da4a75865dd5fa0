"""Plans from a calibration, and batches that run out before a plan can be made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from interrupted_calibration import measure
from small_models import FittedModel, cached, tiny_llama, token_ids

import fhopt
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData, of_batches
from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.evaluation.prefilled import prefilled
from fhopt.plan.latent_plan import LatentPlan


def test_no_batch_at_all_is_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match="there are no calibration batches"):
        measure(llama.captured, count=0)


def test_batches_that_leave_none_for_choosing_bits_are_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match="leave none for the bit allocation"):
        measure(llama.captured, count=6)


OPTIONS = FitOptions(sequences=3, rate_sequences=2, sinks=4, recent=8, block=8, tokens=2048, mean_tokens=16)


def test_plans_have_means_if_statistics_are_of_differences_from_them(llama: FittedModel) -> None:
    """Their moments differ; calibration of arbitrary modules subtracts none, even if requested."""
    torch.manual_seed(0)
    batches: list[dict[str, Any]] = [{"input_ids": token_ids(1, 96)} for _ in range(5)]
    weights = dict(llama.model.named_parameters())
    both = [
        run.calibrate(CalibrationData(llama.captured, batches, weights, "tiny"), options)
        for options in (OPTIONS, FitOptions(**{**vars(OPTIONS), "mean_tokens": 0}))
    ]
    assert [run.plan_from_calibration(measured, OPTIONS).mean_tokens for measured in both] == [16, 0]
    for name, centred in both[0].statistics.items():
        plain = both[1].statistics[name]
        for side in ("key", "value"):
            moments = [
                getattr(statistics, side).moment.diagonal(dim1=1, dim2=2).sum() for statistics in (centred, plain)
            ]
            assert not torch.allclose(moments[0], moments[1], rtol=1e-3)
    module = run.calibrate(of_batches(tiny_llama(), [batch | {"use_cache": False} for batch in batches]), OPTIONS)
    assert run.plan_from_calibration(module, OPTIONS).mean_tokens == 0


def test_small_plans_have_trellis_codes_if_supported(llama: FittedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches: list[dict[str, Any]] = [{"input_ids": token_ids(1, 96)} for _ in range(5)]
    weights = dict(llama.model.named_parameters())
    measured, plain = (
        run.calibrate(CalibrationData(llama.captured, batches, weights, "tiny"), replace(OPTIONS, mean_tokens=means))
        for means in (16, 0)
    )

    def has_trellis(calibration: run.Calibration, **options: Any) -> bool:
        return run.plan_from_calibration(
            calibration, replace(OPTIONS, ratio=6, bits=(1, 2, 4, 8), **options)
        ).has_trellis

    assert has_trellis(measured) and has_trellis(measured, device="cpu")
    assert not run.plan_from_calibration(measured, OPTIONS).has_trellis  # 4x
    assert not has_trellis(plain) and has_trellis(plain, code="trellis")
    assert not has_trellis(measured, code="uniform")
    assert run.code_of(replace(OPTIONS, ratio=8, device="h100"), 16) == "uniform"
    with monkeypatch.context() as without:
        without.setattr(run, "has_kernels", lambda: False)
        assert not has_trellis(measured) and has_trellis(measured, code="trellis")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not has_trellis(measured) and has_trellis(measured, device="cpu")


def test_keys_are_relative_to_segments_in_plans_with_means(llama: FittedModel) -> None:
    """Such a plan can be saved, with its description."""
    torch.manual_seed(0)
    batches: list[dict[str, Any]] = [{"input_ids": token_ids(1, 96)} for _ in range(5)]
    weights = dict(llama.model.named_parameters())

    def plan_with(**changes: Any) -> LatentPlan:
        options = replace(OPTIONS, **changes)
        return run.plan_from_calibration(
            run.calibrate(CalibrationData(llama.captured, batches, weights, "tiny"), options), options
        )

    assert [s.segment for s in plan_with().sites] == [512] * len(llama.outcome.sites)
    assert plan_with(segment=64).segment == 64
    assert plan_with(mean_tokens=0).segment == plan_with(segment=0).segment == plan_with(ratio=1.0).segment == 0
    assert replace(OPTIONS, device="h100").segment_tokens == 0  # no GPU kernel rotates queries by segment
    module = run.calibrate(of_batches(tiny_llama(), [batch | {"use_cache": False} for batch in batches]), OPTIONS)
    assert run.plan_from_calibration(module, OPTIONS).segment == 0


@pytest.mark.parametrize("segment", [-64, 100, 32, 1 << 20])
def test_segments_without_kernel_support_are_refused(segment: int) -> None:
    with pytest.raises(FhoptError, match=f"segment is {segment}; expected 0 .none. or a multiple of 64 up"):
        replace(OPTIONS, segment=segment).check_sizes()


@pytest.mark.parametrize(
    ("tokens", "context", "window", "near"),
    [
        (8192, 1024, 256, 256),
        (32768, 1024, 1024, 256),
        (32768, 8192, 1024, 1024),
        (2048, 1024, 64, 64),
        (10**6, 128, 1024, 32),
    ],
)
def test_the_residual_window_is_a_share_of_the_target_context(
    tokens: int, context: int, window: int, near: int
) -> None:
    """Calibration excludes as many tokens, as far as its sequences allow."""
    options = FitOptions(tokens=tokens, context=context)
    assert (options.window.recent, options.near_tokens) == (window, near)
    assert FitOptions(tokens=tokens, context=context, recent=300).window.recent == 300
    assert FitOptions(tokens=tokens, context=context, recent=300).near_tokens == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_with_a_constant_part_are_as_accurate_far_beyond_the_calibration_as_within_it(dtype: torch.dtype) -> None:
    """RoPE rotates a key bias with the position: 1,000 tokens later it has rotated away from its mean."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, max_position_embeddings=4096)
    model = transformers.Qwen2ForCausalLM(config).to(dtype).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=10.0)
    rows = [{"input_ids": token_ids(1, 128)} for _ in range(14)]
    near: dict[str, Any] = dict(sinks=4, recent=16, block=16, mean_tokens=32, context=128)
    plan = fhopt.fit(model, batches=rows, ratio=6, tokens=2048, sequences=8, rate_sequences=6, **near)
    exact = new_cache(model, None)
    with torch.inference_mode(), switched(model, None):
        model(token_ids(1, 1900), **cached(exact), use_cache=True)
    with torch.inference_mode(), switched(model, plan):
        cache = prefilled(model, plan, exact)
    for latent, layer in zip(cache.layers, exact.layers, strict=True):
        keys = latent._reconstructed()[0]
        error = (keys.double() - layer.keys.double()).square().mean((0, 1, 3)).sqrt()
        assert 0 < error[1000:1800].mean() < 1.5 * error[40:128].mean()
