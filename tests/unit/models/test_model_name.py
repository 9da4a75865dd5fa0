"""MODEL by its name and files, before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fhopt.errors import FhoptError
from fhopt.models.model_name import StoredFacts, check_text_model, folder_of, is_of_few_bits, stored_facts


def folder(path: Path, config: dict[str, Any], **files: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    save_file({}, path / "model.safetensors")
    return path


def test_demo_is_not_a_folder_even_if_one_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert folder_of("demo") is None and folder_of("./demo") == Path("demo")
    check_text_model("demo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "unknown model 'nowhere'"),
        ("{tmp}", "has no config.json"),
        ("{tmp}/a.gguf", "expected a GGUF file"),
        ("a.pt2", "expected a program"),
        ("json:loads", "has no tokenizer"),
        ("nowhere_at_all:loads", "cannot be imported"),
    ],
)
def test_models_other_than_language_models_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match=message):
        check_text_model(name.format(tmp=tmp_path))


def test_a_folder_of_an_encoder_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"architectures": ["BertModel"]}, tokenizer={})
    with pytest.raises(FhoptError, match="is a BertModel, which does not generate text"):
        check_text_model(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(FhoptError, match="has no tokenizer"):
        check_text_model(str(tmp_path))


def test_positions_and_template_are_read_from_files(tmp_path: Path) -> None:
    folder(tmp_path, {"text_config": {"max_position_embeddings": 70}, "n_positions": 9}, tokenizer_config={})
    assert stored_facts(str(tmp_path)) == StoredFacts(70, False)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert stored_facts(str(tmp_path)).has_chat_template
    folder(tmp_path, {"n_positions": 9})
    assert stored_facts(str(tmp_path)).positions == 9
    assert stored_facts("demo") == StoredFacts()


def test_unreadable_files_give_no_information(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no JSON")
    assert stored_facts(str(tmp_path)).positions is None


def test_a_name_is_checked_without_torch() -> None:
    code = "import sys; from fhopt.models import model_name; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None}, None),
        ({}, None),
    ],
)
def test_the_dtype_that_a_folder_is_stored_in(tmp_path: Path, config: dict[str, Any], dtype: str | None) -> None:
    name = str(folder(tmp_path, config))
    assert stored_facts(name).dtype == dtype
    assert is_of_few_bits(name) == (dtype == "bfloat16")


def test_gguf_files_are_quantized() -> None:
    assert is_of_few_bits("demo") and is_of_few_bits("some/file.gguf") and not is_of_few_bits("module:function")
