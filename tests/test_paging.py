"""Calibrating pages: sketches, what is left out, what that costs, budgets, and the options of the command."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Fitted, found, tiny_llama, token_ids
from torch import Tensor

from fhopt import ops, page_ops, paging
from fhopt.errors import FhoptError
from fhopt.evaluate import new_cache, switched
from fhopt.fitting import exact_plan
from fhopt.latents import Latents, attend
from fhopt.layers import LatentLayer
from fhopt.models import LoadedModel
from fhopt.page_ops import FEWEST
from fhopt.pages import LOST, PageIndex
from fhopt.paging import (
    ALL,
    FILLS,
    LIFTS,
    MASSES,
    Curves,
    PagingOptions,
    for_model,
    parse_share,
    share_out,
    with_pages,
)
from fhopt.spec import LatentPlan

SMALL: dict[str, Any] = dict(tokens=4, sketch=4, context=480, sequences=1, least=0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred tokens are a context."""
    monkeypatch.setattr(paging, "PIECE", 64)
    monkeypatch.setattr(paging, "LAST", 16)


# --------------------------------------------------------------------------------------------------- curves


def naive_left_out(expected: Tensor, weights: Tensor, count: int) -> float:
    """The weight of all but the `count` pages that are expected to have most, of one query."""
    best = sorted(range(len(expected)), key=lambda p: -float(expected[p]))[:count]
    return float(weights.sum()) - sum(float(weights[p]) for p in best)


def test_curves_are_sums_over_queries_of_what_a_plain_loop_leaves_out() -> None:
    """Of all weight pages have seven tenths; a list has room for half of them."""
    expected, weights = (torch.randn(2, 2, 3, 4, 40).softmax(-1) * 0.7).unbind(0)
    curves = Curves()
    curves.add(expected, weights, 0.5)
    queries = list(zip(expected.flatten(0, 2), weights.flatten(0, 2), strict=True))

    def left(needed: list[int]) -> list[float]:
        return [naive_left_out(e, w, n) for (e, w), n in zip(queries, needed, strict=True)]

    for at, lift in enumerate(LIFTS):
        needed = [min(20, max(FEWEST, sum(1 for x in e.tolist() if x * 40 >= lift))) for e, _ in queries]
        assert float(curves.left[at]) == pytest.approx(sum(left(needed)), abs=1e-4)  # float32
        assert float(curves.squares[at]) == pytest.approx(sum(x * x for x in left(needed)), abs=1e-4)
        assert float(curves.read[at]) == pytest.approx(sum(needed) / 40)
        assert curves.share(at) == pytest.approx(sum(needed) / 40 / len(queries))
    for at, mass in enumerate(MASSES):
        needed = []
        for e, _ in queries:
            falling = e.double().sort(descending=True).values
            needed.append(next((n for n in range(40) if mass < 1 and float(falling[n:].sum()) <= 1 - mass), 40))
        assert float(curves.by_mass[at]) == pytest.approx(sum(left(needed)), abs=1e-4)
        assert float(curves.used[at]) == pytest.approx(sum(needed) / 40)
    assert (curves.share(ALL), curves.left_out(ALL), curves.loss(ALL)) == (1.0, 0.0, 0.0)


def test_curves_count_what_a_choice_reads() -> None:
    """Pages that `keep_best` lists, with the lift and the room of a plan."""
    expected = torch.randn(2, 2, 4, 40).softmax(-1) * 0.8
    curves = Curves()
    curves.add(expected, expected, 0.3)
    for at, lift in enumerate(LIFTS):
        threshold = page_ops.Threshold(1.0, lift, 40)
        kept = page_ops.best_of(expected, 12, 12, threshold)
        assert curves.share(at) == pytest.approx(float(kept.double().mean()))
        assert curves.left_out(at) == pytest.approx(float((expected * ~kept).sum(-1).mean()), abs=1e-6)


def test_the_least_mass_that_keeps_enough_is_taken() -> None:
    curves = Curves(by_mass=torch.linspace(1.2, 0, len(MASSES), dtype=torch.float64), count=2)
    for at in range(len(MASSES)):
        assert curves.mass_for(float(curves.by_mass[at]) / 2 + 1e-9) == at
    assert curves.mass_for(0.0) == len(MASSES) - 1


