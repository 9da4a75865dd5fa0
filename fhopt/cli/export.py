"""Commands that write models: `fhopt rewrite`, `fhopt export`, `fhopt verify`."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import EXPORTED, MODEL, PLAN, REWRITTEN, TEXT
from fhopt.cli.options import DTYPES, busy, json_option, output_console, print_json, progress_bar
from fhopt.errors import FhoptError

_force_option = click.option("--force", is_flag=True, help="Replace an older folder of this command at --out.")
_EXPORTING = {"loading": 1.0, "exporting": 10.0}  # stages, and their shares of the time


@main.command()
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_path", type=PLAN, required=True, help="The plan to apply.")
@click.option(
    "--data",
    "texts",
    type=TEXT,
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text for the model card's quality results, as in eval; repeatable.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure quality for the model card, which takes a few minutes.",
)
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences per text.")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sequence.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the weights. [default: as stored; float32 unless MODEL is a Hugging Face folder]",
)
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    help="Maximum size of a weight file; copied files keep their size.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["folder", "pt2"]),
    default="folder",
    show_default=True,
    help="folder: a rewritten folder. pt2: exported programs, which run without fhopt: a decode step with latents "
    "as state, or any module.",
)
@click.option(
    "--aot/--no-aot",
    default=True,
    show_default=True,
    help="With --format pt2: also compile the programs, which takes minutes.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@_force_option
@json_option
def rewrite_command(
    model: str, plan_path: Path, texts: tuple[str, ...], measure: bool, sequences: int, context: int,
    dtype: str | None, shard_size: str, kind: str, aot: bool, out: Path, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL and its plan as one folder, which fhopt.load and transformers open, with or without the plan.

    The weights are unchanged; those of a Hugging Face folder are copied. MODEL must generate text, except with
    --format pt2.
    """
    _check_size(shard_size)

    import torch

    from fhopt.export import pt2_module, pt2_step, rewrite_folder
    from fhopt.models.cache_layers import measured_layers
    from fhopt.models.loader import load_model
    from fhopt.models.model_name import folder_of
    from fhopt.plan.cache_size import cache_size
    from fhopt.plan.latent_plan import LatentPlan

    out, source = Path(os.path.abspath(out)), folder_of(model)
    _check_new(out, force)
    plan = LatentPlan.load(plan_path)
    own = rewrite_folder.stored_dtype(source) if source else None
    if kind == "pt2":
        pt2_step.check_out(out, pt2_step.DESCRIPTION, pt2_module.DESCRIPTION)
    with busy("loading", as_json):
        loaded = load_model(model, getattr(torch, dtype) if dtype else own or torch.float32)
    if kind == "pt2":
        is_decoder = loaded.tokenizer is not None and hasattr(loaded.module, "generate")
        write = pt2_step.write_programs if is_decoder else pt2_module.write_module
        with busy("programs", as_json):
            write(loaded, plan, out, compiled=aot)
        print_json({"path": str(out)}) if as_json else click.echo(f"programs written to {out}")
        return
    rewrite_folder.check_rewritable(loaded, plan, out, source)
    with progress_bar(as_json, {"loss": 10.0, "writing": 1.0}) as progress:
        progress("loss", 0, len(texts))
        losses = rewrite_folder.losses(loaded, plan, texts if measure else (), sequences, context, progress)
        progress("writing", 0, 1)
        written = rewrite_folder.rewrite_folder(loaded, plan, out, source, shard_size, losses)
    if as_json:
        ratios = {"ratio": plan.ratio(), "whole_ratio": cache_size(plan, layers=measured_layers(loaded.module)).ratio}
        print_json(asdict(written) | {"path": str(out), "digest": plan.digest()} | ratios)
        return
    console = output_console(as_json)
    for text, result in losses.items():
        console.print(f"{text}: perplexity {result.exact:.4f} -> {result.plan:.4f} ({result.increase_percent:+.2f}%)")
    console.print(
        f"{written.total_bytes:,} bytes written to {out}: {written.weight_bytes:,} of weights, {written.plan_bytes:,} "
        "of the plan.",
        soft_wrap=True,
        highlight=False,
    )


