"""The wide zoo: its independent counts, small models, and isolation from processes that die."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import Entry
from model_zoo.checking import entries
from torch import Tensor, nn

from benchmarks.zoo import wide, wide_check, wide_report
from benchmarks.zoo.attention_count import count
from benchmarks.zoo.forked_jobs import Ended, run_apart
from benchmarks.zoo.forward_inputs import NoInputs, forward_arguments
from benchmarks.zoo.tiny_configs import tiny
from benchmarks.zoo.transformers_classes import DECODERS, Candidate, candidates
from benchmarks.zoo.wide_check import WideRow, check

ZOO = {entry.label: entry for entry in entries()}
COUNTED = """
    nanogpt-eager-forward nanogpt-sdpa-forward talking_heads-forward multi_query_einsum-forward cross-forward
"""
LOOKALIKES = [entry for entry in ZOO.values() if entry.family == "look-alike"]


def counted(entry: Entry) -> int:
    case = entry.build()
    return count(lambda: case.module(*case.args, **case.kwargs), case.module.parameters())


# ---- counting


@pytest.mark.parametrize("label", COUNTED.split())
def test_attentions_are_counted_by_computation(label: str) -> None:
    entry = ZOO[label]
    assert counted(entry) == (0 if label.startswith("talking") else entry.sites)


@pytest.mark.parametrize(
    "name", ["mixture_of_experts", "attention_pooling", "efficient_attention", "squeeze_and_excitation"]
)
def test_softmaxes_of_projections_are_not_attention(name: str) -> None:
    (entry,) = (e for e in LOOKALIKES if e.name == name)
    assert counted(entry) == 0


def test_projected_learned_queries_count_and_weights_used_twice_count_once() -> None:
    keys, queries, project = torch.randn(1, 5, 4), nn.Parameter(torch.randn(1, 3, 4)), nn.Parameter(torch.randn(4, 4))

    def attend() -> Tensor:
        weights = ((queries @ project) @ keys.transpose(1, 2)).softmax(-1)
        return weights @ keys + weights @ (2 * keys)

    assert count(attend, [queries, project]) == 1
    assert count(lambda: (keys @ project).softmax(-1) @ project, [queries, project]) == 0


# ---- making models small


@pytest.mark.parametrize(("name", "layers"), [("LlamaConfig", 2), ("Gemma3TextConfig", 2), ("Qwen3NextConfig", 2)])
def test_configurations_become_small_and_have_a_layer_of_each_kind(name: str, layers: int) -> None:
    import transformers

    make: Any = getattr(transformers, name)
    config, full = tiny(make), make()
    assert config.num_hidden_layers == layers and config.hidden_size == 64 and config.vocab_size == 128
    kinds = getattr(full, "layer_types", None)
    assert set(kinds or ()) == set(getattr(config, "layer_types", None) or ())
    assert all(token is None or token < 128 for token in (config.bos_token_id, config.pad_token_id))


def test_nested_configurations_become_small_too() -> None:
    from transformers import LlavaConfig

    config = tiny(LlavaConfig)
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (2, 2)
    assert config.image_token_index < config.text_config.vocab_size


def test_arguments_are_found_by_trial_and_a_refusal_is_named() -> None:
    from transformers import T5Model

    model = T5Model(tiny(T5Model.config_class))
    assert set(forward_arguments(model)) == {"input_ids", "decoder_input_ids", "use_cache"}
    with pytest.raises(NoInputs, match="no argument of its forward is known here"):
        forward_arguments(nn.Linear(2, 2))


@pytest.mark.slow
def test_every_causal_language_model_is_a_candidate_once() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = [c.name for c in candidates()]
    assert len(names) == len(set(names)) and set(CAUSAL.values()) <= set(names)
    assert {c.family for c in candidates()} >= {DECODERS, "text", "vision", "audio"}


# ---- checking


class _Attention(nn.Module):
    """Softmax attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unsqueeze(1) for p in (self.q, self.k, self.v))
        weights: Tensor = (q @ k.transpose(2, 3)).softmax(-1)
        return weights @ v


