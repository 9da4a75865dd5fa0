"""`fhopt generate` on the command line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_models import call
from gguf_models import save_text_gguf
from rewritten_folders import written
from small_models import FittedModel, tiny_llama
from text_models import interrupt, save_plan, save_text_model, shown_on, start

from fhopt.cli.app import main
from fhopt.models import loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"))


def test_standard_output_has_the_text_and_standard_error_the_statistics(folder: Path) -> None:
    result = call("generate", str(folder), "hello", "--max-new-tokens", "20")
    assert result.exit_code == 0, result.output
    assert len(result.stdout) == 21 and result.stdout.endswith("\n")
    read, decoded, size = result.stderr.splitlines()
    assert read.startswith("12 prompt tokens (chat template): first token after") and "decode" in decoded
    assert size == "full-precision KV cache: 15.9 kB"


def test_a_terminal_shows_the_text_then_the_statistics(folder: Path) -> None:
    piped = call("generate", str(folder), "hello", "--max-new-tokens", "12").stdout.strip()
    own, other = pty.openpty()
    process = start("generate", folder, "hello", "--max-new-tokens", 12, stdout=other, stderr=other)
    os.close(other)
    shown = shown_on(own).decode()
    os.close(own)
    assert process.wait(timeout=240) == 0
    text, _, statistics = shown.partition("12 prompt tokens")
    assert text.replace("\r", "").strip().endswith(piped) and "12 tokens, decode" in statistics


def test_a_raw_prompt_is_continued(folder: Path) -> None:
    raw = call("generate", str(folder), "hello", "--raw", "--max-new-tokens", "4")
    assert "5 prompt tokens (raw)" in raw.stderr
    mute = save_text_model(folder / "mute", None)
    assert call("generate", str(mute), "hello", "--max-new-tokens", "4").stdout == raw.stdout


def test_the_prompt_may_come_from_a_file_or_standard_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    options = ["--max-new-tokens", "5"]
    expected = call("generate", str(folder), "hello", *options).stdout
    assert call("generate", str(folder), "--file", str(tmp_path / "prompt.txt"), *options).stdout == expected
    for prompt in (["-"], ["--file", "-"]):
        piped = CliRunner().invoke(main, ["generate", str(folder), *prompt, *options], input="hello")
        assert piped.stdout == expected, piped.output


def test_json_has_text_speed_and_bytes_against_the_exact_cache(
    folder: Path, llama: FittedModel, tmp_path: Path
) -> None:
    plan = str(save_plan(tmp_path / "plan", llama))
    result = call("generate", str(folder), "hello " * 20, "--plan", plan, "--max-new-tokens", "30", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["tokens"] == 30 and found["text"] and found["prompt_form"] == "chat template"
    assert found["exact_cache_bytes"] == 512 * (found["prompt_tokens"] + 29)
    assert found["ratio"] == found["exact_cache_bytes"] / found["cache_bytes"] > 2 and found["plan_ratio"] > 3
    assert min(found[n] for n in found if n.endswith(("_per_second", "_s"))) > 0 and not found["interrupted"]
    lines = call("generate", str(folder), "hello " * 20, "--plan", plan, "--max-new-tokens", "30").stderr
    assert "x plan: " in lines and "in float32" in lines and "smaller" in lines


def test_the_plan_of_a_rewritten_folder_is_applied(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    written(tmp_path / "new", llama.model, llama.plan(4), source=folder)
    save_text_model(tmp_path / "texts")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "new" / file).write_bytes((tmp_path / "texts" / file).read_bytes())
    options = ["hello", "--max-new-tokens", "5", "--json"]
    latent = call("generate", str(tmp_path / "new"), *options)
    assert latent.exit_code == 0, latent.output
    assert json.loads(latent.stdout)["plan_ratio"] == pytest.approx(llama.plan(4).ratio())
    assert json.loads(call("generate", str(tmp_path / "new"), *options, "--exact").stdout)["plan_ratio"] is None


def test_sampling_follows_the_seed(folder: Path) -> None:
    def text(seed: int) -> str:
        options = ["--temperature", "1", "--top-p", "0.9", "--seed", str(seed), "--max-new-tokens", "20"]
        return call("generate", str(folder), "hello", *options).stdout

    assert text(1) == text(1) != text(2)


@pytest.mark.slow
def test_ctrl_c_stops_and_still_prints_the_statistics(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path, None, tiny_llama(max_position_embeddings=20_000), spaced=True)
    process = start(
        "generate", folder, "hello", "--max-new-tokens", 19_000, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.read(5)
        interrupt(process)
        text, lines = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, lines
    assert text.endswith("\n") and "decode" in lines and "full-precision KV cache" in lines and "Traceback" not in lines


def test_weights_of_a_gguf_file_may_stay_in_their_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    save_text_gguf(path, {"": "Q8_0"})
    options = ["hello", "--raw", "--max-new-tokens", "8"]
    whole = call("generate", str(path), *options)
    with monkeypatch.context() as patched:
        patched.setattr(loader, "load_model", lambda *_: pytest.fail("the file is dequantized"))
        kept = call("generate", str(path), *options, "--keep-blocks")
    assert kept.exit_code == 0 and kept.stdout == whole.stdout
    for command in ("generate", "chat"):
        refused = call(command, str(folder), "--keep-blocks", *(["hello"] if command == "generate" else []))
        assert refused.exit_code == 2 and "--keep-blocks requires a GGUF file" in refused.stderr
    elsewhere = call("generate", str(path), *options, "--keep-blocks", "--device-map", "auto")
    assert elsewhere.exit_code == 2 and "--keep-blocks runs only on CPUs" in elsewhere.stderr
