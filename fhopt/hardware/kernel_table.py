"""`fhopt kernels`: the generated kernels for a plan's attention on latents, and their resources on a device.

    kernel = (KernelSpec, H, J)     one file per spec; one row of the table per kernel

Bytes, operations and the roofline are those of the work "latents" in cost_model.py: quantized tokens only, without
recent window, bases and weights. Registers, shared memory and instructions are extracted from compiled native code,
which needs no GPU. For a CPU there are C++ files, without resources.

Dimensions: B batch, H query heads, J latent heads, S queries, T tokens, M rows (S queries of the heads that share a
latent head).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

from rich.table import Table

from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu.configs import Config
from fhopt.codegen.gpu.gpus import find_gpu
from fhopt.codegen.gpu.resources import Occupancy, triton_version
from fhopt.codegen.gpu.tuning import TunedConfigs, choose_each
from fhopt.errors import FhoptError
from fhopt.files import check_folder, check_writable, write_folder
from fhopt.hardware.cost_model import BATCH, ITEMSIZES, QUANTIZED, QUERIES, Cost, Work, site_cost
from fhopt.hardware.devices import Device, find_device
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan

TABLE_FILES = ("kernels.md", "kernels.json")
MAX_NAMES = 3  # site names per cell


@dataclass(frozen=True)
class Options:
    """Options of `fhopt kernels`.

    candidates: configurations to compile for a kernel whose default does not fit; 0: all configurations of every
    kernel.
    """

    device: str
    batch: int = 1
    queries: int = 1
    tokens: int = 32_768
    dtype: str = "bfloat16"
    candidates: int = 4


@dataclass(frozen=True)
class Rejected:
    """A configuration that does not fit the device, and the reason."""

    config: Config
    reason: str


@dataclass(frozen=True)
class Compiled:
    """Resources of the chosen configuration of a kernel; see `Resources` and `ConfigAssessment` of codegen."""

    config: Config
    registers: int
    spilled: int
    shared: int
    occupancy: Occupancy
    bytes_ahead: int
    token_instructions: float
    tensor_cores: dict[str, int]
    loop_reads: dict[str, int]


@dataclass(frozen=True)
class KernelRow:
    """A kernel: its file, the sites that run it, their cost, and its resources.

    bytes_per_token, operations_per_token: per cached token at one site, for all its heads and `queries` queries.
    roofline_seconds: of one step at one site after `tokens` cached tokens. compiled: None on a CPU, and if no
    configuration fits.
    """

    file: str
    sites: tuple[str, ...]
    heads: int
    latent_heads: tuple[int, int]  # of keys and of values
    rows: int  # M
    bytes_per_token: int
    operations_per_token: int
    roofline_seconds: float
    bound: str
    compiled: Compiled | None
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class Kernels:
    """The kernel table of a plan on a device, and the files by name."""

    options: Options
    triton: str  # version; empty on a CPU
    rows: tuple[KernelRow, ...]
    files: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return everything but the text of the files as JSON values."""
        kernels = [asdict(row) for row in self.rows]
        return asdict(self.options) | {"triton": self.triton, "kernels": kernels, "files": sorted(self.files)}


Kernel = tuple[KernelSpec, int, int, int]  # the spec, H, J of keys and of values


# --------------------------------------------------------------------------------------------------- files


