"""The latent cache: generation in every mode, states against a naive reference, bytes, and wrong use."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation import MODES, batch_of, cache_of, generate
from hand_plans import CODED, SITE, random_plan, shared_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from model_zoo import huggingface as zoo
from naive import naive_code, naive_round
from small_models import Fitted, cached, found, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt import fitting, latents, ops, passes
from fhopt.applying import cache_argument, latent_cache
from fhopt.cache import REGIONS, LatentCache, layer_indices
from fhopt.capture import capture
from fhopt.codegen import dispatch
from fhopt.codegen.build import build_torch
from fhopt.errors import FhoptError
from fhopt.evaluate import score
from fhopt.layers import LatentLayer
from fhopt.spec import LatentPlan, SidePlan, Tier

WINDOWS = (16, 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), [("llama", "full width"), ("gpt2", "exact")])
def test_latents_of_full_width_generate_the_same_tokens(
    name: str, kind: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """Every mode meets both models and both plans: what a mode does to a cache does not ask whose bases it has."""
    fitted: Fitted = request.getfixturevalue(name)
    model, batch = fitted.model, batch_of(mode)
    ids = token_ids(batch, 40)
    expected = generate(model, MODES[mode], ids)
    sites = fitted.outcome.sites.values()
    plan = fitted.plan(1) if kind == "full width" else fitting.exact_plan(sites, recent=8, block=8)
    fhopt.apply(model, plan)
    try:
        found = generate(model, MODES[mode], ids)
    finally:
        fhopt.unapply(model)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_generate_makes_latent_caches_by_itself_and_unapply_takes_it_back(fitted: Fitted) -> None:
    fhopt.apply(fitted.model, fitted.plan(4))
    with_latents = generate(fitted.model, MODES["greedy"], token_ids(1, 60))
    fhopt.unapply(fitted.model)
    without = generate(fitted.model, MODES["greedy"], token_ids(1, 60))
    assert all(isinstance(layer, LatentLayer) for layer in cache_of(with_latents).layers)
    assert not any(isinstance(layer, LatentLayer) for layer in cache_of(without).layers)
    assert fitted.model.config._attn_implementation == "sdpa"


def test_left_padding_is_masked_in_latents_too(fitted: Fitted) -> None:
    ids, mask = token_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    expected = generate(fitted.model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.apply(fitted.model, fitted.plan(1))
    found = generate(fitted.model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.unapply(fitted.model)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_continued_chat_reuses_its_cache(llama: Fitted) -> None:
    ids = token_ids(1, 40)
    fhopt.apply(llama.model, llama.plan(1))
    try:
        cache = LatentCache(llama.plan(1), llama.model.config)
        first = generate(llama.model, MODES["greedy"], ids, **cached(cache))
        second = generate(llama.model, MODES["greedy"], first.sequences, **cached(cache))
    finally:
        fhopt.unapply(llama.model)
    expected = generate(llama.model, {"do_sample": False, "max_new_tokens": 48, "min_new_tokens": 48}, ids)
    assert torch.equal(second.sequences, expected.sequences)


def logits(model: Any, cache: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], **cached(cache)).logits for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)
        ]
    return torch.cat(parts, 1)


def test_steps_of_a_block_see_exactly_what_single_tokens_see(fitted: Fitted) -> None:
    """In float64, so that both ways round every latent to the same code."""
    plan, ids, model = fitted.plan(4, window_bits=16), token_ids(1, 60), copy.deepcopy(fitted.model).double()
    fhopt.apply(model, plan)
    blocks = logits(model, LatentCache(plan), ids, list(range(20, 60, 8)))
    single = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(blocks, single, rtol=1e-4, atol=1e-4)


def test_absorbed_attention_equals_attention_on_rebuilt_keys_and_values(fitted: Fitted) -> None:
    """In float64, so that both ways round every latent to the same code; kernels are compared in test_codegen.py."""
    plan, ids, model = fitted.plan(4), token_ids(2, 60), copy.deepcopy(fitted.model).double()
    rebuilt = logits(model, LatentCache(plan, absorb=False), ids, list(range(20, 60)))
    fhopt.apply(model, plan)
    absorbed = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-4, atol=1e-4)  # a decoder is rounded to float32


def test_a_lossy_plan_stays_close_and_full_width_costs_nothing(llama: Fitted) -> None:
    ids = token_ids(2, 80)
    exact = score(llama.model, ids, None).nats
    for ratio, bound in ((1, 1e-5), (4, 0.05)):
        plan = llama.plan(ratio)
        fhopt.apply(llama.model, plan)
        assert abs(score(llama.model, ids, plan).nats - exact) < bound
        fhopt.unapply(llama.model)


def allocated(run: Callable[[], Any]) -> list[int]:
    """Bytes of every block that torch's allocator hands out while `run` runs, in C++ too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events: Any = trace.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def decoding(model: Any, cache: Any, steps: int) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for _ in range(steps):
            model(token_ids(1, 1), **{cache_argument(model): cache})

    return run


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_no_keys_or_values_of_full_length_are_ever_allocated_in_decoding(
    llama: Fitted, static: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 tokens, steps over a block that is sealed, every allocation: none is as large as one layer's latents as
    numbers, let alone its keys. What does grow are logits and masks, a few numbers a token."""
    if kernel == "torch":
        monkeypatch.setattr(dispatch, "build", build_torch)
        monkeypatch.setattr(dispatch, "_kernels", {})
        monkeypatch.setattr(latents, "TILE", 64)
    model, plan, length = tiny_llama(max_position_embeddings=4096), llama.plan(4), 3000
    fhopt.apply(model, plan)
    cache = latent_cache(model, max_cache_len=3100 if static else None)
    with torch.no_grad():
        model(token_ids(1, length), **cached(cache))
    decoding(model, cache, 2)()
    blocks = allocated(decoding(model, cache, plan.block))
    fhopt.unapply(model)
    sealed = int(cache.layers[0].sealed_rows)
    site = plan.sites[0]
    keys = sealed * site.site.kv_heads * site.site.key_dim * 4
    rows = sealed * (site.key.row_bytes() + 2) * (site.key.groups + 1) * 1.1  # storage of codes, when it grows
    assert blocks and sealed > 2900
    assert max(blocks) < max(rows, keys / 3)


@pytest.mark.parametrize("name", ["bloom", "falcon", "mpt"])
def test_nor_in_models_that_write_their_attention_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "TILE", 64)
    row = next(m for m in zoo.DECODERS if m.name == name)
    limit = {"max_seq_len": 4096} if name == "mpt" else {}
    model: Any = zoo._make(replace(row, options={**row.options, **limit}), row.implementations[-1])
    sites = passes.find(capture(model, (), {"input_ids": token_ids(1, 9), "use_cache": False}).program).sites
    plan = coded(fitting.exact_plan(sites.values(), recent=8, block=8))
    fhopt.apply(model, plan)
    cache = latent_cache(model)
    with torch.no_grad():
        model(token_ids(1, 3000), **{cache_argument(model): cache}, use_cache=True)
    decoding(model, cache, 2)()
    blocks = allocated(decoding(model, cache, plan.block))
    site = plan.sites[0].site
    assert max(blocks) < cache.layers[0].sealed * site.kv_heads * site.key_dim * 4 / (1 if site.kv_heads == 1 else 3)


def coded(plan: LatentPlan) -> LatentPlan:
    """The same latents with 4 bits each."""

    def side(old: SidePlan) -> SidePlan:
        return replace(old, tiers=(Tier(4, old.width, 0.4),))

    return replace(plan, sites=tuple(replace(s, key=side(s.key), value=side(s.value)) for s in plan.sites))


# ---- bytes


def test_the_cache_holds_what_the_plan_says(fitted: Fitted) -> None:
    plan = fitted.plan(4)
    fhopt.apply(fitted.model, plan)
    cache = LatentCache(plan)
    logits(fitted.model, cache, token_ids(1, 400), [200])
    fhopt.unapply(fitted.model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for row in cache.layers for t in row.tensors}
    assert cache.nbytes == sum(held.values()) == sum(r["bytes"] for r in cache.report())
    needed = plan.cache_bytes(400, itemsize=4)
    spare = sum(p.token_bytes() for p in plan.sites) * (cache.layers[0].sealed / 8 + plan.block)
    assert needed <= cache.nbytes <= needed + spare
    assert cache.nbytes < 0.5 * 400 * plan.exact_token_bytes(itemsize=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("window_bits", WINDOWS)
@pytest.mark.parametrize("layout", ["head", "input"])
def test_the_report_is_what_the_allocator_handed_out(
    layout: str, window_bits: int, static: bool, dtype: torch.dtype
) -> None:
    from torch.profiler import ProfilerActivity, profile

    plan = random_plan(layout, CODED, window_bits=window_bits, sinks=3)
    batches = [
        (torch.randn(2, 2, n, 16).to(dtype), torch.randn(2, 2, n, 8).to(dtype)) for n in (300, 1, 1, 5, 40, 1, 8, 1)
    ]

    def fill() -> LatentCache:
        cache = LatentCache(plan, max_cache_len=400 if static else None)
        for key, value in batches:
            cache.update(key, value, 0)
        cache.crop(-11)
        cache.update(*batches[1], 0)
        return cache

    fill()  # bases, kernels
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        cache = fill()
    events: Any = trace.profiler.kineto_results.events()
    held = sum(e.nbytes() for e in events if e.name() == "[memory]")
    counters = 16 if static else 0  # how many tokens, how many sealed
    assert cache.nbytes + counters == held
    (row,) = cache.report()
    assert row["bytes"] == cache.nbytes == sum(row[region] for region in REGIONS)
    tokens = 357 - 11 + 1
    assert row["tokens"] == tokens and row["exact"] == 0
    site, size = plan.sites[0], dtype.itemsize
    assert row["sealed"] == 2 * row["sealed_tokens"] * site.token_bytes(size)
    if static:
        assert row["sinks"] == 2 * (3 + 1) * site.open_bytes(16, size)
        assert row["window"] == 2 * (plan.window + 1) * site.open_bytes(window_bits, size)
    else:
        assert row["sinks"] == 2 * 3 * site.open_bytes(16, size)
        assert row["window"] == 2 * (tokens - 3 - row["sealed_tokens"]) * site.open_bytes(window_bits, size)
        assert row["spare"] <= 2 * (row["sealed_tokens"] // 64 + plan.block) * site.token_bytes(size)


# ---- states


class CacheStates(RuleBasedStateMachine):
    """Any sequence of operations leaves the state of the naive reference: lists of tokens [B,G,1,D], each coded on its
    own when its turn comes."""

    plan: LatentPlan

    @initialize(batch=st.integers(1, 2))
    def start(self, batch: int) -> None:
        plan = self.plan
        self.layer = LatentLayer(plan, plan.sites[0], absorb=False)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rounded: list[bool] = []
        self.sealed, self.batch = 0, batch

    @rule(count=st.integers(1, 40), seed=st.integers(0, 9999))
    def append(self, count: int, seed: int) -> None:
        plan, generator = self.plan.sites[0], torch.Generator().manual_seed(seed)
        for tokens, dim in ((self.keys, plan.site.key_dim), (self.values, plan.site.value_dim)):
            shape = (self.batch, plan.site.kv_heads, count, dim)
            tokens += torch.randn(shape, generator=generator).to(plan.key.encode.dtype).split(1, 2)
        self.rounded += [False] * count
        found = self.layer.update(*[torch.cat(tokens[-count:], 2) for tokens in (self.keys, self.values)])
        for side, tokens in zip(found, (self.keys, self.values), strict=True):
            torch.testing.assert_close(side, torch.cat(tokens, 2), rtol=1e-3, atol=1e-3)
        while len(self.keys) - self.plan.sinks - self.sealed >= self.plan.recent + self.plan.block:
            for i in range(self.plan.sinks + self.sealed, self.plan.sinks + self.sealed + self.plan.block):
                self.keys[i], self.values[i] = naive_code(self.keys[i], self.values[i], plan)
                self.rounded[i] = False
            self.sealed += self.plan.block
        self.round_window()
        self.check()

    def round_window(self) -> None:
        if self.plan.window_bits == 8:
            for i in range(self.plan.sinks + self.sealed, len(self.keys)):
                if not self.rounded[i]:
                    self.keys[i], self.values[i] = naive_round(self.keys[i]), naive_round(self.values[i])
                    self.rounded[i] = True

    @precondition(lambda self: self.keys)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = len(self.keys)
        count = round(share * length)
        self.layer.crop(-count)
        for tokens in (self.keys, self.values, self.rounded):
            del tokens[length - count :]
        keep = max(0, length - count - self.plan.sinks) // self.plan.block * self.plan.block
        if count:
            self.sealed = min(self.sealed, keep)
        self.round_window()
        self.check()

    @precondition(lambda self: self.keys)
    @rule(indices=st.lists(st.integers(0, 1), min_size=1, max_size=3), how=st.sampled_from(["reorder", "select"]))
    def take(self, indices: list[int], how: str) -> None:
        index = torch.tensor([i % self.batch for i in indices])
        (self.layer.reorder_cache if how == "reorder" else self.layer.batch_select_indices)(index)
        self._take(index)

    @precondition(lambda self: self.keys and self.batch <= 2)
    @rule()
    def repeat(self) -> None:
        self.layer.batch_repeat_interleave(2)
        self._take(torch.arange(self.batch).repeat_interleave(2))

    @rule()
    def move(self) -> None:
        self.layer.offload()
        self.layer.prefetch()
        self.check()

    @rule()
    def reset(self) -> None:
        self.layer.reset()
        assert self.layer.keys is None and self.layer.values is None and not self.layer.tensors
        self.start(self.batch)

    def _take(self, index: Tensor) -> None:
        self.keys, self.values = ([t[index] for t in tokens] for tokens in (self.keys, self.values))
        self.batch = len(index)
        self.check()

    def check(self) -> None:
        assert self.layer.get_seq_length() == len(self.keys)
        assert self.layer.sealed == self.sealed
        assert self.layer.get_mask_sizes(3) == (len(self.keys) + 3, 0)
        for held, tokens in ((self.layer.keys, self.keys), (self.layer.values, self.values)):
            if tokens and held is not None:
                torch.testing.assert_close(held, torch.cat(tokens, 2), rtol=1e-3, atol=1e-3)
        plan, itemsize = self.plan.sites[0], self.plan.sites[0].key.encode.itemsize
        first = min(self.plan.sinks, len(self.keys))
        window = (len(self.keys) - first - self.sealed) * plan.open_bytes(self.plan.window_bits, itemsize)
        needed = window + first * plan.open_bytes(16, itemsize) + self.sealed * plan.token_bytes(itemsize)
        assert self.layer.nbytes >= self.batch * needed


def run_states(plan: LatentPlan) -> None:
    machine: Any = type("Machine", (CacheStates,), {"plan": plan})
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    machine.TestCase().runTest()


@pytest.mark.parametrize("ratio", [1, 4])
def test_any_sequence_of_operations_leaves_the_state_of_a_naive_reference(llama: Fitted, ratio: float) -> None:
    run_states(replace(llama.plan(ratio), sites=llama.plan(ratio).sites[:1]))


@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("window_bits", WINDOWS)
def test_so_do_windows_of_codes_and_shared_rows(window_bits: int, layout: str, tiers: Any) -> None:
    run_states(random_plan(layout, tiers, window_bits=window_bits, sinks=3))


# ---- a window of 8 bits


@given(st.integers(0, 9999), st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
def test_rounded_rows_are_within_half_a_scale_and_round_to_themselves(seed: int, size: float) -> None:
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = ops.round_rows(x)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16 and scale.shape == (2, 3, 5)
    found = ops.unround_rows(codes, scale, x.dtype)
    assert bool(((found - x).abs() <= 0.501 * scale.unsqueeze(-1)).all())  # .501: the division rounds too
    again = ops.unround_rows(*ops.round_rows(found), x.dtype)
    assert bool(((again - found).abs() <= 0.501 * scale.unsqueeze(-1)).all())


def test_rows_of_zeros_and_no_rows_have_codes_too() -> None:
    for tokens in (2, 0):
        zeros = torch.zeros(1, 2, tokens, 8, dtype=torch.bfloat16)
        found = ops.unround_rows(*ops.round_rows(zeros), zeros.dtype)
        assert found.dtype == torch.bfloat16 and bool((found.abs() <= 2.0**-25).all())  # half the least float16


@functools.cache
def plans(make: Callable[[], Any], window_bits: int) -> LatentPlan:
    """Uncoded latents for all sites of the model that `make` makes."""
    with torch.random.fork_rng():
        sites = found(make())[1].sites.values()
    return replace(fitting.exact_plan(sites, recent=8, block=8), window_bits=window_bits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_window_of_codes_generates_in_every_mode(make: Any, mode: str) -> None:
    model, batch = make(), batch_of(mode)
    fhopt.apply(model, plans(make, 8))
    output = generate(model, MODES[mode], token_ids(batch, 40))
    assert all(bool(step.isfinite().all()) for step in output.logits)
    assert output.sequences.shape[1] == 64


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_logits_behind_a_window_of_codes_stay_close_and_a_prompt_is_exact_to_itself(make: Any) -> None:
    model, ids = make(), token_ids(2, 60)
    exact, rounded = plans(make, 16), plans(make, 8)
    fhopt.apply(model, exact)
    expected = logits(model, LatentCache(exact), ids, list(range(30, 60)))
    absorbed = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    fhopt.unapply(model)
    rebuilt = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-3, atol=1e-3)  # other order of sums, in float32
    assert torch.equal(absorbed[:, :30], expected[:, :30])
    error = float((absorbed - expected).norm() / expected.norm())
    assert 1e-5 < error < 1e-2  # a number moves by at most 1/254 of the largest of its row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_window_of_codes_is_read_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0], absorb=False)
    for tokens in (3, 30, 1):
        key, value = torch.randn(1, 2, tokens, 16, dtype=dtype), torch.randn(1, 2, tokens, 8, dtype=dtype)
        k, v = layer.update(key, value)
        assert k.dtype == v.dtype == dtype
        assert torch.equal(k[:, :, -tokens:], key) and torch.equal(v[:, :, -tokens:], value)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("window_bits", WINDOWS)
def test_without_spare_rows_the_bytes_are_those_of_the_formula(window_bits: int, layout: str, sinks: int) -> None:
    for tiers in ((), CODED):
        plan = random_plan(layout, tiers, window_bits=window_bits, sinks=sinks)
        for steps in ([1], [3, 1, 1], [100], [100, 3], [20, 1, 1, 1, 1]):
            cache = LatentCache(plan, absorb=False)
            for count in steps:
                cache.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 8), 0)
            assert cache.nbytes == cache.report()[0]["bytes"] == plan.cache_bytes(sum(steps), itemsize=4)


# ---- one latent for keys and values


def gpt2_with_biases() -> Any:
    """No bias is zero and no norm is plain, as in a trained model; the same numbers each time."""
    model, generator = tiny_gpt2(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return model


@functools.cache
def shared() -> LatentPlan:
    """Keys and values are affine maps of the normed input: together they span as many directions as it has numbers."""
    with torch.random.fork_rng():
        return shared_plan(found(gpt2_with_biases(), 96)[1], width=64)


@pytest.mark.parametrize("mode", MODES)
def test_keys_and_values_from_one_latent_generate_the_same_tokens(mode: str) -> None:
    model, batch = gpt2_with_biases(), batch_of(mode)
    ids = token_ids(batch, 40)
    expected = generate(model, MODES[mode], ids)
    fhopt.apply(model, shared())
    output = generate(model, MODES[mode], ids)
    assert {layer.site.layout for layer in cache_of(output).layers} == {"input"}
    assert torch.equal(output.sequences, expected.sequences)
    for a, b in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("absorb", [True, False])
def test_keys_and_values_from_one_latent_survive_a_crop(absorb: bool) -> None:
    model, ids = gpt2_with_biases(), token_ids(1, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    plan = shared()
    if absorb:
        fhopt.apply(model, plan)
    cache = LatentCache(plan, model.config, absorb=absorb)
    logits(model, cache, torch.cat([ids[:, :33], token_ids(1, 20)], 1), [40])
    assert cache.layers[0].sealed == 40
    cache.crop(-20)  # behind token 33 and in a sealed block
    assert cache.layers[0].sealed == 24 and cache.get_seq_length() == 33
    behind = logits(model, cache, ids[:, 33:], [10])
    torch.testing.assert_close(behind, expected[:, 33:], rtol=1e-4, atol=1e-4)


def test_one_latent_of_d_model_numbers_halves_the_sealed_bytes() -> None:
    model = gpt2_with_biases()
    plan = shared()
    assert plan.sites[0].is_exact and 2 * plan.sites[0].token_bytes() == plan.exact_token_bytes() // 2
    cache = LatentCache(plan, absorb=False)
    logits(model, cache, token_ids(1, 92), [])
    assert cache.layers[0].sealed == 80
    assert cache.nbytes == plan.cache_bytes(92, itemsize=4)


# ---- wrong use


def test_tokens_that_do_not_fit_are_refused_and_the_cache_stays(llama: Fitted) -> None:
    layer = LatentLayer(llama.plan(4), llama.plan(4).sites[0], absorb=False)
    layer.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
    state = [t.clone() for t in layer.tensors]
    wrong = {
        "keys and values have": torch.randn(1, 3, 1, 16),
        "batch 2": torch.randn(2, 2, 1, 16),
        "torch.bfloat16": torch.randn(1, 2, 1, 16, dtype=torch.bfloat16),
    }
    for message, tokens in wrong.items():
        with pytest.raises(FhoptError, match=message):
            layer.update(tokens, tokens)
    with pytest.raises(FhoptError, match="crop"):
        layer.crop(-31)
    assert all(torch.equal(a, b) for a, b in zip(layer.tensors, state, strict=True))


def test_layers_that_neither_plan_nor_cache_know_are_refused_and_the_cache_stays_empty(llama: Fitted) -> None:
    cache = LatentCache(replace(llama.plan(4), sites=llama.plan(4).sites[:1]))
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(FhoptError, match=r"caches a layer 1, .* know 1.*LatentCache\(plan, model.config\)"):
                llama.model(token_ids(1, 40), **cached(cache))
            assert cache.get_seq_length() == 0 and cache.nbytes == 0
        cache = LatentCache(cache.plan, llama.model.config)
        llama.model(token_ids(1, 40), **cached(cache))
    assert [row["kind"] for row in cache.report()] == ["band", "exact"]


def test_a_cache_by_the_plan_of_another_model_is_refused(llama: Fitted, gpt2: Fitted) -> None:
    fhopt.apply(llama.model, llama.plan(4))
    cache = LatentCache(gpt2.plan(4))
    with torch.no_grad(), pytest.raises(FhoptError, match="plan for another model"):
        llama.model(token_ids(1, 40), **cached(cache))
    fhopt.unapply(llama.model)
    with torch.no_grad(), pytest.raises(FhoptError, match="Is this the model"):
        llama.model(token_ids(1, 40), **cached(cache))
    assert cache.get_seq_length() == 0


def test_a_cache_goes_on_in_the_dtype_that_it_began_in(llama: Fitted) -> None:
    cache = LatentCache(llama.plan(4))
    with torch.no_grad():
        llama.model(token_ids(1, 60), **cached(cache))
        state = [t.clone() for layer in cache.layers for t in layer.tensors]
        with pytest.raises(FhoptError, match=r"torch.bfloat16 of batch 1, the cache holds torch.float32"):
            copy.deepcopy(llama.model).to(torch.bfloat16)(token_ids(1, 1), **cached(cache))
        with pytest.raises(FhoptError, match="of batch 2"):
            llama.model(token_ids(2, 1), **cached(cache))
    assert all(map(torch.equal, state, [t for layer in cache.layers for t in layer.tensors]))


@pytest.mark.parametrize("layout", ["head", "input"])
def test_layers_of_a_model_that_is_spread_over_devices_stay_where_their_tokens_are(layout: str) -> None:
    """`meta` stands for the second device: it has no numbers, but every tensor knows where it is."""
    plan = random_plan(layout, CODED)
    twin = replace(plan.sites[0], site=replace(plan.sites[0].site, name="layers.1"))
    cache = LatentCache(replace(plan, sites=(plan.sites[0], twin)))
    for count in (30, 1, 5):
        for layer, device in enumerate(("cpu", "meta")):
            key, value = (torch.zeros(1, 2, count, size, device=device) for size in (16, 8))
            keys, values = cache.update(key, value, layer)
            assert {keys.device.type, values.device.type} == {device}
    assert [{t.device.type for t in layer.tensors} for layer in cache.layers] == [{"cpu"}, {"meta"}]


def latent_pair(**options: Any) -> tuple[Any, Tensor]:
    """Keys that hold latents, and the same as an ordinary tensor."""
    layer = LatentLayer(random_plan("head", CODED, **options), random_plan("head", CODED).sites[0])
    layer.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 8))
    keys = layer.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 8))[0]
    return keys, keys.rebuild()  # type: ignore[attr-defined]


def test_products_of_latents_are_understood_in_every_spelling() -> None:
    keys, plain = latent_pair()
    query = torch.randn(1, 2, 3, 16)
    folded = query.flatten(0, 1)
    for spelling in (
        lambda k: query @ k.mT,
        lambda k: torch.matmul(input=query, other=k.transpose(2, 3)),
        lambda k: torch.bmm(folded, mat2=k.reshape(2, 61, 16).swapaxes(1, 2)),
        lambda k: torch.baddbmm(torch.full((2, 3, 61), torch.nan), folded, k.reshape(shape=(2, 61, 16)).mT, beta=0),
        lambda k: torch.permute(k, dims=(0, 1, 3, 2)),
        lambda k: k[:, :, 5:] * 2,
    ):
        torch.testing.assert_close(spelling(keys), spelling(plain), rtol=1e-4, atol=1e-4)
    assert keys.shape == plain.shape and keys.dtype == plain.dtype and keys.size(2) == 61


def test_a_change_of_latents_in_place_is_refused() -> None:
    keys, _ = latent_pair()

    def assign(x: Tensor) -> None:
        x[:, :, 0] = 0

    def scale(x: Tensor) -> None:
        x *= 2

    for change in (assign, scale, lambda x: x.mul_(2), lambda x: torch.add(x, 1, out=x)):
        with pytest.raises(FhoptError, match=r"in place .*absorb=False"):
            change(keys)


def test_gradients_pass_through_keys_that_had_to_be_rebuilt() -> None:
    model, gradients = tiny_llama(), []
    ids = token_ids(1, 40)
    plan = fitting.exact_plan(found_sites(model), recent=8, block=8)
    for absorb in (True, False):
        cache = LatentCache(plan, model.config, absorb=absorb)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model(ids[:, :30], **cached(cache))
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model(ids[:, 30:], **cached(cache)).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def found_sites(model: Any) -> list[Any]:
    return list(found(model, 24)[1].sites.values())


def test_a_compiled_model_that_loses_the_latents_is_told() -> None:
    """Keys that anything is done to, between cache and attention, are other tensors, without what hung on the first."""
    model, ids = tiny_llama(), token_ids(1, 40)
    fhopt.apply(model, fitting.exact_plan(found_sites(model), recent=8, block=8))
    cache = latent_cache(model, max_cache_len=64)

    def lossy(self: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = LatentCache.update(self, *args, **kwargs)
        return key * 1.0, value

    with torch.no_grad():
        model(ids, **cached(cache))
        torch._dynamo.reset()
        step: Any = torch.compile(model.forward, backend="eager", fullgraph=True)
        cache.__class__ = type("Lossy", (LatentCache,), {"update": lossy})
        with pytest.raises(Exception, match="loses the latents"):
            step(input_ids=ids[:, :1], **cached(cache), use_cache=True)


def test_what_apply_made_active_unapply_takes_back(llama: Fitted) -> None:
    fhopt.apply(llama.model, llama.plan(1))
    cache = latent_cache(llama.model, max_cache_len=64)
    layer = cache.layers[0]
    with torch.no_grad():
        llama.model(token_ids(1, 40), **cached(cache))
        assert layer.reader.active
        llama.model.set_attn_implementation("sdpa")
        llama.model(token_ids(1, 1), **cached(cache))
        assert not layer.reader.active
    fhopt.unapply(llama.model)
    assert llama.model.config._attn_implementation == "sdpa" and not layer.reader.active


def test_a_copy_of_a_cache_goes_its_own_way_and_shares_the_bases(llama: Fitted) -> None:
    """How transformers' documentation reuses a prompt: by copy.deepcopy."""
    cache, ids = LatentCache(llama.plan(4)), token_ids(1, 60)
    with torch.no_grad():
        llama.model(ids, **cached(cache))
        other = copy.deepcopy(cache)
        expected = llama.model(ids[:, :5], **cached(other)).logits
        assert cache.get_seq_length() == 60 and other.get_seq_length() == 65
        assert torch.equal(llama.model(ids[:, :5], **cached(cache)).logits, expected)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert a.key_bases is b.key_bases and a.plan is b.plan


def test_a_model_without_the_plan_applied_reads_the_latents_too(fitted: Fitted) -> None:
    """Its own attention gets tensors of full length that hold latents: never a wrong number, applied or not."""
    ids = token_ids(2, 60)
    expected = logits(fitted.model, LatentCache(fitted.plan(4), absorb=False), ids, [30, 40, 41])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of grouped heads, sdpa repeats the keys
        found = logits(fitted.model, LatentCache(fitted.plan(4)), ids, [30, 40, 41])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_plan_for_another_model_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="does not have"):
        fhopt.apply(tiny_gpt2(), llama.plan(4))
    with pytest.raises(FhoptError, match="not a transformers model"):
        fhopt.apply(torch.nn.Linear(2, 2), llama.plan(4))
    with pytest.raises(FhoptError, match="the model has 1"):
        LatentCache(llama.plan(4), tiny_llama(num_hidden_layers=1).config)


