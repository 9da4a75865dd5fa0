"""Execution of a pass: timing, verification, dumps, explanations of misses."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from torch import fx

from fhopt.errors import Miss, PassError
from fhopt.passes.graph.nodes import source_line
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.passes.verify import check_invariants


class run_stage:
    """A context that times a pass, verifies its result, dumps the graph, and adds the pass's name to a failure."""

    def __init__(self, outcome: Outcome, name: str) -> None:
        self.outcome, self.name = outcome, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            if isinstance(error, Exception):
                raise PassError(f"pass {self.name} failed: {type(error).__name__}: {error}") from error
            return
        self.outcome.program.module.recompile()
        check_invariants(self.outcome.program, self.name)
        self.outcome.seconds[self.name] = time.perf_counter() - self.start
        dump_stage(self.outcome, self.name)


_watcher: ContextVar[Callable[[Outcome, str], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(by: Callable[[Outcome, str], None]) -> Iterator[None]:
    """Call `by(outcome, pass)` after every pass in this context, and with "input" before a graph's first pass."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def explain_miss(stage: str, miss: Miss, node: fx.Node, line: str = "") -> Explanation:
    """Make an explanation of a miss in a pass."""
    at = miss.node if isinstance(miss.node, fx.Node) else node
    return Explanation(stage, at.name, miss.reason, source_line(at) or line, miss.reached)


def failure(stage: str, error: Exception, node: fx.Node) -> Miss:
    """Return a Miss for an unexpected exception of a pass at `node`."""
    text = (str(error).splitlines() or [""])[0]
    return Miss(
        f"pass {stage} failed here because of a bug in fhopt ({type(error).__name__}: {text}); the code runs "
        "unchanged. Report it with the source line",
        node,
    )


def dump_certificates(outcome: Outcome) -> None:
    """Write the certificates to `certificates.txt` in the folder named by FHOPT_DUMP, if set."""
    folder = os.environ.get("FHOPT_DUMP")
    if folder:
        lines = [line for name, found in outcome.proofs.items() for line in (*found.lines(name), "")]
        (Path(folder) / "certificates.txt").write_text("\n".join(lines), encoding="utf-8")


def dump_stage(outcome: Outcome, name: str) -> None:
    """Write the graph to `NN-<pass>.txt` in the folder named by FHOPT_DUMP, if set; the first line sums up the pass."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(outcome, name)
    folder = os.environ.get("FHOPT_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    number = len(outcome.seconds)
    head = (
        f"# {name}: {len(outcome.sites)} sites, {len(outcome.compressed)} compressed, "
        f"{outcome.seconds.get(name, 0.0) * 1e3:.0f} ms\n"
    )
    misses = "".join(f"# missed in {m.stage}: {m.node}: {m.reason} ({m.source})\n" for m in outcome.missed)
    (path / f"{number:02d}-{name}.txt").write_text(head + misses + print_graph(outcome.program.graph))
