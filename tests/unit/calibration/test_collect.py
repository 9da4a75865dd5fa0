"""Calibration statistics: sums over batches, costs, every kind of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from small_models import FAR, VOCABULARY, FittedModel, numbered, tiny_gpt2, token_ids
from torch import Tensor

from fhopt.calibration import checkpoint, collect, probe, probed_attention
from fhopt.calibration.probed_attention import OnGradients
from fhopt.errors import FhoptError
from fhopt.fitting import allocation, fit_plan
from fhopt.fitting.bases import Basis
from fhopt.fitting.candidates import fit_bases
from fhopt.fitting.costs import SideCosts, empty_costs
from fhopt.fitting.statistics import SiteStatistics, empty_statistics
from fhopt.models.capture import capture
from fhopt.ops import packing
from fhopt.passes import pipeline
from fhopt.plan.segment_rotation import SegmentRotation

SITE = "model.layers.1.self_attn"


# ---- sums


def sums(statistics: dict[str, SiteStatistics]) -> list[Tensor]:
    return list(checkpoint.named_moments(statistics).values())


def test_moments_and_metrics_sum_over_batches(fitted: FittedModel) -> None:
    batches = numbered(2)

    def part(chosen: list[Any], **more: Any) -> dict[str, SiteStatistics]:
        return collect.collect(fitted.captured, fitted.outcome, chosen, **FAR, **more)

    whole, one, two = part(batches), part(batches[:1]), part(batches[1:])
    added = part(batches[1:], into=part(batches[:1]))
    for a, b, c, d in zip(sums(whole), sums(one), sums(two), sums(added), strict=True):
        torch.testing.assert_close(a, b + c)
        assert torch.equal(a, d)


def test_moments_are_those_of_the_keys_after_the_sinks(llama: FittedModel) -> None:
    """Compare with keys and values recorded in the graph; heads of a latent head are concatenated."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        seen[name] = k, v
        return lambda a, b: None

    batches = numbered(1)
    probe.run_probed(llama.captured, llama.outcome, batches, (4, 8), 0, see, lambda n: None)
    statistics = collect.collect(llama.captured, llama.outcome, batches, **FAR)
    for name, s in statistics.items():
        assert int(s.key.count) == int(s.value.count) == 92
        for side, x in zip((s.key, s.value), seen[name], strict=True):
            rows = x[0].permute(1, 0, 2).reshape(92, 32).double()
            torch.testing.assert_close(side.moment[0], rows.mT @ rows)


def test_keys_relative_to_segments_are_counted_as_a_cache_encodes_them(llama: FittedModel) -> None:
    """Moments and metrics are both relative, so positions do not exceed those of a segment."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        def keep(key_gradient: Tensor, value_gradient: Tensor) -> None:
            seen[name] = k, key_gradient

        return keep

    batches, sites = numbered(1), list(llama.outcome.sites.values())
    probe.run_probed(llama.captured, llama.outcome, batches, (4, 8), 0, see, lambda n: None)
    statistics = collect.collect(
        llama.captured, llama.outcome, batches, **FAR, span=5000, into=empty_statistics(sites, 64)
    )
    for name, s in statistics.items():
        assert s.segment == 64 and s.site.rope is not None
        rotation = SegmentRotation.on(s.site.rope, 64, torch.device("cpu"))
        for total, x in zip((s.key.moment, s.key.metric), seen[name], strict=True):
            rows = rotation.relative(x, torch.arange(x.shape[2]))[0].permute(1, 0, 2).flatten(1).double()
            torch.testing.assert_close(total[0], rows.mT @ rows)
            plain = x[0].permute(1, 0, 2).flatten(1).double()
            assert not torch.allclose(total[0], plain.mT @ plain, rtol=1e-3)


def test_keys_and_values_without_rotation_are_also_summed_together(fitted: FittedModel) -> None:
    """Cross moments and both sides' moments form one matrix, which must have no negative direction."""
    for s in fitted.statistics.values():
        if s.site.rope is not None:
            assert s.cross is None and s.cross_metric is None
            continue
        assert s.cross is not None and s.cross_metric is not None
        for key, cross, value in (
            (s.key.moment[0], s.cross, s.value.moment[0]),
            (s.key.metric[0], s.cross_metric, s.value.metric[0]),
        ):
            joint = torch.cat([torch.cat([key, cross], 1), torch.cat([cross.T, value], 1)])
            values = torch.linalg.eigvalsh(joint)
            assert float(values[0]) > -1e-9 * float(values[-1])
            assert float(cross.abs().max()) > 0


def test_random_choices_depend_only_on_batch_number_and_seed(llama: FittedModel) -> None:
    first, second = numbered(2)

    def metrics(batches: list[Any], seed: int = 0) -> Tensor:
        return collect.collect(llama.captured, llama.outcome, batches, seed=seed, **FAR)[SITE].key.metric

    both = metrics([first, second])
    torch.testing.assert_close(metrics([second, first]), both)  # sums in another order
    for other in (metrics([(0, second[1]), (1, first[1])]), metrics([first, second], seed=1)):
        assert float((other - both).abs().max() / both.abs().max()) > 0.01


