"""Runner of fhopt: `apply` and `generate()` in eager mode, or a static cache and compiled decode steps.

The weights of a GGUF file stay in their blocks.

options
    plan        folder of a fitted plan; without one the cache is full-precision
    compiled    true: decode steps compiled by the backend "flashhead"
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import StaticCache

import fhopt
from benchmarks.engines.protocol import EngineReport, EngineRequest, run
from benchmarks.engines.runners.run_transformers import decode_steps, generate, load
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan

PACKAGES = ("transformers", "torch")


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    model, plan = _load(request), request.options.get("plan")
    if plan:
        fhopt.apply(model, _plan(plan, request))
    if not request.options.get("compiled"):
        return generate(model, request, PACKAGES)
    cache: Any = (
        latent_cache(model, max_cache_len=request.most)
        if plan
        else StaticCache(model.config, max_cache_len=request.most)
    )
    step = torch.compile(model, backend="flashhead", options={"ratio": 1})
    return decode_steps(model, step, cache, request, PACKAGES)


def _load(request: EngineRequest) -> Any:
    if not request.model.endswith(".gguf"):
        return load(request)
    torch.set_num_threads(request.threads)
    return fhopt.load_gguf(request.model)[0]


def _plan(folder: str, request: EngineRequest) -> LatentPlan:
    """Return the plan; for a file quantized from the model it was fitted to, a plan without the model's fingerprint."""
    plan = LatentPlan.load(folder)
    if request.model.endswith(".gguf"):
        known = {name: x for name, x in plan.provenance.items() if name not in ("fingerprint", "weights")}
        plan = replace(plan, provenance=known)
    return plan


if __name__ == "__main__":
    run(measure)
