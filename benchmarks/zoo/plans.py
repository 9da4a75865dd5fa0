"""Plans on every decoder in which the wide zoo finds attention: fit, apply and generate.

    python -m benchmarks.zoo.plans               benchmarks/results/zoo_plans.json and docs/results/zoo_plans.md
    python -m benchmarks.zoo.plans --only Gemma  classes whose name contains Gemma; writes nothing
    python -m benchmarks.zoo.plans --quick       a sample of under a minute (also QUICK=1); writes nothing

A plan of ratio 1 must generate the unmodified model's tokens; one of ratio 4 must have about the KL that its fit
expects. Weights and tokens are random. Each class has a separate process; an interrupted run is resumed
(build/zoo_plans.jsonl). The exit status is 1 if a class crashes or has unexpected results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import click
from rich.table import Table

from benchmarks.recording import RESULTS, ROOT, commit, is_quick, machine, screen, versions
from benchmarks.zoo.forked_jobs import Ended, run_apart
from benchmarks.zoo.plan_check import PlanRow, check_plan
from benchmarks.zoo.tiny_configs import WINDOW
from benchmarks.zoo.transformers_classes import DECODERS, Candidate, candidates, make
from benchmarks.zoo.wide import QUICK_SECONDS, prepare, within, write
from benchmarks.zoo.wide_check import one_line
from benchmarks.zoo.wide_report import reasons

KEPT = ROOT / "build" / "zoo_plans.jsonl"
PAGE = ROOT / "docs" / "results" / "zoo_plans.md"
SECONDS = 300.0  # per plan; most take 3 to 10
RATIOS = (4.0, 1.0)
WIDE = 48  # tokens of a sliding window: compressed, and shorter than the prompt
WINDOWS = re.compile(r"sliding_window(_size)?|attention_window_size|attention_chunk_size")
SAMPLE = 20  # in a quick run, one in this many classes
STATUSES = {
    "works": "as expected",
    "more": "KL above expected",
    "refused": "refused, with a reason",
    "wrong": "wrong results, or a plan that is not used",
    "crashed": "crashed",
    "not built": "does not generate in this form",
}


@click.command()
@click.option("--only", metavar="NAME", help="Only classes whose name contains NAME; writes no results.")
@click.option("--quick", is_flag=True, help="A sample of under a minute; writes no results.")
@click.option("--again", is_flag=True, help="Forget what a run that was stopped has done.")
def main(only: str | None, quick: bool, again: bool) -> None:
    """Fit, apply and generate with a plan on every decoder."""
    prepare()
    jobs = [(c, ratio) for ratio in RATIOS for c in decoders() if only is None or only in c.name]
    if not jobs:
        raise click.BadParameter(f"no decoder has {only!r} in its name.", param_hint="--only")
    if quick or is_quick():
        rows = list(within(QUICK_SECONDS, jobs[::SAMPLE], _checked))
    else:
        rows = list(_checked(jobs)) if only is not None else _all(jobs, again)
    screen().print(table(rows))
    bad = [row for row in rows if row.status in ("wrong", "crashed")]
    for row in bad:
        print(row.line)
    sys.exit(1 if bad else 0)


def decoders() -> list[Candidate]:
    """Return the decoders in which the wide zoo found attention with keys and values; all, before it has run."""
    file = RESULTS / "zoo_wide.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    without = {row["case"] for row in known} - {row["case"] for row in known if row.get("sites")}
    return [c for c in candidates() if c.family == DECODERS and c.name not in without]


def _all(jobs: Sequence[tuple[Candidate, float]], again: bool) -> list[PlanRow]:
    """Check the remaining jobs; write the results and the page."""
    if again:
        KEPT.unlink(missing_ok=True)
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    done = {(row.case, row.ratio): row for row in (PlanRow(**json.loads(line)) for line in lines)}
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as file:
        for row in _checked([job for job in jobs if (job[0].name, job[1]) not in done]):
            done[row.case, row.ratio] = row
            file.write(json.dumps(row.as_dict()) + "\n")
            file.flush()
    rows = sorted(done.values(), key=lambda row: (row.case.lower(), row.ratio))
    write(RESULTS / "zoo_plans.json", rows)
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"zoo-plans: {(RESULTS / 'zoo_plans.json').relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
    return rows


def _checked(jobs: Sequence[tuple[Candidate, float]]) -> Iterator[PlanRow]:
    """Yield a row per job, and print it."""
    for number, (candidate, ratio) in enumerate(jobs, 1):
        row = _apart(candidate, ratio)
        if row.status == "crashed":  # torch's threads do not always survive a fork: an fhopt crash is reproducible
            row = _apart(candidate, ratio)
        print(f"{number}/{len(jobs)} {row.line}", flush=True)
        yield row


def _apart(candidate: Candidate, ratio: float) -> PlanRow:
    try:
        row: PlanRow = run_apart(partial(attempt, candidate, ratio), SECONDS)
    except Ended as end:
        return PlanRow(candidate.name, ratio, status="crashed", why=[f"its process {end}"])
    return row


def attempt(candidate: Candidate, ratio: float) -> PlanRow:
    """Build one class and check a plan on it, in a separate process."""
    row = PlanRow(candidate.name, ratio)
    try:
        model = make(candidate, "eager", is_decoder=True, change=widen_windows)
    except Exception as error:  # a class may raise anything for an unsuitable configuration
        row.status, row.why = "not built", [one_line(error)]
        return row
    try:
        row = check_plan(row, model)
        return _with_all_experts(candidate, row) if row.status == "more" else row
    except Exception as error:
        row.status, row.why = "crashed", [one_line(error)]
        return row


def _with_all_experts(candidate: Candidate, row: PlanRow) -> PlanRow:
    """Repeat the check of a mixture that exceeds the expected KL, with all experts for each token.

    If that has the expected KL, a token changed its expert, a step that the fit's estimate cannot foresee.
    """
    try:
        model = make(candidate, "eager", is_decoder=True, change=take_all_experts)
    except ValueError:
        return row
    dense = check_plan(PlanRow(row.case, row.ratio), model)
    if dense.status != "works":
        return row
    dense.why = [f"a token changes its expert: {row.measured:.1e} nats, expected {row.expected:.1e}"]
    return dense


def widen_windows(config: Any) -> None:
    """Make sliding windows and chunks long enough to be compressed, and shorter than the prompt."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_diff_dict"))]
    for part in parts:
        for name, value in list(vars(part).items()):
            if WINDOWS.fullmatch(name) and value == WINDOW:
                setattr(part, name, WIDE)