def test_page_weights_are_those_of_attention_to_everything(llama: Fitted) -> None:
    """Against one softmax over rebuilt keys."""
    plan, seen = llama.plan(4, window_bits=16), []
    model = llama.model
    with torch.no_grad(), switched(model, plan):
        cache = new_cache(model, plan)
        model(token_ids(1, 100), past_key_values=cache)
        layer = cache.layers[0]
        assert isinstance(layer, LatentLayer)
        layer.observer = lambda *arguments: seen.append(arguments)
        model(token_ids(1, 3), past_key_values=cache)
    (query, key, value, latents, scale, softcap) = seen[0]
    found = paging._Everything.of(query, key, value, latents, scale=scale, softcap=softcap).page_weights(4)
    keys = torch.cat([latents.key.rebuild(), latents.key.open(key, latents.sinks)], 2)
    logits = ops.grouped_scores(query, keys) * scale
    mask = torch.ones(3, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 3)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)[..., : latents.visible]
    torch.testing.assert_close(found, weights.unflatten(-1, (-1, 4)).sum(-1), rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------- budgets


def falling(cost: float, half: float, generator: torch.Generator) -> Curves:
    """A site that leaves out less with lower lifts, in steps of random size, and reads more, up to seven tenths."""
    steps = torch.rand(2, len(LIFTS), generator=generator, dtype=torch.float64)
    left, read = steps[0].flip(0).cumsum(0).flip(0) * half, steps[1].cumsum(0)
    return Curves(left=left, squares=left.square(), read=0.7 * read / read[-1], count=1, cost=cost)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), share=st.sampled_from([1 / 16, 1 / 8, 1 / 3, 1.0]))
def test_budgets_stay_within_the_share_and_above_half_of_it(seed: int, share: float) -> None:
    plan = _plan()
    generator = torch.Generator().manual_seed(seed)
    costs = [1.0, 5.0]
    curves = {s.site.name: falling(c, 0.1, generator) for s, c in zip(plan.sites, costs, strict=True)}
    given_ = share_out(curves, plan.sites, share)
    size = {s.site.name: s.token_bytes() for s in plan.sites}
    used = sum(size[n] * curves[n].share(at) for n, at in given_.items())
    assert used <= share * sum(size.values()) * (1 + 1e-6)
    larger = [curves[n].share(at + 1) - curves[n].share(at) for n, at in given_.items() if at < ALL]
    assert used + min((size[n] * x for n, x in zip(size, larger, strict=False)), default=0) > share * sum(
        size.values()
    ) * (1 - 1e-6)  # nothing more fits
    for name, at in given_.items():
        assert at == ALL or curves[name].share(at + 1) > share / 2


@functools.cache
def _plan() -> LatentPlan:
    return exact_plan(found(tiny_llama())[1].sites.values(), recent=8, block=8)


@pytest.mark.parametrize("where", ["text", "echo"])
def test_a_site_that_costs_more_gets_more(where: str) -> None:
    plan = _plan()
    a, b = [s.site.name for s in plan.sites]
    generator = torch.Generator().manual_seed(0)
    same = falling(1.0, 0.1, generator)
    heard = replace(same, read=torch.zeros(len(LIFTS)))  # what an echo reads is no budget's
    same = replace(same, echo=heard)
    dear = replace(same, cost=20.0) if where == "text" else replace(same, echo=replace(heard, cost=20.0))
    given_ = share_out({a: same, b: dear}, plan.sites, 1 / 4)
    assert given_[b] > given_[a]
    assert dear.loss(3) == pytest.approx(10.5 * float(same.squares[3])) and dear.loss(ALL) == 0


@pytest.mark.parametrize("length", [10, 11])
def test_an_echo_says_tokens_of_a_text_twice(length: int) -> None:
    ids = torch.arange(100, 100 + length)
    said = paging.echo(ids)
    half = length // 2
    again = said[half : 2 * half]
    assert said.shape == ids.shape and said[0] == ids[0] and torch.equal(said[1:half], again[1:])
    assert len(set(again.tolist())) == half and set(again.tolist()) <= set(ids[1:].tolist())
    assert not torch.equal(again, ids[1 : half + 1])


def test_sites_that_were_not_measured_read_everything_and_leave_less_to_others() -> None:
    plan = _plan()
    a, b = [s.site.name for s in plan.sites]
    curves = {a: falling(1.0, 0.1, torch.Generator().manual_seed(0)), b: Curves()}
    assert share_out(curves, plan.sites, 0.9)[b] == ALL
    with pytest.raises(FhoptError, match="sites read at least"):
        share_out(curves, plan.sites, 0.25)


# --------------------------------------------------------------------------------------------------- the whole