def test_a_batch_of_another_shape_is_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match=r"input_ids of shape \(1, 95\); expected \(1, 96\)"):
        collect.collect(llama.captured, llama.outcome, numbered(1, 95), **FAR)


def test_progress_is_reported_batch_by_batch(llama: FittedModel) -> None:
    done: list[int] = []
    collect.collect(llama.captured, llama.outcome, numbered(2, start=5), done=done.append, **FAR)
    assert done == [5, 6]


# ---- costs


@pytest.mark.parametrize("rows", [24, 128])
def test_the_cost_of_dropping_is_the_square_of_a_sum_over_the_sequence(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """For one sequence: ((sum over tokens of g x^T) applied to each channel's direction)^2, by queries.

    Gradients are taken for some queries at a time, of the first tokens, and their squares are summed.
    """
    monkeypatch.setattr(probed_attention, "QUERIES", rows)
    bases = {name: {"band": layouts["band"]} for name, layouts in llama.bases.items()}
    batches, seen = numbered(1), []
    costs = collect.measure_costs(llama.captured, llama.outcome, batches, bases, {4: 0.4}, **FAR)

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        return lambda a, b: seen.append((k, v, a, b)) if name == SITE else None

    probe.run_probed(llama.captured, llama.outcome, batches, (4, 8), 0, see, lambda n: None)
    assert [a.shape[2] for _, _, a, _ in seen] == ([84] if rows == 128 else [12, 36, 60, 84])  # 4 sinks, 8 recent
    tiles = [[x[0].transpose(0, 1).flatten(1).double() for x in tile] for tile in seen]  # [T, 32], gradients [N, 32]
    for i, basis in enumerate(bases[SITE]["band"]):
        measured, x, gradients = costs[SITE, "band", i], tiles[0][i], [tile[2 + i] for tile in tiles]
        direct = sum(
            torch.einsum("rc,tc,td,dr->r", basis.encode[0], x[: len(g)], g, basis.decode[0]) ** 2 for g in gradients
        )
        assert isinstance(direct, Tensor)
        scale = float(direct.max())
        # float32 sums of 92 tokens
        torch.testing.assert_close(measured.sums[0][0], direct, rtol=1e-3, atol=1e-5 * scale)
        latent = x @ basis.encode[0].mT
        token = latent[:, :16].square().mean(1, keepdim=True).sqrt()
        error = packing.rounded(latent / token, 4, 0.4) * token - latent
        coded = sum(((g @ basis.decode[0]) * error[: len(g)]).sum(0) ** 2 for g in gradients)
        assert isinstance(coded, Tensor)
        # a value within float32 rounding of a threshold may fall on the other side, by a step of one token each: rare
        torch.testing.assert_close(measured.sums[4][0], coded, rtol=0.05, atol=1e-3 * float(coded.max()))
        assert int(measured.tokens) == 92


def test_the_cost_of_one_latent_for_keys_and_values_is_that_of_both_errors_together(gpt2: FittedModel) -> None:
    """At 0 bits, one sequence: the effects of a channel on keys and on values are added, then squared."""
    name, layouts = next(iter(gpt2.bases.items()))
    (basis,) = layouts["input"]
    bases: dict[str, dict[str, tuple[Basis, ...]]] = {n: {} for n in gpt2.bases} | {name: {"input": (basis,)}}
    batches, seen = numbered(1), []
    costs = collect.measure_costs(gpt2.captured, gpt2.outcome, batches, bases, {}, **FAR)

    def see(site: str, k: Tensor, v: Tensor) -> OnGradients:
        return lambda a, b: seen.append((torch.cat([k, v], -1), torch.cat([a, b], -1))) if site == name else None

    probe.run_probed(gpt2.captured, gpt2.outcome, batches, (4, 8), 0, see, lambda n: None)
    x, g = (part[0].transpose(0, 1).flatten(1).double() for part in seen[0])  # [T, G*(D+E)], of the first tokens
    direct = torch.einsum("rc,tc,td,dr->r", basis.encode[0], x[: len(g)], g, basis.decode[0]) ** 2
    # float32 sums of 92 tokens
    torch.testing.assert_close(costs[name, "input", 0].sums[0][0], direct, rtol=1e-3, atol=1e-5 * float(direct.max()))


def test_more_bits_cost_less_from_2_to_8(fitted: FittedModel) -> None:
    for measured in fitted.costs.values():
        totals = [float(measured.sums[b].sum()) for b in (0, 2, 4, 6, 8)]
        assert totals == sorted(totals, reverse=True)


def test_costs_sum_over_batches(llama: FittedModel) -> None:
    batches, bases = numbered(2), fit_bases(llama.statistics, context=96)

    def measured(*parts: list[Any]) -> dict[str, Tensor]:
        costs = empty_costs(bases, (0, *allocation.STEPS))
        for part in parts:
            collect.measure_costs(llama.captured, llama.outcome, part, bases, allocation.STEPS, into=costs, **FAR)
        return checkpoint.named_costs(costs)

    whole, parts = measured(batches), measured(batches[:1], batches[1:])
    assert whole.keys() == parts.keys()
    for name, total in whole.items():
        assert torch.equal(total, parts[name]) and total.any(), name


def test_costs_of_a_bfloat16_model_are_those_of_latents_in_float32(llama: FittedModel) -> None:
    x, gradient = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(2))
    basis = llama.bases[SITE]["band"][0]
    one, two = (SideCosts({bits: torch.zeros_like(basis.variance) for bits in (0, 8)}) for _ in range(2))
    levels = {0: 0.0, 8: 0.03}
    collect._add_costs(one, basis, collect._errors(basis, x, levels), gradient, levels)
    collect._add_costs(two, basis, collect._errors(basis, x.float(), levels), gradient.float(), levels)
    assert torch.equal(one.sums[8], two.sums[8]) and one.sums[8].any()


