"""Layouts of an engine's blocks, as given to kernels."""

from __future__ import annotations

import pytest
import torch

from fhopt.codegen.block_layout import BlockLayout, SideLayout
from fhopt.plan.window import ResidualWindow

D, R = 16, 24
TIERS = ((8, 8, 0.02), (4, 16, 0.3))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tiers", [TIERS, ()])
def test_specs_are_those_of_latents_window_and_sinks(bits: int, tiers: tuple[tuple[int, int, float], ...]) -> None:
    side = SideLayout(torch.zeros(2, R, D), torch.zeros(2, D, R), tiers, 16, 4, 0)
    layout = BlockLayout(
        heads=4, kv_heads=2, sizes=(D, D), dtype=torch.bfloat16, scale=0.25, key=side, value=side, is_shared=False,
        window=ResidualWindow(4, 8, 8, bits), window_rows=(0, 0, 0, 0), first_rows=(0, 0, 0, 0), means_from=0,
    )  # fmt: skip
    latents, window, sinks = layout.specs()
    assert (latents.key_tiers, latents.key_width, latents.value_width) == (tiers, R, R)
    assert window.key_tiers == (((8, D, 1.0),) if bits == 8 else ()) and not sinks.key_tiers
    assert {spec.dtype for spec in (latents, window, sinks)} == {"bfloat16"}
    assert (window.key_width, sinks.value_width) == (D, D)
