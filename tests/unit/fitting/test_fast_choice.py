"""Layouts and bits for a CPU: trade loss for time, within a bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fitting_by_hand import nats, site, spectrum, statistics

from fhopt.cli.fit import _show_plan
from fhopt.fitting import fast_choice, fit_plan
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.fast_choice import DEARER, LITTLE, MAX_KL_RATIO, bound_of, channel_times
from fhopt.fitting.fit_summary import evidence_of
from fhopt.fitting.statistics import SiteStatistics
from fhopt.hardware.devices import DEVICES, channel_seconds, layout_time
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite

NAMES = ("a", "b", "c")
WIDTH = 64  # head size


def _sites() -> dict[str, AttentionSite]:
    return {name: replace(site(name), heads=16, kv_heads=4, key_dim=WIDTH, value_dim=WIDTH) for name in NAMES}


def _bases(gains: tuple[float, ...], size: float) -> CandidateBases:
    """Per-head latents, and shared ones with the costs of all heads together, divided by a gain."""
    bases: dict[str, dict[str, tuple[Basis, ...]]] = {}
    for number, (name, gain) in enumerate(zip(NAMES, gains, strict=True)):
        own = tuple(_times(spectrum(WIDTH, 4, 1e4, seed), size) for seed in (number, number + 9))
        shared = tuple(_times(spectrum(4 * WIDTH, 1, 1e4 * gain, seed), size / gain) for seed in (number, number + 9))
        bases[name] = {"band": shared, "head": own}
    return bases


def _times(basis: Basis, factor: float) -> Basis:
    return replace(basis, variance=factor * basis.variance)


def _fit(bases: CandidateBases, device: str | None, ratio: float = 4.0, **options: Any) -> LatentPlan:
    empty = next(iter(statistics("a").values()))
    kept: dict[str, SiteStatistics] = {name: replace(empty, site=s) for name, s in _sites().items()}
    chosen: dict[str, Any] = dict(sinks=0, recent=1, block=1, tokens=100_000) | options
    return fit_plan.fit_ratio(kept, bases=bases, ratio=ratio, device=device, **chosen)


def _seconds(plan: LatentPlan, device: str) -> float:
    """Arithmetic per token, computed from the plan."""
    return sum(
        side.width * channel_seconds(DEVICES[device], s.site.heads, side.groups)
        for s in plan.sites
        for side in (s.key, s.value)
    )


@pytest.mark.parametrize("device", ["cpu", "cpu-avx2"])
@pytest.mark.parametrize("ratio", [3.0, 4.0, 8.0])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_plan_for_a_cpu_is_faster_and_its_loss_is_within_the_bound(device: str, ratio: float, size: float) -> None:
    bases = _bases((1.0, 1.5, 20.0), size)
    least, fast = _fit(bases, None, ratio), _fit(bases, device, ratio)
    assert nats(least) <= nats(fast) <= bound_of(nats(least))
    share = _seconds(fast, device) / _seconds(least, device)
    assert share < 1 and fast.provenance["time"]["share"] == pytest.approx(share, rel=1e-6)
    assert fast.provenance["time"]["predicted_nats_without"] == nats(least)
    assert ratio <= fast.ratio(100_000) < 1.05 * ratio  # the size is unchanged


def test_latents_stay_shared_where_the_gain_is_largest() -> None:
    bases = _bases((1.0, 1.0, 30.0), 10.0)
    layouts = {s.site.name: s.layout for s in _fit(bases, "cpu-avx2").sites}
    assert layouts == {"a": "head", "b": "head", "c": "band"}


def test_the_bound_is_a_multiple_of_the_loss_and_a_larger_one_for_a_small_loss() -> None:
    for least in (1e-6, LITTLE / MAX_KL_RATIO):
        assert bound_of(least) == pytest.approx(MAX_KL_RATIO * least)
    assert bound_of(LITTLE / 2) == LITTLE
    for least in (LITTLE / DEARER, 1.0):
        assert bound_of(least) == DEARER * least


def test_negligible_losses_buy_time() -> None:
    """With 1e-4 of the variance, the loss shrinks as much, and may grow 3x."""
    share = {size: _fit(_bases((3.0, 3.0, 3.0), size), "cpu-avx2").provenance["time"]["share"] for size in (1e-4, 1.0)}
    assert share[1e-4] < 0.95 * share[1.0]


def test_time_counts_only_on_cpus() -> None:
    bases = _bases((1.0, 1.5, 20.0), 1.0)
    for device in (None, "h100"):
        assert not channel_times(bases, _sites(), device)
        assert "time" not in _fit(bases, device).provenance
    times = channel_times(bases, _sites(), "cpu")
    assert times["a", "head"] > times["a", "band"]  # four latents: as many multiplications, more codes
    shared = {"a": {"input": (bases["a"]["band"][0],)}}
    assert times["a", "band"] < channel_times(shared, _sites(), "cpu")["a", "input"] < 2 * times["a", "band"]


def test_channel_times_agree_with_the_cost_model() -> None:
    """Long contexts with few bytes, so that arithmetic dominates: 96 more channels on each side."""
    for device in (DEVICES["cpu"], DEVICES["cpu-avx2"]):
        wide, narrow = (layout_time(device, 32, 8, width, width, 1, 1000) for width in (128, 32))
        assert (wide - narrow) / 1000 == pytest.approx(2 * 96 * channel_seconds(device, 32, 8), rel=1e-6)


def test_no_rate_is_tried_if_there_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_choice, "FIRST", None)  # would raise
    plan = _fit(_bases((1.0, 1.0, 1.0), 0.0), "cpu")
    assert nats(plan) == 0 and "time" not in plan.provenance


def test_sites_with_shared_kernels_also_trade_loss_for_time() -> None:
    bases = _bases((1.0, 1.0, 1.0), 1.0)
    least, fast, shared = _fit(bases, None), _fit(bases, "cpu-avx2"), _fit(bases, "cpu-avx2", kernel_shapes=1)
    share = _seconds(shared, "cpu-avx2") / _seconds(least, "cpu-avx2")
    assert shared.provenance["time"]["share"] == pytest.approx(share, rel=1e-6)
    assert share < 1.1 * fast.provenance["time"]["share"] < 1
    assert shared.provenance["kernel_shapes"]["predicted_nats_without"] == nats(fast)
    assert 0.95 * nats(fast) < nats(shared) < 2 * nats(fast)


def test_memory_bound_threads_trade_no_loss_for_time() -> None:
    """Arithmetic scales with threads, memory bandwidth is that of a socket."""
    bases = _bases((1.0, 1.5, 20.0), 1.0)
    for device, counts in (("cpu:2", True), ("cpu:512", False)):
        plan = _fit(bases, device)
        assert ("time" in plan.provenance) is counts
    assert nats(plan) == nats(_fit(bases, None))


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_other_sizes_are_expected_to_have_the_loss_of_their_own_plans(size: float) -> None:
    bases = _bases((1.0, 1.5, 20.0), size)
    evidence = evidence_of(_fit(bases, "cpu-avx2", 8.0))
    assert evidence is not None
    for ratio in (3.0, 4.0, 6.0):
        (expected,) = (one.nats for one in evidence.curve if one.ratio == ratio)
        least = nats(_fit(bases, None, ratio))
        assert 0.99 * least <= expected <= 1.01 * bound_of(least)


def test_the_trade_of_loss_for_time_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = _fit(_bases((1.0, 1.5, 20.0), 1.0), "cpu-avx2")
    plan.save(tmp_path / "plan")
    kept = LatentPlan.load(tmp_path / "plan")
    _show_plan(kept, 8192, tmp_path / "plan", {}, as_json=False)
    more = nats(plan) / plan.provenance["time"]["predicted_nats_without"] - 1
    said = f"for cpu-avx2: attention {1 / plan.provenance['time']['share']:.2f}x faster, expected loss"
    assert f"{said} {100 * more:+.0f}%" in capsys.readouterr().out
    _show_plan(kept, 8192, tmp_path / "plan", {}, as_json=True)
    assert json.loads(capsys.readouterr().out)["time"] == plan.provenance["time"]
    _show_plan(_fit(_bases((1.0, 1.5, 20.0), 1.0), None), 8192, tmp_path / "plan", {}, as_json=False)
    assert "of the time" not in capsys.readouterr().out
