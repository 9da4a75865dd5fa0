"""Recording of benchmark results: one JSON file, one table, one plot.

    rows = [Row("llama@2048", "fhopt", "time_ms", 1.2, "ms", baseline=1.5, ratio=1.25), ...]
    record("decode", rows, draw)  ->  benchmarks/results/decode.json, benchmarks/results/decode.png, a printed table

The file names machine, versions and commit of the measurement. A value that is not finite is null in it. A plot is
drawn from the file only, so that `python -m benchmarks.plots` can redraw it without a measurement.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("fhopt", "torch", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class Row:
    """One measurement. baseline: the value it is compared with, in the same unit. ratio: above 1 if ours is better.

    error: why there is no value; the value is NaN then.
    """

    case: str
    impl: str
    metric: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class ResultsFile:
    """A results file: what it was measured on, and its rows (those without a value have NaN)."""

    name: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    rows: tuple[Row, ...]

    @property
    def hardware(self) -> str:
        """Return CPU, vector unit and threads, or the GPU."""
        on = self.machine
        threads = f"{on['threads']} thread" + ("s" if on["threads"] != 1 else "")
        return str(on.get("gpu") or f"{on['cpu']} ({on['cpu_capability']}), {threads}")

    def of(self, metric: str) -> list[Row]:
        """Return the rows of one metric that have a value."""
        return [row for row in self.rows if row.metric == metric and math.isfinite(row.value)]


Draw = Callable[["Figure", ResultsFile], None]


def is_quick() -> bool:
    """Return whether QUICK=1 requests a small version of the benchmark, of under a minute."""
    return os.environ.get("QUICK", "") == "1"


def record(
    name: str, rows: Sequence[Row], draw: Draw | None = None, summary: Table | None = None,
    further: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write `results/<name>.json`, with `draw` also `.png`, print a table, and return the file's path.

    draw: fills the plot from the file. summary: printed instead of the table of all rows. further: versions of packages
    in other processes.
    """
    path = write(name, rows, further)
    console = screen()
    console.print(summary or table(name, rows))
    picture = plot(name, draw) if draw else None
    console.print(f"{name}: {_shown(path)}" + (f", {_shown(picture)}" if picture else ""))
    if draw and picture is None:
        console.print("No plot: matplotlib is not installed; pip install 'fhopt[bench]' brings it.", markup=False)
    return path


def read(name: str) -> ResultsFile:
    """Read `results/<name>.json`."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(Row)}
    rows = [{key: value for key, value in row.items() if key in known} for row in content["rows"]]
    parsed = (Row(**row | {"value": math.nan if row["value"] is None else row["value"]}) for row in rows)
    return ResultsFile(name, content["machine"], content["versions"], content["commit"], tuple(parsed))


def kept_rows(name: str, is_remeasured: Callable[[str], bool]) -> list[Row]:
    """Return the rows of an earlier run in `results/<name>.json`, except for cases that are re-measured."""
    rows = read(name).rows if (RESULTS / f"{name}.json").exists() else ()
    return [row for row in rows if math.isfinite(row.value) and not is_remeasured(row.case)]


def process_bytes(trim: bool = True) -> int:
    """Return the anonymous memory of this process, swapped out or not, without the libraries.

    trim: first return freed blocks that the C library retains. On systems without /proc: all resident memory.
    """
    gc.collect()
    if trim and sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    sizes = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmSwap")))
    return 1024 * sum(int(size.split()[0]) for size in sizes.values())


def screen() -> Console:
    """Return a console whose tables keep their columns if the output is piped into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def child_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a child process that runs a module of `benchmarks`, from any folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


# --------------------------------------------------------------------------------------------------- file


def write(name: str, rows: Iterable[Row], further: Mapping[str, str] | None = None) -> Path:
    """Write `results/<name>.json` atomically. further: versions of packages in other processes."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = json.dumps(
        {"machine": machine(), "versions": versions() | dict(further or {}), "commit": commit()}, indent=1
    )
    figures = [_entry(row) for row in rows]
    lines = ",\n".join(  # one row per line
        f"  {json.dumps(figure, allow_nan=False, separators=(',', ':'))}" for figure in figures
    )
    staging = path.with_name(f".{path.name}.part")
    staging.write_text(f'{head.removesuffix("}").rstrip()},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    staging.replace(path)
    return path


def _entry(row: Row) -> dict[str, Any]:
    """Return a row in the form of the file: `error` only if there is one."""
    return {k: _number(v) for k, v in dataclasses.asdict(row).items() if k != "error" or v is not None}


def _number(value: Any) -> Any:
    """Return a value in the form of the file: a fraction with six digits, null if not finite."""
    if not isinstance(value, float) or value.is_integer():
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def machine() -> dict[str, Any]:
    """Return the machine properties that results depend on; nothing that identifies the machine or its owner."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed ones of PACKAGES."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str:
    """Return the measured commit, with `-dirty` if files differ from it; "unknown" outside of git."""
    try:
        known = _git("rev-parse", "HEAD")
        return known + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------- table, plot


def table(name: str, rows: Iterable[Row]) -> Table:
    """Format a line per case and implementation, a column per metric, ratios after the values."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    metrics: dict[str, str] = {}
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        cells.setdefault((row.case, row.impl), {})[row.metric] = f"{row.value:.4g}{ratio}"
        metrics[row.metric] = row.unit
    out = Table(title=name, title_justify="left")
    for heading in ("case", "impl"):
        out.add_column(heading, no_wrap=True)
    for metric, unit in metrics.items():
        out.add_column(f"{metric}\n{unit}", justify="right", no_wrap=True)
    for (case, impl), values in cells.items():
        out.add_row(case, impl, *(values.get(metric, "") for metric in metrics))
    return out


def plot(name: str, draw: Draw) -> Path | None:
    """Plot `results/<name>.json` as `<name>.png`; None if matplotlib is not installed.

    The picture holds the hash of the file that it was drawn from.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(9.0, 5.0), dpi=120, layout="constrained")
    draw(figure, read(name))
    path = RESULTS / f"{name}.png"
    figure.savefig(path, metadata={"Source": data_hash(name), "Software": None})
    return path


def data_hash(name: str) -> str:
    """Return the hash of the results that a plot of `results/<name>.json` shows."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()[:16]
