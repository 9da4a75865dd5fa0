"""Fuzzing with random attention programs: outputs and gradients are compared with eager mode, for a given time.

    python -m benchmarks.zoo.fuzz_graphs --minutes 60 --seed 7  writes benchmarks/results/fuzz_graphs.json
    python -m benchmarks.zoo.fuzz_graphs --quick                one minute (also QUICK=1)

Each worker is a process with its own seeds. A program is compiled once and called three times, with other values of
every input (tests/support/program_checks.py). The first wrong program is shrunk and printed; the exit status is 1. It
is also 1 if fewer than FLOOR of the programs are rewritten: a finder that rewrites nothing is never wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.recording import Row, child_environment, is_quick, write

FLOOR = 0.10  # share of the compared programs that must be rewritten
GRACE = 900  # seconds for shrinking a failure after the time limit


def work(seed: int, seconds: float, file: Path, weakened: str = "") -> None:
    """Run one worker in this process and write its tally."""
    import torch
    from program_runs import run

    torch.set_num_threads(1)
    if weakened:
        from benchmarks.zoo.fuzz_mutations import weaken

        weaken(weakened)
    tally = run(seed, seconds, shrink=not weakened)
    file.write_text(json.dumps({**vars(tally), "programs": tally.programs, "seed": seed}))


def start(seed: int, seconds: float, file: Path, weakened: str = "") -> subprocess.Popen[bytes]:
    """Start a worker process; `weakened` names an entry of fuzz_mutations.RULES."""
    words = ["--minutes", str(seconds / 60), "--seed", str(seed), "--write", str(file)]
    words += ["--weakened", weakened] if weakened else []
    return subprocess.Popen([sys.executable, "-m", "benchmarks.zoo.fuzz_graphs", *words], env=child_environment())


def run_workers(seed: int, seconds: float, workers: int) -> list[dict[str, Any]]:
    """Run worker processes with the seeds seed, seed + 1, ...; a failure of one stops the others.

    A worker that ends without a tally, such as by a segmentation fault, is a failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.json") for index in range(workers)]
        processes = [start(seed + index, seconds, file) for index, file in enumerate(files)]
        deadline = time.monotonic() + seconds + GRACE
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.2)
            if any(
                file.exists() and p.poll() is not None and _read(file)["failure"]
                for p, file in zip(processes, files, strict=True)
            ):
                break
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        tallies = []
        for index, (process, file) in enumerate(zip(processes, files, strict=True)):
            lost = {
                "seed": seed + index,
                "failure": "" if process.returncode == -9 else f"exit status {process.returncode}",
            }
            tallies.append(_read(file) if file.exists() else lost)
        return tallies


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def rows_of(tallies: list[dict[str, Any]], minutes: float) -> list[Row]:
    """Return the rows of the results file."""
    rows: list[Row] = []
    for tally in tallies:
        outcomes = tally.get("outcomes", {})
        counts = {
            "minutes": minutes, "cpu_minutes": round(tally.get("cpu_seconds", 0.0) / 60, 1),
            "programs": tally.get("programs", 0), "calls": tally.get("calls", 0),
            "attentions_rewritten": tally.get("sites", 0), "failures": int(bool(tally["failure"])),
            **{f"programs_{k.replace(' ', '_')}": v for k, v in sorted(outcomes.items())},
        }  # fmt: skip
        rows += [Row(f"seed {tally['seed']}", "fhopt", metric, float(value), "") for metric, value in counts.items()]
    return rows


@click.command()
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Time for drawing programs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first worker.")
@click.option("--workers", type=int, default=2, show_default=True, help="Worker processes.")
@click.option("--quick", is_flag=True, help="One minute; no results file.")
@click.option("--write", "file", type=click.Path(path_type=Path), hidden=True)
@click.option("--weakened", default="", hidden=True)
def main(minutes: float, seed: int, workers: int, quick: bool, file: Path | None, weakened: str) -> None:
    """Fuzz for a given time; exit status 1 on a failure or if too few programs are rewritten."""
    if file is not None:
        return work(seed, 60 * minutes, file, weakened)
    quick = quick or is_quick()
    minutes = 1.0 if quick else minutes
    tallies = run_workers(seed, 60 * minutes, workers)
    rows = rows_of(tallies, minutes)
    for row in rows:
        click.echo(f"{row.case}: {row.metric} {row.value:g}")
    failures = [tally for tally in tallies if tally["failure"]]
    for tally in failures:
        click.echo(f"\nseed {tally['seed']}, after {tally.get('seconds_to_failure', 0.0):.0f} s: {tally['failure']}")
    programs = sum(tally.get("programs", 0) for tally in tallies)
    rewritten = sum(tally.get("outcomes", {}).get("rewritten", 0) for tally in tallies)
    share = rewritten / max(1, programs)
    click.echo(f"{programs} programs, {share:.0%} rewritten, {len(failures)} failures")
    if not quick and not failures:
        click.echo(str(write("fuzz_graphs", rows)))
    if not failures and share < FLOOR:
        click.echo(f"fewer than {FLOOR:.0%} of the programs were rewritten; the fuzzer checks too little")
    sys.exit(bool(failures) or share < FLOOR)


if __name__ == "__main__":
    main()
