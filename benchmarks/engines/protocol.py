"""What the programs in runners/ share: they read one measurement, do it, and print one line of JSON.

Each runs in the environment of its engine, so this file imports nothing but the standard library (Python 3.10), and
nothing of fhopt.

    request   argument 1: JSON with the fields of `Request`
    report    last line of standard output: JSON with the fields of `Report`
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """One measurement: an engine, a model, a context, a batch.

    model: path in the form that the engine reads. prompts: JSON file with a list of token ids for each sequence.
    started: time.monotonic() of the process that asked, just before it started this one (one clock for all processes
    of a machine). cores: the CPU cores to run on, one for each thread. warm: decode steps before those that are timed.
    """

    model: str
    prompts: str
    context: int
    batch: int
    new_tokens: int
    cores: tuple[int, ...]
    started: float
    warm: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Return the number of threads."""
        return len(self.cores)

    @property
    def steps(self) -> int:
        """Return how many tokens each sequence generates: the first one, those before timing, those that are timed."""
        return 1 + self.warm + self.new_tokens

    @property
    def most(self) -> int:
        """Return the positions of a sequence that a cache must have: the prompt and all new tokens."""
        return self.context + self.steps

    def tokens(self) -> list[list[int]]:
        """Return the prompt [batch][context] of token ids."""
        prompts = json.loads(Path(self.prompts).read_text(encoding="utf-8"))
        return [list(ids[: self.context]) for ids in prompts[: self.batch]]


@dataclass
class Report:
    """What a program measured: the first call of the model in a process of its own.

    first_token_s: from the start of the process until every sequence has its first new token. second_token_s: until it
    has its second one, which is later where decode steps are compiled first. prefill_s: of the call that reads the
    prompts. decode_s: seconds of `decode_tokens` further tokens, of all sequences together, behind the first steps.
    peak_bytes: the most resident memory of the process and its children. tokens: new tokens of the first sequence.
    """

    first_token_s: float
    second_token_s: float
    prefill_s: float
    decode_s: float
    decode_tokens: int
    peak_bytes: int
    versions: dict[str, str]
    tokens: list[int]


@dataclass
class Clock:
    """Take the times of one measurement: `start` before the prompt, `step` whenever all sequences have a new token."""

    request: Request
    started: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Note that the prompts are about to be read."""
        self.started = time.monotonic()

    def step(self, count: int | None = None) -> None:
        """Note that new tokens are there; the first call ends prefill. count: of all sequences, one each by default."""
        self.times.append(time.monotonic())
        self.counts.append(self.request.batch if count is None else count)

    @property
    def is_done(self) -> bool:
        """Tell whether all steps that are to be timed have been."""
        return len(self.times) >= self.request.steps

    def report(self, packages: Sequence[str], tokens: Sequence[int]) -> Report:
        """Return the report. Raises RuntimeError where fewer tokens were generated than asked for."""
        if not self.is_done:
            raise RuntimeError(f"the engine stopped after {len(self.times)} of {self.request.steps} tokens")
        first, second, base = self.times[0], self.times[1], self.request.warm
        return Report(
            first - self.request.started, second - self.request.started, first - self.started,
            self.times[-1] - self.times[base], sum(self.counts[base + 1 :]), peak_bytes(), versions(packages),
            list(tokens),
        )  # fmt: skip


@dataclass
class StepCounter:
    """Count new tokens of engines that schedule sequences themselves: some generate while other prompts are read.

    Prefill ends with the step after which each sequence has a token. What is generated until then counts for nothing.
    """

    clock: Clock
    tokens: list[list[int]] = field(default_factory=list)
    _new: int = 0

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.clock.request.batch)]

    @staticmethod
    def extra_tokens(request: Request, chunk: int) -> int:
        """Return how many tokens a sequence may generate while the other prompts are read, `chunk` tokens a step."""
        return -(-request.batch * request.context // chunk) + request.batch if request.batch > 1 else 0

    def add(self, sequence: int, ids: Sequence[int]) -> None:
        """Note tokens that a sequence gained in this step."""
        self.tokens[sequence] += ids
        self._new += len(ids)

    def end_step(self) -> None:
        """Note the end of a step of the engine."""
        new, self._new = self._new, 0
        if all(self.tokens) and new:
            self.clock.step(new)

    def report(self, packages: Sequence[str]) -> Report:
        """Return the report."""
        return self.clock.report(packages, self.tokens[0])


def run(measure: Callable[[Request], Report]) -> None:
    """Read the request, bind the process to its cores, measure, print the report; an error in one line at the end."""
    values = json.loads(sys.argv[1])
    request = Request(**{**values, "cores": tuple(values["cores"])})
    if sys.platform == "linux":
        os.sched_setaffinity(0, request.cores)
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, it is this process that ends
    try:
        report = measure(request)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
    print(json.dumps(dataclasses.asdict(report)), flush=True)
    os._exit(0)  # some engines hang in their threads, or crash, when they are torn down


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages."""
    return {name: metadata.version(name) for name in packages}


def peak_bytes() -> int:
    """Return the most resident memory that this process and its living children had, each, added up. Linux only."""
    return sum(_peak(process) for process in ("self", *_children(os.getpid())))


def _children(process: int) -> list[str]:
    try:
        direct = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [one for child in direct for one in (child, *_children(int(child)))]


def _peak(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
