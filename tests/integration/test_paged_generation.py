"""Pages in evaluation, files, static caches and compiled graphs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_plans import LONG, decoded, paged
from small_models import FittedModel, token_ids

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.evaluation.perplexity import new_cache, read_steps, score, switched
from fhopt.hf.apply import latent_cache
from fhopt.ops import paged_attention
from fhopt.ops.page_selection import FEWEST

# --------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def double(llama: FittedModel) -> Any:
    """A float64 model, so that every implementation rounds every latent to the same code."""
    return copy.deepcopy(llama.model).double()


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_evaluation_in_chunks_agrees_with_single_tokens(llama: FittedModel, double: Any, fill: bool) -> None:
    plan, ids = paged(llama.plan(4, window_bits=16), fill=fill), token_ids(1, LONG)
    with torch.no_grad(), switched(double, plan):
        steps = torch.cat([x for _, (x,) in read_steps(double, ids, [new_cache(double, plan)], plan, 20)], 1)
    torch.testing.assert_close(steps, decoded(double, plan, ids, 20), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), switched(double, plan):
        other = new_cache(double, plan, each_query=False)
        dense = torch.cat([x for _, (x,) in read_steps(double, ids, [other], plan, 20)], 1)
    assert float((dense - steps).abs().max()) > 1e-4


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_a_static_cache_selects_the_same_pages_as_a_dynamic_one(llama: FittedModel, double: Any, fill: bool) -> None:
    plan, ids = paged(llama.plan(4, window_bits=16), fill=fill), token_ids(2, LONG)
    growing = decoded(double, plan, ids, 120)
    static = decoded(double, plan, ids, 120, max_cache_len=LONG + 40)
    torch.testing.assert_close(static, growing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_cache_len", [None, 200])
def test_a_saved_cache_continues_where_it_was(llama: FittedModel, max_cache_len: int | None, tmp_path: Path) -> None:
    plan, ids = paged(llama.plan(4), fill=True), token_ids(1, LONG)
    options = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
    with torch.no_grad(), switched(llama.model, plan):
        cache = latent_cache(llama.model, **options)
        llama.model(ids[:, :140], past_key_values=cache)
        fhopt.save_cache(llama.model, cache, tmp_path / "cache")
        loaded = fhopt.load_cache(llama.model, tmp_path / "cache")
        a, b = (llama.model(ids[:, 140:141], past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(a, b)


@pytest.mark.parametrize("max_cache_len", [None, 200])
def test_bytes_of_a_step_are_those_of_the_selected_pages(llama: FittedModel, max_cache_len: int | None) -> None:
    """Most pages do not reach the lift."""
    plan, ids = paged(llama.plan(4), share=0.5, lift=2.0), token_ids(2, LONG)
    listed = []
    chosen = paged_attention.list_selected_pages

    def watch(step: paged_attention.PageStep) -> Any:
        found = chosen(step)
        listed.append(found[0])
        return found

    with torch.no_grad(), switched(llama.model, plan), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "list_selected_pages", watch)
        cache = LatentCache(plan, llama.model.config, max_cache_len=max_cache_len)
        llama.model(ids[:, :140], past_key_values=cache)
        assert not listed
        held = cache.report()
        for i in range(140, LONG):
            llama.model(ids[:, i : i + 1], past_key_values=cache)
    count = [layer.lists.tolist() for layer in cache.layers if isinstance(layer, (LatentLayer, StaticLatentLayer))]
    assert len(listed) == 2 * (LONG - 140)
    assert sum(c[2] for c in count) == sum(int((lists >= 0).sum()) for lists in listed)
    assert sum(c[0] for c in count) == sum(lists.shape[:2].numel() for lists in listed)
    assert all(FEWEST * c[0] <= c[2] < 0.5 * c[3] for c in count)
    for before, row, (_, _, read, there) in zip(held, cache.report(), count, strict=True):
        assert (
            row["dense_step_bytes"] - row["step_bytes"]
            == row["sealed"] - int(row["sealed"] * read / there) - row["index"]
        )
        assert before["step_bytes"] < before["dense_step_bytes"]


# --------------------------------------------------------------------------------------------------- the guarantee


@pytest.mark.parametrize("each", [False, True], ids=["lists", "masks"])
def test_an_unreachable_limit_gives_dense_attention(llama: FittedModel, double: Any, each: bool) -> None:
    plan, ids = llama.plan(4, window_bits=16), token_ids(2, LONG)
    dense = decoded(double, plan, ids, 120)
    for max_cache_len in (None, 200):
        limited = paged(plan, limit=1e-9)
        with torch.no_grad(), switched(double, limited):
            cache = LatentCache(limited, double.config, each_query=each, max_cache_len=max_cache_len)
            parts = [double(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 120), (120, 121), (121, LONG))]
        torch.testing.assert_close(torch.cat(parts[1:], 1)[:, :1], dense[:, :1], rtol=1e-6, atol=1e-6)
        assert [row["completed"] for row in cache.report()] == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------- plans


def test_perplexity_with_pages_is_measured_and_worse_than_with_all_pages(llama: FittedModel) -> None:
    ids, found = token_ids(2, 200), {}
    for name, plan in (("all", llama.plan(2)), ("some", paged(llama.plan(2), share=0.05))):
        with switched(llama.model, plan):
            found[name] = score(llama.model, ids, plan).nats
    assert found["some"] != found["all"] and abs(found["some"] - found["all"]) < 0.2


# --------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize(
    ("kind", "queries"),
    [
        pytest.param("latents", 12, marks=pytest.mark.slow),
        pytest.param("window of 8 bits", 12, marks=pytest.mark.slow),
        pytest.param("pages", 1, marks=pytest.mark.slow),
        ("PagePlan.limit", 1),
    ],
)
def test_a_compiled_graph_has_the_gradients_of_an_eager_call(llama: FittedModel, kind: str, queries: int) -> None:
    """For tokens after a cache, whose graph with gradients must not contain non-differentiable operations."""
    plan, ids = llama.plan(4, window_bits=8 if kind == "window of 8 bits" else 16), token_ids(1, LONG)
    if "pages" in kind:
        plan = paged(plan, fill=kind == "pages", limit=0.5 if "limit" in kind else 1.0)
    model, found = copy.deepcopy(llama.model).requires_grad_(True), []
    with switched(model, plan), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*graph break.*|.*recompil.*")
        for call in (model, torch.compile(model, backend="aot_eager")):
            torch._dynamo.reset()
            model.zero_grad()
            cache = latent_cache(model)
            with torch.no_grad():
                model(ids[:, :-queries], past_key_values=cache)
            call(ids[:, -queries:], past_key_values=cache).logits.square().sum().backward()
            found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert len(found[0]) == sum(1 for _ in model.parameters())
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("fixed", [{}, {"max_cache_len": LONG}], ids=["growing", "fixed"])
def test_codes_in_a_cache_have_no_autograd_history(llama: FittedModel, fixed: dict[str, int]) -> None:
    plan, ids = paged(llama.plan(4, window_bits=8)), token_ids(1, LONG)
    model = copy.deepcopy(llama.model).requires_grad_(True)
    with switched(model, plan):
        cache = latent_cache(model, **fixed)
        model(ids, past_key_values=cache).logits.square().sum().backward()
    for layer in cache.layers:
        parts = *layer.packed_keys.parts, *layer.packed_values.parts, *layer.sketches.parts
        assert parts and not any(part.requires_grad for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_a_compiled_step_with_a_static_cache_selects_like_an_eager_one(llama: FittedModel, fill: bool) -> None:
    """One graph for all steps, in float32: of two pages with equal weight, either may be selected."""
    plan, ids = paged(llama.plan(4, window_bits=16), share=0.5, fill=fill), token_ids(1, LONG)
    eager = decoded(llama.model, plan, ids, 140, max_cache_len=200)
    graphs = 0

    def count(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    with torch.no_grad(), switched(llama.model, plan):
        cache = latent_cache(llama.model, max_cache_len=200)
        llama.model(ids[:, :140], past_key_values=cache)
        step: Any = torch.compile(llama.model, backend=count, dynamic=False)
        parts = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, LONG)]
    torch.testing.assert_close(torch.cat(parts, 1), eager, rtol=1e-3, atol=1e-3)
    assert graphs == 1
