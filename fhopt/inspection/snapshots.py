"""Snapshots of a model's graph after each pass, and the changes by each pass.

seen = Snapshots()
with seen.taking():
    outcome = passes.find(program)
seen.taken          the graphs, one per pass
seen.changes()      lines that each pass removed and added; equal changes of many layers are merged
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import networkx as nx

from fhopt.errors import FhoptError
from fhopt.inspection.graphs import network, site_nodes
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import stages as passes_stages
from fhopt.passes.graph.printing import print_graph

ALL = "all"
CONTEXT = 1  # unchanged lines around a change
_NAME, _NUMBER = re.compile(r"%\w+"), re.compile(r"_?\d+")


@dataclass(frozen=True)
class Snapshot:
    """One graph after one pass; "input" is the captured graph. graph: its index among the model's graphs."""

    graph: int
    stage: str
    seconds: float
    text: str
    network: nx.DiGraph


@dataclass(frozen=True)
class Change:
    """Lines of a unified diff, and how often the same change occurs, ignoring numbers in names."""

    lines: tuple[str, ...]
    times: int


@dataclass(frozen=True)
class StageChanges:
    """Changes of one pass to one graph. nodes: their number before and after."""

    graph: int
    stage: str
    seconds: float
    nodes: tuple[int, int]
    removed: int
    added: int
    changes: tuple[Change, ...]


@dataclass
class Snapshots:
    """Graphs in the order in which passes produced them. keep_networks: also store the graph of nodes."""

    keep_networks: bool = False
    taken: list[Snapshot] = field(default_factory=list)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take a snapshot after every pass inside the context."""
        with passes_stages.watched(self._take):
            yield

    def _take(self, outcome: passes_outcome.Outcome, stage: str) -> None:
        graph = self.taken[-1].graph if self.taken else -1
        graph += stage == "input"
        nodes = network(outcome.program) if self.keep_networks else nx.DiGraph()
        seconds = outcome.seconds.get(stage, 0.0)
        self.taken.append(Snapshot(max(0, graph), stage, seconds, print_graph(outcome.program.graph), nodes))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the passes that ran, "input" first."""
        return tuple(dict.fromkeys(snapshot.stage for snapshot in self.taken))

    def after(self, stage: str, site: str | None = None) -> Snapshot:
        """Return the graph after a pass; of several, one with the site, or the largest. Raises FhoptError."""
        results = [snapshot for snapshot in self.taken if snapshot.stage == stage]
        if not results:
            raise FhoptError(f"pass {stage!r} did not run; expected all, or one of {', '.join(self.stages)}.")
        if site is not None:
            results = [snapshot for snapshot in results if site_nodes(snapshot.network, site)] or results
        return max(results, key=lambda snapshot: len(snapshot.network))

    def changes(self) -> list[StageChanges]:
        """Return the changes by each pass, in order."""
        pairs = zip(self.taken, self.taken[1:], strict=False)
        return [_changes(before, after) for before, after in pairs if before.graph == after.graph]


def _changes(before: Snapshot, after: Snapshot) -> StageChanges:
    old, new = before.text.splitlines(), after.text.splitlines()
    hunks = list(_hunks(old, new))
    grouped: dict[str, list[tuple[str, ...]]] = {}
    for hunk in hunks:
        grouped.setdefault(_NAME.sub(_unnumbered, "\n".join(hunk)), []).append(hunk)
    lines = [line for hunk in hunks for line in hunk]
    return StageChanges(
        after.graph,
        after.stage,
        after.seconds,
        (len(old), len(new)),
        sum(line.startswith("-") for line in lines),
        sum(line.startswith("+") for line in lines),
        tuple(Change(same[0], len(same)) for same in grouped.values()),
    )


def _unnumbered(name: re.Match[str]) -> str:
    """Return a node's name without its number, which differs by layer; shapes and constants keep their numbers."""
    return _NUMBER.sub("", name[0])


def _hunks(old: list[str], new: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the hunks of a unified diff without headers; every line begins with a space, "-" or "+"."""
    hunk: list[str] = []
    for line in difflib.unified_diff(old, new, lineterm="", n=CONTEXT):
        if line.startswith(("---", "+++")):
            continue
        if line.startswith("@@"):
            if hunk:
                yield tuple(hunk)
            hunk = []
        else:
            hunk.append(line)
    if hunk:
        yield tuple(hunk)
