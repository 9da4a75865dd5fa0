"""Tables of `fhopt doctor`: the machine, what is fast on it and what is not, and what a model gains there by a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fhopt.hardware.this_machine import GOOD, Finding, GpuFacts, Machine
from fhopt.inspection.prospects import Prospect, Prospects
from fhopt.plan.display import quantity, times


def machine_report(machine: Machine, found: Sequence[Finding]) -> Group:
    """Tabulate a machine, and below it the findings, a line each with its cure."""
    return Group(_machine_table(machine), "", _findings_table(found))


def _machine_table(machine: Machine) -> Table:
    table = _facts()
    table.add_row("CPU", Text(machine.cpu))
    table.add_row("vector units", ", ".join(machine.vector_units) or "unknown")
    table.add_row("cores", f"{machine.cores}; {machine.threads} thread{'s' * (machine.threads > 1)} used")
    table.add_row("memory", f"{machine.free_gb:,.1f} of {machine.memory_gb:,.1f} GB free")
    table.add_row("memory read", f"{machine.read_gb_s:,.1f} GB/s, measured now")
    table.add_row("C++ compiler", Text(machine.compiler or "none that works"))
    for gpu in machine.gpus:
        table.add_row("GPU", Text(_gpu_words(gpu)))
    if not machine.gpus:
        table.add_row("GPU", "none that torch can use")
    installed = [f"{name} {version}" for name, version in machine.versions.items() if version]
    table.add_row("versions", Text(", ".join(installed)))
    size = quantity(machine.cache_bytes, "B")
    state = "cannot be used" if machine.cache_fault else "writable"
    table.add_row("kernel cache", Text(f"{machine.cache_folder or 'no folder'}, {size}, {state}"))
    return table


def _gpu_words(gpu: GpuFacts) -> str:
    triton = "without Triton kernels" if gpu.triton_fault else "with Triton kernels"
    return f"{gpu.name} ({gpu.architecture}), {gpu.free_gb:,.1f} of {gpu.memory_gb:,.1f} GB free, {triton}"


def _findings_table(found: Sequence[Finding]) -> Table:
    table = _facts()
    for one in found:
        style = "green" if one.state == GOOD else "yellow"
        table.add_row(Text(one.state, style), Text(f"{one.words} {one.cure}".strip()))
    return table


def prospects_report(prospects: Prospects) -> Group:
    """Tabulate a model on this machine: sites, what stays exact, and a row for each KV cache."""
    table = _facts()
    table.add_row("model", Text(f"{prospects.model}, {prospects.parameters:,} parameters"))
    size = quantity(prospects.weight_bytes, "B")
    table.add_row("weights", f"{size}, {prospects.itemsize} bytes each")
    missed = f", {prospects.not_rewritten} candidates not rewritten" if prospects.not_rewritten else ""
    table.add_row("attention sites", f"{prospects.sites}{missed}")
    for kept in prospects.kept_exact:
        layers = "layer" if kept.layers == 1 else "layers"
        table.add_row("stays exact", f"{kept.layers} {layers}: {kept.reason}")
    if prospects.positions is not None:
        table.add_row("positions", f"{prospects.positions:,}")
    return Group(table, "", _caches_table(prospects), Text(_legend(prospects), "italic"))


def _caches_table(prospects: Prospects) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("KV cache")
    names = ["bytes per\ntoken", "smaller", *(f"faster at\n{tokens:,}" for tokens in prospects.contexts)]
    names += [f"tokens that\nfit, {one.device}" for one in prospects.caches[0].fits]
    names += [f"pays on\n{one.device}" for one in prospects.caches[-1].pays]
    for name in names:
        table.add_column(name, justify="right", overflow="fold", no_wrap=True)
    for one in prospects.caches:
        table.add_row(*_cells(one))
    return table


def _cells(one: Prospect) -> list[str]:
    is_exact = not one.pays
    gains = ["" if is_exact else times(gain) for gain in (one.ratio, *one.speedups)]
    fits = [f"{fit.tokens:,}" if fit.tokens else "none" for fit in one.fits]
    return [one.cache, f"{one.bytes_per_token:,.0f}", *gains, *fits, *(paying.words for paying in one.pays)]


def _legend(prospects: Prospects) -> str:
    words = (
        "Whole model. Faster: a decode step, at most, by the bytes to read. Tokens that fit: beside the weights, into "
    )
    return words + "memory that is free now. Pays: cached tokens from which attention is faster, by roofline."


def _facts() -> Table:
    table: Any = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
