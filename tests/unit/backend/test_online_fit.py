"""Online fit: record, fit, gate, apply; or stay exact with a reason."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from small_models import tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.backend import compile_report
from fhopt.backend.online_fit import FitTarget, TokenStream, without_padding
from fhopt.cache.report import cache_report
from fhopt.hf.apply import applied_plan

pytestmark = pytest.mark.usefixtures("traced_only")


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, **options)
    return found


def gather(model: Any, calls: int) -> None:
    for _ in range(calls):
        generate(model, token_ids(2, 256))


# --------------------------------------------------------------------------------------------------- the stream


def test_tokens_go_behind_the_sequence_that_they_continue() -> None:
    stream = TokenStream()
    stream.add(torch.tensor([[1, 2, 3], [4, 5, 6]]), None)
    stream.add(torch.tensor([[7], [8]]), None)
    stream.add(torch.tensor([[9, 10]]), None)
    assert stream.rows == [[1, 2, 3, 7], [4, 5, 6, 8], [9, 10]] and stream.count == 10
    assert stream.cut(3, 0, 1, shortest=1).tolist() == [[1, 2, 3], [7, 4, 5], [6, 8, 9]]


def test_padding_is_left_out() -> None:
    stream = TokenStream()
    stream.add(torch.tensor([[0, 0, 3], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]]))
    stream.add(torch.tensor([[7], [8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert stream.rows == [[3, 7], [4, 5, 6, 8]] and stream.count == 6


def test_what_fills_a_batch_up_is_no_text() -> None:
    assert (
        without_padding([0, 0, 5, 6, 0, 0, 0], 0) == [5, 6, 0]
        and without_padding([5, 6], 0) == [5, 6]
        and without_padding([0, 0], 0) == []
    )
    stream = TokenStream(padding=0)
    stream.add(torch.tensor([[0] * 8 + [7] * 40, [8] * 40 + [0] * 8, [0] * 40 + [9] * 8]), None)
    assert stream.cut(81, 0, 1).tolist() == [[7] * 40 + [8] * 40 + [0]]


# --------------------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_a_model_is_exact_until_its_plan_passes_and_then_new_sequences_are_latent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny_llama(), token_ids(1, 300)
    exact = generate(model, ids)
    compiled = torch.compile(model, backend="flashhead", options={"calibration_tokens": 4096, "max_loss": "50%"})
    gather(compiled, 4)
    assert fhopt.report(compiled).state == compile_report.GATHERING
    assert torch.equal(generate(compiled, ids), exact)
    with caplog.at_level(logging.WARNING, logger="fhopt"):
        gather(compiled, 5)
    messages = [r.message for r in caplog.records if r.name == "fhopt"]
    assert len(messages) == 1 and "new sequences are cached as latents" in messages[0] and "perplexity" in messages[0]
    found = fhopt.report(compiled)
    assert found.state == compile_report.COMPRESSED and "held-out tokens" in found.events[-1]
    plan = applied_plan(model)
    assert plan.provenance["gate"]["max_loss"] == 0.5 and plan.provenance["tokens"] >= 0.7 * 4096
    output = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert any(row["kind"] != "exact" for row in cache_report(output.past_key_values))
    generate(compiled, ids)
    latent = [s for g in fhopt.report(compiled).graphs for s in g.sites if s.how == "latents of the cache"]
    assert {s.name for s in latent} == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    fhopt.unapply(model)
    assert torch.equal(generate(model, ids), exact)


@pytest.mark.slow
def test_a_ratio_is_kept_and_still_gated() -> None:
    model = tiny_gpt2()
    model.compile(backend="flashhead", options={"calibration_tokens": 4096, "ratio": 4, "max_loss": 0.9})
    gather(model, 9)
    assert abs(applied_plan(model).ratio() - 4) < 0.05


@pytest.mark.slow
def test_where_no_plan_passes_the_model_stays_exact_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_llama(), token_ids(1, 60)
    exact = generate(model, ids)
    model.compile(backend="flashhead", options={"calibration_tokens": 4096, "max_loss": 1e-9, "ratio": 12})
    with caplog.at_level(logging.WARNING, logger="fhopt"):
        gather(model, 9)
    found = fhopt.report(model)
    assert found.state == compile_report.REJECTED and "no plan passes" in found.events[-1]
    assert [r.message for r in caplog.records if r.name == "fhopt"] == [f"fhopt: LlamaForCausalLM {found.events[-1]}"]
    assert torch.equal(generate(model, ids), exact) and not hasattr(model, "_fhopt_applied")


def test_a_model_without_a_cache_is_not_recorded() -> None:
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    compiled = torch.compile(module, backend="flashhead")
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        compiled(x, x, x)
    found = fhopt.report(compiled)
    assert found.state == compile_report.EXACT and "not a language model of transformers" in found.events[0]


def test_a_failing_fit_does_not_fail_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise KeyError("something unforeseen")

    monkeypatch.setattr("fhopt.backend.online_fit.fit", fails)
    model = tiny_llama()
    model.compile(backend="flashhead", options={"calibration_tokens": 4096})
    gather(model, 9)
    found = fhopt.report(model)
    assert found.state == compile_report.REJECTED and "fitting failed (KeyError" in found.events[-1]


@pytest.mark.slow
def test_a_model_with_an_online_fit_is_freed_with_its_weights_and_keeps_the_modes_of_its_parts() -> None:
    model = tiny_llama()
    model.model.layers[0].train()
    model.compile(backend="flashhead", options={"calibration_tokens": 4096, "max_loss": 0.9})
    gather(model, 9)
    assert fhopt.report(model).state == compile_report.COMPRESSED
    assert model.model.layers[0].training and not model.model.layers[1].training
    weight = weakref.ref(model.model.layers[0].self_attn.k_proj.weight)
    del model
    gc.collect()
    assert weight() is None


def test_two_models_that_share_an_embedding_have_reports_of_their_own() -> None:
    teacher, student = tiny_llama(), tiny_llama()
    student.set_input_embeddings(teacher.get_input_embeddings())
    compiled = torch.compile(lambda teacher, student, ids: student(ids).logits, backend="flashhead")
    with torch.no_grad():
        compiled(teacher, student, token_ids(1, 20))
    assert fhopt.report(student).state == compile_report.GATHERING
    with pytest.raises(fhopt.FhoptError, match="nothing of LlamaForCausalLM"):
        fhopt.report(teacher)


def test_training_is_not_recorded() -> None:
    model = tiny_llama()
    compiled: Any = torch.compile(model, backend="flashhead", options={"calibration_tokens": 4096})
    for _ in range(18):
        loss: torch.Tensor = compiled(token_ids(2, 256)).logits.sum()
        torch.autograd.grad(loss, list(model.parameters()))
    assert not hasattr(model, "_fhopt_applied") and fhopt.report(compiled).state == compile_report.EXACT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_tokens": 10}, "at least 4,096"),
        ({"max_loss": 2}, "expected a share"),
        ({"max_loss": "much"}, "is not a share"),
        ({"ratio": 0.5}, "expected 1"),
        ({"ratio": "four"}, "expected numbers"),
        ({"weights": "maybe"}, "'check' or 'trust'"),
        ({"plan": 3}, "expected a LatentPlan"),
        ({"plan": "/nowhere"}, "is not a plan"),
    ],
)
def test_wrong_options_are_refused_with_the_cure(options: dict[str, Any], message: str) -> None:
    compiled: Any = torch.compile(tiny_llama(), backend="flashhead", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"FhoptError.*{message}"):
        compiled(token_ids(1, 8))


def test_defaults_are_those_that_the_documentation_names() -> None:
    assert FitTarget.parse({}) == FitTarget(None, 0.01, 16384)
