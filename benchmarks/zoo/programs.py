"""Decode programs on every decoder that takes a plan: how the step runs, and whether the logits are the same.

    python -m benchmarks.zoo.programs               benchmarks/results/zoo_programs.json, docs/results/zoo_programs.md
    python -m benchmarks.zoo.programs --only Gemma  classes whose name contains Gemma; writes nothing
    python -m benchmarks.zoo.programs --quick       a sample of under a minute (also QUICK=1); writes nothing

Each class decodes the same tokens with `decode_program=True` and `False`, past several blocks that are quantized.
Weights and tokens are random. Each class has a separate process. The exit status is 1 if a class crashes or differs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

import fhopt
from benchmarks.recording import RESULTS, ROOT, commit, is_quick, machine, screen, versions
from benchmarks.zoo.forked_jobs import Ended, run_apart
from benchmarks.zoo.plan_check import OPTIONS, batches
from benchmarks.zoo.plans import SAMPLE, SECONDS, decoders, widen_windows
from benchmarks.zoo.transformers_classes import Candidate, make
from benchmarks.zoo.wide import QUICK_SECONDS, prepare, within, write
from benchmarks.zoo.wide_check import one_line
from benchmarks.zoo.wide_report import reasons
from fhopt.calibration import run
from fhopt.calibration.data import of_batches
from fhopt.decode.programs import decode_programs
from fhopt.errors import FhoptError
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument

PAGE = ROOT / "docs" / "results" / "zoo_programs.md"
PROMPT, NEW = 70, 40  # tokens; a block is 16, so that several are quantized while decoding
CACHE = replace(OPTIONS, ratio=4.0, recent=16, block=16, window_bits=8)  # native steps need an 8-bit window
MAX_ERROR = 5e-3  # of the largest logit; another rounding may quantize an element to the next integer
STATUSES = {
    "whole": "one program",
    "segments": "segments",
    "original": "original forward",
    "wrong": "other logits",
    "crashed": "crashed",
    "refused": "takes no plan",
    "not built": "does not generate in this form",
}


@dataclass
class ProgramRow:
    """How the decode step of a class runs. error: max difference of logits, relative to the largest.

    native: native calls per step. why: reasons of operations that run eagerly, or why there is no program.
    """

    case: str
    status: str = ""
    error: float = 0.0
    native: int = 0
    why: list[str] = field(default_factory=list)

    def as_result(self) -> dict[str, Any]:
        """Return the row in the form of the results: the common fields, and further ones."""
        figures = {"metric": "relative_error", "value": self.error, "unit": "", "baseline": 0.0, "ratio": None}
        said = {"status": self.status, "native": self.native} | ({"why": self.why} if self.why else {})
        return {"case": self.case, "impl": "decode program", **figures, **said}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def line(self) -> str:
        """Return one line for the screen."""
        return f"{self.case} {self.status}, {self.native} native, {self.error:.1e} {'; '.join(self.why)}"


@click.command()
@click.option("--only", metavar="NAME", help="Only classes whose name contains NAME; writes no results.")
@click.option("--quick", is_flag=True, help="A sample of under a minute; writes no results.")
def main(only: str | None, quick: bool) -> None:
    """Decode with and without a program on every decoder that takes a plan."""
    prepare()
    jobs = [c for c in decoders() if only is None or only in c.name]
    if not jobs:
        raise click.BadParameter(f"no decoder has {only!r} in its name.", param_hint="--only")
    if quick or is_quick():
        rows = list(within(QUICK_SECONDS, jobs[::SAMPLE], _checked))
    else:
        rows = sorted(_checked(jobs), key=lambda row: row.case.lower())
        if only is None:
            write(RESULTS / "zoo_programs.json", rows)
            PAGE.write_text(page(rows), encoding="utf-8")
    screen().print(table(rows))
    bad = [row for row in rows if row.status in ("wrong", "crashed")]
    for row in bad:
        print(row.line)
    sys.exit(1 if bad else 0)


def _checked(jobs: Sequence[Candidate]) -> Iterator[ProgramRow]:
    """Yield a row per job, and print it."""
    for number, candidate in enumerate(jobs, 1):
        row = _apart(candidate)
        if row.status == "crashed":  # torch's threads do not always survive a fork: an fhopt crash is reproducible
            row = _apart(candidate)
        print(f"{number}/{len(jobs)} {row.line}", flush=True)
        yield row


def _apart(candidate: Candidate) -> ProgramRow:
    try:
        row: ProgramRow = run_apart(partial(attempt, candidate), SECONDS)
    except Ended as end:
        return ProgramRow(candidate.name, "crashed", why=[f"its process {end}"])
    return row


def attempt(candidate: Candidate) -> ProgramRow:
    """Build one class and decode with it, in a separate process."""
    row = ProgramRow(candidate.name)
    try:
        model = make(candidate, "eager", is_decoder=True, change=widen_windows)
        _exact_tokens(model)
    except Exception as error:  # a class may raise anything for an unsuitable configuration
        row.status, row.why = "not built", [one_line(error)]
        return row
    try:
        return check_program(row, model)
    except FhoptError as error:
        row.status, row.why = "refused", [one_line(error)]
    except Exception as error:
        row.status, row.why = "crashed", [one_line(error)]
    return row


def _exact_tokens(model: Any) -> None:
    """Generate without a plan, to find classes that cannot."""
    model.generate(_prompt(), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def check_program(row: ProgramRow, model: Any) -> ProgramRow:
    """Fill the row with a comparison of decode steps with and without a program."""
    plan = run.plan_from_calibration(run.calibrate(of_batches(model, batches(model)), CACHE), CACHE)
    fhopt.prepare(fhopt.apply(model, plan, decode_program=False))
    expected = decoded(model, latent_cache(model))
    fhopt.unapply(model)
    fhopt.prepare(fhopt.apply(model, plan))
    made = decoded(model, latent_cache(model))
    row.error = float((made - expected).abs().max() / expected.abs().max())
    state = decode_programs(model)
    if state is None:
        row.status, row.why = "original", ["its attention has no interface that a program replaces"]
    elif not state.programs:
        row.status, row.why = "original", [state.reason]
    else:
        program = state.programs[0]
        row.native, row.why = program.native_calls, program.reasons()
        row.status = "whole" if row.native == 1 else "segments"
    if not row.error <= MAX_ERROR:  # NaN is wrong, too
        row.status = "wrong"
    return row


def _prompt() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 90, (1, PROMPT + NEW), generator=generator)


@torch.no_grad()
def decoded(model: Any, cache: Any) -> Tensor:
    """Return the logits [NEW, V] of a prefill of PROMPT tokens and of decode steps, as `generate` prepares them."""
    name, tokens, rows = cache_argument(model), _prompt(), []
    for end in range(PROMPT, PROMPT + NEW):
        is_first = end == PROMPT
        known = {name: cache, "use_cache": True, "attention_mask": torch.ones(1, end, dtype=torch.long)}
        options = {"next_sequence_length": None if is_first else 1, "is_first_iteration": is_first}
        inputs = model.prepare_inputs_for_generation(tokens[:, :end], **known, **options)
        rows.append(model(**inputs, return_dict=True).logits[:, -1].float())
    return torch.cat(rows)


def counts(rows: Sequence[ProgramRow]) -> list[list[str]]:
    """Return a line per status: title, classes, share of those that take a plan."""
    number = Counter(row.status for row in rows)
    taken = sum(number[status] for status in STATUSES if status not in ("refused", "not built"))
    lines = []
    for status, title in STATUSES.items():
        share = "" if status in ("refused", "not built") or not taken else f"{100 * number[status] / taken:.0f}%"
        lines.append([title, str(number[status]), share])
    return lines


def table(rows: Sequence[ProgramRow]) -> Table:
    """Format a line per status, for the screen."""
    out = Table(title="Decode programs on the wide zoo", title_justify="left")
    for heading in ("decode step", "classes", "of those with a plan"):
        out.add_column(heading, justify="left" if heading == "decode step" else "right")
    for line in counts(rows):
        out.add_row(*line)
    return out


def page(rows: Sequence[ProgramRow]) -> str:
    """Return the Markdown page."""
    used = versions()
    lines = [
        "# Decode programs on every decoder of transformers",
        "",
        f"Made by `make zoo-programs` with torch {used['torch']} and transformers {used.get('transformers', '-')}, on "
        f"{machine()['cpu']}, commit {commit()[:12]}. Do not edit: run the command again.",
        "",
        "Every decoder of [the wide zoo](zoo_wide.md): tiny, random weights, a 4x plan. The decode step runs as one "
        "native call, as several with operations between them that run as in the model, or as the original forward. "
        f"All are compared with the original forward over {NEW} steps; a difference of more than {MAX_ERROR:g} of the "
        "largest logit is an error.",
        "",
        "| decode step | classes | of those with a plan |",
        "|---|---|---|",
        *("| " + " | ".join(line) + " |" for line in counts(rows)),
    ]
    for status, title in STATUSES.items():
        members = [row for row in rows if row.status == status and row.why]
        if members and status not in ("whole", "refused", "not built"):
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *reasons(members)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
