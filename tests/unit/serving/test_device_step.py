"""Triton decode steps on an engine's blocks: which ones they run, under Triton's interpreter."""

from __future__ import annotations

import logging

import pytest
import torch
from hand_plans import CODED, random_plan
from needs import needs_triton, sampled
from triton_processes import failures
from triton_step_checks import CHECKS

from fhopt.plan.latent_plan import LatentPlan
from fhopt.serving import device_step
from fhopt.serving.layer_cache import LayerCache


@pytest.fixture(scope="module")
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures("triton_step_checks", tmp_path_factory.mktemp("triton"), request)


@needs_triton
@pytest.mark.parametrize("check", sampled(CHECKS, 4))
def test_under_the_interpreter(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


def layer_of(plan: LatentPlan, dtype: torch.dtype = torch.float32) -> LayerCache:
    return LayerCache(plan, plan.sites[0], 0.25, dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "has_triton", "reason"),
    [
        ("xpu", torch.float32, True, "kernels exist only for CUDA and ROCm, not for xpu"),
        ("cuda", torch.float64, True, "no kernel supports torch.float64"),
        ("cuda", torch.float32, False, "pip install 'triton"),
    ],
)
def test_a_layer_without_kernels_gives_a_reason_and_runs_on_torch_operations(
    device: str, dtype: torch.dtype, has_triton: bool, reason: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(device_step, "has_triton", lambda: has_triton)
    with caplog.at_level(logging.WARNING):
        assert device_step.device_step(layer_of(random_plan("head", CODED), dtype), torch.device(device)) is None
    assert "layers.0: decode steps run on torch operations" in caplog.text and reason in caplog.text
