"""A handmade site and plans whose costs can be computed on paper."""

from __future__ import annotations

from hypothesis import settings

from fhopt.plan.site import AttentionSite

SITE = AttentionSite(
    "layer.attention", {}, "self", heads=4, kv_heads=2, key_dim=16, value_dim=8, scale=0.25, rope=None, key_norm=False,
    mask="causal", softcap=0.0, cache="cat", source="",
)  # fmt: skip

figures = settings(max_examples=60, deadline=None)
