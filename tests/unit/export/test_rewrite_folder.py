"""A rewritten folder: its contents, and models that cannot be rewritten."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rewritten_folders import generated, written
from small_models import FittedModel, tiny_llama, token_ids

import fhopt
from fhopt.cli.app import main
from fhopt.errors import FhoptError
from fhopt.export import rewrite_folder
from fhopt.files import appearing_folder
from fhopt.models import rewritten_folder
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.model_name import folder_of


@pytest.fixture(scope="session")
def folder(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten tiny Llama in three shards."""
    out = tmp_path_factory.mktemp("folders") / "llama"
    written(out, llama.model, llama.plan(4), shard_size="200KB")
    return out


@pytest.fixture
def forged(folder: Path, tmp_path: Path) -> Path:
    """Return a copy to tamper with."""
    return Path(shutil.copytree(folder, tmp_path / "forged"))


# --------------------------------------------------------------------------------------------------- three ways


def test_a_rewritten_folder_is_a_model_for_commands_and_exact_there(
    llama: FittedModel, lettered: Any, tmp_path: Path
) -> None:
    loaded = LoadedModel("small", llama.model, lettered)
    rewrite_folder.rewrite_folder(loaded, llama.plan(4), tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert again.tokenizer("abc").input_ids == lettered("abc").input_ids
    ids = token_ids(1, 40)
    assert torch.equal(generated(again.language_model(), ids)[1], generated(llama.model, ids)[1])
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["sites"]) == 2


def test_commands_refuse_a_folder_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(FhoptError, match=r"has no tokenizer; expected tokenizer\.json"):
        load_model(str(folder))


# --------------------------------------------------------------------------------------------------- writing


def test_the_folder_is_no_larger_than_the_original_and_the_bases(
    folder: Path, llama: FittedModel, tmp_path: Path
) -> None:
    llama.model.save_pretrained(tmp_path / "original")
    llama.plan(4).save(tmp_path / "plan")
    parts = [f.stat().st_size for part in ("original", "plan") for f in (tmp_path / part).iterdir()]
    whole = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    assert sum(whole) - sum(parts) < 5000  # the model card, the manifest, an index


def test_weights_of_a_hugging_face_folder_are_copied_without_its_code(llama: FittedModel, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    llama.model.save_pretrained(source, max_shard_size="200KB")
    (source / "README.md").write_text("---\nlicense: mit\n---\nText.")
    (source / "LICENSE").write_text("MIT")
    (source / "tokenizer_config.json").write_text("{}")
    for name in ("modeling_own.py", "pytorch_model.bin"):
        (source / name).write_bytes(b"raise SystemExit")
    done = written(out, llama.model, llama.plan(4), source=source)
    assert done.copied and not (out / "modeling_own.py").exists() and not (out / "pytorch_model.bin").exists()
    for file in [*source.glob("*.safetensors"), source / "LICENSE", source / "tokenizer_config.json"]:
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert "license: mit" in (out / "README.md").read_text()
    fhopt.load(out)


def test_weights_in_another_dtype_than_the_folder_are_saved_again(llama: FittedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "source")
    model = copy.deepcopy(llama.model).bfloat16()
    assert not written(tmp_path / "out", model, llama.plan(4), source=tmp_path / "source").copied
    loaded: Any = fhopt.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_unsupported_models_are_refused_before_anything_is_written(llama: FittedModel, tmp_path: Path) -> None:
    plan, out = llama.plan(4), tmp_path / "out"
    with pytest.raises(FhoptError, match="expected one"):
        written(out, torch.nn.Linear(2, 2), plan)
    with pytest.raises(FhoptError, match="plan was not fitted to"):
        written(out, tiny_llama(vocab_size=98), plan.with_provenance(fingerprint="0" * 64))
    quantized = tiny_llama()
    quantized.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(FhoptError, match="one quantizer"):
        written(out, quantized, plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(FhoptError, match="is not a rewritten folder"):
        written(tmp_path / "full", llama.model, plan)
    assert not out.exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_an_older_folder_is_replaced_and_stays_if_writing_fails(forged: Path, llama: FittedModel) -> None:
    before = (forged / "fhopt.json").read_bytes()
    with pytest.raises(FhoptError, match="no room"), appearing_folder(forged) as staging:
        (staging / "half").write_text("half")
        raise OSError(28, "no room")
    assert (forged / "fhopt.json").read_bytes() == before
    assert [p.name for p in forged.parent.iterdir()] == ["forged"]
    written(forged, llama.model, llama.plan(2))
    assert rewritten_folder.read_folder(forged).plan.digest() == llama.plan(2).digest()


# --------------------------------------------------------------------------------------------------- the real model


def test_a_folder_named_demo_is_not_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` creates such a folder."""
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("demo") is None and folder_of("other") == Path("other") and folder_of("absent") is None
