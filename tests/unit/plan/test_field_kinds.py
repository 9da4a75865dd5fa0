"""Checks of attention sites and provenance: results of fits pass, impossible values are refused with their place."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hand_plans import SITE
from small_models import FittedModel

from fhopt.plan.cache_size import CacheLayer, record_of
from fhopt.plan.field_kinds import provenance_kind, site_kind
from fhopt.plan.json_kinds import WrongField
from fhopt.plan.site import AttentionSite, Rope

ROPE = Rope("half", 12, tuple(0.9 / 3**i for i in range(6)), offset=2)


def described(site: AttentionSite) -> Any:
    return json.loads(json.dumps(asdict(site)))


@pytest.mark.parametrize(
    "site",
    [
        SITE,
        replace(SITE, rope=ROPE),
        replace(SITE, rope=Rope("half", 12, (0.1,) * 6, blocks=3, positions="grid")),
        replace(SITE, mask="sliding", window=4096, softcap=50.0, sinks=True),
        replace(SITE, scale=1.0, projections={"q": ("a.q",), "k": ("a.k", "a.k_lora"), "v": ()}, source="model.py:7"),
    ],
)
def test_sites_of_models_pass(site: AttentionSite) -> None:
    site_kind(described(site), "sites.0")


def test_found_sites_pass(fitted: FittedModel) -> None:
    for site in fitted.outcome.sites.values():
        site_kind(described(site), "sites.0")
    provenance_kind(json.loads(json.dumps(dict(fitted.plan(4).provenance))), "provenance")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": 3}, r"s\.heads is 3; expected a multiple of kv_heads, 2"),
        ({"scale": 0}, r"s\.scale is 0; expected a finite number from 1e-06"),
        ({"softcap": 1e-9}, r"s\.softcap is 1e-09; expected a finite number from 0\.001"),
        ({"mask": "round"}, r"s\.mask is 'round'; expected 'none' or 'causal'"),
        ({"cache": ["cat"]}, r"s\.cache is \['cat'\]; expected 'none' or"),
        ({"key_dim": 8}, r"s\.rope\.rotary_dim is 12 from channel 2; expected a multiple of 2 within 8 channels"),
    ],
)
def test_impossible_sites_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WrongField, match=reason):
        site_kind(described(replace(SITE, rope=ROPE)) | changes, "s")


def test_recorded_layers_pass() -> None:
    record = record_of([CacheLayer("a.0", numbers=48), CacheLayer("a.1", "sliding", 64, False, 48, 1 << 40)])
    provenance_kind(json.loads(json.dumps(record)), "p")
    with pytest.raises(WrongField, match=r"p\.cache_layers\.0\.name is missing"):
        provenance_kind({"cache_layers": [{}]}, "p")
