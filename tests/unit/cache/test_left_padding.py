"""Left-padded batches: each sequence has its own attention sinks and means."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import MODES, batch_of, cache_of, generate
from latent_caches import found_sites, gpt2_with_biases, shared
from needs import sampled
from padded_batches import alone, call, divergence, padded, read
from paged_plans import paged
from small_models import FittedModel, cached, tiny_llama, token_ids
from torch import Tensor
from torch._dynamo.utils import counters

import fhopt
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.left_padding import PADDING, note_padding, padding_ahead
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import switched
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan

LENGTHS = (70, 46, 21)  # padding: none, whole blocks (24 tokens), and a part of a block (49)
LATER = 30
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)
SEGMENT = 64


@pytest.fixture(params=sampled([{}, {"max_cache_len": 128}], 2), ids=["growing", "static"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a cache."""
    return dict(request.param)


@pytest.fixture
def plan(llama: FittedModel) -> LatentPlan:
    return llama.plan(8, mean_tokens=16)


def in_parts(plan: LatentPlan) -> LatentPlan:
    """Return the plan with keys relative to segments, although its bases were fitted without."""
    return replace(plan, sites=tuple(replace(site, segment=SEGMENT) for site in plan.sites))


def filled(plan: LatentPlan, model: Any, lengths: tuple[int, ...], **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Return the first layer after an update with random keys and values of such a batch, and these."""
    cache = LatentCache(plan, model.config, **options)
    note_padding(cache.layers, padded(lengths)[1], max(lengths))
    site = plan.sites[0].site
    keys, values = (torch.randn(len(lengths), site.kv_heads, max(lengths), n) for n in (site.key_dim, site.value_dim))
    cache.layers[0].update(keys, values)
    return cache.layers[0], keys, values


# ---- stored state


def test_attention_sinks_are_the_first_tokens_of_each_sequence(
    options: dict[str, int], llama: FittedModel, plan: LatentPlan
) -> None:
    layer, keys, values = filled(plan, llama.model, LENGTHS, **options)
    for window, x in ((layer.window_keys, keys), (layer.window_values, values)):
        for row, length in enumerate(LENGTHS):
            own = x[row, :, max(LENGTHS) - length :]
            assert torch.equal(window.parts[0][row, :, : plan.sinks], own[:, : plan.sinks])


def test_means_are_computed_per_sequence(options: dict[str, int], llama: FittedModel, plan: LatentPlan) -> None:
    layer, keys, values = filled(plan, llama.model, LENGTHS, **options)
    for mean, x in zip(layer.means.parts, (keys, values), strict=True):
        for row, length in enumerate(LENGTHS):
            start = max(LENGTHS) - length + plan.sinks
            expected = x[row, :, start : start + plan.mean_tokens].mean(1, keepdim=True)
            torch.testing.assert_close(mean[row], expected)


def test_prompts_shorter_than_the_attention_sinks_take_means_of_later_tokens(
    options: dict[str, int], llama: FittedModel, plan: LatentPlan
) -> None:
    layer, keys, _ = filled(plan, llama.model, (70, 2), **options)
    assert torch.equal(layer.window_keys.parts[0][1, :, :2], keys[1, :, -2:])
    first = layer.means.parts[0].clone()
    assert first[0].any() and not first[1].any()
    more = torch.randn_like(keys[:, :, :1])
    layer.update(more, more)
    assert torch.equal(layer.means.parts[0][0], first[0])
    torch.testing.assert_close(layer.means.parts[0][1], more[1])
    layer.update(torch.randn_like(more), more)
    torch.testing.assert_close(layer.means.parts[0][1], more[1])


@pytest.mark.parametrize("window_bits", [8, 16])
def test_keys_and_values_are_attended_to_in_order_of_position(
    window_bits: int, options: dict[str, int], llama: FittedModel
) -> None:
    plan = llama.plan(1, window_bits=window_bits)
    layer, keys, values = filled(plan, llama.model, (*LENGTHS, 2), absorb=False, **options)
    kept = plan.sinks, -1 if window_bits == 16 else 1
    for found, x in ((layer.keys, keys), (layer.values, values)):
        torch.testing.assert_close(found[:, :, : x.shape[2]], x, rtol=0.0, atol=1e-4 if kept[1] < 0 else 0.05)


def test_without_padding_no_padding_state_is_stored(llama: FittedModel, plan: LatentPlan) -> None:
    ids, mask = padded((60, 60), 20)
    found, cache = read(llama.model, plan, (ids, mask), 20)
    with torch.no_grad(), switched(llama.model, plan):
        plain = latent_cache(llama.model)
        parts = [llama.model(ids[:, :60], **cached(plain)).logits[:, -1:]]
        parts += [llama.model(ids[:, t : t + 1], **cached(plain)).logits for t in range(60, 80)]
    assert torch.equal(found, torch.cat(parts, 1))
    for one, other in zip(cache.layers, plain.layers, strict=True):
        assert not one.padding.parts and one.padding.places is None and PADDING not in one.state()["parts"]
        assert one.regions() == other.regions()


def test_its_bytes_are_counted(llama: FittedModel, plan: LatentPlan) -> None:
    (_, with_padding), (_, without) = (read(llama.model, plan, padded(n), 0) for n in ((70, 21), (70, 70)))
    numbers = 2 * 3 * 8  # three int64 per sequence
    assert with_padding.nbytes - without.nbytes == len(with_padding.layers) * numbers


# ---- same results as without padding


@pytest.mark.parametrize("window_bits", [8, 16])
@pytest.mark.parametrize("lengths", [LENGTHS, (90, 26, 41)])
def test_a_short_sequence_gives_the_same_results_as_without_padding(
    lengths: tuple[int, ...], window_bits: int, options: dict[str, int], llama: FittedModel
) -> None:
    """Equal up to rounding if padding is whole blocks; otherwise other tokens are the newest of a block.

    With the longer sequences, keys are relative to segments, and the second sequence's padding is one whole segment.
    """
    plan = llama.plan(8, mean_tokens=16, window_bits=window_bits)
    plan = in_parts(plan) if lengths[0] - lengths[1] == SEGMENT else plan
    batch = padded(lengths, LATER)
    found, _ = read(llama.model, plan, batch, LATER, **options)
    exact, _ = read(llama.model, None, batch, LATER)
    losses = []
    for row in range(len(lengths)):
        own, _ = read(llama.model, plan, alone(*batch, row), LATER, **options)
        losses.append((divergence(found[row], exact[row]), divergence(own[0], exact[row])))
        if row < 2:  # rounding decides a latent between two codes, which changes few logits
            far = ~torch.isclose(found[row], own[0], **CLOSE)
            assert far.double().mean() < 0.2 and (found[row] - own[0]).abs().max() < 0.05
    assert losses[2][0] < 1.5 * losses[2][1]


@torch.no_grad()
def test_segments_begin_where_position_counting_begins(options: dict[str, Any], llama: FittedModel) -> None:
    """Without position ids, the model's positions count padding; those of `generate` do not."""
    plan, (ids, mask) = in_parts(llama.plan(8, mean_tokens=16)), padded((120, 40))
    errors, counted = [], {"position_ids": (mask.cumsum(1) - 1).clamp(0)}
    for positions, behind in (({}, [0, 0]), (counted, [0, 80])):
        given = {"attention_mask": mask, "use_cache": True, **positions}
        exact = llama.model(ids, **given).past_key_values.layers[0].keys[1, :, 80:]
        with switched(llama.model, plan):
            cache = LatentCache(plan, llama.model.config, **options)
            llama.model(ids, **given, **cached(cache))
        assert cache.layers[0].padding.behind.tolist() == behind
        found = cache.layers[0].keys[:, :, :120][1, :, 80:]
        errors.append(float((found - exact).square().mean() / exact.square().mean()))
    assert 0 < errors[0] < 1.2 * errors[1] and errors[1] < 1.2 * errors[0]


def test_greedy_tokens_at_8x_are_those_of_each_sequence_without_padding(llama: FittedModel, plan: LatentPlan) -> None:
    ids, mask = padded((70, 46, 22))  # padding in whole blocks
    with switched(llama.model, plan):
        found = generate(llama.model, MODES["greedy"], ids, attention_mask=mask).sequences[:, -24:]
        for row in range(3):
            own, ones = alone(ids, mask, row)
            one = generate(llama.model, MODES["greedy"], own, attention_mask=ones).sequences[0, -24:]
            assert torch.equal(found[row], one)


# ---- exact plans stay exact in every mode


@pytest.mark.parametrize("mode", [m for m in MODES if batch_of(m) > 1 and "custom_generate" not in MODES[m]])
@pytest.mark.parametrize("kind", ["full width", "one latent"])
def test_latents_of_full_width_generate_the_exact_tokens(kind: str, mode: str, llama: FittedModel) -> None:
    model, plan = (llama.model, llama.plan(1)) if kind == "full width" else (gpt2_with_biases(), shared())
    ids, mask = padded((50, 23))
    expected = generate(model, MODES[mode], ids, attention_mask=mask)
    with switched(model, plan):
        found = generate(model, MODES[mode], ids, attention_mask=mask)
    assert any(layer.padding.parts for layer in cache_of(found).layers)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("mode", ["chunked prefill", "static chunked prefill"])
def test_a_sequence_without_a_token_in_the_first_chunk_has_padding_for_sinks(mode: str, llama: FittedModel) -> None:
    ids, mask = padded((50, 45, 20))  # chunks of 13 tokens
    expected = generate(llama.model, MODES["greedy"], ids, attention_mask=mask)
    with switched(llama.model, llama.plan(1)):
        found = generate(llama.model, MODES[mode], ids, attention_mask=mask)
    numbers = cache_of(found).layers[0].padding.parts[0]
    assert numbers[:, 0].tolist() == [[0, 4, 0], [5, 4, 5], [30, 0, 30]]
    assert torch.equal(found.sequences, expected.sequences)


def test_chunked_prefill_finds_sequence_starts(options: dict[str, Any], llama: FittedModel, plan: LatentPlan) -> None:
    """Segments and means are those of the unpadded sequence; its first tokens are quantized because it has no sinks."""
    ids, mask = padded((110, 21))
    cache = LatentCache(in_parts(plan), llama.model.config, **options)
    with torch.no_grad(), switched(llama.model, in_parts(plan)):
        for t in range(0, 110, 10):
            given = {"attention_mask": mask[:, : t + 10], "position_ids": (mask.cumsum(1) - 1)[:, t : t + 10].clamp(0)}
            llama.model(ids[:, t : t + 10], **given, **cached(cache))
    layer = cache.layers[0]
    assert layer.padding.parts[0][:, 0].tolist() == [[0, 4, 0], [89, 0, 89]]
    keys = layer.keys[:, :, :110][1, :, 89:]
    with torch.no_grad():
        exact = llama.model(ids[1:, 89:], use_cache=True).past_key_values.layers[0].keys[0]
    assert float((keys - exact).square().mean() / exact.square().mean()) < 0.1


@pytest.mark.parametrize("attention", sampled(["eager", "sdpa"], 2))
def test_models_with_explicit_attention_attend_in_order_of_position(attention: str, options: dict[str, Any]) -> None:
    model, batch = tiny_llama(attention), padded(LENGTHS, LATER)
    expected, _ = read(model, None, batch, LATER)
    plan = fit_plan.exact_plan(found_sites(model), recent=8, block=8)
    cache = LatentCache(plan, model.config, **options)
    note_padding(cache.layers, batch[1][:, : max(LENGTHS)], max(LENGTHS))
    found, _ = read(model, None, batch, LATER, cache=cache)
    assert cache.layers[0].padding.parts
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("absorb", [True, False])
def test_a_second_turn_continues_after_the_first(absorb: bool, options: dict[str, int], llama: FittedModel) -> None:
    ids, mask = padded(LENGTHS, 50)
    with torch.no_grad():
        expected = call(llama.model, (ids, mask), (0, 120), None).logits[:, 70:]
    with torch.no_grad(), switched(llama.model, llama.plan(1)):
        cache = latent_cache(llama.model, absorb=absorb, **options)
        parts = [
            call(llama.model, (ids, mask), part, cache).logits for part in ((0, 70), (70, 71), (71, 110), (110, 120))
        ]
    torch.testing.assert_close(torch.cat(parts[1:], 1), expected, **CLOSE)


def test_without_a_mask_later_tokens_see_the_padding_as_in_an_exact_cache(
    options: dict[str, int], llama: FittedModel
) -> None:
    ids, mask = padded(LENGTHS, 10)
    outputs = []
    for plan in (None, llama.plan(1)):
        _, cache = read(llama.model, plan, (ids[:, :70], mask[:, :70]), 0, **(options if plan else {}))
        with torch.no_grad(), switched(llama.model, plan):
            outputs.append(llama.model(ids[:, 70:], **cached(cache)).logits)
    torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_selected_pages_contain_no_padding(share: float, llama: FittedModel) -> None:
    plan, batch = paged(llama.plan(4), share), padded((140, 61), 20)
    found, cache = read(llama.model, plan, batch, 20)
    other = batch[0].clone()
    other[1, :79] = token_ids(1, 79)
    changed, _ = read(llama.model, plan, (other, batch[1]), 20)
    assert cache.layers[0].padding.parts and bool(found.isfinite().all())
    torch.testing.assert_close(found, changed, **CLOSE)


@pytest.mark.parametrize("segments", sampled([False, True], 2))
def test_compiled_steps_support_it_and_other_padding_needs_no_other_graph(
    segments: bool, llama: FittedModel, plan: LatentPlan
) -> None:
    model, plan = llama.model, in_parts(plan) if segments else plan
    compiled: Any = torch.compile(model, backend="eager", dynamic=False)
    graphs = []
    torch._dynamo.reset()
    counters.clear()
    for lengths in ((70, 46), (70, 21)):
        ids, mask = padded(lengths, 6)
        _, cache = read(model, plan, (ids[:, :70], mask[:, :70]), 0, max_cache_len=128)
        other, place = copy.deepcopy(cache), torch.arange(128)
        whole = torch.nn.functional.pad(mask, (0, 52))
        for t in range(70, 76):
            seen = ((place <= t) & whole.bool())[:, None, None]
            given = {"attention_mask": seen, "position_ids": mask[:, :t].sum(1, keepdim=True), "use_cache": True}
            with torch.no_grad(), switched(model, plan):
                expected = model(ids[:, t : t + 1], **given, **cached(other)).logits
                found = compiled(ids[:, t : t + 1], **given, **cached(cache)).logits
            torch.testing.assert_close(found, expected, **CLOSE)
        assert cache.layers[0].padding.parts
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_compiled_steps_continue_after_reordering_sequences(llama: FittedModel, plan: LatentPlan) -> None:
    """Beam search reorders after each step; the graph then recomputes the rotations of keys and queries."""
    model, plan = llama.model, in_parts(plan)
    compiled: Any = torch.compile(model, backend="eager", dynamic=False)
    torch._dynamo.reset()
    ids, mask = padded((140, 46), 4)
    _, cache = read(model, plan, (ids[:, :140], mask[:, :140]), 0, max_cache_len=256)
    other, order = copy.deepcopy(cache), torch.tensor([1, 0])
    whole = torch.nn.functional.pad(mask, (0, 112)).bool()
    for t in range(140, 144):
        for one in (cache, other):
            one.reorder_cache(order)
        whole, mask = whole[order], mask[order]
        seen = ((torch.arange(256) <= t) & whole)[:, None, None]
        given = {"attention_mask": seen, "position_ids": mask[:, :t].sum(1, keepdim=True), "use_cache": True}
        with torch.no_grad(), switched(model, plan):
            expected = model(ids[:, t : t + 1], **given, **cached(other)).logits
            found = compiled(ids[:, t : t + 1], **given, **cached(cache)).logits
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_graph_of_the_whole_model_knows_positions_but_not_padding(
    options: dict[str, Any], llama: FittedModel
) -> None:
    """Tokens are not reordered in it; keys are as accurate as in an uncompiled call."""
    model, plan, (ids, mask) = llama.model, in_parts(llama.plan(8, mean_tokens=16)), padded((120, 40))
    positions = (mask.cumsum(1) - 1).clamp(0)
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    exact = model(ids, **given).past_key_values.layers[0].keys[1, :, 80:]
    compiled: Any = torch.compile(model, backend="eager", dynamic=False)
    torch._dynamo.reset()
    errors = []
    for call_model in (compiled, model):
        with switched(model, plan):
            cache = LatentCache(plan, model.config, **options)
            call_model(ids, **given, **cached(cache))
        assert cache.layers[0].padding.behind.tolist() == [0, 80]
        assert (cache.layers[0].padding.places is None) is (call_model is compiled)
        found = cache.layers[0].keys[:, :, :120][1, :, 80:]
        errors.append(float((found - exact).square().mean() / exact.square().mean()))
    assert 0 < errors[0] < 1.3 * errors[1]


# ---- moving sequences


def test_padding_moves_with_its_sequence(options: dict[str, int], llama: FittedModel, plan: LatentPlan) -> None:
    order = torch.tensor([2, 0, 2])
    ids, mask = padded(LENGTHS, LATER)
    expected, _ = read(llama.model, plan, (ids[order], mask[order]), LATER, **options)
    _, cache = read(llama.model, plan, (ids[:, :70], mask[:, :70]), 0, **options)
    cache.reorder_cache(order)
    with torch.no_grad(), switched(llama.model, plan):
        steps = [call(llama.model, (ids[order], mask[order]), (t, t + 1), cache).logits for t in range(70, 100)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 1:], **CLOSE)


