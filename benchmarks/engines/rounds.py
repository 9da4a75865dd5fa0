"""Rounds of measurements, each in a separate process: schedule, results and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.engines.catalog import EngineConfig
from benchmarks.engines.environments import Unavailable, last_error
from benchmarks.engines.protocol import EngineReport, EngineRequest
from benchmarks.recording import ROOT

RUNNERS = "benchmarks.engines.runners"


@dataclass(frozen=True)
class EngineCase:
    """A model at a context and a batch size."""

    model: str
    context: int
    batch: int

    def name(self, vector_unit: str) -> str:
        """Return the name of the case in results."""
        return f"{self.model}/{self.context}/{self.batch}/{vector_unit}"


@dataclass
class EngineOutcome:
    """The results of an engine in a case: reports of its processes, or the failure.

    cold: of a process that found nothing compiled; ignored if there are others.
    """

    reports: list[EngineReport] = field(default_factory=list)
    cold: EngineReport | None = None
    error: str = ""
    wall_s: float = 0.0  # of the last process


Outcomes = dict[tuple[EngineCase, str], EngineOutcome]
Measure = Callable[[EngineCase, EngineConfig], tuple[EngineReport, bool]]  # the report, and whether it was a cold start


def run_rounds(
    cases: Sequence[EngineCase], engines: Sequence[EngineConfig], rounds: int, budget_s: float, measure: Measure,
    say: Callable[[str], None], clock: Callable[[], float] = time.monotonic,
) -> Outcomes:  # fmt: skip
    """Measure each engine in each case, interleaved, up to `rounds` times.

    After the first round, a round of a case is skipped if it would end later than `budget_s` seconds after the start.
    Failures are not retried in their case; `measure` raises Unavailable for them.
    """
    outcomes: Outcomes = {(case, engine.name): EngineOutcome() for case in cases for engine in engines}
    start = clock()
    for index in range(rounds):
        for case in cases:
            active = [engine for engine in engines if not outcomes[case, engine.name].error]
            expected = sum(outcomes[case, engine.name].wall_s for engine in active)
            if index and clock() - start + expected > budget_s:
                say(f"{case.context} x {case.batch}: no time for round {index + 1}")
                continue
            for engine in active:
                before = clock()
                _turn(outcomes[case, engine.name], case, engine, measure)
                outcomes[case, engine.name].wall_s = clock() - before
                say(line(case, engine, outcomes[case, engine.name]))
    return outcomes


def _turn(outcome: EngineOutcome, case: EngineCase, engine: EngineConfig, measure: Measure) -> None:
    """Measure once and record the result."""
    try:
        report, is_cold = measure(case, engine)
    except Unavailable as error:
        outcome.error = str(error)
        return
    if is_cold:
        outcome.cold = report
    else:
        outcome.reports.append(report)


def line(case: EngineCase, engine: EngineConfig, outcome: EngineOutcome) -> str:
    """Format the newest result of an engine in one line."""
    where = f"{case.context} x {case.batch}, {engine.name}"
    if outcome.error:
        return f"{where}: {outcome.error}"
    report = outcome.reports[-1] if outcome.reports else outcome.cold
    assert report is not None
    return (
        f"{where}: {report.decode_tokens / report.decode_s:.1f} tokens/s, prompt "
        f"{case.context * case.batch / report.prefill_s:.0f} tokens/s, first token {report.first_token_s:.1f} s, "
        f"{report.peak_bytes / 2**20:.0f} MiB"
    )


# --------------------------------------------------------------------------------------------------- one process


@dataclass(frozen=True)
class Setting:
    """Settings shared by all processes of a run. caches: folder for engines' compiled code."""

    caches: Path
    new_tokens: int
    cores: tuple[int, ...]
    limit_s: float


def in_a_process(
    setting: Setting, case: EngineCase, engine: EngineConfig, python: Path, request: EngineRequest
) -> tuple[EngineReport, bool]:
    """Measure in a new process; return its report, and whether it found nothing compiled. Raises Unavailable."""
    cache = cache_folder(setting, case, engine)
    is_cold = engine.is_compiled and not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(replace(request, started=time.monotonic())))
    command = [str(python), "-m", f"{RUNNERS}.run_{engine.runner}", text]
    return parse(communicate(command, variables(setting, cache), setting.limit_s)), is_cold


def cache_folder(setting: Setting, case: EngineCase, engine: EngineConfig) -> Path:
    """Return the folder for an engine's compiled code in a case; a shared one for engines that compile nothing."""
    if not engine.is_compiled:
        return setting.caches / "shared"
    context = "all" if engine.shares_cache else str(case.context)
    return setting.caches / engine.slug / f"{case.model}-{context}-{case.batch}"


def variables(setting: Setting, cache: Path) -> dict[str, str]:
    """Return the environment of a process: as many threads as cores, no network, separate caches."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    own = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "XDG_CACHE_HOME": str(cache),
        "FHOPT_CACHE_DIR": str(setting.caches / "fhopt"),
    }
    return os.environ | dict.fromkeys(threads, str(len(setting.cores))) | own


def communicate(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> str:
    """Run a program and return its standard output. Raises Unavailable if it fails or times out."""
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Unavailable(f"took longer than {limit_s:g} s") from error
    if process.returncode:
        raise Unavailable(last_error(errors or output, process.returncode))
    return output


def parse(output: str) -> EngineReport:
    """Parse the report from the last JSON object line of a program's output. Raises Unavailable."""
    for text in reversed(output.splitlines()):
        if text.startswith("{"):
            try:
                return EngineReport(**json.loads(text))
            except (ValueError, TypeError):
                continue
    raise Unavailable("the program printed no report; the last line was: " + (output.strip().splitlines() or [""])[-1])


# --------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Metric:
    """A metric of a report. higher: whether higher is better."""

    name: str
    unit: str
    higher: bool
    value: Callable[[EngineCase, EngineReport], float]


METRICS = (
    Metric("decode_tokens_per_second", "1/s", True, lambda case, report: report.decode_tokens / report.decode_s),
    Metric("prefill_tokens_per_second", "1/s", True, lambda case, r: case.context * case.batch / r.prefill_s),
    Metric("first_token_s", "s", False, lambda case, report: report.first_token_s),
    Metric("second_token_s", "s", False, lambda case, report: report.second_token_s),
    Metric("peak_bytes", "bytes", False, lambda case, report: float(report.peak_bytes)),
)
COLD = tuple(replace(m, name=m.name.replace("_s", "_cold_s")) for m in METRICS if m.name.endswith("token_s"))


def figures(case: EngineCase, outcome: EngineOutcome) -> Iterator[tuple[Metric, float]]:
    """Yield the median of each metric over the reports of one engine; cold starts under separate names."""
    reports = outcome.reports or ([outcome.cold] if outcome.cold is not None else [])
    for metric in METRICS:
        if reports and not (metric.name.endswith("token_s") and not outcome.reports):
            yield metric, _median(metric.value(case, report) for report in reports)
    if outcome.cold is not None:
        for metric in COLD:
            yield metric, metric.value(case, outcome.cold)


def _median(values: Iterable[float]) -> float:
    import statistics

    return statistics.median(values)


def packages(outcomes: Mapping[Any, EngineOutcome]) -> dict[str, str]:
    """Return the versions of all measured packages."""
    every = [report for outcome in outcomes.values() for report in (*outcome.reports, outcome.cold) if report]
    return {name: version for report in every for name, version in sorted(report.versions.items())}
