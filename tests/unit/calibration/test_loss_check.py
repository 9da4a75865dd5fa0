"""KL on held-out batches: equal to that of a real cache, zero for exact plans, and stored in plans."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_calibration import OPTIONS, sequences
from needs import needs_compiler
from offloaded_models import offloaded
from small_models import FAR, FittedModel, found, numbered, tiny_llama, token_ids

from fhopt import codegen
from fhopt.calibration import loss_check, probe, run
from fhopt.calibration.data import CalibrationData
from fhopt.calibration.loss_check import check_losses
from fhopt.calibration.offloaded_probe import find_dispatched
from fhopt.calibration.statistics_file import load_statistics, save_statistics
from fhopt.evaluation.perplexity import token_costs
from fhopt.fitting.fit_plan import exact_plan
from fhopt.fitting.loss_interval import CHECKS
from fhopt.plan.expected_loss import expected_loss

TEXT = [("one", {"input_ids": token_ids(1, 96)})]


@pytest.mark.parametrize("options", [{"window_bits": 8, "mean_tokens": 16}, {"window_bits": 16}, {"layout": "auto"}])
def test_losses_are_those_of_the_real_cache(llama: FittedModel, options: dict[str, Any]) -> None:
    """Compare with a real cache, called in steps of 8 tokens with a window of 8 to 15: equal only approximately."""
    plan = llama.plan(4, **options)
    model = probe.probed(llama.captured, llama.outcome)
    (check,) = check_losses(model, TEXT, [(1.0, plan)], FAR["recent"] + plan.block // 2)
    real = float(token_costs(llama.model, TEXT[0][1]["input_ids"], plan).kl.mean())
    assert check.text == "one" and check.predicted == (1.0,)
    assert real / 1.6 < check.measured[0] < real * 1.6


def test_an_exact_plan_loses_nothing(llama: FittedModel) -> None:
    plan = exact_plan(llama.outcome.sites.values(), sinks=4, recent=8, block=8)
    model = probe.probed(llama.captured, llama.outcome)
    (check,) = check_losses(model, TEXT, [(0.0, plan)], 8)
    assert 0 <= check.measured[0] < 1e-9  # float32 sums in another order


def test_attention_without_a_plan_equals_the_model(llama: FittedModel) -> None:
    model = probe.probed(llama.captured, llama.outcome)
    exact = model.run(TEXT[0][1], loss_check.PlanAttention(None))
    with torch.no_grad():
        expected = llama.model(TEXT[0][1]["input_ids"], use_cache=False).logits
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("masked", ["causal", "bool", "additive", "none"])
def test_kernels_attend_with_one_softmax_over_all_parts(
    llama: FittedModel, masked: str, extra: bool, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = llama.outcome.sites[next(iter(llama.outcome.sites))]
    q, k = torch.randn(2, site.heads, 60, site.key_dim), torch.randn(2, site.kv_heads, 60, site.key_dim)
    v = torch.randn(2, site.kv_heads, 60, site.value_dim)
    mask = {"bool": torch.rand(2, 1, 60, 60) < 0.8, "additive": torch.randn(1, site.heads, 60, 60)}.get(masked)
    further = torch.randn(1, site.heads, 1, 1) if extra else None
    attention = loss_check.PlanAttention(llama.plan(4, window_bits=8, mean_tokens=16), 12)
    options: dict[str, Any] = {"scale": 0.2, "is_causal": masked == "causal", "softcap": softcap}
    codegen.register_kernels()
    used, by_kernels = list[bool](), loss_check._attended_by_kernels

    def watched(*args: Any) -> torch.Tensor | None:
        output = None if used else by_kernels(*args)
        used.append(output is not None)
        return output

    monkeypatch.setattr(loss_check, "_attended_by_kernels", watched)
    found = [attention.attend(site, q, k, v, mask, further, **options) for _ in range(2)]
    assert used == [True, False]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_dispatched_model_is_checked_like_one_in_memory(llama: FittedModel, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    away = find_dispatched(offloaded(tmp_path / "model"), TEXT[0][1])
    losses = [
        check_losses(model, TEXT, [(1.0, llama.plan(4))], 12)[0].measured[0]
        for model in (away, probe.probed(llama.captured, llama.outcome))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_calibration_stores_its_checks_and_its_plans_have_an_interval(llama: FittedModel, tmp_path: Path) -> None:
    steps: list[tuple[str, int]] = []
    held_out = [(f"text {i}", batch) for i, batch in numbered(2, start=50)]
    data = CalibrationData(llama.captured, sequences(), name="tiny", held_out=held_out)
    measured = run.calibrate(data, OPTIONS, lambda stage, done, total: steps.append((stage, done)))
    assert steps[-2:] == [("losses", 1), ("losses", 2)]
    assert [check["text"] for check in measured.provenance[CHECKS]] == [name for name, _ in held_out]
    save_statistics(measured, tmp_path / "stats")
    plan = run.plan_from_calibration(load_statistics(tmp_path / "stats"), OPTIONS)
    plan.save(tmp_path / "plan")
    loss = expected_loss(type(plan).load(tmp_path / "plan"))
    assert loss is not None and loss.interval is not None
    assert loss.interval[0] < loss.nats < loss.interval[1]
    model = probe.probed(*found(llama.model, 96))
    (check,) = check_losses(model, [("new", numbered(1, start=90)[0][1])], [(0.0, plan)], 12)
    assert loss.interval[0] < check.measured[0] < loss.interval[1]


def test_a_calibration_without_held_out_text_has_no_checks(llama: FittedModel) -> None:
    measured = run.calibrate(CalibrationData(llama.captured, sequences(), {}, "tiny"), OPTIONS)
    loss = expected_loss(run.plan_from_calibration(measured, OPTIONS))
    assert CHECKS not in measured.provenance and loss is not None and loss.interval is None


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_a_small_divergence_is_accurate_in_float32(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits differ by a thousandth, so that KL is about a millionth of a nat; some tokens have masked logits."""
    monkeypatch.setattr(probe, "PROBABILITIES", 3000)
    exact = 3 * torch.randn(2, 5, 1000)
    exact[..., -10:] = torch.finfo(torch.float32).min
    other = exact + size * torch.randn(2, 5, 1000)
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    assert loss_check._divergence(exact, other) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("sure", [50.0, 100.0, 300.0])
def test_a_plan_certain_where_the_model_is_not_has_a_finite_divergence(sure: float) -> None:
    """And vice versa: float32 cannot represent such a ratio of probabilities."""
    flat, sharp = torch.zeros(1, 4), torch.tensor([[sure, 0.0, 0.0, 0.0]])
    for exact, other in ((sharp, flat), (flat, sharp)):
        p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
        assert loss_check._divergence(exact, other) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_tokens_masked_in_both_contribute_no_divergence() -> None:
    logits = torch.randn(1, 4, 50)
    logits[..., 7] = -math.inf
    assert loss_check._divergence(logits, logits.clone()) == 0.0


def test_losses_of_a_16_bit_model_are_those_of_its_weights_in_float32(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    plans = [(0.01, llama.plan(2.2))]
    losses: list[float] = []
    for is_widened, of_dtype in ((True, model), (False, model), (False, copy.deepcopy(model).float())):
        monkeypatch.setattr(probe, "is_widened", lambda *_, value=is_widened: value)
        (check,) = check_losses(probe.ProbedGraph(*found(of_dtype, 96)), TEXT, plans, 8)
        losses += check.measured
    widened, of_16_bits, of_float32 = losses
    assert widened == pytest.approx(of_float32, rel=1e-4) != of_16_bits