def attend() -> tuple[nn.Module, dict[str, Any]]:
    return _Attention().requires_grad_(False), {"x": torch.randn(2, 5, 8)}


def checked() -> WideRow:
    return check(WideRow("Attention", "text", "eager"), *attend())


def test_a_class_whose_attentions_are_rewritten_is_found() -> None:
    row = checked()
    assert (row.status, row.expected, row.found, row.sites, row.graphs) == ("found", 1, 1, 1, 1)
    written = row.as_dict()
    assert row.max_error < 1e-5 and WideRow.from_dict(json.loads(json.dumps(written))).as_dict() == written
    assert row.as_result()["ratio"] == 1 and row.as_result()["metric"] == "attentions_found"


def test_an_attention_with_an_unused_result_does_not_count() -> None:
    class Unread(_Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x + 1)
            return super().forward(x)

    row = check(WideRow("Unread", "text", "eager"), Unread().requires_grad_(False), {"x": torch.randn(2, 5, 8)})
    assert (row.status, row.expected, row.found) == ("found", 1, 1)


def test_an_attention_neither_found_nor_explained_is_a_silent_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.passes.recognize.normalize import Normalize

    monkeypatch.setattr(Normalize, "candidates", lambda self, program: [])
    monkeypatch.setattr("fhopt.passes.pipeline.left_out", lambda program, known: [])
    assert checked().status == "silent"


def test_texts_of_reasons_are_those_of_the_passes() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "not_rewritten.md"
    reasons = " ".join(page.read_text().lower().split())
    assert all(text in reasons for text in (*wide_check.IS_NO_ATTENTION, wide_check.FAULT))


def test_a_false_reason_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.errors import Miss
    from fhopt.passes.recognize.normalize import Normalize

    def refuse(self: Any, node: Any, *args: Any) -> Any:
        raise Miss("not the softmax of an attention: no product precedes it", node)

    monkeypatch.setattr(Normalize, "match", refuse)
    row = checked()
    assert row.status == "silent" and row.why == ["not the softmax of an attention: no product precedes it"]


