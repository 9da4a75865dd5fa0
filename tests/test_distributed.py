"""Models on several devices, and calibration and evaluation in several processes."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from click.testing import CliRunner
from small_models import Fitted, cached, found, numbered, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt import calibrate, fitting, gathering, pipeline, placing
from fhopt.applying import latent_cache
from fhopt.cli import main
from fhopt.dispatched import find_dispatched, is_dispatched, outline
from fhopt.errors import FhoptError
from fhopt.offloaded import Weights
from fhopt.spec import LatentPlan

OPTIONS = pipeline.FitOptions(sequences=6, rate_sequences=5, context=96, recent=8, block=8, tokens=2048)
AWAY = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu"}
PLACES = AWAY | {"lm_head": "disk"}


def offloaded(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model in `folder`, blocks and head on disk until they run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=PLACES)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_llama().double().save_pretrained(path)
    return path


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative to the largest number of each sum."""
    pairs = [(left[name].double(), right[name].double()) for name in left]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


# --------------------------------------------------------------------------------------------------- calibration


def test_a_model_on_disk_gives_the_plan_of_one_in_memory(folder: Path) -> None:
    batches = [batch for _, batch in numbered(11)]
    whole, away = tiny_llama().double(), offloaded(folder)
    assert is_dispatched(away) and not is_dispatched(whole)
    measured = [pipeline.measure_module(model, batches, OPTIONS) for model in (whole, away)]
    one, two = [gathering.moments(m.statistics) | gathering.rates(m.found, fitting.STEPS) for m in measured]
    assert largest_difference(two, one) < 1e-9  # float64, in the same order
    plans = [pipeline.plan_for(m, OPTIONS) for m in measured]
    assert plans[0].provenance == plans[1].provenance
    for left, right in zip(plans[0].sites, plans[1].sites, strict=True):
        assert left.site == right.site and left.key.tiers == right.key.tiers
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-5, atol=1e-5)
    there = {name for name, weight in away.named_parameters() if not weight.is_meta}
    assert there == {"model.embed_tokens.weight", "model.norm.weight"}
    assert away.config._attn_implementation == whole.config._attn_implementation


def test_no_weights_of_blocks_are_held_for_the_backward_pass(folder: Path) -> None:
    model, batch = offloaded(folder), {"input_ids": token_ids(1, 48)}
    source = find_dispatched(model, batch)
    held: list[tuple[int, ...]] = []
    seen: list[str] = []

    def keep(x: Tensor) -> Tensor:
        held.append(tuple(x.shape))
        return x

    def see(name: str, key: Tensor, value: Tensor) -> Callable[[Tensor, Tensor], None]:
        seen.append(name)
        return lambda key_gradient, value_gradient: None

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        source.probe(batch, calibrate.Watch((4, 8), see), lambda logits: logits.sum())
    weights = {tuple(p.shape) for p in model.model.layers[0].mlp.parameters()}
    assert sorted(seen) == sorted(source.modules)  # each site once, although blocks run twice
    assert held and not weights & set(held)


