"""The expected loss of a plan as text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import FittedModel

from fhopt.plan.expected_loss import EXPECTED, calibration_warning, expected_loss


def test_a_plan_of_an_older_version_prints_its_available_data(llama: FittedModel) -> None:
    plan = llama.plan(4)
    loss = expected_loss(plan)
    assert loss is not None and loss.interval is None and loss.nats == plan.provenance["predicted_nats"]
    assert loss.words.endswith("nats/token (not checked on held-out text)")
    assert expected_loss(replace(plan, provenance={})) is None


def test_a_checked_plan_prints_an_interval(llama: FittedModel) -> None:
    known = {"nats": 8.7e-4, "least": 2.9e-4, "most": 2.6e-3}
    loss = expected_loss(llama.plan(4).with_provenance(**{EXPECTED: known}))
    assert loss is not None and loss.interval == (2.9e-4, 2.6e-3)
    assert loss.words == "0.00087 nats/token (0.00029 to 0.0026 on text from other domains)"


@pytest.mark.parametrize(("sequences", "warns"), [(1, True), (2, True), (3, False)])
def test_few_tokens_for_the_width_of_latents_are_warned_of(llama: FittedModel, sequences: int, warns: bool) -> None:
    """Two kv heads of 16 channels are mixed: at least 256 tokens are needed."""
    plan = llama.plan(4).with_provenance(sequences=sequences, context=96)
    warning = calibration_warning(plan)
    assert (warning is not None) == warns
    if warning:
        assert f"fitted to {96 * sequences} tokens; expected at least 256" in warning
        assert "Calibrate with --sequences 3." in warning
    assert calibration_warning(llama.plan(4)) is None  # unknown
