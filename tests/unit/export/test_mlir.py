"""Decode steps as MLIR, run by IREE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from exported_steps import by_the_model
from small_models import FittedModel, token_ids

from fhopt.cli.app import main
from fhopt.export import mlir, rewrite_folder
from fhopt.models.loaded_model import LoadedModel

pytest.importorskip("torch_mlir.ir", reason="the extra mlir is not installed")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def folder(llama: FittedModel, lettered: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folders") / "llama"
    rewrite_folder.rewrite_folder(LoadedModel("llama", llama.model, lettered), llama.plan(4), out)
    return out


@pytest.mark.slow
def test_a_rewritten_folder_is_verified_and_exported_as_mlir(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    verified = call("verify", str(folder), "--json")
    assert verified.exit_code == 0, verified.output
    for number, options in enumerate(([], ["--bytecode"])):
        out = str(tmp_path / str(number))
        done = call("export", str(folder), "--target", "mlir", *options, "-o", out, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(call("verify", out, "--json").stdout) == json.loads(verified.stdout)
    assert json.loads(done.stdout)["files"].keys() == {"seal.mlirbc", "step.mlirbc", "step.json", "weights.safetensors"}


def test_nonexistent_targets_are_refused(folder: Path) -> None:
    for options, said in (
        (["--target", "tpu"], "is no target"),
        (["--target", "mlir", "--arch", "sm_90"], "of a device"),
        (["--target", "iree-cpu", "--dialect", "torch"], "given linalg"),
    ):
        refused = call("export", str(folder), *options)
        assert refused.exit_code == 2 and said in refused.stderr


@pytest.mark.slow
def test_an_iree_module_has_the_logits_of_the_model(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    pytest.importorskip("iree.compiler")
    pytest.importorskip("iree.runtime")
    out, ids = tmp_path / "out", token_ids(1, 48)
    done = call("export", str(folder), "--target", "iree-cpu", "-o", str(out))
    assert done.exit_code == 0, done.output
    state = mlir.open_module(out)
    expected = by_the_model(llama.model, llama.plan(4), ids)
    errors = [float((state.step(ids[:, i : i + 1]) - expected[i]).abs().max()) for i in range(48)]
    assert max(errors) < 1e-4 and state.quantized > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "arch", "holds"), [("iree-cpu", "aarch64:cortex-a76", b"aarch64"), ("iree-vulkan", "", b"vulkan-spirv")]
)
def test_a_module_for_another_machine_is_compiled_here(
    target: str, arch: str, holds: bytes, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("iree.compiler")
    out = tmp_path / "out"
    options = ["--arch", arch] if arch else []
    done = call("export", str(folder), "--target", target, *options, "-o", str(out))
    assert done.exit_code == 0, done.output
    assert len((out / "step.vmfb").read_bytes()) > 10_000 and json.loads((out / "step.json").read_text())
