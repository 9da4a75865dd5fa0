"""Compile reports: how each attention of a compiled model runs, by model, graph and site, with reasons.

    print(fhopt.report(compiled))       a table;      fhopt.report(compiled).as_dict()       for programs

The backend writes them. They reference no part of a model, and are stored in a weak dictionary by compiled module.
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
from fhopt.passes.certificate import Certificate
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.plan.display import html_table, html_titled

EXACT, PLANNED, GATHERING, COMPRESSED, REJECTED = "exact", "by a plan", "gathering", "compressed", "rejected"


@dataclass(frozen=True)
class SiteRecord:
    """An attention in a graph. how: "latent (LAYOUT)", "absorbed", "kernel", "torch", or "not rewritten".

    certificate: why the rewrite holds for all values; None if nothing was rewritten.
    """

    name: str
    how: str
    reason: str = ""
    source: str = ""
    certificate: Certificate | None = None


@dataclass(frozen=True)
class GraphRecord:
    """A compiled graph. seconds: in fhopt's own passes. assumed: see `Outcome`."""

    training: bool
    sites: tuple[SiteRecord, ...]
    seconds: float
    assumed: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass
class CompileReport:
    """Compile report of one model.

    state: EXACT or PLANNED; GATHERING, COMPRESSED or REJECTED with an online fit. events: decisions of the backend with
    their reasons, in order.
    """

    model: str
    state: str = EXACT
    graphs: list[GraphRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def add_graph(self, outcome: Outcome, training: bool) -> None:
        """Record a compiled graph."""
        seconds = sum(outcome.seconds.values())
        self.graphs.append(GraphRecord(training, tuple(_sites(outcome)), seconds, tuple(outcome.assumed.items())))

    def add_event(self, event: str) -> None:
        """Record an event, without duplicates."""
        if event not in self.events:
            self.events.append(event)

    def as_dict(self) -> dict[str, Any]:
        """Return model, state, graphs (training, sites, seconds) and events as JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return report_html(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(_table(self))
        for event in self.events:
            console.print(f"- {event}", markup=False, highlight=False)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()


def _sites(outcome: Outcome) -> Iterator[SiteRecord]:
    """Yield a record of each site, and of each attention without one: exact, or not rewritten."""
    reasons: dict[str, Explanation] = {m.node: m for m in outcome.missed}
    for node, site in outcome.sites.items():
        missed = reasons.pop(node, None)
        layout = outcome.compressed.get(site.name)
        how = "absorbed" if layout == "absorbed" else f"latent ({layout})" if layout else outcome.lowered.get(site.name)
        reason = missed.reason if missed and not layout else ""
        yield SiteRecord(site.name, how or "torch", reason, site.source, outcome.certificates.get(node))
    for name in outcome.compressed.keys() - {site.name for site in outcome.sites.values()}:
        yield SiteRecord(name, outcome.compressed[name])
    yield from (SiteRecord(name, "latents of the cache") for name in outcome.reading)
    for missed in reasons.values():
        how, proof = outcome.lowered.get(missed.node, "not rewritten"), outcome.certificates.get(missed.node)
        yield SiteRecord(missed.node, how, missed.reason, missed.source, proof)


def _table(report: CompileReport) -> Table:
    table = Table(title=_title(report), title_justify="left")
    for heading in ("site", "graphs", "rewritten as", "reason"):
        table.add_column(heading, overflow="fold")
    counted: dict[SiteRecord, int] = {}
    for graph in report.graphs:
        for site in graph.sites:
            counted[site] = counted.get(site, 0) + 1
    for site, count in counted.items():
        proof = site.certificate.summary if site.certificate else ""
        table.add_row(site.name, str(count), site.how, site.reason or proof)
    return table


def _title(report: CompileReport) -> str:
    return f"{report.model}: {report.state}, graphs: {len(report.graphs)}"


def report_html(report: CompileReport) -> str:
    """Return the HTML of a report for notebooks: sites and events."""
    rows = dict.fromkeys((s.name, s.how, s.reason, s.source) for graph in report.graphs for s in graph.sites)
    events = "".join(f"<li>{html.escape(event)}</li>" for event in report.events)
    return html_titled(_title(report), html_table(("site", "rewritten as", "reason", "source"), rows)) + (
        f"<ul>{events}</ul>" if events else ""
    )


# --------------------------------------------------------------------------------------------------- by module


_reports: weakref.WeakKeyDictionary[torch.nn.Module, CompileReport] = weakref.WeakKeyDictionary()
_unowned = CompileReport("graphs of functions")


def report_of(module: torch.nn.Module | None) -> CompileReport:
    """Return the report of a module, creating it if missing; None: that of graphs without an owning module."""
    if module is None:
        return _unowned
    return _reports.setdefault(module, CompileReport(type(module).__name__))


def forget_reports() -> None:
    """Discard all reports."""
    _reports.clear()
    _unowned.graphs.clear()
    _unowned.events.clear()


def report(compiled: Any) -> CompileReport:
    """Return the report of a compiled model: `torch.compile(model, ...)`, or a model after `model.compile(...)`.

    Reports of compiled parts of a model are merged; a function has the reports of the models that it calls. Raises
    FhoptError if this backend has compiled no part of it.
    """
    target = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", compiled)
    target = getattr(target, "__self__", target)
    if isinstance(target, torch.nn.Module):
        parts = [_reports[m] for m in target.modules() if m in _reports]
    else:
        parts = [*(_reports[m] for root in _called(target) for m in root.modules() if m in _reports), _unowned]
    parts = [part for part in parts if part.graphs or part.events]
    if not parts:
        raise FhoptError(
            f"fhopt has not compiled {type(target).__name__} yet; expected a compiled module that was called. "
            'Run model.compile(backend="flashhead"), then call the model once.'
        )
    return parts[0] if len(parts) == 1 else _merge(type(target).__name__, parts)


def _called(function: Any) -> list[torch.nn.Module]:
    """List the modules in the closure and the globals of a function."""
    try:
        names = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):
        return []
    return [v for v in (*names.nonlocals.values(), *names.globals.values()) if isinstance(v, torch.nn.Module)]


def _merge(name: str, parts: list[CompileReport]) -> CompileReport:
    events = [event for part in parts for event in part.events]
    state = next((p.state for p in parts if p.state != EXACT), EXACT)
    return CompileReport(name, state, [g for p in parts for g in p.graphs], list(dict.fromkeys(events)))


def owner(parameters: Iterable[Tensor]) -> torch.nn.Module | None:
    """Find the module whose call Dynamo is tracing and that owns these parameters; None if there is none.

    Of several, such as two models that share an embedding, returns the one with the fewest parameters.
    """
    identities = {id(p) for p in parameters}
    owned = [(m, {id(p) for p in m.parameters()}) for m in _modules_in(_traced_locals())]
    fitting = [(len(own), i) for i, (_, own) in enumerate(owned) if identities <= own]
    return owned[min(fitting)[1]][0] if fitting else None


def _traced_locals() -> dict[str, Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        names: dict[str, Any] = InstructionTranslator.current_tx().output.root_tx.f_locals
    except AttributeError:  # no trace in progress
        return {}
    return names


def _modules_in(values: dict[str, Any]) -> Iterator[torch.nn.Module]:
    for value in values.values():
        parts = value if isinstance(value, (tuple, list)) else [getattr(value, "__self__", value)]
        yield from (part for part in parts if isinstance(part, torch.nn.Module))
