"""Process memory of caches: SmolLM2's shapes in bfloat16, 8,192 tokens, a 4x plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import SITE

from benchmarks.cpu import memory
from benchmarks.recording import process_bytes
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.report import cache_bytes
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan

LAYERS, HEADS, SIZE, TOKENS = 30, 3, 64, 8192
TIERS = (BitGroup(4, 40, 0.4), BitGroup(3, 24, 0.7))  # 29 bytes and a scale instead of 128


def plan() -> LatentPlan:
    """A plan of random quantized latents per head, with the sinks and window of `fhopt fit`."""
    generator = torch.Generator().manual_seed(0)
    sites = []
    for layer in range(LAYERS):
        site = replace(SITE, name=f"layers.{layer}", heads=9, kv_heads=HEADS, key_dim=SIZE, value_dim=SIZE)
        basis = torch.randn(HEADS, SIZE, SIZE, generator=generator) / 8
        side = SidePlan(basis, basis.mT.contiguous(), TIERS)
        sites.append(SitePlan(site, "head", side, replace(side)))
    return LatentPlan(tuple(sites), sinks=4, recent=128, block=64, window_bits=8)


def fill(cache: Any, tokens: int) -> None:
    """Fill a cache: chunks of 512 tokens, then the last 64 one by one."""
    left = tokens
    while left:
        count = min(512, left - 64) if left > 64 else 1
        for layer in range(LAYERS):
            shape = (1, HEADS, count, SIZE)
            cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
        left -= count


def measure(kind: str) -> dict[str, int]:
    """Measure the process memory that a cache adds, and the size it reports."""
    from transformers.cache_utils import DynamicCache

    import fhopt.codegen

    fhopt.codegen.register_kernels()
    used = plan()
    make: Callable[[], Any] = (lambda: LatentCache(used)) if kind == "latent" else DynamicCache
    fill(make(), 1000)
    before, cache = process_bytes(), make()
    fill(cache, TOKENS)
    return {"gained": process_bytes() - before, "held": cache_bytes(cache), "formula": used.cache_bytes(TOKENS)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_4x_plan_takes_a_quarter_of_the_process_memory() -> None:
    root = Path(__file__).parents[3]
    paths = (root / "tests" / "support", root, os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    latent, exact = (
        json.loads(
            subprocess.run([sys.executable, __file__, kind], env=environment, capture_output=True, check=True).stdout
        )
        for kind in ("latent", "exact")
    )
    ratio = plan().ratio(TOKENS)
    assert 4 <= ratio < 4.1
    assert latent["gained"] <= exact["gained"] / 4 * 1.03
    for found in (latent, exact):
        assert 0.97 * found["held"] <= found["gained"] <= 1.05 * found["held"]  # pages, and Python objects
    assert latent["formula"] <= latent["held"] <= latent["formula"] * 1.02  # and at most 1/64 spare capacity


def test_a_cache_that_is_too_large_is_reported() -> None:
    results = {
        "exact": {"resident_bytes": 1000, "ratio": 1.0},
        "4x": {"resident_bytes": 255, "ratio": 4.0},
        "8x": {"resident_bytes": 140, "ratio": 8.0},
    }
    told = memory.verdicts(results)
    assert told["4x"] == "0.2550 of the exact cache, at most 0.2575"
    assert told["8x"] == "0.1400 of the exact cache, MORE THAN 0.1288"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1])))