def test_padding_is_repeated_and_selected(llama: FittedModel, plan: LatentPlan) -> None:
    _, cache = read(llama.model, plan, padded(LENGTHS), 0)
    ahead = [[[0, 4, 0]], [[24, 4, 24]], [[49, 4, 49]]]
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].padding.parts[0].tolist() == [x for x in ahead for _ in range(2)]
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.layers[1].padding.parts[0].tolist() == [ahead[2], ahead[0]]
    copied = copy.deepcopy(cache)
    cache.reset()
    assert not cache.layers[1].padding.parts and copied.layers[1].padding.parts


def test_a_reset_cache_reads_the_padding_again(options: dict[str, int], llama: FittedModel, plan: LatentPlan) -> None:
    batch, outputs = padded((70, 70), 5), []
    for before in ((70, 70), (70, 21)):
        with switched(llama.model, plan):
            cache = latent_cache(llama.model, **options)
        read(llama.model, plan, padded(before, 5), 5, cache=cache)
        cache.reset()
        outputs.append(read(llama.model, plan, batch, 5, cache=cache)[0])
        assert not cache.layers[0].padding.parts
    assert torch.equal(*outputs)


@pytest.mark.parametrize("target", [75, 60, 51, 40, 10, 2, 0])
def test_crop_keeps_the_first_tokens(target: int, options: dict[str, int], llama: FittedModel) -> None:
    """Crop at token 53, after the sinks of the shortest sequence, and before them."""
    ids, mask = padded((*LENGTHS, 2), 30)
    first = torch.cat([ids[:, :target], token_ids(4, 80 - target)], 1)
    first[:, :70][mask[:, :70] == 0] = ids[:, :70][mask[:, :70] == 0]
    with torch.no_grad():
        expected = call(llama.model, (ids, mask), (0, 100), None).logits[:, target:]
    with torch.no_grad(), switched(llama.model, llama.plan(1)):
        cache = latent_cache(llama.model, **options)
        call(llama.model, (first, mask[:, :80]), (0, 70), cache)
        call(llama.model, (first, mask[:, :80]), (70, 80), cache)
        cache.crop(target - 80)
        assert int(cache.get_seq_length()) == target
        parts = [call(llama.model, (ids, mask), part, cache).logits for part in ((target, 90), (90, 91), (91, 100))]
    seen = mask[:, target:100].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[seen], expected[seen], **CLOSE)