def tiny_qwen() -> Any:
    """Qwen3: keys are normed before they rotate."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen])
def test_the_outline_of_a_model_has_its_sites_and_no_memory(make: Callable[[], Any]) -> None:
    model = make()
    twin = outline(model)
    for one, other in zip(*(found(m)[1].sites.values() for m in (model, twin)), strict=True):
        angles = [site.rope.angles if site.rope else () for site in (one, other)]
        assert angles[0] == pytest.approx(angles[1], rel=1e-9)  # measured in float64
        assert replace(one, rope=None) == replace(other, rope=None)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in twin.parameters()}
    assert max(memory.values()) <= 4


def test_a_dispatched_module_that_is_no_model_of_transformers_is_refused() -> None:
    from accelerate import cpu_offload

    module = cpu_offload(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.device("cpu"))
    with pytest.raises(FhoptError, match=r"no model of transformers.*Calibrate it on one device"):
        pipeline.measure_module(module, [{"input": torch.zeros(1, 4)}], OPTIONS)


def test_attention_that_a_model_writes_out_is_refused_on_several_devices() -> None:
    from accelerate import cpu_offload
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4)
    model = cpu_offload(BloomForCausalLM(config).eval(), torch.device("cpu"))
    with pytest.raises(FhoptError, match="does not call transformers' attention interface"):
        find_dispatched(model, {"input_ids": token_ids(1, 16)})


# --------------------------------------------------------------------------------------------------- plans


def generated(model: Any, ids: Tensor) -> Tensor:
    return torch.stack(
        model.generate(
            ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        ).logits
    )


def test_a_plan_serves_a_model_that_accelerate_has_dispatched_and_its_caches_come_from_files(
    llama: Fitted, folder: Path, tmp_path: Path
) -> None:
    plan, ids = llama.plan(4), token_ids(1, 60)
    whole, away = tiny_llama().double(), offloaded(folder)
    for model in (whole, away):
        fhopt.apply(model, plan)
    assert torch.equal(generated(away, ids), generated(whole, ids))
    cache = latent_cache(away)
    with torch.no_grad():
        away(ids, **cached(cache))
        fhopt.save_cache(away, cache, tmp_path / "cache.safetensors")
        again = fhopt.load_cache(away, tmp_path / "cache.safetensors")
        logits = [away(ids[:, -1:], **cached(c)).logits for c in (cache, again)]
    assert torch.equal(logits[0], logits[1]) and {t.device.type for t in again.layers[0].tensors} == {"cpu"}


def test_weights_are_read_one_at_a_time_and_not_kept(folder: Path) -> None:
    model = offloaded(folder)
    weights, names = Weights(model), [name for name, _ in tiny_llama().named_parameters()]
    assert sorted(names) == list(weights) and not weights.absent
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name], tiny_llama().double().get_parameter(name))
    assert weights[name] is not weights[name] and model.get_parameter(name).is_meta


def test_a_model_without_numbers_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match=r"lm_head\.weight of LlamaForCausalLM is on the meta device"):
        fhopt.apply(tiny_llama().to("meta"), llama.plan(4))


# --------------------------------------------------------------------------------------------------- placing


def test_processes_of_a_machine_share_its_gpus_and_its_memory() -> None:
    memory: dict[int | str, int] = {0: 10, 1: 11, 2: 12, 3: 13, "cpu": 100}
    assert placing.share_memory(memory, 1, 2) == {2: 12, 3: 13, "cpu": 50}
    shares = [placing.share_memory(memory, rank, 3) for rank in range(3)]
    assert sorted(d for s in shares for d in s if isinstance(d, int)) == [0, 1, 2, 3]
    assert placing.share_memory({"cpu": 100}, 0, 4) == {"cpu": 25}
    with pytest.raises(FhoptError, match=r"8 processes for 4 GPUs.*--nproc-per-node"):
        placing.share_memory(memory, 0, 8)


def test_device_maps_in_words_become_options(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(PLACES))
    assert placing.placement(None) == {} and placing.placement("cpu") == {"device_map": {"": "cpu"}}
    assert placing.placement(str(tmp_path / "map.json")) == {"device_map": PLACES}
    auto = placing.placement("auto")
    assert auto["device_map"] == "auto" and auto["max_memory"]["cpu"] > 0


@pytest.mark.parametrize("text", ["warp", "cuda:99", "absent.json"])
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(FhoptError, match="expected"):
        placing.placement(text)


def test_a_device_map_needs_a_folder() -> None:
    done = CliRunner().invoke(main, ["eval", "demo", "--device-map", "cpu"])
    assert done.exit_code == 2 and "'demo' is no folder" in done.output


# --------------------------------------------------------------------------------------------------- processes


@dataclass
class Told:
    """What a command said in one process."""

    code: int
    out: str
    err: str


FIT = ("--data", "license", "--sequences", "5", "--rate-sequences", "3", "--context", "144", "--recent", "16", "--json")
EVAL = ("--data", "license", "--sequences", "3", "--context", "150", "--json")
TASKS = ("--tasks", "perplexity,passkey", "--lengths", "320", "--items", "1")


def invoke(*arguments: str) -> Told:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Told(done.exit_code, done.stdout, done.stderr)


def run_fit(model: Path, *more: str) -> Told:
    return invoke("fit", str(model), *FIT, *more, "-o", str(model.parent / "spread"))


def run_eval(model: Path) -> Told:
    return invoke("eval", str(model), "--plan", str(model.parent / "plan"), *EVAL, *TASKS)


def in_one_process(name: str) -> Callable[[], None]:
    """Nothing in the first process, and a failure in the second: what `name` says of it."""

    def fail() -> None:
        if name == "ends":
            os._exit(9)
        raise RuntimeError("out of memory, say")

    return fail if os.environ["RANK"] == "1" else lambda: None


def fit_and_fail(model: Path, how: str) -> Told:
    """A calibration of which the second process fails at its second sequence."""
    probe, fail, calls = calibrate.ProbedGraph.probe, in_one_process(how), itertools.count()

    def probe_or_fail(self: Any, *arguments: Any) -> None:
        if next(calls) == 1:
            fail()
        probe(self, *arguments)

    setattr(calibrate.ProbedGraph, "probe", probe_or_fail)  # noqa: B010  # of one process, which ends
    done = CliRunner().invoke(main, ["fit", str(model), *FIT, "-o", str(model.parent / "failed")])
    return Told(done.exit_code, done.stdout, done.stderr + repr(done.exception))


def without_a_model(model: Path) -> Told:
    """The second process finds no model."""
    return run_eval(model.with_name("absent") if os.environ["RANK"] == "1" else model)


SCENARIOS: dict[str, Callable[[Path], Told]] = {
    "fit": lambda model: run_fit(model, "--device-map", str(model.parent / "map.json")),
    "eval": run_eval,
    "no model": without_a_model,
    "raises": lambda model: fit_and_fail(model, "raises"),
    "ends": lambda model: fit_and_fail(model, "ends"),
}


def act(model: Path, scenario: str) -> None:
    """In one of two processes."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    told = SCENARIOS[scenario](model)
    (model.parent / f"{scenario}.{os.environ['RANK']}.json").write_text(json.dumps(vars(told)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a tokenizer, a plan for it, and what one process says of both."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path: Path = tmp_path_factory.mktemp("here")
    letters = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz .,\n()'=:_0123456789"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(letters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path / "model")
    tiny_llama().save_pretrained(path / "model")
    (path / "map.json").write_text(json.dumps(PLACES))
    done = invoke("fit", str(path / "model"), *FIT, "-o", str(path / "plan"))
    assert done.code == 0, done.err
    return path


def acted(here: Path, scenario: str) -> list[Told]:
    processes.launch(__file__, 2, here / "model", scenario, may_end=scenario == "ends")
    files = [here / f"{scenario}.{rank}.json" for rank in range(2)]
    return [Told(**json.loads(file.read_text())) for file in files if file.exists()]


def test_two_processes_fit_a_model_on_disk_and_one_writes_and_speaks(here: Path) -> None:
    first, second = acted(here, "fit")
    assert (first.code, second.code, second.out, second.err) == (0, 0, "", ""), first.err + second.err
    assert json.loads(first.out)["sites"] == 2
    one, two = (LatentPlan.load(here / name) for name in ("plan", "spread"))
    for left, right in zip(one.sites, two.sites, strict=True):
        assert (left.layout, left.key.tiers, left.value.tiers) == (right.layout, right.key.tiers, right.value.tiers)
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-3, atol=1e-3)  # sums of float32 passes
    assert not [name for name in os.listdir(here) if name.startswith(".spread")]  # checkpoints, progress


def test_two_processes_evaluate_as_one_and_one_speaks(here: Path) -> None:
    alone = run_eval(here / "model")
    assert alone.code == 0, alone.err
    first, second = acted(here, "eval")
    assert (first.code, second.code, second.out, second.err) == (0, 0, "", ""), first.err + second.err
    assert json.loads(first.out) == json.loads(alone.out)


def test_a_mistake_in_one_process_is_told_once_and_ends_all(here: Path) -> None:
    first, second = acted(here, "no model")
    assert (first.code, second.code, first.out, second.out, second.err) == (2, 2, "", "", "")
    assert first.err.startswith("fhopt: process 1 of 2:") and "absent' is no model" in first.err
    assert len(first.err.splitlines()) == 1


def test_a_process_that_raises_ends_all_with_its_error(here: Path) -> None:
    first, second = acted(here, "raises")
    assert first.code == 2 and "fhopt: process 1 of 2: RuntimeError: out of memory, say" in first.err
    assert second.code == 1 and "RuntimeError('out of memory, say')" in second.err  # with its traceback
    assert not (here / "failed").exists()


def test_a_process_that_is_gone_ends_the_others(here: Path) -> None:
    (first,) = acted(here, "ends")
    assert first.code == 2 and "another process has ended, or cannot be reached" in first.err
    assert not (here / "failed").exists()


if __name__ == "__main__":
    act(Path(sys.argv[1]), sys.argv[2])
