"""The store of models converted from GGUF files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_text_gguf

from fhopt import system
from fhopt.errors import FhoptError
from fhopt.models import converted_models, gguf_files, loader
from fhopt.models.loader import load_model


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FHOPT_MODELS_GB")
    monkeypatch.setattr(system, "_warned", set())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_text_gguf(tmp_path / "a model.gguf")
    return tmp_path / "a model.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Record the dtypes of conversions."""
    made: list[torch.dtype] = []

    def read(path: Path, dtype: torch.dtype) -> Any:
        made.append(dtype)
        return gguf_files.read_gguf(path, dtype)

    monkeypatch.setattr(loader, "read_gguf", read)
    return made


def test_a_stored_conversion_restores_the_model_and_its_tokenizer(file: Path, conversions: list[torch.dtype]) -> None:
    first, second = load_model(str(file)), load_model(str(file))
    assert conversions == [torch.float32]
    one: Any = first.language_model()
    two: Any = second.language_model()
    assert type(one) is type(two) and one.config.to_dict() == two.config.to_dict()
    assert one.config.name_or_path == two.config.name_or_path == str(file.parent)
    assert one.generation_config.to_dict() == two.generation_config.to_dict()
    for (name, before), (other, after) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert name == other and before.dtype == after.dtype and torch.equal(before, after)
    assert not any(p.requires_grad for p in two.parameters()) and not two.training
    text = "abab, é <s> x"
    assert first.tokenizer(text).input_ids == second.tokenizer(text).input_ids
    assert first.tokenizer.chat_template == second.tokenizer.chat_template
    assert (first.name, second.name) == ("a model", "a model")


def test_another_dtype_a_changed_file_and_a_damaged_copy_are_converted_again(
    file: Path, conversions: list[torch.dtype]
) -> None:
    load_model(str(file))
    assert load_model(str(file), torch.bfloat16).language_model().dtype == torch.bfloat16
    assert conversions == [torch.float32, torch.bfloat16] and len(converted_models.converted_models()) == 2
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\0\0"
    file.write_bytes(content)
    load_model(str(file))
    assert len(conversions) == 3
    kept = converted_models.find_converted(file, torch.float32)
    assert kept is not None
    (kept / "model.safetensors").write_bytes(b"")
    load_model(str(file))
    load_model(str(file))
    assert len(conversions) == 4


def test_the_oldest_are_removed_to_make_room_and_so_are_leftovers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        load_model(str(file), dtype)
    os.utime(converted_models.models_folder() / converted_models.converted_models()[0].name, (1, 1))
    newer, older = converted_models.converted_models()
    monkeypatch.setenv("FHOPT_MODELS_GB", str((newer.nbytes + older.nbytes) / 1e9))
    load_model(str(file), torch.float16)
    names = {c.name for c in converted_models.converted_models()}
    assert newer.name in names and older.name not in names and len(names) == 2
    left = converted_models.models_folder() / ".left"
    left.mkdir()
    os.utime(left, (1, 1))
    assert {c.name for c in converted_models.prune_converted(0)} == names
    assert not list(converted_models.models_folder().iterdir())


def test_without_a_limit_nothing_is_stored_and_a_model_that_is_too_large_is_reported(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_MODELS_GB", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(file))
    assert not converted_models.converted_models()
    monkeypatch.setenv("FHOPT_MODELS_GB", "1e-6")
    with pytest.warns(RuntimeWarning, match="could not be stored .*FHOPT_MODELS_GB allows"):
        load_model(str(file))
    assert not converted_models.converted_models()
    monkeypatch.setenv("FHOPT_MODELS_GB", "many")
    with pytest.raises(FhoptError, match="expected a number of gigabytes"):
        load_model(str(file))


def test_a_folder_that_others_may_write_to_is_not_used(
    file: Path, conversions: list[torch.dtype], tmp_path: Path
) -> None:
    load_model(str(file))
    (tmp_path / "cache" / "models").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="could not be stored .*others may write to it"):
        load_model(str(file))
    assert len(conversions) == 2
