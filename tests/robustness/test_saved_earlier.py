"""Files of earlier fhopt versions: they load, and give the stored results.

tests/golden/saved: the commit before the packages wrote them, from a Llama of one layer and random weights with a plan
of 2.5x: a rewritten folder (with its plan), a saved prompt cache of the first 70 tokens, and an exported decode step
(torch 2.15). expected.safetensors has the 90 ids, their logits with the cache, and those of the exported step.

tests/golden/0504013: commit 0504013 wrote them; its README.md lists them. tokens.json has a prompt and the tokens that
this commit generated with each file, logits.safetensors the logits of these tokens.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fhopt
from fhopt.export.pt2_step import export_pt2, read_step_description
from fhopt.export.step_attention import StateTensor
from fhopt.export.step_state import StepState
from fhopt.models.model_facts import cache_argument
from fhopt.plan.serialization import plan_tensors

SAVED, COMMITTED = (Path(__file__).parents[1] / "golden" / name for name in ("saved", "0504013"))
PROMPT = 70  # tokens of the saved prompt cache
# On the CPU that wrote them, all values are equal. Another CPU sums in another order, and a key or value between
# two codes may round to the other one, which changes a logit by about a hundredth of their deviation.
SHARE = 0.02
NEAR = 1e-5  # of logits up to 8, computed in float64 and stored as float32
STEP_PROMPT, NEW = 160, 24  # tokens of the prompt that the exported step of 0504013 has seen; generated tokens
needs_torch_2_15 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15), reason="torch reads programs of newer ones at best"
)


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


def load_programs(folder: Path) -> list[Any]:
    """Load the compressed programs of an exported decode step."""
    files = (io.BytesIO(gzip.decompress((folder / f"{name}.pt2.gz").read_bytes())) for name in ("step", "seal"))
    return [torch.export.load(file).module() for file in files]


@pytest.mark.slow
@needs_torch_2_15
def test_an_exported_step_gives_the_stored_logits(expected: dict[str, Tensor]) -> None:
    plan = fhopt.LatentPlan.load(SAVED / "folder" / "plan")
    tensors = export_pt2(fhopt.unapply(fhopt.load(SAVED / "folder")), plan).state
    state = StepState(plan, tensors, *load_programs(SAVED))
    logits = torch.cat([state.step(token) for token in expected["ids"].split(1, 1)], 1)
    assert_same(logits, expected["stepped"])


# --------------------------------------------------------------------------------------------------- 0504013


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.tensor([json.loads((COMMITTED / "tokens.json").read_text())["prompt"]])


def assert_generated(name: str, logits: Tensor) -> None:
    """Check the logits [S,V] of greedily chosen tokens, and the tokens."""
    assert logits.argmax(-1).tolist() == json.loads((COMMITTED / "tokens.json").read_text())["tokens"][name]
    assert float((logits - load_file(COMMITTED / "logits.safetensors")[name]).abs().max()) <= NEAR


def generated(model: Any, prompt: Tensor) -> Tensor:
    """Generate NEW tokens greedily and return their logits [NEW,V]."""
    options: dict[str, Any] = dict(
        max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat(model.generate(prompt, **options).logits)


def test_a_folder_of_0504013_generates_the_stored_tokens(prompt: Tensor) -> None:
    model: Any = fhopt.load(COMMITTED / "folder", dtype=torch.float64)
    assert fhopt.latent_cache(model).plan.digest() == fhopt.LatentPlan.load(COMMITTED / "folder" / "plan").digest()
    assert_generated("folder", generated(model, prompt))


@pytest.mark.parametrize("name", ["trellis", "pages", "exact"])
def test_a_plan_of_0504013_generates_the_stored_tokens(name: str, prompt: Tensor) -> None:
    plan = fhopt.LatentPlan.load(COMMITTED / name)
    found = {"trellis": plan.has_trellis, "pages": plan.pages is not None, "exact": plan.ratio() == 1}
    assert [n for n, is_one in found.items() if is_one] == [name]
    model: Any = fhopt.unapply(fhopt.load(COMMITTED / "folder", dtype=torch.float64))
    fhopt.apply(model, plan)
    assert_generated(name, generated(model, prompt))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("folder/plan", {"ratio": 4.0, "device": "cpu"}),
        ("trellis", {"ratio": 8.0, "code": "trellis"}),
        ("exact", {"ratio": 1.0}),
    ],
)
def test_statistics_of_0504013_give_the_plans_that_it_fitted(name: str, options: dict[str, Any]) -> None:
    expected = fhopt.LatentPlan.load(COMMITTED / name)
    plan = fhopt.fit(None, statistics=COMMITTED / "statistics", **options)
    assert (plan.window, plan.mean_tokens, plan.ratio()) == (expected.window, expected.mean_tokens, expected.ratio())
    for site, other in zip(plan.sites, expected.sites, strict=True):
        assert (site.layout, site.key.tiers, site.value.tiers) == (other.layout, other.key.tiers, other.value.tiers)
    torch.testing.assert_close(plan_tensors(plan), plan_tensors(expected), rtol=0, atol=NEAR)


@needs_torch_2_15
def test_an_exported_step_of_0504013_generates_the_stored_tokens(prompt: Tensor) -> None:
    folder = COMMITTED / "step"
    described = read_step_description(folder)["state"]
    tensors = [StateTensor(t["name"], tuple(t["shape"]), getattr(torch, t["dtype"])) for t in described]
    state = StepState(fhopt.LatentPlan.load(folder / "plan"), tensors, *load_programs(folder))
    logits = [state.step(token)[0] for token in prompt[:, :STEP_PROMPT].split(1, 1)][-1:]
    while len(logits) < NEW:
        logits.append(state.step(logits[-1].argmax().view(1, 1))[0])
    assert state.quantized == state.plan.block
    assert_generated("step", torch.cat(logits))
