"""Benchmark of fhopt and other engines on a CPU: transformers, llama.cpp, ik_llama, OpenVINO, ONNX Runtime, vLLM.

    python -m benchmarks.engines.compare                the demo's model at 512, 2,048 and 8,000 tokens; 20 minutes
    python -m benchmarks.engines.compare --prepare      only install engines, convert models and fit plans
    python -m benchmarks.engines.compare --model FOLDER --context 16384 --batch 8 --engine llama.cpp --engine fhopt
    python -m benchmarks.engines.compare --quick        128 tokens, three engines, 8 new tokens (also QUICK=1)
    python -m benchmarks.engines.compare --list         the known engines and options

Writes benchmarks/results/peers.json and peers.png (quick: peers-quick). Metrics, all of whole processes, medians over
interleaved rounds:

    decode_tokens_per_second     of all sequences together, at a context of `context` tokens, prefill not counted
    prefill_tokens_per_second    of the prefill call
    first_token_s                from the start of the process until every sequence has a token
    second_token_s               until each has its second one: includes compilation of decode steps
    *_token_cold_s               the same for a process that found nothing compiled (engines that compile)
    peak_bytes                   peak resident memory of the process, libraries and mapped weights included

All engines get the same tokens (code of the standard library) on the same cores, one process per measurement. Weights
come from one folder in bfloat16: GGUF in F16 and Q4_0, and ONNX files, are converted from it. A configuration that
cannot run is a row with its error. For fhopt the baseline is the best of all other engines in the same case, excluding
those with 8-bit and 4-bit weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

from benchmarks import recording
from benchmarks.engines import catalog, report
from benchmarks.engines.catalog import EngineConfig
from benchmarks.engines.environments import ENVIRONMENTS, OWN, ModelForms, Unavailable, interpreter, last_error, prompts
from benchmarks.engines.protocol import EngineReport, EngineRequest
from benchmarks.engines.rounds import EngineCase, Setting, in_a_process, packages, run_rounds, variables
from benchmarks.recording import ROOT, Row, is_quick, record

CONTEXTS, BATCHES = (512, 2048, 8000), (1,)
NEW_TOKENS, ROUNDS, MINUTES, LIMIT_S = 32, 3, 20.0, 300.0
QUICK_CONTEXT, QUICK_TOKENS = 128, 8
BUILD = ROOT / "build" / "peers"


def say(text: str) -> None:
    """Report progress on standard error."""
    click.echo(text, err=True)


@dataclass
class ComparisonRun:
    """One run of the benchmark: the prerequisites of an engine's process, each created once.

    requests: the prerequisites of an engine, or why it cannot run.
    """

    build: Path
    setting: Setting
    models: dict[str, ModelForms]
    is_quick: bool = False
    prepared: dict[tuple[str, str], tuple[Path, Path, dict[str, object]] | str] = field(default_factory=dict)

    def prepare(self, model: str, engine: EngineConfig) -> tuple[Path, Path, dict[str, object]]:
        """Return interpreter, model and options of an engine, creating what is missing. Raises Unavailable."""
        key = (model, engine.name)
        if key not in self.prepared:
            try:
                self.prepared[key] = self._made(model, engine)
            except Unavailable as error:
                self.prepared[key] = str(error)
        made = self.prepared[key]
        if isinstance(made, str):
            raise Unavailable(made)
        return made

    def _made(self, model: str, engine: EngineConfig) -> tuple[Path, Path, dict[str, object]]:
        forms = self.models[model]
        python = interpreter(engine.environment, self.build, say)
        path = forms.make(engine.form, say)
        plan = {"plan": str(forms.plan(engine.plan, say, self.is_quick))} if engine.plan else {}
        return python, path, {**engine.options, **plan}

    def measure(self, case: EngineCase, engine: EngineConfig) -> tuple[EngineReport, bool]:
        """Measure in a new process. Raises Unavailable."""
        python, path, options = self.prepare(case.model, engine)
        forms = self.models[case.model]
        ids = prompts(forms, case.context, case.batch, say)
        request = EngineRequest(
            str(path), str(ids), case.context, case.batch, self.setting.new_tokens, self.setting.cores, 0.0,
            options=options,
        )  # fmt: skip
        return in_a_process(self.setting, case, engine, python, request)


def positions(forms: ModelForms) -> int:
    """Return the maximum number of positions of the model. Raises Unavailable."""
    config = json.loads((forms.make("folder", say) / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or sys.maxsize)


def cases(
    run: ComparisonRun, contexts: Sequence[int], batches: Sequence[int], new_tokens: int
) -> tuple[list[EngineCase], dict[EngineCase, str]]:
    """Return the cases that fit the models, and those that are too long for one, with the reason."""
    able, unable = [], {}
    for name, forms in run.models.items():
        most = positions(forms)
        for batch in batches:
            for context in contexts:
                case = EngineCase(name, context, batch)
                if context + new_tokens + 3 > most:
                    unable[case] = f"the model has {most:,} positions"
                else:
                    able.append(case)
    return able, unable


def sizes(build: Path, names: Sequence[str]) -> dict[str, int]:
    """Return the installed bytes of environments, by name and packages."""
    found = {}
    for name in names:
        if name != OWN and ENVIRONMENTS[name].is_ready(build):
            content = json.loads(ENVIRONMENTS[name].marker(build).read_text(encoding="utf-8"))
            found[f"{name}: {', '.join(content['packages'])}"] = int(content["bytes"])
    return found


def write(rows: Sequence[Row], versions: dict[str, str], name: str) -> None:
    """Write the results with those of earlier runs in other cases, and print a table and the failures."""
    unit = report.about(recording.machine())
    every = report.compared(report.merged(report.earlier(name), rows))
    now = {(row.case, row.impl) for row in rows}
    table = report.summary([row for row in every if (row.case, row.impl) in now], unit)
    record(name, every, report.draw, table, versions)
    for text in report.shown_failures(rows):
        click.echo(f"not run: {text}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "names", multiple=True, default=("demo",), show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--context", "contexts", type=int, multiple=True, default=CONTEXTS, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=BATCHES, show_default=True)
@click.option("--engine", "wanted", multiple=True, metavar="NAME", help="Start of an engine's name; repeatable.")
@click.option("--rounds", type=int, default=ROUNDS, show_default=True, help="Measurements of each, at most.")
@click.option("--minutes", default=MINUTES, show_default=True, help="No round but the first begins that ends later.")
@click.option("--new-tokens", default=NEW_TOKENS, show_default=True, help="Decode steps that are timed.")
@click.option("--threads", type=int, help="Threads and cores of each engine; all cores when not given.")
@click.option("--limit", default=LIMIT_S, show_default=True, help="Seconds that one measurement may take.")
@click.option("--plan", "plans", multiple=True, metavar="NAME=FOLDER", help="A fitted plan, such as 4x=FOLDER.")
@click.option("--build", type=click.Path(path_type=Path), default=BUILD, help="Folder of environments and models.")
@click.option("--prepare", is_flag=True, help="Install, convert and fit, and measure nothing.")
@click.option("--list", "is_list", is_flag=True, help="Print the names of all engines and options.")
@click.option("--quick", is_flag=True, help="A small version of under a minute; also QUICK=1.")
def main(
    names: tuple[str, ...], contexts: tuple[int, ...], batches: tuple[int, ...], wanted: tuple[str, ...], rounds: int,
    minutes: float, new_tokens: int, threads: int | None, limit: float, plans: tuple[str, ...], build: Path,
    prepare: bool, is_list: bool, quick: bool,
) -> None:  # fmt: skip
    """Benchmark engines on this CPU."""
    if is_list:
        return list_engines()
    if quick := quick or is_quick():
        contexts, batches, rounds, new_tokens = (QUICK_CONTEXT,), (1,), 1, QUICK_TOKENS
    engines = chosen(wanted, quick, build)
    setting = Setting(build / "caches", new_tokens, cores(threads), limit)
    torch.set_num_threads(len(setting.cores))  # recorded in the results
    given = dict(pair(text) for text in plans)
    forms = [ModelForms(name, build, given) for name in names]
    run = ComparisonRun(build, setting, {form.name: form for form in forms}, quick)
    try:
        able, unable = cases(run, contexts, batches, new_tokens)
    except Unavailable as error:
        raise click.ClickException(str(error)) from error
    prepare_all(run, engines)
    if prepare:
        return None
    outcomes = run_rounds(able, engines, rounds, 60 * minutes, run.measure, say)
    unit = report.vector_unit()
    rows = report.rows_of(outcomes, unit)
    rows += [report.failure(case, "all", text, unit) for case, text in unable.items()]
    rows += report.installed(sizes(build, list(dict.fromkeys(engine.environment for engine in engines))))
    write(rows, packages(outcomes), "peers-quick" if quick else "peers")
    return None


def chosen(wanted: Sequence[str], quick: bool, build: Path) -> list[EngineConfig]:
    """Return the engines to measure; a quick run installs nothing and skips missing engines."""
    try:
        engines = catalog.chosen(wanted, quick)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--engine") from error
    if not quick:
        return engines
    return [
        engine for engine in engines if engine.environment == OWN or ENVIRONMENTS[engine.environment].is_ready(build)
    ]


def cores(threads: int | None) -> tuple[int, ...]:
    """Return the cores to run on. Raises BadParameter if there are fewer cores than threads."""
    able = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(able):
        raise click.BadParameter(f"{threads} threads; expected 1 to {len(able)}, the cores.", param_hint="--threads")
    return tuple(able[:threads])


def pair(text: str) -> tuple[str, Path]:
    """Parse NAME=FOLDER. Raises BadParameter."""
    name, _, folder = text.partition("=")
    if not folder or not Path(folder).is_dir():
        raise click.BadParameter(f"{text!r}; expected NAME=FOLDER with a fitted plan, such as 4x=FOLDER.")
    return name, Path(folder)


def list_engines() -> None:
    """Print the names of all engines; those that are not measured by default are marked."""
    for engine in catalog.ENGINE_CONFIGS:
        click.echo(engine.name + ("" if engine.is_default else "  (by --engine only)"))


def prepare_all(run: ComparisonRun, engines: Sequence[EngineConfig]) -> None:
    """Install, convert and fit what the engines need, and build fhopt's kernels; report failures."""
    for model in run.models:
        for engine in engines:
            try:
                run.prepare(model, engine)
            except Unavailable as error:
                say(f"{engine.name}: {error}")
    if any(engine.is_ours for engine in engines):
        say("fhopt: building kernels")
        build_kernels(run.setting)


def build_kernels(setting: Setting) -> None:
    """Build fhopt's kernels for all plans, as `fhopt.prepare` does, in the cache that its processes use."""
    done = subprocess.run(
        [sys.executable, "-c", "import fhopt.codegen as c; c.register_kernels(); c.build_all()"], capture_output=True,
        text=True, env=variables(setting, setting.caches / "shared"), check=False,
    )  # fmt: skip
    if done.returncode:
        say(f"fhopt: no kernels: {last_error(done.stderr, done.returncode)}")


if __name__ == "__main__":
    main()
