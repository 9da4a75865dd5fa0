"""Code shared by runners, and the runners that need no other environment."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from gguf_models import save_text_gguf
from needs import needs_compiler
from text_models import save_text_model

from benchmarks.engines import protocol, rounds
from benchmarks.engines.catalog import EngineConfig
from benchmarks.engines.environments import Unavailable
from benchmarks.engines.protocol import EngineClock, EngineRequest, StepCounter
from benchmarks.engines.runners import run_fhopt, run_transformers
from fhopt.fitting import fit_plan
from fhopt.models.loader import load_model
from fhopt.models.sites import find_sites

RUNNERS = Path(protocol.__file__).parent / "runners"
REQUEST = EngineRequest("model", "prompts", 4, 2, 3, (0,), 0.0)


# --------------------------------------------------------------------------------------------------- protocol


def test_a_clock_counts_prefill_and_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0, 20.0, 21.0, 22.0, 23.0, 24.5])
    monkeypatch.setattr("benchmarks.engines.protocol.time.monotonic", lambda: next(times))
    clock = EngineClock(replace(REQUEST, started=8.0))
    clock.start()
    while not clock.is_done:
        clock.step()
    report = clock.report((), [7])
    assert (report.first_token_s, report.second_token_s, report.prefill_s) == (5.0, 12.0, 3.0)
    assert (report.decode_s, report.decode_tokens) == (3.5, 6)  # three steps of two sequences


def test_tokens_generated_during_the_prefill_of_other_prompts_do_not_count() -> None:
    clock = EngineClock(REQUEST)
    counter = StepCounter(clock)
    clock.start()
    counter.add(0, [1])
    counter.end_step()
    assert not clock.times  # the second sequence has no token yet
    for _ in range(REQUEST.steps):
        counter.add(0, [1])
        counter.add(1, [2])
        counter.end_step()
        counter.end_step()  # an engine step without a token
    report = counter.report(())
    assert report.decode_tokens == REQUEST.batch * REQUEST.new_tokens


def test_an_engine_that_stops_early_is_an_error() -> None:
    clock = EngineClock(REQUEST)
    clock.step()
    with pytest.raises(RuntimeError, match="stopped after 1 of 6 tokens"):
        clock.report((), [])


RUNNER = """
from benchmarks.engines.protocol import EngineClock, run
def measure(request):
    {body}
    clock = EngineClock(request)
    clock.start()
    for _ in range(request.steps): clock.step()
    return clock.report(("torch",), [1])
run(measure)
"""


def started(tmp_path: Path, body: str, limit_s: float = 60.0) -> str:
    file = tmp_path / "runner.py"
    file.write_text(RUNNER.format(body=body))
    setting = rounds.Setting(tmp_path, 8, (min(os.sched_getaffinity(0)),), limit_s)
    text = json.dumps(asdict(replace(REQUEST, cores=setting.cores, started=time.monotonic())))
    return rounds.communicate([sys.executable, str(file), text], rounds.variables(setting, tmp_path), limit_s)


def test_a_process_reports_its_own_times_memory_and_versions(tmp_path: Path) -> None:
    report = rounds.parse(started(tmp_path, "held = bytearray(64 << 20); held[::4096] = b'x' * len(held[::4096])"))
    assert report.peak_bytes > 64 << 20
    assert 0 < report.prefill_s <= report.first_token_s < 60
    assert report.versions["torch"]


@pytest.mark.parametrize(
    ("body", "limit_s", "reason"),
    [
        ("raise ValueError('two\\nlines')", 60.0, "ValueError: two lines"),
        ("import os; os.kill(os.getpid(), 9)", 60.0, r"ended by signal 9 \(out of memory\?\)"),
        ("import time; time.sleep(600)", 3.0, "took longer than 3 s"),
    ],
)
def test_a_failed_process_reports_the_cause_in_one_line(tmp_path: Path, body: str, limit_s: float, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        started(tmp_path, body, limit_s)


# --------------------------------------------------------------------------------------------------- programs


@pytest.fixture
def request_of_a_small_model(tmp_path: Path) -> EngineRequest:
    folder = save_text_model(tmp_path / "model")
    prompts = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return EngineRequest(str(folder), str(tmp_path / "prompts.json"), 12, 2, 3, (0,), 0.0, options={"dtype": "float32"})


def test_transformers_and_fhopt_generate_the_same_tokens_in_every_way(
    request_of_a_small_model: EngineRequest, tmp_path: Path
) -> None:
    from transformers import StaticCache

    given = request_of_a_small_model
    loaded = load_model(given.model)
    plan = fit_plan.exact_plan(find_sites(loaded).sites.values(), recent=4, block=2).save(tmp_path / "exact")
    ways = ({"attention": "sdpa"}, {"attention": "eager", "chunk": 5})
    found = [run_transformers.measure(replace(given, options=given.options | way)) for way in ways]
    found.append(run_fhopt.measure(replace(given, options=given.options | {"plan": str(plan)})))
    model = run_transformers.load(given)
    cache = StaticCache(model.config, max_cache_len=given.most)
    found.append(run_transformers.decode_steps(model, model, cache, given, ("torch",)))
    assert [report.tokens for report in found] == [found[0].tokens] * len(found)
    assert len(found[0].tokens) == given.steps
    assert {report.decode_tokens for report in found} == {given.batch * given.new_tokens}


def test_a_runner_starts_in_any_working_directory(
    request_of_a_small_model: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setting = rounds.Setting(tmp_path / "caches", 3, (min(os.sched_getaffinity(0)),), 120.0)
    given = replace(request_of_a_small_model, cores=setting.cores)
    engine = EngineConfig("transformers sdpa", "transformers", "fhopt", "folder")
    report, is_cold = rounds.in_a_process(setting, rounds.EngineCase("m", 12, 2), engine, Path(sys.executable), given)
    assert len(report.tokens) == given.steps and not is_cold


@needs_compiler
def test_fhopt_runs_a_gguf_file_with_the_plan_of_its_original_model(tmp_path: Path) -> None:
    save_text_gguf(tmp_path / "m.gguf", {"": "Q4_0"})
    sites = find_sites(load_model(str(tmp_path / "m.gguf"))).sites.values()
    plan = fit_plan.exact_plan(sites, recent=4, block=2).with_provenance(fingerprint="of another model")
    (tmp_path / "prompts.json").write_text(json.dumps([list(range(3, 15))]))
    options = {"plan": str(plan.save(tmp_path / "plan"))}
    report = run_fhopt.measure(
        EngineRequest(str(tmp_path / "m.gguf"), str(tmp_path / "prompts.json"), 12, 1, 3, (0,), 0.0, options=options)
    )
    assert len(report.tokens) == 6 and report.decode_tokens == 3  # the first one, two warm-up steps, three timed ones


def test_programs_of_other_engines_do_not_import_fhopt() -> None:
    for file in (*RUNNERS.glob("run_*.py"), Path(protocol.__file__)):
        if file.stem != "run_fhopt":
            assert "import fhopt" not in file.read_text()
            assert "from fhopt" not in file.read_text()
