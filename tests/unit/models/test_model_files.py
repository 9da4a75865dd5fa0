"""Checks of MODEL before torch is imported."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from imports import imported_by
from safetensors.torch import save_file

from fhopt.errors import FhoptError
from fhopt.models.loader import load_model
from fhopt.models.model_files import check_model, check_pickled_tensors


class _Runs:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    check_model(str(model_folder(tmp_path / "model")))


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "a FIFO":
        os.mkfifo(folder / "special_tokens_map.json")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "a loop":
        (folder / "vocab.txt").symlink_to("vocab.txt")
    elif how == "a device":
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("/dev/zero")
    elif how == "no JSON":
        (folder / "config.json").write_text("[" * 100_000)
    elif how == "a folder":
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
    else:
        (folder / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a FIFO", "is a FIFO; expected a regular file"),
        ("cut short", "is not a complete safetensors file"),
        ("no weights", "has no weights"),
        ("no tokenizer", "has no tokenizer"),
        ("a loop", "cannot be read"),
        ("a device", "is a device; expected a regular file"),
        ("no JSON", "is not JSON"),
        ("a folder", "is a folder; expected a regular file"),
        ("a list", "holds a list; expected an object"),
    ],
)
def test_an_unreadable_folder_is_refused(how: str, reason: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    spoil(folder, how)
    with pytest.raises(FhoptError, match=reason):
        check_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(name: str, archive: bool, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if archive:
        torch.save({"a": _Runs(tmp_path / "ran")}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(FhoptError, match=r"is a pickle that would call posix\.mkdir"):
        check_model(str(folder))
    with pytest.raises(FhoptError, match="is a pickle, or an archive with one"):
        check_model(str(folder / name))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_is_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.bin")
    check_pickled_tensors(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_text("text")
    with pytest.raises(FhoptError, match="is not a weights file"):
        check_pickled_tensors(tmp_path / "b.bin")


def test_a_program_with_pickled_objects_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    program._example_inputs = ((_Runs(tmp_path / "ran"),), {})
    path = tmp_path / "a.pt2"
    torch.export.save(program, path)
    with pytest.raises(FhoptError, match="could not be read as an exported program"):
        load_model(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "unknown model"),
        ("{tmp}/a.gguf", "does not exist"),
        ("{tmp}/b.gguf", "it begins with b'text'"),
        ("{tmp}/b.pt2", "could not be read as an exported program"),
        ("{tmp}/text", "it is a file of another kind"),
        ("no_such_package.at_all:f", "No module named 'no_such_package'"),
        (":f", "is not a module name"),
    ],
)
def test_other_files_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    for file in ("b.gguf", "b.pt2", "text"):
        (tmp_path / file).write_text("text")
    with pytest.raises(FhoptError, match=reason):
        check_model(name.format(tmp=tmp_path))


def test_it_needs_no_torch() -> None:
    assert not {"torch", "transformers"} & imported_by("fhopt.models.model_files")
