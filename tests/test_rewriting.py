"""Rewritten folders: they open in three ways with the same tokens, and a folder that is not right is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import Fitted, found, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt import fitting, rewriting, rewritten
from fhopt.cli import main
from fhopt.errors import FhoptError
from fhopt.files import appearing_folder
from fhopt.models import LoadedModel, folder_of, load_model
from fhopt.spec import LatentPlan, SidePlan, SitePlan, Tier

GENERATE = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
ids, found = torch.load({ids!r}), {{}}
def generate(route, model):
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    kinds = sorted({{type(layer).__name__ for layer in out.past_key_values.layers}})
    found[route] = (out.sequences, torch.stack(out.logits), kinds, "fhopt" in sys.modules)
{routes}
torch.save(found, {result!r})
"""
BY_TRANSFORMERS = "model = AutoModelForCausalLM.from_pretrained({folder!r})"
# Fresh processes: what is imported before transformers, and the ways in which the folder is then opened, in turn.
PROCESSES = {
    "fhopt imported first": (
        "import fhopt",
        {"transformers, fhopt imported first": BY_TRANSFORMERS, "fhopt.load": "model = fhopt.load({folder!r})"},
    ),
    "fhopt imported last": (
        "",
        {
            "transformers without fhopt": BY_TRANSFORMERS,
            "transformers, fhopt imported last": "import fhopt\n" + BY_TRANSFORMERS,
        },
    ),
}
ROUNDING = 1e-5  # of the largest logit: weights at other addresses are summed in another order


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def written(out: Path, model: Any, plan: LatentPlan, **options: Any) -> rewriting.Rewritten:
    return rewriting.rewrite(LoadedModel("small", model), plan, out, **options)


def generated(model: Any, ids: Tensor, tokens: int = 12) -> tuple[Tensor, Tensor]:
    out: Any = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


def in_a_fresh_process(process: str, folder: Path, ids: Tensor, tmp_path: Path) -> dict[str, Any]:
    """By route: tokens, logits, classes of cache layers, and whether fhopt was imported by then."""
    first, routes = PROCESSES[process]
    given_, result = tmp_path / "ids.pt", tmp_path / "result.pt"
    torch.save(ids, given_)
    opened = "\n".join(f"{then}\ngenerate({route!r}, model)" for route, then in routes.items())
    opened = opened.format(folder=str(folder))
    code = GENERATE.format(first=first, routes=opened, ids=str(given_), result=str(result))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=tmp_path)
    found: dict[str, Any] = torch.load(result)
    assert found.keys() == routes.keys()
    return found


