"""What became of the models that were compiled: per model, per graph, per site, with reasons. `fhopt.report` shows it.

    print(fhopt.report(compiled))       a table;      fhopt.report(compiled).as_dict()       for programs

The backend writes it. Nothing of a model is held: journals are kept by the module that was compiled, weakly.
"""

from __future__ import annotations

import html
import inspect
import io
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.plan.display import html_table, html_titled

EXACT, PLANNED, GATHERING, COMPRESSED, REJECTED = "exact", "by a plan", "gathering", "compressed", "rejected"


@dataclass(frozen=True)
class SiteRecord:
    """One attention in one graph. how: "latent (LAYOUT)", "absorbed", "kernel", "torch", or "left alone"."""

    name: str
    how: str
    reason: str = ""
    source: str = ""


@dataclass(frozen=True)
class GraphRecord:
    """One compiled graph. seconds: of fhopt's own passes."""

    training: bool
    sites: tuple[SiteRecord, ...]
    seconds: float


@dataclass
class Journal:
    """What happened to one model.

    state: EXACT, PLANNED, or of a model that is profiled GATHERING, COMPRESSED, REJECTED. events: what was done and
    why, in order.
    """

    model: str
    state: str = EXACT
    graphs: list[GraphRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome, training: bool) -> None:
        """Take down one graph."""
        self.graphs.append(GraphRecord(training, tuple(_sites(outcome)), sum(outcome.seconds.values())))

    def say(self, event: str) -> None:
        """Take down an event, once where it repeats."""
        if event not in self.events:
            self.events.append(event)

    def as_dict(self) -> dict[str, Any]:
        """For programs: model, state, graphs (training, sites, seconds), events."""
        return asdict(self)

    def _repr_html_(self) -> str:
        from fhopt.backend.compile_report import journal_html

        return journal_html(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(_table(self))
        for event in self.events:
            console.print(f"- {event}", markup=False, highlight=False)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()


def _sites(outcome: Outcome) -> Iterator[SiteRecord]:
    """What became of each site, and of what was no site."""
    reasons: dict[str, Explanation] = {m.node: m for m in outcome.missed}
    for node, site in outcome.sites.items():
        missed = reasons.pop(node, None)
        layout = outcome.compressed.get(site.name)
        how = "absorbed" if layout == "absorbed" else f"latent ({layout})" if layout else outcome.lowered.get(site.name)
        yield SiteRecord(site.name, how or "torch", missed.reason if missed and not layout else "", site.source)
    for name in outcome.compressed.keys() - {site.name for site in outcome.sites.values()}:
        yield SiteRecord(name, outcome.compressed[name])
    yield from (SiteRecord(name, "latents of the cache") for name in outcome.reading)
    for missed in reasons.values():
        yield SiteRecord(missed.node, "left alone", missed.reason, missed.source)


def _table(journal: Journal) -> Table:
    table = Table(title=f"{journal.model}: {journal.state}, graphs: {len(journal.graphs)}", title_justify="left")
    for heading in ("site", "graphs", "became", "because"):
        table.add_column(heading, overflow="fold")
    counted: dict[SiteRecord, int] = {}
    for graph in journal.graphs:
        for site in graph.sites:
            counted[site] = counted.get(site, 0) + 1
    for site, count in counted.items():
        table.add_row(site.name, str(count), site.how, site.reason)
    return table


# --------------------------------------------------------------------------------------------------- whose


_journals: weakref.WeakKeyDictionary[torch.nn.Module, Journal] = weakref.WeakKeyDictionary()
_unowned = Journal("graphs of functions")


def journal_of(module: torch.nn.Module | None) -> Journal:
    """The journal of a module, begun where there is none; None: of graphs that no module owns."""
    if module is None:
        return _unowned
    return _journals.setdefault(module, Journal(type(module).__name__))


def forget() -> None:
    """Begin all journals anew."""
    _journals.clear()
    _unowned.graphs.clear()
    _unowned.events.clear()


def report(compiled: Any) -> Journal:
    """What became of a compiled model: `torch.compile(model, ...)`, or a model after `model.compile(...)`.

    A model of which parts were compiled gets one journal of all parts; a function that of the models that it calls.
    Raises FhoptError when nothing of it has run yet through this backend.
    """
    target = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", compiled)
    target = getattr(target, "__self__", target)
    if isinstance(target, torch.nn.Module):
        found = [_journals[m] for m in target.modules() if m in _journals]
    else:
        found = [*(_journals[m] for root in _called(target) for m in root.modules() if m in _journals), _unowned]
    found = [one for one in found if one.graphs or one.events]
    if not found:
        raise FhoptError(
            f"nothing of {type(target).__name__} has been compiled by fhopt yet. Compile it with "
            'model.compile(backend="flashhead") and call it once.'
        )
    return found[0] if len(found) == 1 else _merged(type(target).__name__, found)


def _called(function: Any) -> list[torch.nn.Module]:
    """Modules that a function reaches by its closure or as globals."""
    try:
        names = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):
        return []
    return [v for v in (*names.nonlocals.values(), *names.globals.values()) if isinstance(v, torch.nn.Module)]


def _merged(name: str, parts: list[Journal]) -> Journal:
    events = [event for part in parts for event in part.events]
    state = next((p.state for p in parts if p.state != EXACT), EXACT)
    return Journal(name, state, [g for p in parts for g in p.graphs], list(dict.fromkeys(events)))


def owner(parameters: Iterable[Tensor]) -> torch.nn.Module | None:
    """The module whose call Dynamo is tracing and that owns these parameters; None where there is no such module.

    Of several, such as two models that share an embedding, the one with the fewest parameters.
    """
    wanted = {id(p) for p in parameters}
    owned = [(m, {id(p) for p in m.parameters()}) for m in _modules_in(_traced_locals())]
    fitting = [(len(own), i) for i, (_, own) in enumerate(owned) if wanted <= own]
    return owned[min(fitting)[1]][0] if fitting else None


def _traced_locals() -> dict[str, Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        found: dict[str, Any] = InstructionTranslator.current_tx().output.root_tx.f_locals
    except AttributeError:  # nothing is being traced
        return {}
    return found


def _modules_in(values: dict[str, Any]) -> Iterator[torch.nn.Module]:
    for value in values.values():
        parts = value if isinstance(value, (tuple, list)) else [getattr(value, "__self__", value)]
        yield from (part for part in parts if isinstance(part, torch.nn.Module))


def journal_html(journal: Journal) -> str:
    """What became of a compiled model: sites and events."""
    rows = dict.fromkeys((s.name, s.how, s.reason, s.source) for graph in journal.graphs for s in graph.sites)
    events = "".join(f"<li>{html.escape(event)}</li>" for event in journal.events)
    title = f"{journal.model}: {journal.state}, graphs: {len(journal.graphs)}"
    return html_titled(title, html_table(("site", "became", "because", "source"), rows)) + (
        f"<ul>{events}</ul>" if events else ""
    )
