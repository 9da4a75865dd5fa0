"""Draw programs for a given time, count how they were compiled, and shrink the first failure."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import hypothesis
from drawn_programs import programs
from graph_programs import AttentionProgram
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure
from program_checks import Invalid, WrongProgram, check

ROUND = 200  # programs per seed
FURTHER_SEED = 1_000_003  # distance between the seeds of rounds


@dataclass
class Tally:
    """Counts of programs by outcome, of calls and of finished rounds, and the first failure.

    Outcomes: "rewritten", "not rewritten", "invalid", "repeated".
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    sites: int = 0
    rounds: int = 0
    failure: str = ""
    seconds_to_failure: float = 0.0
    cpu_seconds: float = 0.0  # of this process, without compiler processes

    @property
    def programs(self) -> int:
        """Programs that were compiled and compared."""
        return self.outcomes["rewritten"] + self.outcomes["not rewritten"]

    @property
    def rewritten(self) -> float:
        """Share of the compared programs in which fhopt rewrote at least one attention."""
        return self.outcomes["rewritten"] / max(1, self.programs)


def run(seed: int, seconds: float, rounds: int = 10**9, examples: int = ROUND, shrink: bool = True) -> Tally:
    """Check programs until the time is over or one is wrong; the failure is that program, shrunk."""
    tally, start, cpu_start = Tally(), time.monotonic(), time.process_time()
    known: set[AttentionProgram] = set()

    def body(program: AttentionProgram) -> None:
        if time.monotonic() - start > seconds and not tally.seconds_to_failure:
            return
        if program in known:
            tally.outcomes["repeated"] += 1
            return
        try:
            verdict = check(program)
        except Invalid as invalid:
            tally.outcomes["invalid"] += 1
            tally.reasons[str(invalid)[:100]] += 1
        except WrongProgram:
            tally.seconds_to_failure = tally.seconds_to_failure or time.monotonic() - start
            raise
        else:
            tally.outcomes["rewritten" if verdict.sites else "not rewritten"] += 1
            tally.sites += verdict.sites
            tally.calls += len(program.calls)
        known.add(program)

    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    options = settings(
        max_examples=examples, deadline=None, database=None, phases=phases, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), print_blob=False, derandomize=False,
    )  # fmt: skip
    for index in range(rounds):
        tally.rounds = index
        if time.monotonic() - start > seconds:
            break
        test = hypothesis.seed(seed + FURTHER_SEED * index)(options(given(programs())(body)))
        try:
            test()
        except WrongProgram as wrong:
            tally.failure = str(wrong)
            break
        except FlakyFailure as flaky:
            tally.failure = f"a program is wrong in one of two runs: {flaky.exceptions[0]}"
            break
    tally.cpu_seconds = time.process_time() - cpu_start
    return tally
