"""vLLM's messages for folders and options that a plan does not support: one sentence, before memory is reserved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rewritten_folders import sign_files
from safetensors.torch import load_file, save_file
from served_models import Served, folder_of, plan_of
from small_models import FittedModel, tiny_llama

from fhopt.errors import FhoptError
from fhopt.plan.fingerprint import fingerprint


@pytest.fixture(scope="module")
def folder(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refused") / "folder"
    plan = plan_of(llama)
    known = fingerprint(dict(llama.model.named_parameters()), [site.site for site in plan.sites])
    folder_of(path, llama.model, plan.with_provenance(fingerprint=known))
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(FhoptError) as raised:
        Served(str(path), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_damaged_plan_is_refused(copy: Path) -> None:
    (copy / "plan" / "plan.safetensors").write_bytes(b"damaged")
    assert "plan/plan.safetensors has 7 bytes" in refused(copy)


def test_a_plan_for_other_weights_is_refused(copy: Path) -> None:
    """The files match the manifest; the plan was fitted to other weights."""
    weights = load_file(copy / "model.safetensors")
    other = {name: -tensor for name, tensor in weights.items()}
    save_file(other, copy / "model.safetensors", metadata={"format": "pt"})
    sign_files(copy, json.loads((copy / "fhopt.json").read_text()))
    assert "plan was not fitted to" in refused(copy)


def test_a_cache_in_fp8_is_refused(folder: Path) -> None:
    assert "--kv-cache-dtype fp8 is not supported" in refused(folder, kv_cache_dtype="fp8")


def test_an_engine_without_support_for_several_caches_is_refused(folder: Path) -> None:
    assert "--disable-hybrid-kv-cache-manager" in refused(folder, disable_hybrid_kv_cache_manager=True)


def test_a_script_prints_the_sentence_and_no_traceback(copy: Path) -> None:
    (copy / "plan" / "plan.json").unlink()
    code = f"from vllm import LLM; LLM({str(copy)!r}, enforce_eager=True, skip_tokenizer_init=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert done.returncode == 1 and last.startswith("Error: ") and "plan.json" in last
    assert "Traceback" not in done.stderr


def test_other_models_are_served_unchanged(tmp_path: Path) -> None:
    model = tiny_llama(head_dim=32)  # the smallest that vLLM's own attention supports
    model.save_pretrained(tmp_path / "plain")
    engine = Served(str(tmp_path / "plain"))
    assert len(engine.greedy([[1, 2, 3]], 4)[0]) == 4
    engine.close()
