"""Exported decode steps, and the processes that run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from small_models import cached
from torch import Tensor, nn

import fhopt
from fhopt.export import decode_step, step_state
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.models.loaded_model import LoadedModel
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan


def by_the_model(model: Any, plan: LatentPlan, ids: Tensor) -> list[Tensor]:
    """Return each token's logits from the model with a latent cache."""
    fhopt.apply(model, decode_step.unrounded(plan), decode_program=False)  # programs may round differently
    cache = latent_cache(model)
    with torch.no_grad():
        found = [model(ids[:, i : i + 1], **cached(cache)).logits for i in range(ids.shape[1])]
    fhopt.unapply(model)
    return found


def difference(state: step_state.StepState, ids: Tensor, expected: list[Tensor]) -> float:
    steps = (state.step(ids[:, i : i + 1]) for i in range(ids.shape[1]))
    return max(float((step - wanted).abs().max()) for step, wanted in zip(steps, expected, strict=True))


def with_tiers(plan: LatentPlan, tiers: tuple[BitGroup, ...]) -> LatentPlan:
    """Return the plan with other bit groups of the same width on the same bases."""

    def side(one: SidePlan) -> SidePlan:
        return SidePlan(one.encode, one.decode, tiers)

    sites = tuple(SitePlan(s.site, s.layout, side(s.key), side(s.value)) for s in plan.sites)
    return LatentPlan(sites, plan.sinks, plan.recent, plan.block)


ALONE = """
import json, sys, torch
folder, wanted = sys.argv[1], sys.argv[2]
ids = torch.load(wanted)
about = json.load(open(f"{folder}/step.json"))
step, seal = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("step", "seal"))
if wanted.endswith("aot.pt"):
    torch.ops.load_library(f"{folder}/fhopt_kernels.so")
    step = torch._inductor.aoti_load_package(f"{folder}/step-aot.pt2")
sinks, block, limit = about["sinks"], about["block"], about["sinks"] + about["recent"] + about["block"]
state = [torch.zeros([2 * block if n is None else n for n in t["shape"]], dtype=getattr(torch, t["dtype"]))
         for t in about["state"]]
opened = [i for i, t in enumerate(about["state"]) if None not in t["shape"]]
grown = [i for i in range(len(state)) if i not in opened]
held, quantized, found = 0, 0, []
for token in ids[0]:
    logits, *new = step(token.view(1, 1), torch.tensor([held, quantized]), *state)
    found.append(logits)
    for i, x in zip(opened, new):
        state[i][:, :, held] = x[:, :, 0]
    held += 1
    if held == limit:
        rows = seal(*[state[i][:, :, sinks : sinks + block].contiguous() for i in opened])
        for i, x in zip(grown, rows):
            state[i] = torch.cat([state[i][:, :, :quantized], x, torch.zeros_like(x)], 2)
        for i in opened:
            state[i][:, :, sinks : -block] = state[i][:, :, sinks + block :].clone()
        held, quantized = held - block, quantized + block
assert "fhopt" not in sys.modules and "transformers" not in sys.modules
torch.save(torch.stack(found), wanted)
"""


def alone(folder: Path, ids: Tensor, path: Path, code: str = ALONE) -> Tensor:
    """Return the logits of all tokens from a new process without fhopt."""
    torch.save(ids, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(path)
    return found.detach()


class Mixer(nn.Module):
    """One attention over a batch of vectors, with a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        q, k, v = (self.qkv(x) * scale).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"mixed": self.out(y.transpose(1, 2).flatten(2)), "mean": x.mean(1)}


def mixer() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(3)
    return Mixer().eval(), (torch.randn(2, 24, 32),), {"scale": 2.0}


def as_loaded(made: tuple[Any, ...]) -> LoadedModel:
    return LoadedModel("module", made[0], inputs=(made[1], made[2] if len(made) > 2 else {}))


def plan_of(loaded: LoadedModel, tiers: tuple[BitGroup, ...] = ()) -> LatentPlan:
    with torch.no_grad():
        outcome = pipeline.find_attentions(loaded.capture().program)
    return with_tiers(fit_plan.exact_plan(outcome.sites.values(), sinks=2, recent=4, block=4), tiers)
