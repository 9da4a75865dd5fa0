"""Models whose caches have windows, chunks, states and shared layers generate the same tokens with an exact plan."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY
from window_models import WINDOW, windowed

import fhopt
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData
from fhopt.fitting import fit_plan
from fhopt.models.capture import capture

NEW = 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_next", "gemma3n", "llama4"])
def test_generation_with_an_exact_plan_equals_that_of_the_unmodified_model(name: str) -> None:
    model = windowed(name)
    ids = torch.randint(3, VOCABULARY, (2, WINDOW + 40), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    alone = model.generate(ids, **options)
    captured = capture(model, (), {"input_ids": ids[:1, :16], "use_cache": False})
    sites = run.find_compressible(CalibrationData(captured, [], name=name)).sites.values()
    fhopt.apply(model, fit_plan.exact_plan(sites, recent=16, block=16))
    ours = model.generate(ids, **options)
    fhopt.unapply(model)
    assert torch.equal(ours.sequences, alone.sequences)
    for logits, expected in zip(ours.logits, alone.logits, strict=True):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32 sums in another order
