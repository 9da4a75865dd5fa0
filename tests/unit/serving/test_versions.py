"""The supported versions of vLLM, and the hooks that the plugin needs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fhopt.errors import FhoptError
from fhopt.serving import versions

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").is_file())
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make test-serving` brings it"
)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.9.dev1+cpu"])
def test_versions_in_the_range_are_supported(version: str) -> None:
    versions.check_version(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", ""])
def test_others_are_refused_with_a_fix(version: str) -> None:
    with pytest.raises(FhoptError, match=r"expected at least 0\.32 and below 0\.33.*pip install"):
        versions.check_version(version)


def test_the_extra_requires_the_same_range() -> None:
    wanted = re.search(r'^vllm = \["vllm>=([\d.]+),<([\d.]+)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    assert wanted is not None
    assert [tuple(map(int, n.split("."))) for n in wanted.groups()] == [versions.FROM, versions.BEFORE]


@needs_vllm
def test_every_hook_exists() -> None:
    assert versions.missing_hooks() == []


def test_a_moved_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = {"fhopt.serving.versions": ("check_version", "was_moved"), "fhopt.no_such": ("anything",)}
    monkeypatch.setattr(versions, "HOOKS", hooks)
    assert versions.missing_hooks() == ["fhopt.serving.versions.was_moved", "fhopt.no_such.anything"]