def take_all_experts(config: Any) -> None:
    """Set a configuration to send each token to all experts. Raises ValueError if it has none."""
    widen_windows(config)
    counts = (getattr(config, name, None) for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    count = next((n for n in counts if isinstance(n, int) and n > 1), None)
    if count is None or not hasattr(config, "num_experts_per_tok"):
        raise ValueError(f"{type(config).__name__} has no experts")
    config.num_experts_per_tok = count
    if isinstance(getattr(config, "n_group", None), int):
        config.topk_group = config.n_group


def counts(rows: Sequence[PlanRow]) -> list[list[str]]:
    """Return a line per ratio: plans, and how many have each status."""
    lines = []
    for ratio in RATIOS:
        members = [row for row in rows if row.ratio == ratio]
        if members:
            by_status = [str(sum(row.status == status for row in members)) for status in STATUSES]
            lines.append([f"{ratio:g}x", str(len(members)), *by_status])
    return lines


def table(rows: Sequence[PlanRow]) -> Table:
    """Format a line per ratio, for the screen."""
    out = Table(title="Plans on the wide zoo", title_justify="left")
    for heading in ("ratio", "classes", *STATUSES.values()):
        out.add_column(heading, justify="right")
    for line in counts(rows):
        out.add_row(*line)
    return out


def page(rows: Sequence[PlanRow]) -> str:
    """Return the Markdown page."""
    used = versions()
    lines = [
        "# Plans on every decoder of transformers",
        "",
        f"Made by `make zoo-plans` with torch {used['torch']} and transformers {used.get('transformers', '-')}, on "
        f"{machine()['cpu']}, commit {commit()[:12]}. Do not edit: run the command again.",
        "",
        "Every decoder of [the wide zoo](zoo_wide.md) that has keys and values of its own to compress: tiny, random "
        "weights. A plan is fitted to random tokens and applied; the model then generates, and decodes the tokens that "
        "it generates without a plan. A 1x plan must give the same logits; a 4x plan must have a KL of at most five "
        "times its expected loss. Random models say nothing about the quality of trained ones.",
        "",
        "| ratio | classes | " + " | ".join(STATUSES.values()) + " |",
        "|---|---|" + "---|" * len(STATUSES),
        *("| " + " | ".join(line) + " |" for line in counts(rows)),
    ]
    for status, title in STATUSES.items():
        members = [row for row in rows if row.status == status]
        if status == "works":
            lines += _changed_experts([row for row in members if row.why])
        elif members and status != "more":
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *reasons(members)]
    lines += _losses([row for row in rows if row.status == "more"])
    return "\n".join(lines) + "\n"


def _changed_experts(rows: Sequence[PlanRow]) -> list[str]:
    """Return text that names the mixtures checked with all experts for each token."""
    if not rows:
        return []
    names = ", ".join(row.case for row in rows)
    return [
        "",
        "In these mixtures of experts, a token was routed to another expert; they are compared with all experts "
        f"active: {names}.",
    ]


def _losses(rows: Sequence[PlanRow]) -> list[str]:
    """Format the plans that exceed the expected KL."""
    if not rows:
        return []
    lines = ["", "## KL above expected", "", "| class | nats a token | expected |", "|---|---|---|"]
    return lines + [f"| {row.case} | {row.measured:.1e} | {row.expected:.1e} |" for row in rows]


if __name__ == "__main__":
    main()