def test_a_failing_pass_is_a_crash_and_other_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(before: Any, after: Any) -> float:
        return 0.5

    monkeypatch.setattr(wide_check, "largest_output_difference", differs)
    assert checked().status == "wrong"
    measured = iter([0.5, 0.5, 1e-12, 1e-12])  # two sets of values each
    monkeypatch.setattr(wide_check, "largest_output_difference", lambda before, after: next(measured))
    amplified = checked()
    assert (amplified.status, amplified.max_error) == ("found", 1e-12)
    assert amplified.why == [wide_check.AMPLIFIED]

    def fail(*args: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr("fhopt.passes.pipeline.lower_program", fail)
    row = checked()
    assert row.status == "crashed" and row.why == ["ValueError: no"]


def test_a_pass_that_fails_on_a_rewritten_site_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.passes.recognize.find_attention import FindAttention

    def fail(*args: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(FindAttention, "match", fail)
    row = checked()
    assert row.status == "crashed" and "a bug in fhopt (ValueError: no)" in row.why[0]


def test_a_class_with_non_finite_outputs_does_not_judge_the_finder() -> None:
    module, arguments = attend()
    row = check(WideRow("Attention", "text", "eager"), module, {k: v * float("nan") for k, v in arguments.items()})
    assert (row.status, row.expected) == ("not built", 0)
    assert row.why == ["its own numbers are not finite on small inputs"]


def test_a_class_too_large_to_count_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes")

    monkeypatch.setattr(wide_check, "count", fail)
    row = checked()
    assert row.status == "not built" and "more memory to count" in row.why[0]


# ---- processes


def test_a_job_that_dies_or_hangs_gives_a_reason() -> None:
    assert run_apart(partial(int, "3"), 60) == 3
    with pytest.raises(Ended, match="ended by SIGTERM"):
        run_apart(partial(signal.raise_signal, signal.SIGTERM), 60)
    with pytest.raises(Ended, match="not done after 1 s"):
        run_apart(partial(time.sleep, 60), 1)
    with pytest.raises(Ended, match="ended with"):
        run_apart(partial(bytearray, 1 << 40), 60, memory=1 << 30)


# ---- rows and the page


def rows() -> list[WideRow]:
    return [
        WideRow("LlamaForCausalLM", DECODERS, "eager", 2, 2, 2, status="found"),
        WideRow("OddForCausalLM", DECODERS, "eager", 4, 3, 3, 1, status="explained", why=["heads are mixed by 3"]),
        WideRow("RwkvModel", "text", "eager", status="no attention"),
        WideRow("BigModel", "vision", "eager", status="not built", why=["ValueError: too large"]),
    ]


def test_the_page_counts_by_family_and_lists_reasons() -> None:
    text = wide_report.page(rows(), {"torch": "2"}, "abc", 3)
    assert "| decoders, eager | 2 | 6 | 5 | 83.3% | 1 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0e+00 |" in text
    assert "| heads are mixed by N | OddForCausalLM |" in text and "RwkvModel" not in text
    assert "3 further classes have not been tried yet" in text


def test_a_stopped_run_resumes_and_its_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"KEPT": tmp_path / "kept.jsonl", "PAGE": tmp_path / "page.md", "RESULTS": tmp_path, "ROOT": tmp_path}
    for name, value in known.items():
        monkeypatch.setattr(wide, name, value)
    (tmp_path / "kept.jsonl").write_text(json.dumps(rows()[0].as_dict()) + "\n")
    tried: list[str] = []

    def attempt(candidate: Candidate, implementation: str) -> WideRow:
        tried.append(candidate.name)
        return WideRow(candidate.name, candidate.family, implementation, status="no attention")

    monkeypatch.setattr(wide, "run_apart", lambda job, seconds: job())
    monkeypatch.setattr(wide, "attempt", attempt)
    both = [Candidate(n, n, DECODERS, ("eager",)) for n in ("LlamaForCausalLM", "OtherForCausalLM")]
    done = wide._all([(c, "eager") for c in both], again=False)
    assert tried == ["OtherForCausalLM"] and [row.case for row in done] == ["LlamaForCausalLM", "OtherForCausalLM"]
    saved = json.loads((tmp_path / "zoo_wide.json").read_text())
    assert [row["case"] for row in saved["rows"]] == ["LlamaForCausalLM", "OtherForCausalLM"]
    assert (tmp_path / "page.md").exists()


def test_a_row_of_the_results_is_loaded_unchanged_except_for_its_time() -> None:
    full = WideRow("A", "text", "eager", 3, 2, 1, 1, 2e-6, 1, 4.0, "explained", ["one reason", "another"])
    for row in (full, WideRow("B", "text", "sdpa", status="not built"), WideRow("C", "text", max_error=math.inf)):
        assert WideRow.from_result(json.loads(json.dumps(row.as_result()))) == replace(row, seconds=0.0)


def test_running_one_family_keeps_the_rows_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "RESULTS", tmp_path)
    monkeypatch.setattr(wide, "ROOT", tmp_path)
    monkeypatch.setattr(wide, "KEPT", tmp_path / "build" / "kept.jsonl")
    monkeypatch.setattr(wide, "PAGE", tmp_path / "page.md")
    former = [
        WideRow("Old", "text", "eager", 1, 1, status="found"),
        WideRow("New", "vision", "eager", status="crashed"),
    ]
    wide.write(tmp_path / "zoo_wide.json", former)
    fresh = WideRow("New", "vision", "eager", 2, 2, status="found")
    monkeypatch.setattr(wide, "_checked", lambda jobs: iter([fresh] if jobs else []))
    monkeypatch.setattr(wide, "every", list)
    jobs = [(Candidate("New", "vision", "vision", ("eager",)), "eager")]
    assert [row.case for row in wide._all(jobs, again=True)] == ["Old", "New"]
    assert [row.status for row in wide._former()] == ["found", "found"]
