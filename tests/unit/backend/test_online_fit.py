"""Online fit: record, fit, gate, apply; or stay exact with a reason."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs import sampled
from small_models import tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.backend import compile_report
from fhopt.backend.online_fit import FitTarget, TokenStream, without_padding
from fhopt.backend.settings import Settings
from fhopt.cache.report import cache_report
from fhopt.decode.programs import decode_programs
from fhopt.errors import FhoptError
from fhopt.hf.apply import applied_plan

pytestmark = pytest.mark.usefixtures("traced_only")


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, **options)
    return found


def gather(model: Any, calls: int) -> None:
    for _ in range(calls):
        generate(model, token_ids(2, 256))


# --------------------------------------------------------------------------------------------------- the stream


def test_tokens_are_appended_to_the_sequence_that_they_continue() -> None:
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


def test_tokens_that_pad_a_batch_are_not_text() -> None:
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
        assert not warnings_of(compiled, lambda model: gather(model, 5))
    messages = [r.message for r in caplog.records if r.name == "fhopt"]
    assert len(messages) == 2 and "runs in exact mode until 4096 tokens are recorded" in messages[0]
    assert "new sequences are cached as latents" in messages[1] and "perplexity" in messages[1]
    found = fhopt.report(compiled)
    assert found.state == compile_report.COMPRESSED and "held-out tokens" in found.events[-1]
    plan = applied_plan(model)
    assert plan.provenance["gate"]["max_loss"] == 0.5 and plan.provenance["tokens"] >= 0.7 * 4096
    output = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert any(row["kind"] != "exact" for row in cache_report(output.past_key_values))
    assert not warnings_of(compiled, lambda model: generate(model, ids))
    programs = decode_programs(model)
    assert programs is not None and programs.has_program  # decode steps run as a program and are not compiled
    fhopt.unapply(model)
    assert torch.equal(generate(model, ids), exact)


@pytest.mark.slow
def test_a_requested_ratio_is_used_and_still_gated() -> None:
    model = tiny_gpt2()
    model.compile(backend="flashhead", options={"calibration_tokens": 4096, "ratio": 4, "max_loss": 0.9})
    gather(model, 9)
    assert abs(applied_plan(model).ratio() - 4) < 0.05


@pytest.mark.slow
def test_if_no_plan_passes_the_model_stays_exact_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_llama(), token_ids(1, 60)
    exact = generate(model, ids)
    model.compile(backend="flashhead", options={"calibration_tokens": 4096, "max_loss": 1e-9, "ratio": 12})
    with caplog.at_level(logging.WARNING, logger="fhopt"):
        gather(model, 9)
    found = fhopt.report(model)
    assert found.state == compile_report.REJECTED and "no plan passes" in found.events[-1]
    assert [r.message for r in caplog.records if r.name == "fhopt"][1:] == [
        f"fhopt: LlamaForCausalLM {found.events[-1]}"
    ]
    assert torch.equal(generate(model, ids), exact) and not hasattr(model, "_fhopt_applied")


def test_a_model_without_a_cache_is_not_recorded() -> None:
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    compiled = torch.compile(module, backend="flashhead")
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        compiled(x, x, x)
    found = fhopt.report(compiled)
    assert found.state == compile_report.EXACT and "not a transformers language model" in found.events[0]


def test_a_failing_fit_does_not_fail_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise KeyError("something unforeseen")

    monkeypatch.setattr("fhopt.backend.online_fit.fit_recorded", fails)
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


def test_two_models_that_share_an_embedding_have_separate_reports() -> None:
    teacher, student = tiny_llama(), tiny_llama()
    student.set_input_embeddings(teacher.get_input_embeddings())
    compiled = torch.compile(lambda teacher, student, ids: student(ids).logits, backend="flashhead")
    with torch.no_grad():
        compiled(teacher, student, token_ids(1, 20))
    assert fhopt.report(student).state == compile_report.GATHERING
    with pytest.raises(fhopt.FhoptError, match="has not compiled LlamaForCausalLM"):
        fhopt.report(teacher)


# --------------------------------------------------------------------------------------------------- never fitted


class Wrapper(torch.nn.Module):
    """A language model inside a user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(ids, use_cache=False).logits
        return logits