def test_a_sketch_keeps_the_channels_in_which_errors_would_matter_most() -> None:
    plan = _plan()
    layer = LatentLayer(plan, plan.sites[0])
    size = torch.arange(1.0, 17).roll(5)
    layer.update(torch.randn(1, 2, 200, 16) * size + 3, torch.randn(1, 2, 200, 16))
    energy = torch.ones(2, 16, dtype=torch.float64)
    energy[1, :8] = 1e6
    moments, latents = paging._Moments(), layer.key_rows.latents(0, layer.sealed)
    assert paging._sketch(moments, 4) is None
    moments.energy = energy
    for part in latents.split(50, 2):
        moments.see(part)
    mean, deviation = moments.mean_and_deviation()
    torch.testing.assert_close(mean.float(), latents.mean((0, 2)))
    torch.testing.assert_close(deviation.float(), latents.std((0, 2)))
    made = paging._sketch(moments, 4)
    assert made is not None and [(t.bits, t.width) for t in made.tiers] == [(4, 8)]
    assert made.channels[0].tolist() == deviation[0].argsort(descending=True)[:8].tolist()
    assert sorted(made.channels[1].tolist()) == list(range(8))
    torch.testing.assert_close(made.deviation, size.expand(2, 16), rtol=0.3, atol=0)  # 180 tokens


@pytest.mark.parametrize("size", [4, 8, 12, 16])
@pytest.mark.parametrize("falls", [0.0, 0.5, 1.0, 3.0])
def test_bits_of_sketches_are_those_that_lose_least(falls: float, size: int) -> None:
    """Against all ways to give channels bits in steps of 8 (16 of 2 bits), by a plain loop."""
    wrong = torch.logspace(0, -falls, 40, dtype=torch.float64)
    best = None
    for four in range(0, 41, 8):
        for two in range(0, 41 - four, 16):
            if 0 < 4 * four + 2 * two <= 8 * size:
                lost = [LOST[4] ** 2] * four + [LOST[2] ** 2] * two
                lost += [1.0] * (40 - len(lost))
                error = sum(x * float(w) for x, w in zip(lost, wrong, strict=True))
                best = min(best or (error, four, two), (error, four, two))
    found = {t.bits: t.width for t in paging.sketch_tiers(wrong, size)}
    assert best is not None and (found.get(4, 0), found.get(2, 0)) == best[1:]


def test_too_few_channels_have_no_sketch() -> None:
    assert paging.sketch_tiers(torch.ones(7), 12) == ()
    assert [(t.bits, t.width) for t in paging.sketch_tiers(torch.ones(15), 12)] == [(4, 8)]


def test_calibrated_pages_say_what_they_leave_out(llama: Fitted) -> None:
    plan, ids = llama.plan(4), token_ids(1, 480)
    options = PagingOptions(share=0.5, **SMALL)
    sketched = paging.with_sketches(llama.model, plan, ids[:, :200], options.sketch)
    for site in sketched.sites:
        assert site.sketch is not None and site.sketch.row_bytes == options.sketch
    curves = paging.measure(llama.model, sketched, ids, options)
    assert all(c.count > 50 and c.cost > 0 for c in curves.values())
    assert all(c.echo and 0 < c.echo.count < c.count and c.echo.cost not in (1.0, c.cost) for c in curves.values())
    assert all(0 < c.left_out(ALL - 1) < c.left_out(0) < 1 for c in curves.values())
    made = with_pages(sketched, curves, options)
    assert made.pages is not None and made.pages.tokens == 4 and max(made.pages.shares) <= 1
    told = made.provenance["pages"]
    assert set(told["left_out"]) == set(told["echo_costs"]) == {s.site.name for s in plan.sites}
    assert 0.25 < sum(told["read"].values()) / len(plan.sites) <= 0.5 and len(made.pages.lifts) == len(plan.sites)
    kept = with_pages(sketched, curves, replace(options, mass=0.95))
    assert kept.pages is not None and any(m < 1 for m in kept.pages.masses)


