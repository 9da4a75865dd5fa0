"""MODEL and --plan of commands that generate text: what is refused before loading, and the messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_models import call
from rewritten_folders import written
from small_models import FittedModel, tiny_llama
from text_models import save_plan, save_text_model

from fhopt.cli.text_model import read_model_plan, statistics
from fhopt.errors import FhoptError
from fhopt.hf.streaming import Generated
from fhopt.plan.fingerprint import fingerprint

WRONG: dict[str, tuple[list[str], str]] = {
    "no such model": (["generate", "{tmp}/no", "x"], "unknown model"),
    "a program without a tokenizer": (["chat", "a.pt2"], "expected a program saved"),
    "a GGUF file that is not there": (["bench", "{tmp}/a.gguf"], "expected a GGUF file"),
    "no chat template, asked for": (["generate", "{mute}", "x", "--chat"], "has no chat template"),
    "no chat template": (["chat", "{mute}"], "Use `fhopt generate {mute} --raw PROMPT`"),
    "no prompt": (["generate", "{chatty}"], "found no prompt"),
    "two prompts": (["generate", "{chatty}", "x", "--file", "y"], "found a PROMPT and --file"),
    "an empty prompt": (["generate", "{chatty}", " "], "the prompt is empty"),
    "a prompt file that is not there": (["generate", "{chatty}", "--file", "{tmp}/no"], "cannot read the prompt"),
    "a prompt longer than the model": (["generate", "{chatty}", "x" * 600], "exceed the model's 512"),
    "negative tokens": (["generate", "{chatty}", "x", "--max-new-tokens", "-1"], "max_new_tokens -1 is invalid"),
    "more tokens than the model has": (["chat", "{chatty}", "--max-new-tokens", "512"], "the model has 512 positions"),
    "a negative temperature": (["chat", "{chatty}", "--temperature", "-1"], "temperature -1"),
    "no such plan": (["generate", "{chatty}", "x", "--plan", "{tmp}/no"], "is not a plan"),
    "a folder that is no plan": (["generate", "{chatty}", "x", "--plan", "{tmp}"], "is not a plan"),
    "a plan of another model": (["generate", "{other}", "x", "--plan", "{plan}"], "plan was not fitted to"),
    "a plan and the exact cache": (["chat", "{chatty}", "--plan", "{plan}", "--exact"], "mutually exclusive"),
    "a context longer than the model": (["bench", "{chatty}", "--contexts", "513"], "expected at most 512"),
    "contexts that are words": (
        ["bench", "{chatty}", "--contexts", "long"],
        "expected comma-separated positive integers",
    ),
    "a negative batch": (["bench", "{chatty}", "--batches", "-1"], "expected comma-separated positive integers"),
    "negative rounds": (["bench", "{chatty}", "--rounds", "-1"], "-1 rounds"),
    "a plot that is no picture": (["bench", "{chatty}", "-o", "{tmp}/plot.txt"], "is not an image file name"),
    "a plan of another model to measure": (["bench", "{other}", "--plan", "{plan}"], "plan was not fitted to"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, llama: FittedModel) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    other = tiny_llama()
    for weight in other.parameters():
        weight.data.neg_()
    plan = llama.plan(4)
    known = fingerprint(dict(llama.model.named_parameters()), [p.site for p in plan.sites])
    return {
        "chatty": save_text_model(path / "chatty"),
        "mute": save_text_model(path / "mute", None),
        "other": save_text_model(path / "other", model=other),
        "plan": plan.with_provenance(fingerprint=known).save(path / "plan"),
    }


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_before_the_model_is_loaded(
    case: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("fhopt.models.loader.load_model", load)
    arguments, message = WRONG[case]
    result = call(*(a.format(tmp=tmp_path, **folders) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message.format(**folders) in " ".join(result.stderr.split()) and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_options_that_need_no_tensors_are_refused_without_torch(folders: dict[str, Path]) -> None:
    code = "import sys; from fhopt.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    for case in ("no chat template", "negative tokens", "no such plan", "a context longer than the model"):
        words = [a.format(tmp=folders["plan"], **folders) for a in WRONG[case][0]]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout.strip() == "False", (case, done.stderr)


def test_a_rewritten_folder_brings_its_plan(llama: FittedModel, folders: dict[str, Path], tmp_path: Path) -> None:
    plan = llama.plan(4)
    written(tmp_path / "new", llama.model, plan)
    found = read_model_plan(str(tmp_path / "new"), None)
    assert found is not None and found.digest() == plan.digest()
    assert read_model_plan(str(tmp_path / "new"), None, exact=True) is None
    assert read_model_plan(str(folders["chatty"]), None) is None
    given = read_model_plan(str(folders["chatty"]), tmp_path / "new")
    assert given is not None and given.digest() == plan.digest()
    save_plan(tmp_path / "plan", llama)
    with pytest.raises(FhoptError, match="mutually exclusive"):
        read_model_plan(str(tmp_path / "new"), tmp_path / "plan", exact=True)


def test_statistics_are_short_lines() -> None:
    stopped = Generated((), "", 9, 9, (), None, 1)
    assert statistics(stopped, "full-precision KV cache", "float32") == [
        "9 prompt tokens: stopped before the first token"
    ]
    done = Generated((1, 2, 3), "abc", 9, 4, (0.5, 0.75, 1.0), None)
    first, decoded = statistics(done, "full-precision KV cache", "float32", "raw")
    read, _, speed = first.partition(": ")
    assert read == "9 prompt tokens (raw), 4 of them prefilled"
    assert speed == "first token after 500 ms, prefill 8 tok/s" and decoded == "3 tokens, decode 4 tok/s"


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.5, "2.00x larger, because few tokens are latents yet"), (4.0, "4.00x smaller")]
)
def test_a_latent_cache_is_compared_in_the_direction_that_is_true(
    ratio: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Generated((1, 2), "ab", 9, 9, (0.5, 0.75), object())
    monkeypatch.setattr("fhopt.hf.streaming.cache_bytes", lambda cache: 1000)
    monkeypatch.setattr("fhopt.hf.streaming.exact_cache_bytes", lambda cache: int(1000 * ratio))
    assert statistics(done, "4.0x plan", "float32")[-1].endswith(f"in float32: {words}")