def in_memory(model: Any, plan: LatentPlan, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and logits of the model by the class of its cache layers."""
    exact, latent = generated(model, ids), generated(fhopt.apply(model, plan), ids)
    fhopt.unapply(model)
    return {"DynamicLayer": exact, "LatentLayer": latent}


def check_process(
    process: str, folder: Path, expected: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, ids: Tensor
) -> None:
    """Every route of a fresh process against the model in memory."""
    for route, (sequences, logits, kinds, is_imported) in in_a_fresh_process(process, folder, ids, tmp_path).items():
        kind = "DynamicLayer" if "without" in route else "LatentLayer"
        assert kinds == [kind] and is_imported is (kind == "LatentLayer"), route
        assert torch.equal(sequences, expected[kind][0]), route
        assert difference(logits, expected[kind][1]) < ROUNDING, route


@pytest.fixture(scope="session")
def folder(llama: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten tiny Llama in three shards."""
    out = tmp_path_factory.mktemp("folders") / "llama"
    written(out, llama.model, llama.plan(4), shard_size="200KB")
    return out


@pytest.fixture
def forged(folder: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(folder, tmp_path / "forged"))


# --------------------------------------------------------------------------------------------------- three ways


@pytest.mark.parametrize("process", PROCESSES)
def test_a_folder_opens_in_a_fresh_process_with_the_tokens_of_the_model_in_memory(
    process: str, folder: Path, llama: Fitted, tmp_path: Path
) -> None:
    ids = token_ids(2, 60)
    check_process(process, folder, in_memory(llama.model, llama.plan(4), ids), tmp_path, ids)


def test_the_plan_changes_logits_so_that_the_routes_can_be_told_apart(folder: Path, llama: Fitted) -> None:
    ids = token_ids(2, 60)
    exact, latent = generated(llama.model, ids), generated(fhopt.load(folder), ids)
    assert difference(latent[1], exact[1]) > 10 * ROUNDING


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_other_families_and_one_file_of_weights(make: Callable[[], Any], tmp_path: Path) -> None:
    model, ids = make(), token_ids(1, 40)
    plan = fitting.exact_plan(found(model)[1].sites.values())
    written(tmp_path / "out", model, plan)
    assert (tmp_path / "out" / "model.safetensors").exists()
    loaded = fhopt.load(tmp_path / "out")
    expected = generated(fhopt.apply(model, plan), ids)
    assert torch.equal(generated(loaded, ids)[0], expected[0])


def test_another_dtype_can_be_asked_for(folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model: Any = fhopt.load(folder, dtype=dtype)
        assert model.dtype == dtype and generated(model, token_ids(1, 40))[0].shape == (1, 52)


def test_weights_may_be_spread_over_memory_and_disk(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk"}
    places |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    ids = token_ids(1, 60)
    expected = generated(fhopt.load(folder), ids)
    for open_it in (fhopt.load, AutoModelForCausalLM.from_pretrained):
        model: Any = open_it(folder, device_map=places, offload_folder=tmp_path / "weights")
        assert {p.is_meta for p in model.model.layers[0].parameters()} == {True}
        assert torch.equal(generated(model, ids)[1], expected[1])


def test_a_loaded_model_can_be_unapplied_saved_and_is_then_the_original(
    folder: Path, llama: Fitted, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    original = llama.model.state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert original.keys() == again.keys() and all(torch.equal(original[k], again[k]) for k in original)


def test_a_rewritten_folder_is_a_model_for_commands_and_exact_there(
    llama: Fitted, lettered: Any, tmp_path: Path
) -> None:
    loaded = LoadedModel("small", llama.model, lettered)
    rewriting.rewrite(loaded, llama.plan(4), tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert again.tokenizer("abc").input_ids == lettered("abc").input_ids
    ids = token_ids(1, 40)
    assert torch.equal(generated(again.language_model(), ids)[1], generated(llama.model, ids)[1])
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["sites"]) == 2


def test_a_folder_without_a_tokenizer_is_no_model_for_commands(folder: Path) -> None:
    with pytest.raises(FhoptError, match="could not be loaded"):
        load_model(str(folder))


# --------------------------------------------------------------------------------------------------- writing


def test_the_folder_is_no_larger_than_the_original_and_the_bases(folder: Path, llama: Fitted, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "original")
    llama.plan(4).save(tmp_path / "plan")
    parts = [f.stat().st_size for part in ("original", "plan") for f in (tmp_path / part).iterdir()]
    whole = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    assert sum(whole) - sum(parts) < 5000  # the model card, the manifest, an index


def test_weights_of_a_hugging_face_folder_are_copied_and_code_is_left_behind(llama: Fitted, tmp_path: Path) -> None:
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


def test_weights_in_another_dtype_than_the_folder_are_saved_anew(llama: Fitted, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "source")
    model = copy.deepcopy(llama.model).bfloat16()
    assert not written(tmp_path / "out", model, llama.plan(4), source=tmp_path / "source").copied
    loaded: Any = fhopt.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_the_card_tells_provenance_loss_and_bytes(llama: Fitted, tmp_path: Path) -> None:
    from fhopt.evaluate import Comparison

    plan = llama.plan(4).with_provenance(model="small", texts=["topics"], tokens=576)
    measured = Comparison(10.0, 10.1, 1.0, (0.5, 1.5), 0.01, None, 2047)
    written(tmp_path / "out", llama.model, plan, losses={"source": measured})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| source | 2,047 | 10.0000 | 10.1000 | +1.00 % (+0.50 to +1.50) | 0.0100 |" in card
    assert plan.digest() in card and "topics (576 tokens)" in card
    assert f"| 8,192 | {plan.exact_token_bytes():,} | {plan.cache_bytes(8192) / 8192:,.0f} |" in card


def test_what_cannot_be_rewritten_is_refused_before_anything_is_written(llama: Fitted, tmp_path: Path) -> None:
    plan, out = llama.plan(4), tmp_path / "out"
    with pytest.raises(FhoptError, match="expected one"):
        written(out, torch.nn.Linear(2, 2), plan)
    with pytest.raises(FhoptError, match="fitted to another model"):
        written(out, tiny_llama(vocab_size=98), plan.with_provenance(fingerprint="0" * 64))
    quantized = tiny_llama()
    quantized.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(FhoptError, match="one quantizer"):
        written(out, quantized, plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(FhoptError, match="holds other things"):
        written(tmp_path / "full", llama.model, plan)
    assert not out.exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_an_older_folder_is_replaced_and_stays_when_writing_fails(forged: Path, llama: Fitted) -> None:
    before = (forged / "fhopt.json").read_bytes()
    with pytest.raises(FhoptError, match="no room"), appearing_folder(forged) as staging:
        (staging / "half").write_text("half")
        raise OSError(28, "no room")
    assert (forged / "fhopt.json").read_bytes() == before
    assert [p.name for p in forged.parent.iterdir()] == ["forged"]
    written(forged, llama.model, llama.plan(2))
    assert rewritten.read_folder(forged).plan.digest() == llama.plan(2).digest()


# --------------------------------------------------------------------------------------------------- refusals


def sign(path: Path) -> None:
    """What a forger does: make digests of plan and files right again."""
    described = json.loads((path / "plan" / "plan.json").read_text())
    numbers = {k: v for k, v in described.items() if k not in ("provenance", "digest")}
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for name, tensor in sorted(load_file(path / "plan" / "plan.safetensors").items()):
        digest.update(name.encode() + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    (path / "plan" / "plan.json").write_text(json.dumps(described | {"digest": digest.hexdigest()}))
    manifest = json.loads((path / "fhopt.json").read_text()) | {"plan": digest.hexdigest()}
    sign_files(path, manifest)


def sign_files(path: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = rewritten.describe_files(path, [n for n in manifest["files"] if (path / n).is_file()])
    (path / "fhopt.json").write_text(json.dumps(manifest))


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
    change_json(path, rewritten.INDEX, lambda x: x.update(weight_map=outside(x["weight_map"], shard.name)))
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
    change_json(path, rewritten.INDEX, lambda x: x["weight_map"].pop(lost))
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


def nested(path: Path) -> None:
    (path / "fhopt.json").write_text("[" * 100_000)


HARM: dict[Callable[[Path], None], str] = {
    not_numbers: "non-finite",
    other_shapes: "shapes",
    other_types: "float32",
    huge_header: "no safetensors file",
    index_outside: "other.safetensors",
    manifest_outside: "not a file of this folder",
    absolute_manifest: "not a file of this folder",
    code_of_its_own: "never run",
    class_of_another_kind: "Trainer",
    adapter: "adapter_config",
    other_weights: "weights are not those|fitted to another model",
    weights_not_numbers: "non-finite",
    a_tensor_less: "missing keys|weights are not those",
    cut_short: "bytes, expected",
    one_bit: "SHA-256",
    other_plan: "not the one",
    fingerprint: "fitted to another model",
    steps: "steps",
    text_for_a_number: "no attention",
    many_layers: "layers have",
    nested: "no JSON",
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


# transformers itself fails or looks elsewhere first, or has no need of what was changed
BEFORE_US = (many_layers, adapter, class_of_another_kind, huge_header, cut_short)


@pytest.mark.parametrize("harm", [h for h in HARM if h not in BEFORE_US], ids=lambda harm: harm.__name__)
def test_transformers_refuses_it_too_once_fhopt_is_imported(harm: Callable[[Path], None], forged: Path) -> None:
    from transformers import LlamaForCausalLM

    harm(forged)
    with nothing_runs(), pytest.raises(FhoptError):
        LlamaForCausalLM.from_pretrained(forged)
    assert not (forged / "was-run").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "generate.py"])
def test_pickles_and_code_beside_the_model_are_never_read(name: str, forged: Path) -> None:
    (forged / name).write_bytes(b"cos\nsystem\n(S'touch was-run'\ntR.")
    with nothing_runs():
        fhopt.load(forged)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="no rewritten model"):
        fhopt.load(tmp_path)
    with pytest.raises(FhoptError, match="no rewritten model"):
        fhopt.load(tmp_path / "absent")


# --------------------------------------------------------------------------------------------------- fuzzing

_watching = False
_ran: list[str] = []
_RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen")


def _audit(event: str, args: Any) -> None:
    if _watching and event in _RUNS:
        _ran.append(event)


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """No pickle is read, no process started and no library opened inside."""
    global _watching
    _ran.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _ran


LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 2**63, 2**400, 1e308, float("nan"), float("-inf"), "", "../../x", "\0", "x" * 5000, [], {},
     [[]], {"a": 1}, [1, 2, 3], "float32", "torch.float64", [0, 0, 0], [16, 8, 0.5]]
)  # fmt: skip
JSON_FILES = ("config.json", "fhopt.json", "plan/plan.json", rewritten.INDEX)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


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
        for _ in range(data.draw(st.integers(1, 4))):  # most of it in the header
            at = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
            piece = data.draw(st.binary(min_size=1, max_size=12))
            content[at : at + data.draw(st.integers(0, 12))] = piece
        (path / name).write_bytes(content[: data.draw(st.sampled_from([len(content), header, 8, 3]))])
        try_to_sign(path)
        loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_no_byte_of_what_decides_numbers_can_change_unnoticed(data: st.DataObject, folder: Path) -> None:
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
    """Sign as far as the harm lets one."""
    try:
        sign(path)
    except Exception:
        sign_files(path, json.loads((path / "fhopt.json").read_text()))


# --------------------------------------------------------------------------------------------------- the real model


def test_a_folder_that_is_called_demo_is_not_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` makes one."""
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("demo") is None and folder_of("other") == Path("other") and folder_of("absent") is None


@pytest.mark.slow
def test_smollm2_opens_by_every_route_with_the_tokens_of_the_model_in_memory(tmp_path: Path) -> None:
    """8-bit latents of all keys and values, so that nothing must be fitted: other numbers than the exact cache's."""
    loaded = load_model("demo")
    model: Any = loaded.module
    plan = _eight_bits(fitting.exact_plan(found(model)[1].sites.values()))
    plan.save(tmp_path / "plan")
    out = tmp_path / "smollm2"
    options = ["rewrite", "demo", "--plan", str(tmp_path / "plan"), "-o", str(out), "--json", "--context", "256"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["losses"]) == {"topics", "source"} and abs(told["losses"]["topics"]["increase_percent"]) < 5
    text = "The first amendment of the constitution says that Congress shall make no law. " * 12
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    expected = in_memory(model, plan, ids)
    assert difference(expected["LatentLayer"][1], expected["DynamicLayer"][1]) > 10 * ROUNDING
    for process in PROCESSES:
        check_process(process, out, expected, tmp_path, ids)
    again = load_model(str(out))
    assert again.tokenizer(text).input_ids == ids[0].tolist()
    module: Any = again.module
    assert not hasattr(module, "_fhopt_applied")
    model.save_pretrained(tmp_path / "original")
    loaded.tokenizer.save_pretrained(tmp_path / "original")
    original = sum(f.stat().st_size for f in (tmp_path / "original").iterdir())
    assert told["total_bytes"] <= original + told["plan_bytes"] + 5000  # the model card and the manifest


def _eight_bits(plan: LatentPlan) -> LatentPlan:
    def side(one: SidePlan) -> SidePlan:
        return SidePlan(one.encode, one.decode, (Tier(8, one.width, 2 / 64),))

    sites = tuple(SitePlan(s.site, s.layout, side(s.key), side(s.value)) for s in plan.sites)
    return LatentPlan(sites, plan.sinks, plan.recent, plan.block, plan.provenance)
