"""A plan in vLLM: the same tokens for any schedule of a request, and the likelihoods of fhopt's own cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import LENGTH, WINDOW, Served, folder_of, plan_of, prompt
from small_models import FittedModel, cached

from fhopt.cache.latent_cache import LatentCache
from fhopt.plan.latent_plan import LatentPlan
from fhopt.serving.batch import means_from

PROMPTS = [prompt(seed, length) for seed, length in enumerate((3, 60, 130, 201, 330))]
ROUNDING = 1e-4  # nats/token: float32 sums in another order
SHARE = 0.005  # of nats/token: the window also rounds a token for itself, and without its mean


@pytest.fixture(scope="module")
def plan(llama: FittedModel) -> LatentPlan:
    return plan_of(llama, mean_tokens=24, segment=64)


@pytest.fixture(scope="module")
def folder(llama: FittedModel, plan: LatentPlan, tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("served") / "folder", llama.model, plan)


@pytest.fixture(scope="module")
def served(folder: str) -> Iterator[Served]:
    """An engine without special options: unchunked prompts, and room for all.

    Closing any engine ends vLLM's process groups, so tests of this one come before those that make others.
    """
    engine = Served(folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(served: Served) -> list[list[int]]:
    """Return the tokens of each prompt on its own, without prefix caching."""
    tokens = []
    for ids in PROMPTS:
        served.llm.reset_prefix_cache()
        tokens += served.greedy([ids])
    return tokens


def test_requests_of_one_batch_get_the_same_tokens_as_single_ones(served: Served, alone: list[list[int]]) -> None:
    served.llm.reset_prefix_cache()
    assert served.greedy(PROMPTS) == alone


def test_a_cached_prefix_changes_no_token(served: Served, alone: list[list[int]]) -> None:
    served.llm.reset_prefix_cache()
    first, again = (served.results([PROMPTS[-1]], max_tokens=24)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens > WINDOW["sinks"] + WINDOW["recent"] + WINDOW["block"]
    assert list(first.outputs[0].token_ids) == list(again.outputs[0].token_ids) == alone[-1]


def test_other_texts_after_one_prefix_do_not_mix(served: Served) -> None:
    shared = prompt(7, 200)
    texts = [shared + prompt(seed, 60) for seed in (8, 9)]
    served.llm.reset_prefix_cache()
    known = served.greedy(texts)
    served.llm.reset_prefix_cache()
    assert [served.greedy([text])[0] for text in texts] == known
    behind = served.results([shared + prompt(10, 40)], max_tokens=8)[0]
    assert behind.num_cached_tokens > 0
    served.llm.reset_prefix_cache()
    assert served.greedy([shared + prompt(10, 40)], 8)[0] == list(behind.outputs[0].token_ids)


def test_sampling_runs(served: Served) -> None:
    (one,) = served.results([PROMPTS[1]], max_tokens=12, temperature=1.0, seed=1, n=3)
    assert len({tuple(output.token_ids) for output in one.outputs}) == 3
    assert len(one.outputs[0].token_ids) == 12


# --------------------------------------------------------------------------------------------------- likelihoods


def own_log_likelihood(model: Any, plan: LatentPlan, ids: list[int]) -> float:
    """Run fhopt's own cache: the tokens of the means in one call, the others one by one."""
    cache: Any = LatentCache(plan, absorb=False)
    first = max(1, means_from(plan))
    calls = [ids[:first], *([token] for token in ids[first:-1])]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([call]), **cached(cache)).logits[0] for call in calls])
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean())


def test_the_likelihood_agrees_with_the_own_cache(llama: FittedModel, plan: LatentPlan, served: Served) -> None:
    ids = prompt(11, LENGTH - 2)
    expected = own_log_likelihood(llama.model, plan, ids)
    assert abs(served.log_likelihood(ids) - expected) < SHARE * abs(expected)


# --------------------------------------------------------------------------------------------------- other engines


def test_chunks_and_preemption_change_no_token(folder: str, alone: list[list[int]]) -> None:
    chunked = Served(folder, max_num_batched_tokens=48, enable_prefix_caching=False)
    assert chunked.greedy(PROMPTS) == alone
    blocks = chunked.config.cache_config.num_gpu_blocks / chunked.config.cache_config.kv_cache_max_concurrency
    chunked.close()
    small = Served(folder, num_gpu_blocks_override=round(1.3 * blocks), max_num_batched_tokens=512)
    assert small.greedy(PROMPTS) == alone
    long = [PROMPTS[-1], prompt(5, 330), prompt(6, 330)]
    crowded = small.greedy(long, 120)
    assert small.metric("num_preemptions") >= 1
    small.close()
    wide = Served(folder)
    assert wide.greedy(long, 120) == crowded
    assert wide.metric("num_preemptions") == 0
    wide.close()


def test_speculative_decoding_changes_no_token(folder: str, alone: list[list[int]]) -> None:
    engine = Served(folder, speculative_config={
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
    })  # fmt: skip
    repeated = prompt(3, 20) * 8
    plain = Served(folder)
    assert engine.greedy([*PROMPTS, repeated]) == [*alone, *plain.greedy([repeated])]
    engine.close()
    plain.close()


@pytest.mark.parametrize("layout", ["band", "head"])
def test_without_rounding_of_the_window_it_is_equal(layout: str, llama: FittedModel, tmp_path: Path) -> None:
    plan = replace(plan_of(llama, layout=layout), window_bits=16)
    engine = Served(folder_of(tmp_path / "folder", llama.model, plan))
    ids = prompt(12, 400)
    assert math.isclose(engine.log_likelihood(ids), own_log_likelihood(llama.model, plan, ids), abs_tol=ROUNDING)
    engine.close()
