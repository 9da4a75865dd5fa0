"""Tables of `fhopt doctor`: the machine, what is fast and slow on it, and what a model gains there from a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fhopt.hardware.this_machine import GOOD, Finding, GpuFacts, Machine
from fhopt.inspection.prospects import Prospect, Prospects
from fhopt.inspection.tables import light_table
from fhopt.plan.display import quantity, times

_LEGEND = (
    "Faster: upper bound on the decode speedup, assuming decode is memory-bound. Fits: largest context in "
    "free memory, after the weights. Pays: break-even context length of attention (roofline)."
)


def machine_report(machine: Machine, found: Sequence[Finding]) -> Group:
    """Tabulate a machine, and below it the findings, one line each with its fix."""
    return Group(_machine_table(machine), "", _findings_table(found))


def _machine_table(machine: Machine) -> Table:
    table = _facts()
    table.add_row("CPU", Text(machine.cpu))
    table.add_row("vector units", ", ".join(machine.vector_units) or "unknown")
    table.add_row("cores", f"{machine.cores}; {machine.threads} thread{'s' * (machine.threads > 1)} used")
    table.add_row("memory", f"{machine.free_gb:,.1f} of {machine.memory_gb:,.1f} GB free")
    table.add_row("memory read", f"{machine.read_gb_s:,.1f} GB/s, measured now")
    table.add_row("C++ compiler", Text(machine.compiler or "none works"))
    for gpu in machine.gpus:
        table.add_row("GPU", Text(_gpu_words(gpu)))
    if not machine.gpus:
        table.add_row("GPU", "torch can use none")
    installed = [f"{name} {version}" for name, version in machine.versions.items() if version]
    table.add_row("versions", Text(", ".join(installed)))
    size = quantity(machine.cache_bytes, "B")
    state = "unusable" if machine.cache_fault else "writable"
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
    """Tabulate a model on this machine: sites, what stays exact, and a column per KV cache."""
    table = _facts()
    table.add_row("model", Text(f"{prospects.model}, {prospects.parameters:,} parameters"))
    size = quantity(prospects.weight_bytes, "B")
    table.add_row("weights", f"{size}, {prospects.itemsize} bytes each")
    missed = f"; {prospects.not_rewritten} not rewritten, see fhopt explain" if prospects.not_rewritten else ""
    table.add_row("attention sites", f"{prospects.sites}{missed}")
    for kept in prospects.kept_exact:
        layers = "layer" if kept.layers == 1 else "layers"
        table.add_row("stays exact", f"{kept.layers} {layers}: {kept.reason}")
    if prospects.positions is not None:
        table.add_row("positions", f"{prospects.positions:,}")
    return Group(table, "", _caches_table(prospects), Text(_LEGEND, "italic"))


def _caches_table(prospects: Prospects) -> Table:
    """Tabulate the KV caches, one column each."""
    caches = prospects.caches
    table = light_table()
    table.add_column("KV cache, whole model", no_wrap=True)
    for one in caches:
        table.add_column(one.cache, justify="right", no_wrap=True)
    table.add_row("bytes/token", *(f"{one.bytes_per_token:,.0f}" for one in caches))
    table.add_row("smaller", *_gains(caches, [one.ratio for one in caches]))
    for number, tokens in enumerate(prospects.contexts):
        table.add_row(f"faster at {tokens:,} tokens", *_gains(caches, [c.speedups[number] for c in caches]))
    for number, place in enumerate(caches[0].fits):
        fits = (one.fits[number].tokens for one in caches)
        table.add_row(f"context that fits, {place.device}", *(f"{tokens:,}" if tokens else "none" for tokens in fits))
        table.add_row(f"pays on {place.device}", *(one.pays[number].words if one.pays else "" for one in caches))
    return table


def _gains(caches: Sequence[Prospect], factors: Sequence[float]) -> list[str]:
    """Return the cells of a row of factors over the full-precision KV cache; its own cell is empty."""
    return [times(factor) if one.pays else "" for one, factor in zip(caches, factors, strict=True)]


def _facts() -> Table:
    table: Any = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
