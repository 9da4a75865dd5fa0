"""`fhopt plans` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stored_plans import plan

from fhopt.cli.app import main


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plans", *arguments])


def test_the_commands(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan")
    added = json.loads(call("add", str(tmp_path / "plan"), "--json").stdout)["plans"][0]
    assert json.loads(call("--json").stdout)["plans"] == [added]
    assert added["name"] in call().stdout.replace("\n", "")
    assert call("path", added["digest"][:10]).stdout.strip() == added["path"]
    assert call("verify").exit_code == 0
    Path(added["path"], "plan.safetensors").write_bytes(b"")
    assert call("verify", "--json").exit_code == 1
    assert json.loads(call("prune", "--dry-run", "--json").stdout)["names"] == [added["name"]]
    assert "1 removed" in call("prune").stdout and json.loads(call("--json").stdout)["plans"] == []
    missing = call("path", "x")
    assert missing.exit_code == 2 and "does not name one plan" in missing.stderr