# ---- files


def test_saved_caches_include_it(options: dict[str, int], llama: FittedModel, plan: LatentPlan, tmp_path: Path) -> None:
    ids, mask = padded(LENGTHS, 10)
    expected, _ = read(llama.model, plan, (ids, mask), 10, **options)
    _, cache = read(llama.model, plan, (ids[:, :70], mask[:, :70]), 0, **options)
    with torch.no_grad(), switched(llama.model, plan):
        loaded = fhopt.load_cache(llama.model, fhopt.save_cache(llama.model, cache, tmp_path / "batch.safetensors"))
        steps = [call(llama.model, (ids, mask), (t, t + 1), loaded).logits for t in range(70, 80)]
    assert torch.equal(torch.cat(steps, 1), expected[:, 1:])


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([[[-1, 4, 0]], [[49, 4, 0]]]), torch.tensor([[[0, 4, 0]], [[90, 4, 0]]]), torch.zeros(1, 1, 3)],
)
def test_invalid_padding_is_refused(wrong: Tensor, llama: FittedModel, plan: LatentPlan) -> None:
    _, cache = read(llama.model, plan, padded((70, 21)), 0)
    state = cache.layers[0].state()
    state["parts"][PADDING] = [wrong]
    other = LatentCache(plan, llama.model.config).layers[0]
    with pytest.raises((ValueError, FhoptError), match="padding"):
        other.restore(state)
    assert not other.is_initialized and not other.padding.parts


# ---- masks


def test_padding_is_derived_from_masks_of_every_kind() -> None:
    _, mask = padded((6, 4, 1))
    causal = mask[:, None, None].bool() & torch.ones(6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(3, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    for given in (mask, mask.bool(), mask.float(), causal, additive, additive.masked_fill(~causal, -torch.inf)):
        ahead = padding_ahead(given)
        assert ahead is not None and ahead.tolist() == [0, 2, 5]
    for given in (torch.ones(3, 6), torch.ones(2, 1, 4, 9), torch.ones(6), torch.ones(3, 6, dtype=torch.long).tril(3)):
        assert padding_ahead(given) is None


def test_the_padding_of_another_batch_is_not_used(llama: FittedModel, plan: LatentPlan) -> None:
    site = plan.sites[0].site
    for batch, tokens in ((3, 70), (2, 69)):
        layer = LatentCache(plan, llama.model.config).layers[0]
        note_padding([layer], padded((70, 21))[1], 70)
        layer.update(*[torch.randn(batch, site.kv_heads, tokens, n) for n in (site.key_dim, site.value_dim)])
        assert not layer.padding.parts and layer.padding.expected is None