def write_kernels(
    plan: LatentPlan, out: Path, options: Options, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Kernels:
    """Write the kernels of `plan` and their table into the folder `out`, atomically. Raises FhoptError."""
    device = find_device(options.device)
    if device.kind == "gpu":
        triton_version()  # raises early if Triton is not installed
    kernels = kernels_of(plan, options.dtype)
    files = {_file(kernel[0], device): kernel[0] for kernel in kernels}
    check_folder(out, (*files, *TABLE_FILES))
    check_writable(out.parent)
    choices = _choices(list(kernels), device, options, progress)
    rows = tuple(_row(kernel, kernels[kernel], choices[kernel], plan, device, options) for kernel in kernels)
    version = triton_version() if device.kind == "gpu" else ""
    texts = {name: render_kernel(spec, "triton" if device.kind == "gpu" else "cpp") for name, spec in files.items()}
    written = Kernels(options, version, rows, texts)
    tables = dict(zip(TABLE_FILES, (markdown(written), json.dumps(written.as_json(), indent=1) + "\n"), strict=True))
    write_folder(out, {name: text.encode() for name, text in (texts | tables).items()})
    return written


def kernels_of(plan: LatentPlan, dtype: str) -> dict[Kernel, list[SitePlan]]:
    """Group sites by the kernel that they run. Raises FhoptError if no site has latents."""
    sites: dict[Kernel, list[SitePlan]] = {}
    for site in plan.sites:
        if _latents(site, dtype) is None:
            continue
        kernel = KernelSpec.of(site, dtype), site.site.heads, site.key.groups, site.value.groups
        sites.setdefault(kernel, []).append(site)
    if not sites:
        raise FhoptError(
            f"the plan has no kernel to write: none of its {len(plan.sites)} sites caches latents. Fit a plan "
            "with a ratio above 1."
        )
    return sites


def _latents(site: SitePlan, dtype: str) -> Work | None:
    """Return the work of a site's quantized tokens; None if it has none, as with a short sliding window."""
    works = site_cost(site.site, site, itemsize=ITEMSIZES[dtype]).works
    return next((work for work in works if work.name == "latents"), None)


def _file(spec: KernelSpec, device: Device) -> str:
    return f"{spec.name}.{'py' if device.kind == 'gpu' else 'cpp'}"


def _choices(
    kernels: Sequence[Kernel], device: Device, options: Options, progress: Callable[[str, int, int], None]
) -> dict[Kernel, TunedConfigs]:
    """Choose the configuration of each kernel; none on a CPU."""
    if device.kind != "gpu":
        return dict.fromkeys(kernels, TunedConfigs(None, ()))
    chosen = dict[Kernel, TunedConfigs]()
    for stage, most in (("compile", min(1, options.candidates)), ("compile more", options.candidates)):
        left = [kernel for kernel in kernels if kernel not in chosen or chosen[kernel].best is None]
        requests = [(kernel[0], _tile_rows(kernel, options)) for kernel in left]
        choices = choose_each(requests, find_gpu(device.name), most, functools.partial(progress, stage))
        chosen |= dict(zip(left, choices, strict=True))
    return chosen


def _tile_rows(kernel: Kernel, options: Options) -> int:
    """Compute the rows of a tile, M."""
    _, heads, key_heads, value_heads = kernel
    return gcd(heads // key_heads, heads // value_heads) * options.queries


def _row(
    kernel: Kernel, sites: list[SitePlan], choice: TunedConfigs, plan: LatentPlan, device: Device, options: Options
) -> KernelRow:
    spec, heads, key_heads, value_heads = kernel
    work = _latents(sites[0], options.dtype)
    assert work is not None
    cost = Cost((work,), ITEMSIZES[options.dtype], plan.sinks + plan.recent + plan.block // 2)
    figures = cost.on(device, options.tokens, options.batch, options.queries)
    one = {QUANTIZED: 1, BATCH: 1, QUERIES: options.queries}
    return KernelRow(
        file=_file(spec, device),
        sites=tuple(site.site.name for site in sites),
        heads=heads,
        latent_heads=(key_heads, value_heads),
        rows=_tile_rows(kernel, options),
        bytes_per_token=int(cost.bytes.subs(one)),
        operations_per_token=int(cost.operations.subs(one)),
        roofline_seconds=figures.attention_seconds,
        bound=figures.bound,
        compiled=_compiled(choice),
        rejected=tuple(Rejected(v.config, v.reason) for v in choice.verdicts if v.reason),
    )


def _compiled(choice: TunedConfigs) -> Compiled | None:
    best = choice.best
    if best is None or best.occupancy is None:
        return None
    resources = best.resources
    return Compiled(
        best.config, resources.registers, resources.spilled, resources.shared, best.occupancy, best.bytes_ahead,
        best.token_instructions, dict(resources.tensor_cores), dict(resources.loop_reads),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- tables


def cells(kernels: Kernels) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the table."""
    head = [
        "file",
        "sites",
        "H",
        "J",
        "bytes/token",
        "operations/token",
        f"roofline at {kernels.options.tokens:,}",
        "bound by",
    ]
    rows = [_cost_cells(row) for row in kernels.rows]
    if kernels.triton:
        head += [
            "registers",
            "spilled",
            "shared",
            "warps resident",
            "instructions/token",
            "reads of a thread",
            "tensor cores",
        ]
        head += ["configuration", "rejected"]
        rows = [cells + _resource_cells(row) for cells, row in zip(rows, kernels.rows, strict=True)]
    return head, rows


def _cost_cells(row: KernelRow) -> list[str]:
    names = ", ".join(row.sites[:MAX_NAMES])
    more = f" and {len(row.sites) - MAX_NAMES} more" if len(row.sites) > MAX_NAMES else ""
    key, value = row.latent_heads
    return [
        row.file, names + more, str(row.heads), str(key) if key == value else f"{key}, {value}",
        f"{row.bytes_per_token:,}", f"{row.operations_per_token:,}", f"{1e6 * row.roofline_seconds:.3g} µs", row.bound,
    ]  # fmt: skip


def _resource_cells(row: KernelRow) -> list[str]:
    compiled = row.compiled
    if compiled is None:
        return ["-", "-", "-", "-", "-", "-", "-", "none fits", str(len(row.rejected))]
    cores = ", ".join(f"{count} {kind}" for kind, count in compiled.tensor_cores.items()) or "none"
    reads = ", ".join(f"{count} x {size} B" for size, count in compiled.loop_reads.items()) or "none"
    warps = f"{compiled.occupancy.warps} ({compiled.occupancy.share:.0%}, {compiled.occupancy.limit})"
    return [
        str(compiled.registers), f"{compiled.spilled} B", f"{compiled.shared:,} B", warps,
        f"{compiled.token_instructions:.3g}", reads, cores, words(compiled.config), str(len(row.rejected)),
    ]  # fmt: skip


def words(config: Config) -> str:
    """Describe a configuration in a few words."""
    return f"{config.block_t} x {config.block_m}, {config.num_warps} warps, {config.num_stages} stages"


def _rejections(kernels: Kernels) -> list[tuple[str, str, str]]:
    """List file, configuration and reason of each rejected configuration."""
    return [(row.file, words(x.config), x.reason) for row in kernels.rows for x in row.rejected]


def _about(kernels: Kernels) -> str:
    chosen = kernels.options
    return f"{chosen.device}, batch {chosen.batch}, queries {chosen.queries}, {chosen.dtype}"


def terminal_table(kernels: Kernels) -> Table:
    """Build the table for a terminal, one line per cell: a row has more cells than fit side by side."""
    head, rows = cells(kernels)
    shown = Table(title=f"Attention on latents: {_about(kernels)}", title_justify="left", show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for row in rows:
        for name, cell in zip(head, row, strict=True):
            shown.add_row(name, cell)
        shown.add_section()
    return shown


def rejected_table(kernels: Kernels) -> Table:
    """Build the table of configurations that do not fit the device."""
    shown = Table(title="Rejected", title_justify="left")
    for name in ("file", "configuration", "reason"):
        shown.add_column(name, overflow="fold")
    for row in _rejections(kernels):
        shown.add_row(*row)
    return shown


def markdown(kernels: Kernels) -> str:
    """Return the text of `kernels.md`."""
    lines = [
        f"# Attention on latents: {_about(kernels)}",
        "",
        "Bytes and operations: per cached token and site. Roofline: lower bound of the time of one step at "
        "one site, from the device's peak bandwidth and throughput.",
    ]
    if kernels.triton:
        lines.append(
            "Registers per thread, shared memory per block, instructions: as compiled by Triton "
            f"{kernels.triton}. Instructions: per warp, cached token and latent head. Reads: global-memory "
            "loads per loop iteration. Configuration: tokens x query rows per tile."
        )
    lines += ["", *_markdown_table(*cells(kernels))]
    if rejected := _rejections(kernels):
        lines += ["", "## Rejected", "", *_markdown_table(["file", "configuration", "reason"], rejected)]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in clean]
