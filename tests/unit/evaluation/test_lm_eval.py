"""The lm-eval harness on latents; skipped if lm-eval is not installed (extra evaluation)."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from character_tokenizer import characters
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.evaluation.lm_eval import _dtype, harness_model
from fhopt.evaluation.perplexity import switched, token_costs

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'fhopt[evaluation]'",
)
TEXT = "The pass key is 4821. " * 9


def test_a_missing_harness_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(FhoptError, match=r"pip install 'fhopt\[evaluation\]'"):
        harness_model.__wrapped__()  # bypasses its cache


def test_an_unknown_dtype_is_named() -> None:
    assert _dtype("auto") is torch.float32 and _dtype("torch.bfloat16") is _dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(FhoptError, match="dtype 'fp99' is unknown; expected float32"):
        _dtype("fp99")


def ended_characters() -> Any:
    """A character-level tokenizer with the tokens that lm-eval requires."""
    tokenizer = characters()
    tokenizer.pad_token = tokenizer.eos_token = "[UNK]"
    return tokenizer


def instance(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@needs_harness
def test_likelihoods_are_those_of_the_latent_cache(llama: FittedModel) -> None:
    plan, tokenizer = llama.plan(4), ended_characters()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    costs = token_costs(llama.model, ids, plan)
    with switched(llama.model, plan):
        model = harness_model()(llama.model, plan, tokenizer=tokenizer, batch_size=2, max_length=256)
        requests = [instance("loglikelihood", TEXT[:150], TEXT[150:end]) for end in (len(TEXT), 170)]
        (whole, _), (part, _) = model.loglikelihood(requests, disable_tqdm=True)
    assert whole == pytest.approx(-float(costs.plan[0, 149:].sum()), rel=1e-3)  # float32: a batch rounds to other codes
    assert part == pytest.approx(-float(costs.plan[0, 149:169].sum()), rel=1e-3)
    assert abs(whole + float(costs.exact[0, 149:].sum())) > 1e-2  # and not those of the exact cache


@needs_harness
def test_padded_contexts_are_continued_like_unpadded_ones(llama: FittedModel) -> None:
    tokenizer = ended_characters()
    how = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [instance("generate_until", text, how) for text in (TEXT[:120], TEXT[:77])]
    expected = []
    for text in (TEXT[:120], TEXT[:77]):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            out = llama.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    plan = llama.plan(1)  # full width: equal to the exact model
    with switched(llama.model, plan):
        model = harness_model()(llama.model, plan, tokenizer=tokenizer, batch_size=2, max_length=256)
        assert model.generate_until(requests, disable_tqdm=True) == expected