# ---- kinds of attention


SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=16)
WINDOW = GROUPED | dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])


def ids_only() -> dict[str, Tensor]:
    return {"input_ids": token_ids(1, 64)}


def padded_ids() -> dict[str, Tensor]:
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[0, :9] = 0
    return {"input_ids": token_ids(2, 64), "attention_mask": mask}


def source_and_target() -> dict[str, Tensor]:
    return {"input_ids": token_ids(1, 48), "decoder_input_ids": token_ids(1, 64)}


def named(prefix: str, options: dict[str, Any], head: str = "ForCausalLM", attention: str = "sdpa") -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{prefix}Config")(**options, attn_implementation=attention)
    return getattr(transformers, f"{prefix}{head}")(config).eval()


T5 = dict(
    vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
    relative_attention_max_distance=16, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], int]] = {
    "norm of keys": (lambda: named("Qwen3", GROUPED), ids_only, 2),
    "partial rotation": (lambda: named("GPTNeoX", SIZES | dict(rotary_pct=0.25)), ids_only, 2),
    "interleaved rotation": (lambda: named("Glm", GROUPED), ids_only, 2),
    "no rotation": (tiny_gpt2, ids_only, 2),
    "softcap and window": (
        lambda: named("Gemma2", WINDOW | dict(query_pre_attn_scalar=16, attn_logit_softcapping=2.0), attention="eager"),
        ids_only, 2,
    ),
    "sinks": (
        lambda: named("GptOss", WINDOW | dict(num_local_experts=4, num_experts_per_tok=2), attention="eager"),
        ids_only, 2,
    ),
    "padding": (lambda: named("Qwen3", GROUPED), padded_ids, 2),
    "bidirectional": (lambda: named("Bert", SIZES, "Model"), padded_ids, 2),
    "cross": (lambda: named("T5", T5, "ForConditionalGeneration"), source_and_target, 6),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_can_be_calibrated_and_fitted(kind: str) -> None:
    make, inputs, count = KINDS[kind]
    model, example = make(), inputs()
    options = {} if kind in ("bidirectional",) else {"use_cache": False}
    captured = capture(model, (), example | options)
    assert captured.is_logits == (kind != "bidirectional")  # BERT without a head returns hidden states
    outcome = pipeline.find_attentions(captured.program)
    statistics = collect.collect(captured, outcome, enumerate([example, inputs()]), **FAR)
    assert len(statistics) == count
    for s in statistics.values():
        for side, dim in ((s.key, s.site.key_dim), (s.value, s.site.value_dim)):
            width = s.site.kv_heads // side.groups * dim
            assert side.moment.shape == side.metric.shape == (side.groups, width, width)
            for matrix in (side.moment, side.metric):
                assert bool(matrix.isfinite().all()) and float(matrix.abs().max()) > 0
    bases = fit_bases(statistics, context=64, tokens=2048)
    costs = collect.measure_costs(captured, outcome, [(2, inputs())], bases, allocation.STEPS, **FAR)
    plan = fit_plan.fit_ratio(statistics, bases=bases, costs=costs, ratio=4, tokens=2048, recent=8, block=8)
    assert 4 <= plan.ratio(2048) < 5
    assert math.isfinite(plan.provenance["predicted_nats"])


def test_a_non_logit_output_counts_as_the_mean_of_a_unit_gaussian() -> None:
    output = torch.zeros(20_000, 2, requires_grad=True)
    likelihood = probe._random_score(output, False, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(likelihood, output)
    torch.testing.assert_close(gradient.mT @ gradient / 20_000, torch.eye(2), rtol=0, atol=0.03)  # of 20,000 samples
