"""`fhopt bench` on the command line."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_models import call
from gguf_models import save_text_gguf
from needs import needs_compiler
from rich.console import Console
from small_models import FittedModel, tiny_llama
from text_models import interrupt, save_plan, save_text_model, shown_on, start

from fhopt.inspection.measured_tables import parts_table, throughput_table
from fhopt.models import loader

QUICK = ("--contexts", "40,96", "--decode", "8", "--rounds", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"), None)


def test_json_has_a_row_for_each_context_batch_and_cache(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    plans = [str(save_plan(tmp_path / name, llama)) for name in ("a", "b")]
    picture = tmp_path / "plot.svg"
    options = [*QUICK, "--plan", plans[0], "--plan", plans[1], "--batches", "1,2", "-o", str(picture), "--json"]
    result = call("bench", str(folder), *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    keys = [(r["batch"], r["context"], r["cache"]) for r in found["rows"]]
    assert keys == [(b, c, n) for b in (1, 2) for c in (40, 96) for n in ("exact", "a", "b")]
    exact, plan = found["rows"][:2]
    assert exact["decode_speedup"] == exact["prefill_speedup"] == exact["ratio"] == 1 and plan["ratio"] > 1.5
    assert plan["decode_speedup"] == plan["decode_tokens_per_second"] / exact["decode_tokens_per_second"]
    assert found["complete"] and found["plot_path"] == str(picture) and picture.stat().st_size > 1000


def test_weights_of_a_gguf_file_may_stay_in_their_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    save_text_gguf(path, {"": "Q8_0"})
    monkeypatch.setattr(loader, "load_model", lambda *_: pytest.fail("the file is dequantized"))
    options = ("--contexts", "40", "--decode", "4", "--rounds", "1", "--keep-blocks")
    found: dict[str, Any] = json.loads(call("bench", str(path), *options, "--json").stdout)
    assert found["weights_in_blocks"] and found["complete"] and [row["cache"] for row in found["rows"]] == ["exact"]
    assert "block-quantized weights" in call("bench", str(path), *options).stdout
    refused = call("bench", str(folder), *options)
    assert refused.exit_code == 2 and "--keep-blocks requires a GGUF file" in refused.stderr


def test_a_table_is_printed_and_the_contexts_end_with_the_model(folder: Path) -> None:
    result = call("bench", str(folder), "--rounds", "1", "--decode", "4")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == "the model has 512 positions; contexts: 512"
    assert "prefill," in result.stdout and "exact" in result.stdout and "262 kB 1.00x" in result.stdout


@needs_compiler
def test_step_parts_are_printed_on_request(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    sizes = ("--contexts", "200", "--decode", "20", "--rounds", "1")
    options = ("bench", str(folder), *sizes, "--plan", str(save_plan(tmp_path / "a", llama)))
    plain, parts, as_json = call(*options), call(*options, "--parts"), call(*options, "--json")
    assert parts.exit_code == 0, parts.output
    assert "attention" not in plain.stdout and "Time of a decode step in ms" in parts.stdout
    rows = [line.split() for line in parts.stdout.split("Time of a decode step in ms")[1].splitlines()]
    ((_, _, step, *others),) = [cells for cells in rows if cells[:2] == ["200", "exact"]]
    assert others == ["-"] * 5 and float(step) > 0
    ((_, step, *others),) = [cells for cells in rows if cells[:1] == ["a"]]
    assert len(others) == 5 and sum(map(float, others[:4])) == pytest.approx(float(step), abs=0.05)
    exact, plan = json.loads(as_json.stdout)["rows"]
    assert exact["step_milliseconds"] is None and plan["step_milliseconds"]["attention"] > 0


def test_plans_of_the_same_name_are_distinguished_by_their_paths(
    folder: Path, llama: FittedModel, tmp_path: Path
) -> None:
    plans = [str(save_plan(tmp_path / name / "plan", llama)) for name in ("a", "b")]
    result = call("bench", str(folder), *QUICK, "--plan", plans[0], "--plan", plans[1], "--json")
    assert [r["cache"] for r in json.loads(result.stdout)["rows"][:3]] == ["exact", *plans]


def test_a_plan_may_have_the_name_of_the_exact_cache(
    folder: Path, llama: FittedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_plan(tmp_path / "exact", llama)
    monkeypatch.chdir(tmp_path)
    result = call("bench", str(folder), *QUICK, "--plan", "exact", "--json")
    assert [r["cache"] for r in json.loads(result.stdout)["rows"][:2]] == ["exact", "plan exact"]


def row(context: int, batch: int, cache: str) -> dict[str, Any]:
    figures = dict(prefill_tokens_per_second=14_000.3, decode_tokens_per_second=123.4, time_to_first_token_s=10.3)
    gains = dict(prefill_speedup=0.86, decode_speedup=12.31, ratio=14.04)
    parts = dict(total=137.77, weights=71.37, attention=38.48, rest=1.15, around=26.77)
    about = dict(step_milliseconds=None if cache == "exact" else parts, layers_counted=30.0)
    return dict(context=context, batch=batch, cache=cache, cache_bytes=123_456_789, **figures, **gains, **about)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    rows = [row(c, b, name) for b in (1, 16) for c in (512, 131_072) for name in ("exact", "my-model-4x")]
    about = dict(
        model="SmolLM2-135M-Instruct", dtype="bfloat16", device="cpu, 16 threads", rounds=3, weights_in_blocks=True
    )
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(throughput_table(about | {"rows": rows}))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width and sum("0.86x" in line for line in lines) == len(rows)
    assert sum("my-model-4x" in line for line in lines) == len(rows) / 2 and not any("…" in line for line in lines)
    console.print(parts_table(about | {"rows": rows}))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width and sum("137.77" in line for line in lines) == len(rows) / 2


@pytest.mark.slow
def test_ctrl_c_prints_complete_rows(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path, None, model=tiny_llama(max_position_embeddings=20_000))
    process = start(
        "bench", folder, "--contexts", "40,20000", "--decode", 30, "--rounds", 500, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        while (line := process.stderr.readline()).startswith("loading"):
            pass
        # after at least 10 s the short context is complete
        interrupt(process)
        text, rest = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130 and line.startswith("bench ") and "Traceback" not in rest
    assert "stopped" in rest and "20,000" not in text


@pytest.mark.slow
def test_a_terminal_shows_a_bar(folder: Path) -> None:
    own, other = pty.openpty()
    process = start("bench", folder, *QUICK, stdout=subprocess.PIPE, stderr=other)
    os.close(other)
    shown = shown_on(own)
    text, _ = process.communicate(timeout=240)
    os.close(own)
    assert process.returncode == 0 and "KV cache" in text and b"bench" in shown and "\x1b" not in text
