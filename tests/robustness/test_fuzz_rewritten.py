"""Any value in any description, any bytes in any file: loaded completely or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rewritten_folders import nothing_runs, places, sign, sign_files, written
from small_models import FittedModel

import fhopt
from fhopt.errors import FhoptError
from fhopt.models import rewritten_folder


@pytest.fixture(scope="session")
def folder(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten tiny Llama in three shards."""
    out = tmp_path_factory.mktemp("folders") / "llama"
    written(out, llama.model, llama.plan(4), shard_size="200KB")
    return out


LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 2**63, 2**400, 1e308, float("nan"), float("-inf"), "", "../../x", "\0", "x" * 5000, [], {},
     [[]], {"a": 1}, [1, 2, 3], "float32", "torch.float64", [0, 0, 0], [16, 8, 0.5]]
)  # fmt: skip
JSON_FILES = ("config.json", "fhopt.json", "plan/plan.json", rewritten_folder.INDEX)


def replace(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def loads_or_is_refused(path: Path) -> None:
    with nothing_runs():
        try:
            fhopt.load(path)
        except FhoptError as error:
            assert str(error)


FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@FUZZ
@given(data=st.data())
def test_any_value_in_any_description_loads_or_is_refused(data: st.DataObject, folder: Path) -> None:
    with copied(folder) as path:
        name = data.draw(st.sampled_from(JSON_FILES))
        value = json.loads((path / name).read_text())
        where = data.draw(st.sampled_from(sorted(places(value), key=str)))
        replace(value, where, data.draw(LEAVES))
        (path / name).write_text(json.dumps(value))
        if name != "fhopt.json":
            try_to_sign(path)
        loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_any_bytes_in_any_file_of_tensors_load_or_are_refused(data: st.DataObject, folder: Path) -> None:
    with copied(folder) as path:
        name = data.draw(st.sampled_from(sorted(str(f.relative_to(path)) for f in path.rglob("*.safetensors"))))
        content = bytearray((path / name).read_bytes())
        header = int.from_bytes(content[:8], "little") + 8
        for _ in range(data.draw(st.integers(1, 4))):  # mostly in the header
            at = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
            piece = data.draw(st.binary(min_size=1, max_size=12))
            content[at : at + data.draw(st.integers(0, 12))] = piece
        (path / name).write_bytes(content[: data.draw(st.sampled_from([len(content), header, 8, 3]))])
        try_to_sign(path)
        loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_no_byte_that_affects_results_can_change_unnoticed(data: st.DataObject, folder: Path) -> None:
    with copied(folder) as path:
        name = data.draw(st.sampled_from(sorted(json.loads((path / "fhopt.json").read_text())["files"])))
        content = bytearray((path / name).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (path / name).write_bytes(content)
        with pytest.raises(FhoptError):
            fhopt.load(path)


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    path = folder.with_name("fuzzed")
    shutil.copytree(folder, path)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def try_to_sign(path: Path) -> None:
    """Re-sign the folder as far as the damage allows."""
    try:
        sign(path)
    except Exception:
        sign_files(path, json.loads((path / "fhopt.json").read_text()))
