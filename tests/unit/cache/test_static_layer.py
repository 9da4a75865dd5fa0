"""A static layer against a naive reference and a dynamic one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation import MODES, generate
from hand_plans import CODED, in_segments, random_plan
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from naive import naive_code, naive_round
from small_models import FittedModel, cached, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan

PLACES = 90


class StaticStates(RuleBasedStateMachine):
    """The naive reference stores each token [B,G,1,D] in both forms.

    Attention sees the quantized form if the token is quantized, by the plan's rule or because a crop no longer finds
    it in the ring.
    """

    plan: LatentPlan

    @initialize(batch=st.integers(1, 2))
    def start(self, batch: int) -> None:
        self.layer = StaticLatentLayer(self.plan, self.plan.sites[0], PLACES, absorb=False)
        self.batch = batch
        self.exact: list[tuple[Tensor, Tensor]] = []
        self.coded: list[tuple[Tensor, Tensor]] = []
        self.quantized = 0

    @rule(count=st.integers(1, 40), seed=st.integers(0, 9999))
    def append(self, count: int, seed: int) -> None:
        site, generator = self.plan.sites[0], torch.Generator().manual_seed(seed)
        count = min(count, PLACES - len(self.exact))
        if not count:
            return self.refuse()
        new = [
            torch.randn(self.batch, site.site.kv_heads, count, dim, generator=generator, dtype=torch.float64)
            for dim in (site.site.key_dim, site.site.value_dim)
        ]
        before = self.read()
        found = self.layer.update(*new)
        for side, old, fresh in zip(found, before, new, strict=True):
            whole = torch.cat([old, fresh], 2)
            torch.testing.assert_close(side[:, :, : whole.shape[2]], whole)
        for pair in zip(*[x.split(1, 2) for x in new], strict=True):
            at = len(self.exact)
            rounds = self.plan.window_bits == 8 and at >= self.plan.sinks
            self.exact.append(tuple(map(naive_round, pair)) if rounds else pair)  # type: ignore[arg-type]
            self.coded.append(naive_code(pair[0], pair[1], site))
        ready = max(0, len(self.exact) - self.plan.sinks - self.plan.recent) // self.plan.block * self.plan.block
        self.quantized = max(self.quantized, ready)
        return self.check()

    def refuse(self) -> None:
        new = torch.zeros(self.batch, 2, 1, 16).double(), torch.zeros(self.batch, 2, 1, 8).double()
        with pytest.raises(FhoptError, match="has no room for 1 more"):
            self.layer.update(*new)
        self.check()

    @precondition(lambda self: self.exact)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = len(self.exact) - self.plan.sinks
        count = round(share * len(self.exact))
        self.layer.crop(-count)
        del self.exact[len(self.exact) - count :], self.coded[len(self.coded) - count :]
        self.quantized = max(0, min(max(self.quantized, length - self.plan.window.capacity), length - count))
        self.check()

    @precondition(lambda self: self.exact)
    @rule(indices=st.lists(st.integers(0, 1), min_size=1, max_size=3), how=st.sampled_from(["reorder", "select"]))
    def take(self, indices: list[int], how: str) -> None:
        index = torch.tensor([i % self.batch for i in indices])
        addresses = [t.data_ptr() for t in self.layer.tensors]
        (self.layer.reorder_cache if how == "reorder" else self.layer.batch_select_indices)(index)
        if how == "reorder" and len(index) == self.batch:
            assert [t.data_ptr() for t in self.layer.tensors] == addresses
        self._take(index)

    @precondition(lambda self: self.exact and self.batch <= 2)
    @rule()
    def repeat(self) -> None:
        self.layer.batch_repeat_interleave(2)
        self._take(torch.arange(self.batch).repeat_interleave(2))

    @precondition(lambda self: self.exact)
    @rule()
    def reset(self) -> None:
        addresses = [t.data_ptr() for t in self.layer.tensors]
        self.layer.reset()
        assert [t.data_ptr() for t in self.layer.tensors] == addresses
        self.exact, self.coded, self.quantized = [], [], 0
        self.check()

    def _take(self, index: Tensor) -> None:
        self.exact = [(k[index], v[index]) for k, v in self.exact]
        self.coded = [(k[index], v[index]) for k, v in self.coded]
        self.batch = len(index)
        self.check()

    def read(self) -> tuple[Tensor, Tensor]:
        """Return what a call would attend to, [B,G,T,D]."""
        site, first = self.plan.sites[0].site, self.plan.sinks
        pairs = [
            self.coded[i] if first <= i < first + self.quantized else self.exact[i] for i in range(len(self.exact))
        ]
        blank = [torch.zeros(self.batch, site.kv_heads, 0, d).double() for d in (site.key_dim, site.value_dim)]
        return torch.cat([blank[0], *[k for k, _ in pairs]], 2), torch.cat([blank[1], *[v for _, v in pairs]], 2)

    def check(self) -> None:
        assert int(self.layer.get_seq_length()) == len(self.exact)
        assert int(self.layer.quantized) == self.quantized
        assert self.layer.get_mask_sizes(3) == (PLACES, 0)
        for held, wanted in zip((self.layer.keys, self.layer.values), self.read(), strict=True):
            if held is not None:
                torch.testing.assert_close(held[:, :, : len(self.exact)], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("window_bits", (16, 8))
def test_any_sequence_of_operations_leaves_the_state_of_a_naive_reference(
    window_bits: int, layout: str, tiers: Any
) -> None:
    plan = random_plan(layout, tiers, window_bits=window_bits, sinks=3)
    machine: Any = type("Machine", (StaticStates,), {"plan": plan})
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    machine.TestCase().runTest()


@pytest.mark.parametrize("places", [1, 3, 4, 12, 19, 20])
def test_caches_that_end_before_or_just_after_the_first_block_are_exact(places: int) -> None:
    plan = random_plan("head", CODED)
    layer = StaticLatentLayer(plan, plan.sites[0], places, absorb=False)
    keys, values = torch.randn(1, 2, places, 16).double(), torch.randn(1, 2, places, 8).double()
    layer.update(keys[:, :, :1], values[:, :, :1])
    for i in range(1, places):
        k, v = layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        torch.testing.assert_close(k[:, :, : i + 1], keys[:, :, : i + 1])
        torch.testing.assert_close(v[:, :, : i + 1], values[:, :, : i + 1])


def in_float64(plan: LatentPlan) -> LatentPlan:
    """Return the plan with bases that make every latent in float64."""

    def double(side: SidePlan) -> SidePlan:
        return replace(side, encode=side.encode.double())

    sites = tuple(replace(site, key=double(site.key), value=double(site.value)) for site in plan.sites)
    return replace(plan, sites=sites)


@pytest.mark.parametrize("ratio", [1, 4])
def test_static_and_dynamic_caches_give_the_same_logits(fitted: FittedModel, ratio: float) -> None:
    """The window has 16 bits: with 8 bits, dynamic caches quantize rounded tokens and static ones exact tokens.

    In float64, so that both round every latent to the same code.
    """
    model, ids = copy.deepcopy(fitted.model).double(), token_ids(2, 70)
    plan = in_float64(fitted.plan(ratio, window_bits=16))
    fhopt.apply(model, plan)
    found = []
    for cache in (latent_cache(model), latent_cache(model, max_cache_len=80)):
        with torch.no_grad():
            steps = [(0, 20), (20, 33), *[(i, i + 1) for i in range(33, 70)]]
            found.append(torch.cat([model(ids[:, a:b], **cached(cache)).logits for a, b in steps], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # the attention kernel computes in float32


def test_static_and_dynamic_layers_store_the_same_keys_in_segments() -> None:
    plan = in_segments(random_plan("head", CODED, mean_tokens=12))
    layers = LatentLayer(plan, plan.sites[0], absorb=False), StaticLatentLayer(plan, plan.sites[0], 330, absorb=False)
    keys, values = torch.randn(2, 2, 320, 16).double(), torch.randn(2, 2, 320, 8).double()
    for start, stop in [(0, 70), (70, 71), (71, 200), *[(i, i + 1) for i in range(200, 320)]]:
        for layer in layers:
            layer.update(keys[:, :, start:stop], values[:, :, start:stop])
    for layer in layers:
        layer.crop(-100)
    grown, static = layers
    assert grown.quantized > 3 * 64
    for a, b in ((grown.keys, static.keys), (grown.values, static.values)):
        assert a is not None and b is not None
        count = plan.sinks + grown.quantized
        torch.testing.assert_close(a[:, :, :count], b[:, :, :count], rtol=1e-6, atol=1e-6)
    error = (grown.keys[:, :, :200] - keys[:, :, :200]).norm() / keys[:, :, :200].norm()  # type: ignore[index]
    assert error < 1.5  # random bases store little; keys of another segment would be worse than zero


def test_a_static_cache_allocates_all_its_places_at_once(llama: FittedModel) -> None:
    plan = llama.plan(4, window_bits=16)
    cache = LatentCache(plan, llama.model.config, max_cache_len=400)
    with torch.no_grad():
        llama.model(token_ids(2, 20), **cached(cache))
        before = cache.nbytes
        llama.model(token_ids(2, 300), **cached(cache))
    assert cache.nbytes == before and cache.get_max_length() == 400 and cache.is_compileable
    window = plan.window.first_length + 2  # and an unused place in each
    exact, coded = plan.exact_token_bytes(itemsize=4), sum(p.token_bytes(4) for p in plan.sites)
    assert before == 2 * (window * exact + (cache.layers[0].capacity + 1) * coded)
    assert cache.layers[0].capacity == (400 - plan.sinks - plan.recent) // plan.block * plan.block


def test_more_tokens_than_fit_are_refused_by_the_first_layer_before_any_layer_stores_them(llama: FittedModel) -> None:
    cache = LatentCache(llama.plan(4), llama.model.config, max_cache_len=50)
    with torch.no_grad():
        llama.model(token_ids(1, 45), **cached(cache))
        state = [t.clone() for layer in cache.layers for t in layer.tensors]
        with pytest.raises(FhoptError, match=r"50 tokens has no room for 6 more; it already holds 45.*max_cache_len"):
            llama.model(token_ids(1, 6), **cached(cache))
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [45, 45]
    assert all(map(torch.equal, state, [t for layer in cache.layers for t in layer.tensors]))


def test_static_caches_of_generate_get_static_latent_layers_and_stay_the_same_object(llama: FittedModel) -> None:
    from transformers import StaticCache

    model, ids = llama.model, token_ids(1, 40)
    fhopt.apply(model, llama.plan(1))
    cache = StaticCache(config=model.config, max_cache_len=128)
    first = generate(model, MODES["greedy"], ids, **cached(cache))
    second = generate(model, MODES["greedy"], first.sequences, **cached(cache))
    fhopt.unapply(model)
    expected = generate(model, {"do_sample": False, "max_new_tokens": 48, "min_new_tokens": 48}, ids)
    assert torch.equal(second.sequences, expected.sequences)
    assert all(isinstance(layer, StaticLatentLayer) for layer in cache.layers)


def test_without_a_plan_applied_a_static_cache_still_works(llama: FittedModel) -> None:
    ids = token_ids(1, 60)
    cache = LatentCache(llama.plan(1), llama.model.config, max_cache_len=64, absorb=False)
    with torch.no_grad():
        expected = llama.model(ids, use_cache=False).logits
        found = torch.cat([llama.model(x, **cached(cache)).logits for x in ids.split(20, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sliding_layers_are_static_too_and_stay_exact() -> None:
    from small_models import found as find
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    plan = fit_plan.exact_plan(find(tiny_llama(), 24)[1].sites.values())
    kinds = [type(layer).__name__ for layer in LatentCache(plan, config, max_cache_len=64).layers]
    assert kinds == ["StaticSlidingWindowLayer", "StaticLatentLayer"]
    assert not any(isinstance(layer, LatentLayer) for layer in LatentCache(plan, config, max_cache_len=64).layers)


def test_an_empty_cache_takes_another_batch_and_a_filled_one_does_not(llama: FittedModel) -> None:
    cache = LatentCache(llama.plan(1), llama.model.config, max_cache_len=64)
    with torch.no_grad():
        for batch in (2, 3, 1):
            ids = token_ids(batch, 40)
            expected = llama.model(ids, use_cache=False).logits
            found = torch.cat([llama.model(part, **cached(cache)).logits for part in ids.split(20, 1)], 1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            with pytest.raises(FhoptError, match="Use one cache per batch"):
                llama.model(token_ids(batch + 1, 1), **cached(cache))
            cache.reset()
