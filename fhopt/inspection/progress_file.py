"""Progress file of a long run, readable by other processes: `fhopt view` shows a running `fhopt fit` from it.

    with ProgressFile(beside(plan)).kept() as report:
        report("moments", 3, 12)

The file is next to the plan that is being fitted, `.NAME.progress.json`. It is written atomically, removed when the run
ends, and left in place, with the reason, if the run fails. Under torchrun the first process writes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import appearing, read_file

RUNNING, FAILED, STOPPED = "running", "failed", "stopped"
Report = Callable[[str, int, int], None]


@dataclass
class ProgressStage:
    """One part of a run: `done` of `total` steps after `seconds`; its first step ended after `first_seconds`."""

    name: str
    total: int
    done: int = 0
    seconds: float = 0.0
    first_done: int = 0
    first_seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the pace since the first step; None before a second step."""
        steps = self.done - self.first_done
        return (self.seconds - self.first_seconds) / steps * (self.total - self.done) if steps > 0 else None


@dataclass
class Progress:
    """Content of a progress file. state: RUNNING, FAILED, or STOPPED if the process has ended."""

    state: str
    process: int
    started: float  # seconds since 1970
    message: str = ""
    stages: list[ProgressStage] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return one object for the page."""
        stages = [asdict(stage) | {"seconds_left": stage.seconds_left} for stage in self.stages]
        return asdict(self) | {"stages": stages, "seconds": time.time() - self.started}


def beside(plan: Path) -> Path:
    """Return the path of the progress file for `plan`."""
    return plan.with_name(f".{plan.name}.progress.json")


class ProgressFile:
    """Writer of a progress file, which ignores write errors, so that they do not end the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = Progress(RUNNING, os.getpid(), time.time())
        self.since = time.monotonic()

    @contextmanager
    def kept(self, also: Report | None = None) -> Iterator[Report]:
        """Yield a function that records progress and passes it to `also`. A run that fails at once leaves no file."""

        def report(stage: str, done: int, total: int) -> None:
            self.record(stage, done, total)
            if also is not None:
                also(stage, done, total)

        try:
            yield report
        except BaseException as error:
            self.now.state, self.now.message = FAILED, " ".join(str(error).split()) or type(error).__name__
            if self.now.stages:
                self._write()
            raise
        if self._is_first():
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def record(self, stage: str, done: int, total: int) -> None:
        """Record that `done` of `total` steps of a stage are done."""
        now, stages = time.monotonic(), self.now.stages
        if not stages or stages[-1].name != stage:
            stages.append(ProgressStage(stage, total, first_done=done))
            stages[-1].first_seconds = now - self.since
        stages[-1].done, stages[-1].total, stages[-1].seconds = done, total, now - self.since
        self._write()

    @staticmethod
    def _is_first() -> bool:
        return int(os.environ.get("RANK", "0")) == 0

    def _write(self) -> None:
        if not self._is_first():
            return
        with suppress(OSError), appearing(self.path) as staging:
            staging.write_text(json.dumps(asdict(self.now)), encoding="utf-8")


def read_progress(path: Path) -> Progress | None:
    """Load a progress file; None if there is none, or if it is unreadable."""
    try:
        content = json.loads(read_file(path))
        stages = [ProgressStage(**stage) for stage in content.pop("stages")]
        progress = Progress(**content, stages=stages)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, FhoptError):
        return None
    if progress.state == RUNNING and not _is_alive(progress.process):
        progress.state = STOPPED
    return progress


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        return True
    return True
