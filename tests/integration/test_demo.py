"""The demo on the real model, started as by a user; checks the claims of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fhopt.plan.latent_plan import LatentPlan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "fhopt.cli", "demo", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_all_sites_are_found_and_the_cache_is_four_times_smaller(demo: dict[str, Any]) -> None:
    assert demo["model"] == "SmolLM2-135M-Instruct"
    assert demo["sites_found"] == 30
    assert 4 <= demo["ratio"] < 4.05
    per_token = demo["bytes_per_token"]
    assert per_token["exact"] == 30 * 2 * 3 * 64 * 2  # layers, sides, kv heads, head size, 16 bits
    assert per_token["exact"] / per_token["plan"] == pytest.approx(demo["ratio"])


def test_perplexity_rises_by_at_most_half_a_percent_on_both_texts(demo: dict[str, Any]) -> None:
    """On one text of 2,048 tokens, noise is about 0.1 %; docs/quality.md has intervals and more texts."""
    assert set(demo["perplexity"]) == {"topics", "source"}
    for text, values in demo["perplexity"].items():
        assert values["plan"] / values["exact"] - 1 <= 0.005, text


def test_the_answer_is_sensible(demo: dict[str, Any]) -> None:
    assert "Paris" in demo["answer"]["exact"] and "Paris" in demo["answer"]["plan"]


def test_the_reported_bytes_are_those_of_the_plan(demo: dict[str, Any]) -> None:
    plan = LatentPlan.load(demo["plan_path"])
    tokens = demo["decode_tokens"]
    held, needed = demo["cache_nbytes"]["plan"], plan.cache_bytes(tokens, itemsize=4)  # the demo runs in float32
    assert needed <= held <= needed * 1.15  # spare capacity of the quantized blocks
    assert demo["cache_nbytes"]["exact"] == tokens * plan.exact_token_bytes(itemsize=4)


def test_plan_and_report_are_at_the_printed_paths(demo: dict[str, Any]) -> None:
    assert Path(demo["report_path"]).stat().st_size > 10_000
    assert demo["tokens_per_second"] == demo["speed_by_context"]["8000"]


def test_decoding_is_faster_at_long_contexts(demo: dict[str, Any]) -> None:
    assert demo["tokens_per_second"]["plan"] > demo["tokens_per_second"]["exact"]
    assert demo["break_even_tokens"] in (512, 2048, 8000)


def test_latents_of_full_width_change_no_logit_of_the_real_model() -> None:
    """float32, 1e-4 relative: without a cache (the rewritten graph) and with one (token by token after a prompt)."""
    import torch

    import fhopt
    from fhopt.cache.latent_cache import LatentCache
    from fhopt.calibration.options import FitOptions
    from fhopt.models.loader import load_model
    from fhopt.passes import pipeline
    from fhopt.planning.pipeline import fit_to_text
    from fhopt.texts import tokens

    loaded = load_model("demo")
    model = loaded.language_model()
    plan = fit_to_text(loaded, FitOptions(ratio=1, sequences=2, context=400, recent=128)).plan
    ids = tokens.sequences(loaded.tokenizer, tokens.read_text("source"), count=1, length=300, what="source")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        captured = loaded.capture(300)
        captured.program.values[next(iter(captured.inputs))] = ids
        outcome = pipeline.optimize(pipeline.find_attentions(captured.program), plan)
        assert len(outcome.compressed) == 30
        graph = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())[captured.result]
        fhopt.apply(model, plan)
        cache = LatentCache(plan, absorb=True)
        cached = [model(ids[:, :290], cache=cache).logits]
        cached += [model(ids[:, i : i + 1], cache=cache).logits for i in range(290, 300)]
    assert cache.layers[0].quantized == 128
    for found in (graph, torch.cat(cached, 1)):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