def test_the_layer_is_the_number_of_the_path_in_which_sites_differ() -> None:
    def indices(*names: str) -> list[int]:
        return list(layer_indices([replace(SITE, name=name) for name in names]).values())

    assert indices("model.layers.11.self_attn") == [11]
    assert indices("transformer.h.3.attn", "transformer.h.0.attn") == [3, 0]
    assert indices("decoder.block.0.layer.1.EncDecAttention", "decoder.block.1.layer.1.EncDecAttention") == [0, 1]
    assert indices("towers.1.layers.0.attn", "towers.1.layers.1.attn") == [0, 1]
    with pytest.raises(FhoptError, match="no layer number"):
        indices("attention")


# ---- what a review found


def test_a_cache_of_the_callers_own_is_filled_not_replaced(llama: Fitted) -> None:
    from transformers import DynamicCache

    ids = token_ids(1, 41)
    with torch.no_grad():
        expected = llama.model(ids, use_cache=False).logits[:, -1]
        fhopt.apply(llama.model, llama.plan(1))
        cache = DynamicCache(config=llama.model.config)
        llama.model(ids[:, :40], **cached(cache))
        assert cache.get_seq_length() == 40 and isinstance(cache.layers[0], LatentLayer)
        found = llama.model(ids[:, 40:], **cached(cache)).logits[:, -1]
        old = LatentCache(llama.plan(1), llama.model.config)
        llama.model(ids, past_key_values=old)
    fhopt.unapply(llama.model)
    assert old.get_seq_length() == 41
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_dropped_cache_is_freed_at_once(llama: Fitted) -> None:
    import gc
    import weakref

    fhopt.apply(llama.model, llama.plan(4))
    cache = LatentCache(llama.plan(4))
    with torch.no_grad():
        llama.model(token_ids(1, 60), **cached(cache))
    layer = weakref.ref(cache.layers[0])
    fhopt.unapply(llama.model)
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


def test_sliding_layers_stay_as_they_are_and_padding_stays_finite_with_softcap() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=128, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    sites = found(model, 24)[1].sites
    assert {s.softcap for s in sites.values()} == {50.0}
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    expected = generate(model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.apply(model, fitting.exact_plan(sites.values(), recent=8, block=8))
    output = generate(model, MODES["greedy"], ids, attention_mask=mask)
    kinds = [isinstance(layer, LatentLayer) for layer in cache_of(output).layers]
    assert kinds == [not s for s in LatentCache(model._fhopt_applied.plan, config).is_sliding]
    assert kinds.count(True) == 1
    assert torch.equal(output.sequences, expected.sequences)
