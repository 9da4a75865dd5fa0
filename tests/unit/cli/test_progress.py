"""Progress of a job: finished share, remaining time, lines without a terminal, a bar on one."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time

import pytest
from rich.console import Console
from text_models import ROOT, shown_on

from fhopt.cli import options, progress
from fhopt.cli.progress import Job, bar, duration, lines


class Clock:
    """A clock controlled by the test."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_stages_take_their_shares_of_the_job_and_of_the_time_left() -> None:
    clock = Clock()
    job = Job({"loading": 1, "moments": 3, "rates": 6}, clock)
    assert job.seconds_left() is None
    job("loading", 0, 1)
    assert job.fraction == 0 and job.words() == "loading: 0%, 0 s so far"
    clock.time += 10
    job("moments", 0, 12)
    assert job.fraction == 0.1 and job.seconds_left() == 30 + 60  # 10 s per share
    clock.time += 20
    job("moments", 4, 12)
    assert job.fraction == 0.2 and job.seconds_left() == 40 + 6 * 15  # its own pace; 15 s per share so far
    assert job.words() == "moments 4 of 12: 20%, 2 min 10 s left"
    clock.time += 15
    assert job.seconds_left() < 40 + 6 * 30  # type: ignore[operator]
    job("rates", 8, 8)
    assert job.fraction == 1 and job.seconds_left() == 0


def test_a_stage_that_takes_longer_than_its_share_promises_nothing() -> None:
    clock = Clock()
    job = Job({"loading": 1, "finding attention": 1}, clock)
    clock.time += 10
    job("finding attention", 0, 1)
    assert job.words() == "finding attention: 50%, 10 s left"
    clock.time += 25
    assert job.words() == "finding attention: 50%, 35 s so far"


def test_a_resumed_job_does_not_count_earlier_work() -> None:
    clock = Clock()
    job = Job({"heal": 1}, clock)
    job("heal", 40, 50)
    assert job.fraction == 0.8 and job.seconds_left() is None
    clock.time += 4
    job("heal", 42, 50)
    assert job.seconds_left() == 16


def test_an_unannounced_stage_joins_and_the_finished_share_never_falls() -> None:
    job = Job({"a": 1, "b": 1})
    job("a", 1, 1)
    assert job.fraction == 0.5
    job("c", 1, 2)
    assert job.fraction == pytest.approx(2.5 / 3)
    job("a", 1, 1)
    assert job.fraction == pytest.approx(2.5 / 3)
    alone = Job({})
    alone("c", 1, 4)
    assert alone.fraction == 0.25


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")]
)
def test_times_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_lines_are_printed_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    with options.progress_bar(False, {"loading": 1.0}) as report:
        report("loading", 0, 1)
        deadline, shown = time.monotonic() + 30, ""
        while shown.count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            shown += capsys.readouterr().err
    assert shown.startswith("loading: 0%, ") and shown.endswith(" s so far\n") and shown.count("\n") >= 2


def test_a_job_that_ends_at_once_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with options.progress_bar(False) as report:
        report("loading", 0, 1)
    with options.progress_bar(True) as report:
        report("loading", 0, 1)
    with pytest.raises(ValueError, match="no"), lines(Job({})):
        raise ValueError("no")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("transient", [False, True])
def test_a_bar_shows_stage_part_and_time(transient: bool) -> None:
    clock = Clock()
    job, console = Job({"loading": 1, "moments": 1}, clock), Console(width=80, file=io.StringIO(), force_terminal=True)
    with bar(job, console, transient) as moved:
        job("loading", 0, 1)
        clock.time += 10
        job("moments", 0, 2)
        moved()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "moments" in text and "0 s left" in text and "100%" in text


PROGRAM = """
import sys
from fhopt.cli.options import progress_bar
with progress_bar(False, {"one": 1.0}) as report:
    report("one", 1, 2)
    print("a result")
    if sys.argv[1:]:
        raise SystemExit(3)
"""


@pytest.mark.parametrize("arguments", [(), ("fails",)])
def test_results_stay_on_standard_output_while_a_bar_is_shown_on_a_terminal(arguments: tuple[str, ...]) -> None:
    own, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=other, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(other)
    shown = shown_on(own)
    text, _ = process.communicate(timeout=240)
    os.close(own)
    assert text == "a result\n" and b"one" in shown and b"a result" not in shown
    assert process.returncode == (3 if arguments else 0)
