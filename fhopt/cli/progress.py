"""Progress of a whole job on standard error: one bar with the time left, or plain lines without a terminal.

A job has stages, each with a share of the time. The command defines them, and the running code reports
`(stage, done, total)`. Without a terminal a line is printed every ten seconds, independent of reports, since a step may
take minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

SECONDS = 10.0  # between two lines without a terminal


class Job:
    """Progress of a job over its stages. shares: relative times of stages, in order; unknown stages are appended."""

    def __init__(self, shares: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self.shares, self.now = dict(shares), now
        self.began = now()
        self.stage, self.done, self.total, self.fraction = "", 0, 1, 0.0
        self.stage_began, self.first, self.is_over = self.began, 0, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record that `done` of `total` steps of a stage are done; earlier stages are complete."""
        if stage != self.stage:
            self.stage, self.first, self.stage_began = stage, done, self.now()
            self.shares.setdefault(stage, sum(self.shares.values()) / max(1, len(self.shares)) or 1.0)
        self.done, self.total = done, max(1, total)
        self.fraction = max(self.fraction, min(1.0, self._reached() / sum(self.shares.values())))

    def _reached(self) -> float:
        return self._before() + self.shares[self.stage] * self.done / self.total

    def _before(self) -> float:
        names = list(self.shares)
        return sum(self.shares[name] for name in names[: names.index(self.stage)])

    def end(self) -> None:
        """Record that all stages are complete."""
        self.fraction, self.is_over = 1.0, True

    def seconds_left(self) -> float | None:
        """Estimate the seconds left: this stage at its own pace, later ones at the overall pace; None if unknown."""
        if self.is_over or not self.stage:
            return 0.0 if self.is_over else None
        now, reached = self.now(), self._reached() - self.shares[self.stage] * self.first / self.total
        steps, spent = self.done - self.first, now - self.stage_began
        known = now if steps > 0 else self.stage_began
        pace = (known - self.began) / reached if reached > 0 else None  # seconds per unit of share
        if steps > 0:
            rest = max(0.0, spent / steps * (self.total - self.first) - spent)
        elif pace is not None:
            rest = pace * self.shares[self.stage] * (self.total - self.first) / self.total - spent
        else:
            return None
        if rest < 0:  # this stage takes longer than its share: unknown
            return None
        later = sum(self.shares.values()) - self._before() - self.shares[self.stage]
        return rest + later * (pace if pace is not None else 0.0)

    def words(self) -> str:
        """Describe the progress on a line: `moments 3 of 12: 37 %, 41 s left`."""
        steps = f" {self.done} of {self.total}" if self.total > 1 else ""
        return f"{self.stage}{steps}: {100 * self.fraction:.0f}%, {self.time_words()}"

    def time_words(self) -> str:
        """Describe the time left, or the time so far if it is unknown."""
        left = self.seconds_left()
        return f"{duration(self.now() - self.began)} so far" if left is None else f"{duration(left)} left"


def duration(seconds: float) -> str:
    """Format seconds: 41 s, 3 min 20 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@contextmanager
def lines(job: Job) -> Iterator[None]:
    """Print a line about a job on standard error every SECONDS, once it has a stage."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(SECONDS):
            if job.stage:
                click.echo(job.words(), err=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Left(ProgressColumn):
    """Progress column with the time left of a job."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def render(self, task: Task) -> Text:
        """Return the time left of the job."""
        left = self.job.seconds_left()
        return Text("" if left is None else f"{duration(left)} left", "progress.remaining")


@contextmanager
def bar(job: Job, console: Console, transient: bool = False) -> Iterator[Callable[[], None]]:
    """Show a bar for a whole job; yields a function to call after progress. transient: remove the bar at the end."""
    columns = (
        TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), _Left(job),
    )  # fmt: skip
    # rich prints other output above the bar. Redirect standard output only if it is a terminal: otherwise it would go
    # to standard error with the bar.
    shared = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=transient, redirect_stdout=shared) as shown:
        task = shown.add_task("", total=1.0)

        def moved() -> None:
            shown.update(task, completed=job.fraction, description=job.stage)

        try:
            yield moved
        except BaseException:
            shown.live.transient = True  # an error message follows
            raise
        job.end()
        moved()