def test_the_mean_of_values_takes_the_part_that_brings_each_head_closest(llama: Fitted) -> None:
    """Errors of probes are those of attention itself; the chosen part has the least, and some heads want some of it."""
    plan, ids = llama.plan(4, window_bits=16), token_ids(1, 480)
    options, seen = PagingOptions(share=0.25, **SMALL), []
    sketched = paging.with_sketches(llama.model, plan, ids[:, :200], options.sketch)
    found, probe = paging.fill_errors, paging._Probe.__call__
    asked: Any = None

    def remember(self: Any, *given: Any) -> None:
        nonlocal asked
        query, key, value, _, scale, softcap = given
        asked = (query[:, :, -paging.QUERIES :], key, value), dict(scale=scale, softcap=softcap)
        probe(self, *given)

    def watch(everything: Any, absorbed: Tensor, latents: Latents, estimates: Tensor, index: PageIndex) -> Tensor:
        (query, key, value), numbers = asked
        errors = found(everything, absorbed, latents, estimates, index)
        for fill, row in zip(FILLS, errors, strict=True):
            chooses = replace(index, each_query=True, fill=torch.full((4,), fill).log())
            a, b = (
                attend(query, key, value, replace(latents, index=i, observer=None), None, **numbers)
                for i in (chooses, None)
            )
            torch.testing.assert_close((a - b).double().square().sum((0, 2, 3)), row, rtol=1e-3, atol=1e-6)
        seen.append(errors)
        return errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paging, "fill_errors", watch)
        patch.setattr(paging._Probe, "__call__", remember)
        curves = paging.measure(llama.model, sketched, ids, options)
    assert len(seen) == 2 * 6  # probes of 64 tokens each, from the first with pages enough
    made = with_pages(sketched, curves, options).pages
    assert made is not None and max(max(heads) for heads in made.fill) > 0
    for site, heads in zip(sketched.sites, made.fill, strict=True):
        errors = curves[site.site.name].errors
        assert isinstance(errors, Tensor)
        for h, part in enumerate(heads):
            assert float(errors[FILLS.index(part), h]) == float(errors[:, h].min())
    bounded = with_pages(sketched, curves, replace(options, limit=0.5)).pages
    assert bounded is not None and bounded.fill == ()


def test_probes_see_what_a_choice_would_leave_out(llama: Fitted) -> None:
    """More pages leave out less, and less than pages taken by lot would."""
    ids, options = token_ids(1, 480), PagingOptions(share=0.5, **SMALL)
    sketched = paging.with_sketches(llama.model, llama.plan(2), ids[:, :200], 8)
    for curves in paging.measure(llama.model, sketched, ids, options).values():
        left = [curves.left_out(at) for at in range(ALL + 1)]
        assert left == sorted(left, reverse=True)
        shares = [curves.share(at) for at in range(ALL + 1)]
        assert shares == sorted(shares)
        half = curves.lift_for(0.5)
        assert curves.left_out(half) < curves.left_out(0) * (1 - shares[half]) / (1 - shares[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "expected shares above 0"),
        ({"mass": 1.5}, "expected shares above 0"),
        ({"tokens": 3}, "expected a divisor of the plan's block"),
        ({"sketch": 6}, "a multiple of 4"),
        ({"sketch": 0}, "a multiple of 4"),
        ({"context": 64}, "Use longer sequences"),
        ({"sequences": 0}, "Use longer sequences"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        PagingOptions(**(SMALL | options)).check(8, 20)


@pytest.mark.parametrize(("text", "share"), [("1/8", 0.125), ("0.125", 0.125), ("12.5%", 0.125), ("1", 1.0)])
def test_shares_are_read_in_three_ways(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "1/0", "9/8", "-1", "all", "nan", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(FhoptError, match="is no share"):
        parse_share(text)


def test_sequences_are_as_long_as_the_model_and_the_texts_allow(lettered: Any) -> None:
    """The options' 4,096 tokens where there are so many positions, fewer where there are not; too few are refused."""
    exact = 20
    needed = PagingOptions().needed(exact, 64)
    for positions, context in ((8192, 4096), (needed, needed)):
        loaded = LoadedModel("tiny", tiny_llama(max_position_embeddings=positions), lettered)
        assert for_model(loaded, PagingOptions(), 16, exact).context == context
        with pytest.raises(FhoptError, match="tokens"):
            for_model(loaded, PagingOptions(sequences=10_000), 16, exact)
    short = LoadedModel("short", tiny_llama(max_position_embeddings=needed - 1), lettered)
    with pytest.raises(FhoptError, match=f"short has {needed - 1} positions; expected {needed} or more"):
        for_model(short, PagingOptions(), 16, exact)


def test_the_command_refuses_a_mass_that_is_none(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from fhopt.cli import main

    result = CliRunner().invoke(main, ["fit", "demo", "--mass", "2", "-o", str(tmp_path / "plan")])
    assert result.exit_code == 2 and "is no share" in result.stderr
    assert not (tmp_path / "plan").exists()
