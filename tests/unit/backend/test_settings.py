"""Options of the backend, including plans."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from compiled_models import forward, with_backend
from small_models import FittedModel, tiny_gpt2, token_ids

from fhopt.backend.settings import Settings
from fhopt.errors import FhoptError


@pytest.mark.slow
def test_options_of_inductor_pass_through_and_a_plan_may_be_a_path(llama: FittedModel, tmp_path: Path) -> None:
    path = str(llama.plan(1).save(tmp_path / "plan"))
    compiled = with_backend(llama.model, plan=path, max_autotune=False)
    with torch.no_grad():
        ids = token_ids(1, 20)
        torch.testing.assert_close(forward(compiled, ids), forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_a_plan_that_fits_nothing_warns_once_or_refuses_when_strict(llama: FittedModel) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        with_backend(model, plan=llama.plan(1))(torch.randn(2, 4))  # no attention
    other = tiny_gpt2()
    with pytest.warns(RuntimeWarning, match="not in the plan"):
        forward(with_backend(other, plan=llama.plan(1)), token_ids(1, 10))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="not in the plan"):
        forward(with_backend(other, plan=llama.plan(1), strict=True), token_ids(1, 10))


def test_a_wrong_plan_option_is_one_clear_error() -> None:
    with pytest.raises(Exception, match="expected a LatentPlan or the path of one"):
        with_backend(torch.nn.Linear(2, 2), plan=3)(torch.randn(1, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_plan_that_changes_on_disk_is_not_mixed_with_the_old_one(llama: FittedModel, tmp_path: Path) -> None:
    path = llama.plan(1).save(tmp_path / "plan")
    compiled = with_backend(llama.model, plan=str(path))
    with torch.no_grad():
        forward(compiled, token_ids(1, 40))
        llama.plan(4).save(path)
        ids = token_ids(1, 41)
        with pytest.warns(RuntimeWarning, match="has changed since it was loaded"):
            found = forward(compiled, ids)
        torch.testing.assert_close(found, forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("raito", "ratio"), ("max_autotun", "max_autotune"), ("triton.cudagraph", "triton.cudagraphs")],
)
def test_a_misspelled_option_is_answered_with_the_nearest_name(option: str, nearest: str) -> None:
    with pytest.raises(FhoptError, match=f"{option!r} is not an option of fhopt or of inductor; expected {nearest!r}"):
        Settings.parse({option: 4})


def test_an_option_with_no_name_near_is_answered_with_those_of_fhopt() -> None:
    with pytest.raises(FhoptError, match="expected one of assume_finite, calibration_tokens, max_loss, plan"):
        Settings.parse({"qqqqqq": 4})
