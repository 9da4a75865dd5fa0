"""Options that commands share; output: consoles, progress bars, JSON."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fhopt.cli.arguments import DEVICE, TEXT
from fhopt.cli.progress import Job, bar, lines
from fhopt.errors import FhoptError
from fhopt.hardware.devices import SHOWN
from fhopt.progress import silent

INTERRUPTED = 130  # exit code after Ctrl-C, 128 + SIGINT
PIPED_WIDTH = 120  # columns without a terminal
LOADING = {"loading": 1.0, "finding attention": 1.0}  # stages of commands that inspect a model, with shares
halved_text_option = click.option(
    "--data", "texts", type=TEXT, multiple=True, default=("topics",), show_default=True,
    help="Calibration text, as in fit; repeatable. Its second half is held out for measuring.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print only one JSON object.")


def _is_first() -> bool:
    """Return whether this process prints: the first that torchrun started, or any process without torchrun."""
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
def progress_bar(
    as_json: bool, shares: Mapping[str, float] = LOADING, transient: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Show the whole job on standard error: a bar with the time left, or a line every ten seconds without a terminal.

    shares: relative times of the job's stages, in order. transient: remove the bar at the end.
    """
    if not _is_first() or as_json:
        yield silent
        return
    job = Job(shares)
    if not sys.stderr.isatty():
        with lines(job):
            yield job
        return
    with bar(job, Console(stderr=True), transient) as moved:

        def report(stage: str, done: int, total: int) -> None:
            job(stage, done, total)
            moved()

        yield report


@contextmanager
def busy(stage: str, as_json: bool) -> Iterator[None]:
    """Show a transient bar for work that reports no progress."""
    with progress_bar(as_json, {stage: 1.0}, transient=True) as progress:
        progress(stage, 0, 1)
        yield


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """On Ctrl-C, say what is kept and how to resume, and exit with code 130. checkpoint: start of the files' paths."""
    try:
        yield
    except KeyboardInterrupt:
        kept = sorted(str(p) for p in checkpoint.parent.iterdir() if p.name.startswith(f"{checkpoint.name}."))
        if kept:
            click.echo(f"stopped. Finished batches are in {', '.join(kept)}. Run the same command to resume.", err=True)
        else:
            click.echo("stopped. Nothing is kept: no batch was finished, or calibration was over.", err=True)
        raise SystemExit(INTERRUPTED) from None


def read_counts(text: str, option: str) -> tuple[int, ...]:
    """Parse a comma-separated list of positive numbers, without duplicates. Raises FhoptError."""
    words = [word.strip() for word in text.split(",")]
    counts = [int(word) if word.isascii() and word.isdecimal() else 0 for word in words]
    if not all(counts):
        raise FhoptError(f"{option} {text!r} is invalid; expected comma-separated positive integers such as 1,4,16.")
    return tuple(dict.fromkeys(counts))


def print_json(value: Any) -> None:
    """Print one JSON value on standard output; non-finite numbers, which JSON does not support, as null."""
    click.echo(json.dumps(_finite(value), indent=1, sort_keys=True))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def calibration_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for calibration data; the defaults are those of `FitOptions`."""
    options = (
        click.option(
            "--data", "texts", type=TEXT, multiple=True, default=("topics", "source", "docstrings", "mixture"),
            show_default=True,
            help="Calibration text; repeatable: file, folder, JSONL, dataset on disk, or topics, source, license, "
                "docstrings, mixture.",
        ),
        _count("--sequences", 8, "Calibration sequences for the bases."),
        _count("--rate-sequences", 8, "Calibration sequences for the bit allocation."),
        _count("--context", 1024, "Tokens per sequence."),
        _count("--tokens", 8192, "Target context length, at which compression ratios are computed."),
        click.option(
            "--recent", type=int,
            help="Size of the residual window: newest tokens, not yet quantized to latents. [default: --tokens / 32]",
        ),
        _count("--sinks", 16, "Number of attention sinks: first tokens, stored in full precision."),
        _count(
            "--mean-tokens", 256,
            "Subtract the mean of the first N tokens before quantizing. Use 0 for plans that will be exported.",
        ),
        click.option(
            "--segment", type=int,
            help="Undo RoPE per segment of N tokens before quantizing keys, so that quality does not degrade with "
                "context length; 0 disables. [default: 512; 0 with --pages, --mean-tokens 0 or a GPU]",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Random seed."
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _count(name: str, default: int, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=int, default=default, show_default=True, help=text)


DTYPES = ("bfloat16", "float16", "float32")
AUTO_DTYPE = "auto"
_placement_option = click.option(
    "--device-map",
    help="Device of the weights: auto, cpu, cuda, or a JSON file that maps modules to devices. [default: cpu]",
)


def placement_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for placement and dtype of a model's weights."""
    dtype = click.option(
        "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Dtype of the model."
    )
    return _placement_option(dtype(command))


def calibration_placement_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the same options for commands that calibrate, where `auto` leaves the dtype to `calibration_dtype`."""
    dtype = click.option(
        "--dtype",
        type=click.Choice([AUTO_DTYPE, *DTYPES]),
        default=AUTO_DTYPE,
        show_default=True,
        help="Dtype of the model. auto: bfloat16 for BF16 and GGUF models if this CPU supports it, else float32; "
        "float32 with --max-loss and --pages.",
    )
    return _placement_option(dtype(command))


def calibration_dtype(model: str, asked: str, device_map: str | None, is_measured: bool = False) -> str:
    """Resolve the dtype in which a command calibrates MODEL, from `calibration_placement_options`.

    is_measured: whether the KL of plans is measured, too; 16-bit rounding errors would exceed it.
    """
    if asked != AUTO_DTYPE:
        return asked
    from fhopt.hardware.this_cpu import multiplies_bfloat16
    from fhopt.models.model_name import is_of_few_bits

    may_be = not is_measured and device_map in (None, "cpu")
    return "bfloat16" if may_be and is_of_few_bits(model) and multiplies_bfloat16() else "float32"


blocks_option = click.option(
    "--keep-blocks", is_flag=True,
    help="Run GGUF weights in their quantized blocks: less memory and faster decoding, CPU only. --dtype applies "
        "to everything else.",
)  # fmt: skip

device_option = click.option(
    "--device", "devices", type=DEVICE, multiple=True, default=SHOWN, show_default=True,
    help="Device for break-even contexts and rooflines, as in cost; repeatable.",
)  # fmt: skip
