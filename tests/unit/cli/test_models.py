"""`fhopt models` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_models import save_text_gguf

from fhopt.cli.app import main
from fhopt.models.loader import load_model


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FHOPT_MODELS_GB", "0.5")
    assert json.loads(call("--json").stdout) == {
        "models": [], "folder": str(tmp_path / "cache" / "models"), "limit_bytes": 500_000_000,
    }  # fmt: skip
    save_text_gguf(tmp_path / "text.gguf")
    load_model(str(tmp_path / "text.gguf"))
    (one,) = json.loads(call("--json").stdout)["models"]
    assert one["name"].startswith("text-float32-") and one["nbytes"] > 100_000
    listed = call().stdout.replace("\n", "")
    assert one["name"] in listed and "of 0.5 GB" in listed
    assert "0 removed" in call("prune").stdout
    assert json.loads(call("prune", "--all", "--json").stdout)["models"] == [one]
    assert json.loads(call("--json").stdout)["models"] == []
    monkeypatch.setenv("FHOPT_MODELS_GB", "-1")
    refused = call()
    assert refused.exit_code == 2 and "expected a number of gigabytes" in refused.stderr
