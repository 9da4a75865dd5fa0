"""Attention of an exported step on packed latents."""

from __future__ import annotations

import pytest
import torch
from exported_steps import by_the_model, difference, with_tiers
from small_models import FittedModel, token_ids

from fhopt.export import decode_step, step_attention, step_state
from fhopt.fitting import fit_plan
from fhopt.plan.site_plan import BitGroup

# Logits of about 4 in float32: attention sums in another order, and on some CPUs a latent between two codes
# rounds to the other one (3e-4 observed).
ROUNDING = 1e-3


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8, 16])
def test_every_number_of_bits_is_unpacked_correctly(bits: int, llama: FittedModel) -> None:
    plan = fit_plan.exact_plan(llama.outcome.sites.values(), recent=8, block=8)
    plan = with_tiers(plan, (BitGroup(bits, 8, 4 / 2**bits), BitGroup(8, 8, 1 / 64)))
    ids = token_ids(1, 40)
    step = decode_step.ExportedStep(llama.model, plan)
    state = step_state.StepState(plan, step.tensors, step, decode_step.Seal(step))
    assert difference(state, ids, by_the_model(llama.model, plan, ids)) < ROUNDING


def test_float16_values_are_loaded_from_bytes_exactly() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    assert torch.equal(step_attention._halves(numbers.clone().view(torch.uint8)), numbers.float())
