"""Baselines that plans are compared with, and which are left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from small_models import tiny_llama, token_ids

from benchmarks.quality.baselines import FAMILIES, CalibratedModel, LeftOut, check_families, offered
from benchmarks.quality.measurement import COUNTED_AT, Implementation, costs, exact_log_probabilities
from benchmarks.quality.methods.quantized_caches import Transformers
from fhopt.errors import FhoptError
from fhopt.plan.window import ResidualWindow

WANTED = [family for family in FAMILIES if family not in ("quanto", "hqq")]
OWN_WINDOW = "kivi-w128"  # retains more tokens before it quantizes


def plan(ratio: float) -> Any:
    """Mock a plan: its full-precision tokens and its bytes."""
    exact = COUNTED_AT * 2 * 2 * 2 * 16 * 2
    return SimpleNamespace(
        sinks=4,
        recent=32,
        block=32,
        window=ResidualWindow(4, 32, 32),
        sites=(),
        provenance={},
        cache_bytes=lambda t: exact / ratio,
    )


@pytest.fixture(scope="module")
def field() -> CalibratedModel:
    return CalibratedModel(tiny_llama(), {4.0: plan(4.0), 8.0: plan(8.0)}, lambda: token_ids(4, 150))


def test_a_run_offers_every_family_and_names_the_omitted_ones(
    field: CalibratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformers, "missing", "it is not installed.")
    methods, left_out = offered(field, (), quick=False)
    assert {baseline.family for baseline in methods} == set(WANTED)
    assert [baseline.name for baseline in left_out] == [
        "quanto-4bit",
        "quanto-2bit",
        "hqq-4bit",
        "hqq-2bit",
        "kvpress",
        "KVzap",
    ]
    assert len({baseline.name for baseline in methods}) == len(methods)


def test_sizes_of_a_family_fall(field: CalibratedModel) -> None:
    methods, _ = offered(field, WANTED, quick=False)
    for family in WANTED:
        sizes = [baseline.cache_bytes(field.shape, COUNTED_AT) for baseline in methods if baseline.family == family]
        assert sizes and sizes == sorted(sizes, reverse=True), family
        assert sizes[0] < COUNTED_AT * field.shape.exact_token_bytes


def test_a_quick_run_collects_no_more_statistics(field: CalibratedModel) -> None:
    methods, left_out = offered(field, (), quick=True)
    assert {baseline.name for baseline in methods} == {"kivi-2bit", "low-rank-4", "low-rank-2"}
    assert [str(baseline) for baseline in left_out] == [
        "every other method is left out: the run is a quick one. Pick some with --baseline."
    ]


def test_a_family_or_a_name_can_be_selected(field: CalibratedModel) -> None:
    def names(*wanted: str) -> list[str]:
        return [baseline.name for baseline in offered(field, wanted, quick=True)[0]]

    assert names("kivi-3bit", "q8_0") == ["kivi-3bit", "q8_0"]
    assert names("turboquant-ip") == ["turboquant-ip-4bit", "turboquant-ip-3bit", "turboquant-ip-2bit"]
    assert names("snapkv") == ["snapkv-4x", "snapkv-8x"]


def test_an_unknown_family_is_refused_with_the_available_ones() -> None:
    with pytest.raises(FhoptError, match="unknown method 'kivy'; choose from the families kivi, rtn"):
        check_families(["kivi", "kivy"])
    assert check_families(["q4_0-hadamard", "kivi-3bit"]) == {"q4_0", "q4_0-hadamard", "kivi"}


def test_an_unknown_size_is_refused_with_the_available_ones(field: CalibratedModel) -> None:
    with pytest.raises(FhoptError, match="unknown size 'kivi-5bit'; its family has kivi-4bit, kivi-3bit, kivi-2bit"):
        offered(field, ["kivi-5bit"], quick=False)


def test_an_eviction_without_a_share_for_the_size_is_left_out() -> None:
    small = CalibratedModel(tiny_llama(), {500.0: plan(500.0)}, lambda: token_ids(2, 100))
    methods, left_out = offered(small, ["snapkv"], quick=False)
    assert not methods and left_out[0].name == "snapkv-500x" and "residual window alone" in left_out[0].reason


def test_formats_whose_blocks_do_not_fit_are_left_out() -> None:
    odd = tiny_llama(num_key_value_heads=1, head_dim=24, num_attention_heads=2)
    _, left_out = offered(
        CalibratedModel(odd, {4.0: plan(4.0)}, lambda: token_ids(2, 100)), ["q4_0", "nvfp4"], quick=False
    )
    assert {baseline.name for baseline in left_out} >= {"nvfp4", "q4_0"}


@pytest.mark.parametrize("family", [family for family in WANTED if family != OWN_WINDOW])
def test_every_family_runs_on_a_text(field: CalibratedModel, family: str) -> None:
    baseline = offered(field, [family], quick=False)[0][0]
    ids = token_ids(1, 140)[0]
    steps = field.plans[4.0]
    log_p = exact_log_probabilities(field.model, ids, steps)
    size = baseline.cache_bytes(field.shape, COUNTED_AT)
    found = costs(
        field.model, ids, Implementation(baseline.name, baseline.family, size, 1.0, baseline=baseline), log_p, steps
    )
    kl = found.kl[0]
    assert bool(kl.isfinite().all()) and float(kl[:60].max()) < 1e-5 < float(kl[68:].max())
    assert field.model.config._attn_implementation == "sdpa"


def test_kivi_with_its_own_window_keeps_that_exact(field: CalibratedModel) -> None:
    (baseline,), left_out = offered(field, [f"{OWN_WINDOW}-3bit"], quick=False)
    assert not left_out and baseline.name == f"{OWN_WINDOW}-3bit"
    ids, steps = token_ids(1, 260)[0], field.plans[4.0]
    log_p = exact_log_probabilities(field.model, ids, steps)
    size = baseline.cache_bytes(field.shape, COUNTED_AT)
    found = costs(
        field.model, ids, Implementation(baseline.name, baseline.family, size, 1.0, baseline=baseline), log_p, steps
    )
    first = 4 + 128 + 64  # tokens until a block is quantized
    kl = found.kl[0]
    assert float(kl[: first - 1].max()) < 1e-5 < float(kl[first + 32 :].max())


def test_omitted_baselines_have_a_reason() -> None:
    assert str(LeftOut("x", "it is missing.")) == "x is left out: it is missing."
