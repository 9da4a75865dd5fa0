"""The steps of the fitting pipeline: their order and inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_models import save_tiny_model
from hand_plans import SITE

from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.plan.cache_size import CacheLayer, record_of
from fhopt.planning import pipeline
from fhopt.planning.request import PlanRequest, read_request
from fhopt.refine.options import Gate

SMALL: dict[str, Any] = dict(sequences=6, rate_sequences=2, context=256, recent=64)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    save_tiny_model(folder)
    return load_model(str(folder))


def test_bytes_per_token_count_only_tokens_inside_windows() -> None:
    """One layer stores all tokens, the other a sliding window of a sixteenth of them."""
    numbers = SITE.exact_numbers_per_token
    sites = {name: replace(SITE, name=name) for name in ("layers.0", "layers.1")}
    layers = [CacheLayer("layers.0", numbers=numbers), CacheLayer("layers.1", "sliding", 512, numbers=numbers)]
    measured: Any = SimpleNamespace(
        statistics={name: SimpleNamespace(site=site) for name, site in sites.items()}, provenance=record_of(layers)
    )
    exact = 2 * numbers * (1 + 1 / 16)
    assert pipeline._ratio_of(measured, exact / 4, 8192) == pytest.approx(4)
    for nbytes in (1.01 * exact, 0.0, -1.0):
        with pytest.raises(FhoptError, match=f"at most {exact:,.0f}, "):
            pipeline._ratio_of(measured, nbytes, 8192)


def test_steps_run_in_order_and_a_calibration_is_not_repeated(loaded: LoadedModel) -> None:
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.extend([stage] if stages[-1:] != [stage] else [])

    source = pipeline.text_source(loaded)
    fitted = pipeline.fit_in_first_process(
        source, PlanRequest(FitOptions(**SMALL)), progress, calibration={"dtype": "float32"}
    )
    assert fitted is not None, "without torchrun there is one process"
    assert stages == ["moments", "rates", "losses"]
    assert fitted.plan.provenance["calibration"] == {"dtype": "float32"}
    stages.clear()
    request = PlanRequest(FitOptions(**SMALL, ratio=8.0), calibration=fitted.calibration)
    again = pipeline.fit_plan(pipeline.text_source(None), request, progress)
    assert stages == [] and again.calibration is fitted.calibration
    assert again.plan.ratio() > 1.5 * fitted.plan.ratio()


def test_bytes_per_token_choose_the_size(loaded: LoadedModel) -> None:
    fitted = pipeline.fit_to_text(loaded, FitOptions(**SMALL))
    request = PlanRequest(FitOptions(**SMALL), bytes_per_token=64.0, calibration=fitted.calibration)
    plan = pipeline.fit_plan(pipeline.text_source(None), request).plan
    assert plan.cache_bytes(8192) / 8192 == pytest.approx(64, rel=0.05)


def test_a_loss_target_measures_the_ratios_of_the_gate(loaded: LoadedModel) -> None:
    gate = Gate(0.9, sequences=1, context=128, ratios=(2.0, 4.0))
    fitted = pipeline.fit_plan(pipeline.text_source(loaded), PlanRequest(FitOptions(**SMALL), gate=gate))
    assert set(fitted.trials) == {2.0, 4.0}
    assert fitted.plan.provenance["gate"]["max_loss"] == 0.9


def test_recorded_calls_are_fitted_without_a_tokenizer(loaded: LoadedModel) -> None:
    model = loaded.language_model()
    ids = torch.randint(3, 90, (10, 256), generator=torch.Generator().manual_seed(0))
    source = pipeline.calls_source(model, ids[:8], ids[8:])
    gate = Gate(0.99, sequences=2, context=256, ratios=(2.0,))
    options = FitOptions(**SMALL, texts=(), mean_tokens=0, ratio=2.0)
    plan = pipeline.fit_plan(source, PlanRequest(options, gate=gate)).plan
    assert plan.provenance["texts"] == ["the calls of the model"] and plan.mean_tokens == 0


def test_a_loss_target_needs_a_language_model() -> None:
    source = pipeline.batches_source(torch.nn.Linear(2, 2), [])
    with pytest.raises(FhoptError, match="require text"):
        pipeline.fit_plan(source, PlanRequest(FitOptions(), gate=Gate(0.01)))


def test_statistics_of_another_model_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    from fhopt.calibration.statistics_file import save_statistics

    save_statistics(pipeline.calibrate_source(pipeline.text_source(loaded), FitOptions(**SMALL)), tmp_path / "s.stats")
    save_tiny_model(tmp_path / "other", scale=-1.0)
    request = read_request(
        statistics=tmp_path / "s.stats", max_loss="50%", options={}, given=(), gate_texts=("topics",)
    )
    with pytest.raises(FhoptError, match="another model"):
        pipeline.fit_plan(pipeline.text_source(load_model(str(tmp_path / "other"))), request)