def warnings_of(compiled: Any, calls: Callable[[Any], Any]) -> list[str]:
    """Call a compiled model and return fhopt's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls(compiled)
    return [str(w.message) for w in caught if "stays in exact mode" in str(w.message)]


@torch.no_grad()
def twice(compiled: Any) -> None:
    """Call with two lengths, for each of which Dynamo compiles a graph."""
    compiled(token_ids(1, 20))
    compiled(token_ids(1, 30))


def with_gradients(compiled: Any) -> None:
    compiled(token_ids(1, 20))


@torch.no_grad()
def with_embeddings(compiled: Any) -> None:
    compiled(inputs_embeds=torch.randn(1, 20, 64))


def function() -> Callable[..., Any]:
    models = {"one": tiny_llama()}  # so that no module is among the function's names
    return lambda ids: models["one"](ids).logits


NEVER: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {
    "function": (function, twice, "belongs to no module"),
    "module": (Wrapper, twice, "Wrapper is not a transformers language model"),
    "gradients": (
        tiny_llama,
        with_gradients,
        "cannot record calls with gradients. Call the model inside torch.no",
    ),
    "no ids": (tiny_llama, with_embeddings, "calls of LlamaForCausalLM without token ids"),
}


@pytest.mark.parametrize("case", sampled(NEVER, 2))
def test_a_requested_fit_that_never_comes_warns_once(case: str) -> None:
    make, calls, reason = NEVER[case]
    messages = warnings_of(torch.compile(make(), backend="flashhead", options={"ratio": 4}), calls)
    assert len(messages) == 1 and reason in messages[0]


def test_other_frames_of_a_recorded_model_do_not_warn() -> None:
    """A graph break in a layer makes a frame of the layer, and possibly one without a module."""
    model = tiny_llama()
    options: dict[str, Any] = {"ratio": 4}
    model.compile(backend="flashhead", options=options)
    model.model.layers[0].mlp.compile(backend="flashhead", options=options)

    @torch.no_grad()
    def calls(model: Any) -> None:
        model(token_ids(1, 20))
        model.model.layers[0].mlp(torch.randn(1, 4, 64))
        torch.compile(lambda x: x + 1, backend="flashhead", options=options)(torch.ones(2))

    assert not warnings_of(model, calls)


@pytest.mark.parametrize("case", sampled(NEVER, 4))
def test_a_fit_by_default_is_silent_if_it_never_happens(case: str) -> None:
    make, calls, _ = NEVER[case]
    assert not warnings_of(torch.compile(make(), backend="flashhead", options={}), calls)


def test_layers_compiled_one_by_one_warn_once() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.compile(backend="flashhead", options={"ratio": 4})
    messages = warnings_of(model, twice)
    assert len(messages) == 1 and "LlamaDecoderLayer is not a transformers language model" in messages[0]


def test_a_second_target_for_a_model_is_not_ignored_silently() -> None:
    model = tiny_llama()
    assert not warnings_of(torch.compile(model, backend="flashhead", options={"ratio": 4}), twice)
    messages = warnings_of(torch.compile(model, backend="flashhead", options={"ratio": 8}), twice)
    assert len(messages) == 1 and "for ratio=4, not for ratio=8. Call torch.compiler.reset()" in messages[0]


def test_a_fit_for_a_model_with_a_plan_warns() -> None:
    model = tiny_llama()
    model.__dict__["_fhopt_applied"] = None
    messages = warnings_of(torch.compile(model, backend="flashhead", options={"ratio": 8}), twice)
    assert len(messages) == 1 and "a plan is already applied. Call fhopt.unapply(model)" in messages[0]


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
        ({"max_loss": "much"}, "is invalid; expected a share"),
        ({"ratio": 0.5}, "expected 1"),
        ({"ratio": 0}, "expected 1"),
        ({"ratio": -1}, "expected 1"),
        ({"ratio": float("nan")}, "expected 1"),
        ({"ratio": True}, "option ratio is True; expected a number"),
        ({"max_loss": True}, "option max_loss is True; expected a number"),
        ({"ratio": "four"}, "expected numbers"),
        ({"ratio": 1, "max_loss": 0.1}, "ratio=1 and max_loss are mutually exclusive"),
        ({"strict": True}, "option strict requires a plan"),
        ({"weights": "trust"}, "option weights requires a plan"),
        ({"skinny_products": "no"}, "expected True or False"),
        ({"weights": "maybe"}, "'check' or 'trust'"),
        ({"plan": 3}, "expected a LatentPlan"),
        ({"plan": "/nowhere"}, "is not a plan"),
    ],
)
def test_wrong_options_are_refused_with_a_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        Settings.parse(options)


def test_numbers_may_be_text() -> None:
    assert FitTarget.parse({"ratio": "4"}) == FitTarget(4.0) and Settings.parse({"ratio": "1"})[0].target is None


def test_defaults_are_those_that_the_documentation_names() -> None:
    assert FitTarget.parse({}) == FitTarget(None, 0.01, 16384)
