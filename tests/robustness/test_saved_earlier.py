"""Files of an earlier fhopt version, in tests/golden/saved: they load, and give the stored results.

The commit before the packages wrote them, from a Llama of one layer and random weights with a plan of 2.5x: a rewritten
folder (with its plan), a saved prompt cache of the first 70 tokens, and an exported decode step (torch 2.15).
expected.safetensors has the 90 ids, their logits with the cache, and those of the exported step.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fhopt
from fhopt.export.pt2_step import export_pt2
from fhopt.export.step_state import StepState
from fhopt.models.model_facts import cache_argument

SAVED = Path(__file__).parents[1] / "golden" / "saved"
PROMPT = 70  # tokens of the saved prompt cache
# On the CPU that wrote them, all values are equal. Another CPU sums in another order, and a key or value between
# two codes may round to the other one, which changes a logit by about a hundredth of their deviation.
SHARE = 0.02


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(SAVED / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> Any:
    return fhopt.load(SAVED / "folder")


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert float((logits - expected).abs().max()) <= SHARE * float(expected.std())


@torch.no_grad()
def through(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Return logits of the prompt, if given, in one call, then of one token at a time."""
    parts = (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)) if ids.shape[1] > PROMPT else ids.split(1, 1)
    return torch.cat([model(part, **{cache_argument(model): cache}).logits for part in parts], 1)


def test_a_rewritten_folder_gives_the_stored_logits(model: Any, expected: dict[str, Tensor]) -> None:
    assert_same(through(model, fhopt.latent_cache(model), expected["ids"]), expected["logits"])


def test_the_plan_is_loaded_unchanged(model: Any) -> None:
    plan = fhopt.LatentPlan.load(SAVED / "folder" / "plan")
    assert (plan.sinks, plan.recent, plan.block, [site.layout for site in plan.sites]) == (4, 16, 16, ["band"])
    assert plan.ratio() == pytest.approx(2.504432895139101)


def test_a_saved_prompt_cache_continues_where_it_was(model: Any, expected: dict[str, Tensor]) -> None:
    cache = fhopt.load_cache(model, SAVED / "prompt.safetensors")
    assert cache.get_seq_length() == PROMPT
    logits = through(model, cache, expected["ids"][:, PROMPT:])
    assert_same(logits, expected["logits"][:, PROMPT:])


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15), reason="torch reads programs of newer ones at best"
)
def test_an_exported_step_gives_the_stored_logits(expected: dict[str, Tensor], tmp_path: Path) -> None:
    programs = []
    for name in ("step", "seal"):
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(gzip.decompress((SAVED / f"{name}.pt2.gz").read_bytes()))
        programs.append(torch.export.load(path).module())
    plan = fhopt.LatentPlan.load(SAVED / "folder" / "plan")
    state = StepState(plan, export_pt2(fhopt.unapply(fhopt.load(SAVED / "folder")), plan).state, *programs)
    logits = torch.cat([state.step(token) for token in expected["ids"].split(1, 1)], 1)
    assert_same(logits, expected["stepped"])
