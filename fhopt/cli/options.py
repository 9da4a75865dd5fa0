"""Options that commands share; output: consoles, progress bars, JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PIPED_WIDTH = 120  # columns without a terminal
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def _is_first() -> bool:
    """Return whether this process prints: the first of those that torchrun started, or any other process."""
    return int(os.environ.get("RANK", "0")) == 0


def fails_together(command: Callable[..., None]) -> Callable[..., None]:
    """End all processes of torchrun with the error of the one that fails, which the first process prints."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return command(*args, **kwargs)
        from fhopt.parallel.collectives import OtherFailed, together

        try:
            with together():
                return command(*args, **kwargs)
        except OtherFailed:
            if _is_first():
                raise
            raise SystemExit(2) from None

    return run


def output_console(as_json: bool) -> Console:
    """Return the console for people, on standard output; on standard error with --json."""
    console = Console(stderr=as_json, quiet=as_json)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


@contextmanager
def progress_bar(as_json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each stage on standard error."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_seen = sys.stderr.isatty() and _is_first() and not as_json
    with Progress(*columns, console=Console(stderr=True), disable=not is_seen) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield report


def print_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    click.echo(json.dumps(value, indent=1, sort_keys=True))


def placement_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where a model's weights go, and in which dtype."""
    spread = click.option(
        "--device-map",
        help="Where the weights go: auto, cpu, cuda, or a JSON file of modules and devices. [default: cpu]",
    )
    dtype = click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        default="float32",
        show_default=True,
        help="Dtype of the model.",
    )
    return spread(dtype(command))


device_option = click.option(
    "--device", "devices", multiple=True, default=("h100", "cpu"), show_default=True,
    help="Device for break-even contexts and rooflines, as in cost; repeatable.",
)  # fmt: skip
