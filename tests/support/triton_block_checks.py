"""Checks of Triton decode steps on an engine's blocks, run in a separate process under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from engine_blocks import Engine, random_tokens
from hand_plans import random_plan
from torch import Tensor
from triton_attention_checks import right_bfloat16

from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan
from fhopt.serving.block_sizes import BlockSizes
from fhopt.serving.compiled_step import layout_of
from fhopt.serving.device_step import DeviceStep

SIZES = BlockSizes(12, 4, 24)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # torch rounds between operations
FLIPS = 0.002  # share of bytes: latents near a rounding boundary, summed in another order
CODED = (BitGroup(8, 8, 2 / 64), BitGroup(4, 8, 0.4))
MIXED = (
    BitGroup(8, 8, 2 / 64),
    BitGroup(6, 8, 0.08),
    BitGroup(5, 8, 0.15),
    BitGroup(4, 8, 0.3),
    BitGroup(3, 8, 0.5),
    BitGroup(2, 8, 0.9),
)


def plan_of(layout: str = "head", tiers: tuple[BitGroup, ...] = CODED, width: int = 16, **options: Any) -> LatentPlan:
    """A handmade float32 plan of `width` channels. layout "joint": one latent for all heads of a side."""
    plan = random_plan("head" if layout == "joint" else layout, CODED if tiers else (), **options)

    def single(side: SidePlan) -> SidePlan:
        encode, decode = side.encode.float(), side.decode.float()
        if layout == "joint":
            encode = torch.cat(list(encode), 1).unsqueeze(0)  # [1, R, G*D]
        repeats = -(-width // 16)
        return SidePlan(encode.repeat(1, repeats, 1)[:, :width], decode.repeat(1, 1, repeats)[..., :width], tiers)

    sites = tuple(SitePlan(s.site, s.layout, single(s.key), single(s.value)) for s in plan.sites)
    return replace(plan, sites=sites)


PLANS: dict[str, LatentPlan] = {
    "a latent for each head": plan_of(),
    "one latent for the heads of a side, means": plan_of("joint", mean_tokens=12),
    "one latent for keys and values, means, window of 8 bits": plan_of("input", window_bits=8, mean_tokens=12),
    "bit groups of 2 to 8 bits, means, window of 8 bits": plan_of("head", MIXED, 48, mean_tokens=12, window_bits=8),
    "not quantized": plan_of(tiers=(), width=20),
    "no sinks, window of 8 bits": plan_of("joint", sinks=0, window_bits=8),
    "odd numbers": plan_of(
        "joint", (BitGroup(3, 8, 0.5), BitGroup(16, 8, 0.0)), sinks=5, recent=7, block=16, mean_tokens=9
    ),
}


class Counted(DeviceStep):
    """A decode step that counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **options: Any) -> None:
        self.calls += 1
        super().__call__(*args, **options)


def engines(plan: LatentPlan, dtype: torch.dtype, **options: Any) -> tuple[Engine, Engine]:
    """Make two engines with the same blocks: the first on torch operations, the second on kernels."""
    from fhopt.codegen.gpu.block_launch import TritonBlockAttention  # late import: only in the process that interprets

    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(Engine(plan, SIZES, dtype=dtype, **options))
    layer = made[1].layer
    layer.compiled = Counted(TritonBlockAttention(layout_of(layer, dtype), layer.device))
    return made[0], made[1]


def tokens_of(plan: LatentPlan, dtype: torch.dtype, count: int, sequences: int) -> list[Any]:
    torch.manual_seed(0)
    return [tuple(x.to(dtype) for x in random_tokens(plan, count)) for _ in range(sequences)]


def close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(outputs, expected, strict=True):
        assert bool(a.isfinite().all())
        assert float((a - b).abs().max()) < ROUNDING[b.dtype] * float(b.abs().max()), (a, b)


def same_blocks(engine: Engine, other: Engine) -> None:
    for a, b in zip(engine.caches, other.caches, strict=True):
        assert float((a[1:] != b[1:]).float().mean()) <= FLIPS  # block 0 holds tokens that are not stored


def it_gives_what_torch_operations_give(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Lengths in one launch: first token, start of the means, before the first block, after it, and later."""
    plan = PLANS[name]
    tokens = tokens_of(plan, dtype, 60, 5)
    reference, kernels = engines(plan, dtype, count=5, most=72)
    first = plan.window.first_length
    lengths = [0, max(2, kernels.layer.means_from - 1), first - 1, first + plan.window.block, 57]
    started = [(0, length) for length in lengths]
    for engine in (reference, kernels):
        engine.step(tokens, started)
    spans = [(length, length + 1) for length in lengths]
    found = kernels.step(tokens, spans)
    assert getattr(kernels.layer.compiled, "calls", 0) == 1
    close(found, reference.step(tokens, spans))
    if plan.sites[0].key.tiers:
        same_blocks(kernels, reference)


def in_bfloat16() -> None:
    right_bfloat16()
    it_gives_what_torch_operations_give("one latent for the heads of a side, means", torch.bfloat16)


CHECKS: dict[str, Callable[[], None]] = {
    **{name: partial(it_gives_what_torch_operations_give, name) for name in PLANS},
    "in bfloat16": in_bfloat16,  # last: it patches the interpreter's bfloat16
}
