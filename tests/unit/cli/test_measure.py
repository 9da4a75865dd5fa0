"""`fhopt cost` on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from command_models import encoder
from costed_plan import SITE

from fhopt.cli.app import main
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cost", *arguments])


def test_without_a_plan_ratios_are_assumed_with_a_note(importable: str) -> None:
    result = call(importable, "--tokens", "1024", "--tokens", "8192")
    assert result.exit_code == 0, result.output
    assert "2x, 4x and 8x are hypothetical" in result.stdout
    assert "128⋅B⋅T" in result.stdout and "no KV cache" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 120


def test_json_has_formulas_rows_and_bounds(importable: str) -> None:
    options = ["--device", "l4", "--device", "cpu:2", "--batch", "2", "--dtype", "float32", "--json"]
    result = call(importable, *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["parameters"] == 4 * (32 * 32 + 32) + 32 * 4 + 4 and found["hypothetical"]
    assert found["formulas"]["exact"]["bytes"] == "256⋅B⋅T"
    assert [(r["device"], r["cache"]) for r in found["rows"]] == [
        (d, c) for d in ("l4", "cpu:2") for c in ("exact", "2x", "4x", "8x")
    ]
    assert found["rows"][0]["figures"]["bytes"] == 2 * 8192 * 256
    assert found["rows"][2]["pays"] == "from" and found["rows"][2]["attention_speedup"] > 3
    assert [b["cache"] for b in found["bounds"]] == ["2x", "4x", "8x", "none"]


def test_a_plan_is_shown_for_an_exported_program_as_for_its_module(importable: str, tmp_path: Path) -> None:
    module, arguments = encoder()
    torch.export.save(torch.export.export(module.eval(), arguments), tmp_path / "encoder.pt2")
    site = replace(SITE, name="attention", kv_heads=4, key_dim=8, value_dim=8)
    key, value = (SidePlan(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), (BitGroup(4, 8, 1.0),)) for _ in range(2))
    folder = LatentPlan((SitePlan(site, "identity", key, value),), 4, 64, 64).save(tmp_path / "plan")
    shown = []
    for model in (importable, str(tmp_path / "encoder.pt2")):
        result = call(model, "--plan", str(folder), "--json")
        assert result.exit_code == 0, result.output
        shown.append(json.loads(result.stdout))
    assert [r["cache"] for r in shown[0]["rows"]] == ["exact", "plan"] * 2 and not shown[0]["hypothetical"]
    assert shown[0]["rows"] == shown[1]["rows"]


def test_an_unknown_device_ends_the_command_with_one_line(importable: str) -> None:
    result = call(importable, "--device", "abacus")
    assert result.exit_code == 2 and result.stdout == ""
    assert "device 'abacus' is unknown" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_model_too_large_for_a_device_is_marked(importable: str) -> None:
    result = call(importable, "--device", "l4", "--tokens", "1000000000")
    assert result.exit_code == 0, result.output
    assert "! weights and KV cache do not fit" in " ".join(result.stdout.split())
