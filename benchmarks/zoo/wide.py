"""Attention detection in every model class of the installed transformers, small and random, with numerical checks.

    python -m benchmarks.zoo.wide                    benchmarks/results/zoo_wide.json, docs/results/zoo_wide.md
    python -m benchmarks.zoo.wide --only Gemma       classes whose name contains Gemma; writes nothing
    python -m benchmarks.zoo.wide --family decoders  only that family; rows of others stay unchanged
    python -m benchmarks.zoo.wide --quick            a sample of under a minute (also QUICK=1); writes nothing

Each class is tried in a separate process, with limits of time and memory. Finished rows are stored in
build/zoo_wide.jsonl: an interrupted run is resumed, and --again starts over. Models of other libraries (timm,
diffusers, x-transformers, vit-pytorch, open_clip) are tried if these are installed; otherwise their rows stay
unchanged. The number of attentions is counted from the model's execution (attention_count.py), never from the finder's
report. The exit status is 1 if a class has attention that is missed silently, wrong results, or a crash.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import torch

from benchmarks.recording import RESULTS, ROOT, commit, is_quick, machine, screen, versions
from benchmarks.zoo.forked_jobs import Ended, run_apart
from benchmarks.zoo.other_libraries import library_candidates
from benchmarks.zoo.transformers_classes import DECODERS, Candidate, build, candidates
from benchmarks.zoo.wide_check import BAD, WideRow, check, one_line
from benchmarks.zoo.wide_report import page, table

KEPT = ROOT / "build" / "zoo_wide.jsonl"
PAGE = ROOT / "docs" / "results" / "zoo_wide.md"
SECONDS = 240.0  # per class; most take 2 to 5
QUICK_SECONDS = 40.0  # time limit for starting another class in a quick run
SAMPLE = 25  # in a quick run, one in this many classes
Job = TypeVar("Job")  # a job
Checked = TypeVar("Checked")  # the row of a job


@click.command()
@click.option("--only", metavar="NAME", help="Only classes whose name contains NAME; writes no results.")
@click.option("--family", metavar="FAMILY", help="Only classes of this family (decoders, text, vision, audio, ...).")
@click.option("--impl", "implementation", metavar="NAME", help="Only this implementation of attention (eager, sdpa).")
@click.option("--quick", is_flag=True, help="A sample of under a minute; writes no results.")
@click.option("--again", is_flag=True, help="Forget what a run that was stopped has done.")
def main(only: str | None, family: str | None, implementation: str | None, quick: bool, again: bool) -> None:
    """Find attention in every class of transformers and of other libraries, and compare the rewritten graphs."""
    prepare()
    jobs = [job for candidate in every() for job in _jobs(candidate, only, family, implementation)]
    if not jobs:
        raise click.UsageError("no class has this name, family and implementation.")
    if quick or is_quick():
        rows = list(within(QUICK_SECONDS, jobs[::SAMPLE], _checked))
    elif only is not None:
        rows = list(_checked(jobs))
    else:
        rows = _all(jobs, again)
    screen().print(table(rows))
    bad = [row for row in rows if row.status in BAD]
    for row in bad:
        print(f"{row.case}/{row.impl}: {row.status}: {'; '.join(row.why)}")
    sys.exit(1 if bad else 0)


def prepare() -> None:
    """Use one thread and no network, silence libraries, and import once what every process needs."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    from torch._dynamo.backends import debugging  # noqa: F401  (imported here once, not in each process)
    from transformers import PreTrainedModel  # noqa: F401
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    for name in ("torch", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    attempt(next(c for c in candidates() if c.name == "LlamaForCausalLM"), "eager")  # triggers Dynamo's late imports


def every() -> list[Candidate]:
    """Return the classes of transformers, then those of other libraries."""
    return [*candidates(), *library_candidates()]


def _jobs(
    candidate: Candidate, only: str | None, family: str | None, implementation: str | None
) -> list[tuple[Candidate, str]]:
    if (only and only not in candidate.name) or (family and family != candidate.family):
        return []
    return [(candidate, i) for i in candidate.implementations if implementation in (None, i)]


def _all(jobs: Sequence[tuple[Candidate, str]], again: bool) -> list[WideRow]:
    """Check the remaining jobs; write the results and the page, with the rows of other jobs unchanged."""
    if again:
        KEPT.unlink(missing_ok=True)
    done = {(row.case, row.impl): row for row in _kept()}
    left = [job for job in jobs if (job[0].name, job[1]) not in done]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as file:
        for row in _checked(left):
            done[row.case, row.impl] = row
            file.write(json.dumps(row.as_dict()) + "\n")
            file.flush()
    asked = {(candidate.name, implementation) for candidate, implementation in jobs}
    others = {(row.case, row.impl): row for row in _former()}
    done = {key: row for key, row in others.items() if key not in asked} | done
    rows = sorted(done.values(), key=lambda row: (row.family != DECODERS, row.family, row.case.lower(), row.impl))
    write(RESULTS / "zoo_wide.json", rows)
    untried = len({c.name for c in every()} - {row.case for row in rows})
    PAGE.write_text(page(rows, versions(), commit(), untried), encoding="utf-8")
    print(f"zoo-wide: {(RESULTS / 'zoo_wide.json').relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
    return rows


def _kept() -> list[WideRow]:
    """Return the rows of an interrupted run."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return [WideRow.from_dict(json.loads(line)) for line in lines]


def _former() -> list[WideRow]:
    """Return the rows of the current results."""
    path = RESULTS / "zoo_wide.json"
    return (
        [WideRow.from_result(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        if path.exists()
        else []
    )


def within(
    seconds: float, jobs: Iterable[Job], check: Callable[[Sequence[Job]], Iterator[Checked]]
) -> Iterator[Checked]:
    """Yield the rows of jobs that start within `seconds`."""
    start = time.perf_counter()
    for job in jobs:
        if time.perf_counter() - start > seconds:
            return
        yield from check([job])


def _checked(jobs: Sequence[tuple[Candidate, str]]) -> Iterator[WideRow]:
    """Yield a row per job, and print it."""
    for number, (candidate, implementation) in enumerate(jobs, 1):
        row = WideRow(candidate.name, candidate.family, implementation)
        start = time.perf_counter()
        try:
            row = run_apart(partial(attempt, candidate, implementation), SECONDS)
        except Ended as end:
            row.status, row.why = "crashed", [f"its process {end}"]
        row.seconds = time.perf_counter() - start
        print(f"{number}/{len(jobs)} {row.line}", flush=True)
        yield row


def attempt(candidate: Candidate, implementation: str) -> WideRow:
    """Build and check one class, in a separate process."""
    row = WideRow(candidate.name, candidate.family, implementation)
    try:
        model, arguments = (candidate.build or partial(build, candidate))(implementation)
    except Exception as error:  # a class may raise anything for an unsuitable configuration
        row.status, row.why = "not built", [one_line(error)]
        return row
    try:
        return check(row, model, arguments)
    except Exception as error:
        row.status, row.why = "crashed", [one_line(error)]
        return row


class WrittenRow(Protocol):
    """A row of results."""

    def as_result(self) -> dict[str, Any]:
        """Return the row in the form of the file."""


def write(path: Path, rows: Iterable[WrittenRow]) -> None:
    """Write the results atomically: a line per row."""
    head = {"machine": machine(), "versions": versions(), "commit": commit()}
    lines = ",\n".join(f"  {json.dumps(row.as_result(), allow_nan=False)}" for row in rows)
    staging = path.with_name(f".{path.name}.part")
    staging.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    staging.replace(path)


if __name__ == "__main__":
    main()
