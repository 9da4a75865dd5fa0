"""Shared code of the programs in runners/: they load one request, measure it, and print one line of JSON.

Each runs in the environment of its engine, so this file imports only the standard library (Python 3.10), and nothing
of fhopt.

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
class EngineRequest:
    """One measurement: an engine, a model, a context, a batch size.

    model: path in the engine's format. prompts: JSON file with a list of token ids per sequence. started:
    time.monotonic() of the requesting process, just before it started this one (one clock for all processes of a
    machine). cores: the CPU cores to run on, one per thread. warm: decode steps before the timed ones.
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
        """Return the tokens that each sequence generates: the first one, warm-up, timed ones."""
        return 1 + self.warm + self.new_tokens

    @property
    def most(self) -> int:
        """Return the required cache positions per sequence: the prompt and all new tokens."""
        return self.context + self.steps

    def tokens(self) -> list[list[int]]:
        """Return the prompt [batch][context] of token ids."""
        prompts = json.loads(Path(self.prompts).read_text(encoding="utf-8"))
        return [list(ids[: self.context]) for ids in prompts[: self.batch]]


@dataclass
class EngineReport:
    """The measurement of a program: the first call of the model in a separate process.

    first_token_s: from the start of the process until every sequence has its first new token. second_token_s: until it
    has its second one, including compilation of decode steps. prefill_s: of the prefill call. decode_s: seconds of
    `decode_tokens` further tokens, of all sequences together, after the warm-up steps. peak_bytes: peak resident memory
    of the process and its children. tokens: new tokens of the first sequence.
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
class EngineClock:
    """Times of one measurement: `start` before the prompt, `step` whenever all sequences have a new token."""

    request: EngineRequest
    started: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Record the start of prefill."""
        self.started = time.monotonic()

    def step(self, count: int | None = None) -> None:
        """Record new tokens; the first call ends prefill. count: of all sequences, one each by default."""
        self.times.append(time.monotonic())
        self.counts.append(self.request.batch if count is None else count)

    @property
    def is_done(self) -> bool:
        """Return whether all timed steps are done."""
        return len(self.times) >= self.request.steps

    def report(self, packages: Sequence[str], tokens: Sequence[int]) -> EngineReport:
        """Return the report. Raises RuntimeError if fewer tokens were generated than requested."""
        if not self.is_done:
            raise RuntimeError(f"the engine stopped after {len(self.times)} of {self.request.steps} tokens")
        first, second, base = self.times[0], self.times[1], self.request.warm
        return EngineReport(
            first - self.request.started, second - self.request.started, first - self.started,
            self.times[-1] - self.times[base], sum(self.counts[base + 1 :]), peak_bytes(), versions(packages),
            list(tokens),
        )  # fmt: skip


@dataclass
class StepCounter:
    """Counts new tokens of engines with their own scheduling: some generate during prefill of other prompts.

    Prefill ends with the step after which each sequence has a token. Tokens generated before that are not counted.
    """

    clock: EngineClock
    tokens: list[list[int]] = field(default_factory=list)
    _new: int = 0

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.clock.request.batch)]

    @staticmethod
    def extra_tokens(request: EngineRequest, chunk: int) -> int:
        """Return the maximum tokens that a sequence generates during prefill of the others, `chunk` tokens per step."""
        return -(-request.batch * request.context // chunk) + request.batch if request.batch > 1 else 0

    def add(self, sequence: int, ids: Sequence[int]) -> None:
        """Record new tokens of a sequence in this step."""
        self.tokens[sequence] += ids
        self._new += len(ids)

    def end_step(self) -> None:
        """Record the end of a step of the engine."""
        new, self._new = self._new, 0
        if all(self.tokens) and new:
            self.clock.step(new)

    def report(self, packages: Sequence[str]) -> EngineReport:
        """Return the report."""
        return self.clock.report(packages, self.tokens[0])


def run(measure: Callable[[EngineRequest], EngineReport]) -> None:
    """Load the request, bind the process to its cores, measure, print the report; on an error, one line at the end."""
    values = json.loads(sys.argv[1])
    request = EngineRequest(**{**values, "cores": tuple(values["cores"])})
    if sys.platform == "linux":
        os.sched_setaffinity(0, request.cores)
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the kernel kills this process first
    try:
        report = measure(request)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
    print(json.dumps(dataclasses.asdict(report)), flush=True)
    os._exit(0)  # some engines hang or crash at shutdown


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages."""
    return {name: metadata.version(name) for name in packages}


def peak_bytes() -> int:
    """Return the sum of the peak resident memory of this process and its living children. Linux only."""
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