def _check_new(out: Path, force: bool) -> None:
    """Raise FhoptError if a folder that this command wrote before would be replaced without --force."""
    from fhopt.export.pt2_module import DESCRIPTION as PROGRAM
    from fhopt.export.pt2_step import DESCRIPTION as STEP
    from fhopt.models.rewritten_folder import MANIFEST

    if not force and any((out / name).is_file() for name in (MANIFEST, STEP, PROGRAM)):
        raise FhoptError(f"{out} exists; expected a new folder. Choose another name, or replace it with --force.")


def _check_size(text: str) -> None:
    if re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]B", text, re.IGNORECASE) is None:
        raise FhoptError(f"--shard-size {text!r} is invalid; expected a size such as 500MB or 5GB.")


@main.command("export")
@click.argument("folder", type=REWRITTEN)
@click.option(
    "--target",
    required=True,
    help="mlir, or an IREE device: iree-cpu, iree-vulkan, iree-cuda, iree-rocm, iree-metal.",
)
@click.option(
    "--arch",
    default="",
    help="Architecture in IREE's spelling: aarch64:cortex-a76, sm_90, gfx942... [default: common ones]",
)
@click.option(
    "--dialect", type=click.Choice(["linalg", "torch"]), default="linalg", show_default=True, help="MLIR dialect."
)
@click.option("--bytecode", is_flag=True, help="Write MLIR bytecode instead of text.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write. [default: FOLDER-TARGET]")
@_force_option
@json_option
def export_command(
    folder: Path, target: str, arch: str, dialect: str, bytecode: bool, out: Path | None, force: bool, as_json: bool
) -> None:
    """Export a decode step of the rewritten model in FOLDER as MLIR or as a module of IREE, with its weights.

    The latents are state that the caller keeps. Needs the extra mlir.
    """
    from fhopt.export.targets import Target

    out = Path(os.path.abspath(out or folder.with_name(f"{folder.name}-{target}")))
    chosen = Target(target, arch, dialect, bytecode)
    chosen.check()
    _check_new(out, force)

    from fhopt.export.mlir import export
    from fhopt.models.loader import load_model
    from fhopt.models.rewritten_folder import read_folder

    plan = read_folder(folder).plan
    with progress_bar(as_json, _EXPORTING) as progress:
        progress("loading", 0, 1)
        loaded = load_model(str(folder))
        progress("exporting", 0, 1)
        export(loaded, plan, chosen, out)
    files = {p.name: p.stat().st_size for p in sorted(out.iterdir()) if p.is_file()}
    if as_json:
        print_json({"path": str(out), "files": files})
        return
    for name, size in files.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"written to {out}")


@main.command("verify")
@click.argument("folder", type=EXPORTED)
@json_option
def verify_step(folder: Path, as_json: bool) -> None:
    """Prove that the decode step in FOLDER never reconstructs keys or values, and count its cost per token.

    The proof reads the program's code. FOLDER was written by `fhopt export`, or by `fhopt rewrite`, whose decode step
    is lowered first. The exit code is 1 if the proof fails. Requires the extra mlir.
    """
    from fhopt.export.mlir_check import verify_folder

    with busy("verifying", as_json):
        result = verify_folder(folder)
    if as_json:
        print_json(asdict(result))
    else:
        click.echo(
            f"multiplications: {result.macs}, T quantized tokens\nper token: {result.bytes_per_token:,} bytes "
            f"(full precision {result.exact_bytes_per_token:,}), {result.macs_per_token:,} "
            f"multiplications\nlargest float tensor: {result.largest_per_token:,} elements per token"
        )
        for fault in result.faults:
            click.echo(f"FAULT: {fault}")
        click.echo(f"{len(result.faults)} faults." if result.faults else "No key or value is ever reconstructed.")
    if result.faults:
        raise SystemExit(1)
