"""Models on several devices and in several processes: plans, caches, commands."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from click.testing import CliRunner
from offloaded_models import PLACES, offloaded
from small_models import FittedModel, cached, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.calibration import probe as calibration_probe
from fhopt.cli.app import main
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_llama().double().save_pretrained(path)
    return path


# --------------------------------------------------------------------------------------------------- plans


def generated(model: Any, ids: Tensor) -> Tensor:
    return torch.stack(
        model.generate(
            ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        ).logits
    )


def test_a_plan_works_on_a_dispatched_model_and_its_caches_load_from_files(
    llama: FittedModel, folder: Path, tmp_path: Path
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


# --------------------------------------------------------------------------------------------------- processes


@dataclass
class Told:
    """The output of a command in one process."""

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
    """Return a failure for the second process, as given by `name`, and a no-op for the first."""

    def fail() -> None:
        if name == "ends":
            os._exit(9)
        raise RuntimeError("out of memory, say")

    return fail if os.environ["RANK"] == "1" else lambda: None


def fit_and_fail(model: Path, how: str) -> Told:
    """Run a calibration in which the second process fails at its second sequence."""
    probe, fail, calls = calibration_probe.ProbedGraph.probe, in_one_process(how), itertools.count()

    def probe_or_fail(self: Any, *arguments: Any) -> None:
        if next(calls) == 1:
            fail()
        probe(self, *arguments)

    setattr(calibration_probe.ProbedGraph, "probe", probe_or_fail)  # noqa: B010  # of one process, which ends
    done = CliRunner().invoke(main, ["fit", str(model), *FIT, "-o", str(model.parent / "failed")])
    return Told(done.exit_code, done.stdout, done.stderr + repr(done.exception))


def without_a_model(model: Path) -> Told:
    """Run a command whose second process finds no model."""
    return run_eval(model.with_name("absent") if os.environ["RANK"] == "1" else model)


SCENARIOS: dict[str, Callable[[Path], Told]] = {
    "fit": lambda model: run_fit(model, "--device-map", str(model.parent / "map.json")),
    "eval": run_eval,
    "no model": without_a_model,
    "raises": lambda model: fit_and_fail(model, "raises"),
    "ends": lambda model: fit_and_fail(model, "ends"),
}


def act(model: Path, scenario: str) -> None:
    """Run the checks of one of two processes."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    told = SCENARIOS[scenario](model)
    (model.parent / f"{scenario}.{os.environ['RANK']}.json").write_text(json.dumps(vars(told)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and tokenizer, a plan for it, and the output of a single process for both."""
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


def test_two_processes_fit_a_model_on_disk_and_one_writes_and_prints(here: Path) -> None:
    first, second = acted(here, "fit")
    assert (first.code, second.code, second.out, second.err) == (0, 0, "", ""), first.err + second.err
    assert json.loads(first.out)["sites"] == 2
    one, two = (LatentPlan.load(here / name) for name in ("plan", "spread"))
    for left, right in zip(one.sites, two.sites, strict=True):
        assert (left.layout, left.key.tiers, left.value.tiers) == (right.layout, right.key.tiers, right.value.tiers)
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-3, atol=1e-3)  # sums of float32 passes
    assert not [name for name in os.listdir(here) if name.startswith(".spread")]  # checkpoints, progress


def test_two_processes_evaluate_like_one_and_one_prints(here: Path) -> None:
    alone = run_eval(here / "model")
    assert alone.code == 0, alone.err
    first, second = acted(here, "eval")
    assert (first.code, second.code, second.out, second.err) == (0, 0, "", ""), first.err + second.err
    assert json.loads(first.out) == json.loads(alone.out)


def test_a_user_error_in_one_process_is_reported_once_and_ends_all(here: Path) -> None:
    first, second = acted(here, "no model")
    assert (first.code, second.code, first.out, second.out, second.err) == (2, 2, "", "", "")
    assert first.err.startswith("fhopt: process 1 of 2:") and "unknown model '" in first.err
    assert len(first.err.splitlines()) == 1


@pytest.mark.slow
def test_a_process_that_raises_ends_all_with_its_error(here: Path) -> None:
    first, second = acted(here, "raises")
    assert first.code == 2 and "fhopt: process 1 of 2: RuntimeError: out of memory, say" in first.err
    assert second.code == 1 and "RuntimeError('out of memory, say')" in second.err  # with its traceback
    assert not (here / "failed").exists()


def test_a_process_that_dies_ends_the_others(here: Path) -> None:
    (first,) = acted(here, "ends")
    assert first.code == 2 and "another process has ended or is unreachable" in first.err
    assert not (here / "failed").exists()


if __name__ == "__main__":
    act(Path(sys.argv[1]), sys.argv[2])
