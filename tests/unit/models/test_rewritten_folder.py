"""Damaged and hostile rewritten folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_folders import nothing_runs, sign, written
from safetensors.torch import load_file, save_file
from small_models import FittedModel
from torch import Tensor

import fhopt
from fhopt.errors import FhoptError
from fhopt.models import rewritten_folder


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


def change_json(path: Path, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads((path / name).read_text())
    change(value)
    (path / name).write_text(json.dumps(value))


def change_bases(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(path / "plan" / "plan.safetensors")
    first = min(tensors)
    save_file(tensors | {first: change(tensors[first]).contiguous()}, path / "plan" / "plan.safetensors")
    sign(path)


def not_numbers(path: Path) -> None:
    change_bases(path, lambda x: x * float("nan"))


def other_shapes(path: Path) -> None:
    change_bases(path, lambda x: x[..., :-1])


def other_types(path: Path) -> None:
    change_bases(path, lambda x: x.double())


def huge_header(path: Path) -> None:
    file = min(path.glob("model-*.safetensors"))
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])
    sign(path)


def outside(names: dict[str, str], shard: str) -> dict[str, str]:
    return {k: "../other.safetensors" if v == shard else v for k, v in names.items()}


def index_outside(path: Path) -> None:
    shard = min(path.glob("model-*.safetensors"))
    shutil.copyfile(shard, path.parent / "other.safetensors")
    change_json(path, rewritten_folder.INDEX, lambda x: x.update(weight_map=outside(x["weight_map"], shard.name)))
    sign(path)


def manifest_outside(path: Path) -> None:
    change_json(path, "fhopt.json", lambda x: x["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}))


def absolute_manifest(path: Path) -> None:
    change_json(path, "fhopt.json", lambda x: x["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}))


def code_of_its_own(path: Path) -> None:
    change_json(path, "config.json", lambda x: x.update(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}))
    (path / "modeling_own.py").write_text(f"open({str(path / 'was-run')!r}, 'w')")
    sign(path)


def class_of_another_kind(path: Path) -> None:
    change_json(path, "config.json", lambda x: x.update(architectures=["Trainer"]))
    sign(path)


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')


def other_weights(path: Path) -> None:
    torch.manual_seed(7)
    for file in path.glob("model-*.safetensors"):
        save_file({k: torch.randn_like(v) for k, v in load_file(file).items()}, file, {"format": "pt"})
    sign(path)


def weights_not_numbers(path: Path) -> None:
    file = min(path.glob("model-*.safetensors"))
    save_file({k: v * float("inf") for k, v in load_file(file).items()}, file, {"format": "pt"})
    sign(path)


def a_tensor_less(path: Path) -> None:
    file = min(path.glob("model-*.safetensors"))
    tensors = load_file(file)
    lost = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file({k: v for k, v in tensors.items() if k != lost}, file, {"format": "pt"})
    change_json(path, rewritten_folder.INDEX, lambda x: x["weight_map"].pop(lost))
    sign(path)


def cut_short(path: Path) -> None:
    file = min(path.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def one_bit(path: Path) -> None:
    file = max(path.glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def other_plan(path: Path) -> None:
    change_json(path, "plan/plan.json", lambda x: x.update(sinks=5))
    sign(path)
    change_json(path, "fhopt.json", lambda x: x.update(plan="0" * 64))


def fingerprint(path: Path) -> None:
    change_json(path, "plan/plan.json", lambda x: x["provenance"].update(fingerprint="0" * 64))
    sign(path)


def steps(path: Path) -> None:
    change_json(path, "plan/plan.json", lambda x: x["sites"][0]["key"][0].__setitem__(2, float("nan")))
    sign(path)


def text_for_a_number(path: Path) -> None:
    change_json(path, "plan/plan.json", lambda x: x["sites"][0]["site"].update(scale="0; system()"))
    sign(path)


def many_layers(path: Path) -> None:
    change_json(path, "config.json", lambda x: x.update(num_hidden_layers=10**9))
    sign(path)


def many_labels(path: Path) -> None:
    """Request a huge dict of label names from transformers."""
    change_json(path, "config.json", lambda x: x.update(num_labels=10**9))
    sign(path)


def many_inner_layers(path: Path) -> None:
    change_json(path, "config.json", lambda x: x.update(text_config={"num_hidden_layers": 10**400}))
    sign(path)


def unprintable_version(path: Path) -> None:
    change_json(path, "fhopt.json", lambda x: x.update(version="1\n\udc80"))


def nested(path: Path) -> None:
    (path / "fhopt.json").write_text("[" * 100_000)


HARM: dict[Callable[[Path], None], str] = {
    not_numbers: "non-finite",
    other_shapes: "shapes",
    other_types: "float32",
    huge_header: "not a safetensors file",
    index_outside: "other.safetensors",
    manifest_outside: "not a file of this folder",
    absolute_manifest: "not a file of this folder",
    code_of_its_own: "fhopt never runs",
    class_of_another_kind: "Trainer",
    adapter: "adapter_config",
    other_weights: "weights are not those|was not fitted to",
    weights_not_numbers: "non-finite",
    a_tensor_less: "missing keys|weights are not those",
    cut_short: "bytes; expected",
    one_bit: "SHA-256",
    other_plan: "not the one",
    fingerprint: "was not fitted to",
    steps: "key.0.2 is nan",
    text_for_a_number: "site.scale is",
    many_layers: "has num_hidden_layers 1e\\+09; expected at most",
    many_labels: "has num_labels 1e\\+09; expected at most",
    many_inner_layers: "has num_hidden_layers 2.15e\\+09; expected at most",
    unprintable_version: r"has version 1 \?; expected 1",
    nested: "not JSON",
}


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_damaged_or_hostile_folder_is_refused_with_one_clear_error(
    harm: Callable[[Path], None], forged: Path
) -> None:
    harm(forged)
    with nothing_runs(), pytest.raises(FhoptError, match=HARM[harm]) as caught:
        fhopt.load(forged)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (forged / "was-run").exists()


# transformers fails first by itself, looks elsewhere, or does not need the changed part
BEFORE_US = (many_layers, many_labels, many_inner_layers, adapter, class_of_another_kind, huge_header, cut_short)


@pytest.mark.parametrize("harm", [h for h in HARM if h not in BEFORE_US], ids=lambda harm: harm.__name__)
def test_transformers_refuses_it_too_once_fhopt_is_imported(harm: Callable[[Path], None], forged: Path) -> None:
    from transformers import LlamaForCausalLM

    harm(forged)
    # transformers 5.25 and newer check the names of shards by themselves, before fhopt does
    refusal = (FhoptError, ValueError) if harm is index_outside else FhoptError
    with nothing_runs(), pytest.raises(refusal):
        LlamaForCausalLM.from_pretrained(forged)
    assert not (forged / "was-run").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "generate.py"])
def test_pickles_and_code_next_to_the_model_are_never_loaded(name: str, forged: Path) -> None:
    (forged / name).write_bytes(b"cos\nsystem\n(S'touch was-run'\ntR.")
    with nothing_runs():
        fhopt.load(forged)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="not a rewritten folder"):
        fhopt.load(tmp_path)
    with pytest.raises(FhoptError, match="is not a folder on this machine"):
        fhopt.load(tmp_path / "absent")
