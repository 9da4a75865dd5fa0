"""Commands that write models: `fhopt rewrite`, `fhopt export`, `fhopt verify`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fhopt.cli.app import main
from fhopt.cli.options import json_option, output_console, print_json, progress_bar
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    pass


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="What to cache.")
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text to measure the loss on, for the model card, as in eval; repeatable.",
)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure the loss, which takes a while.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="To measure on, per text.")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of each.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights. [default: as they are; float32 where MODEL is no Hugging Face folder]",
)
@click.option("--shard-size", default="5GB", show_default=True, help="Of files of weights that are not copied.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["folder", "pt2"]),
    default="folder",
    show_default=True,
    help="A model folder, or programs with latents as state that run without fhopt: a decode step, or any module.",
)
@click.option("--aot/--no-aot", default=True, show_default=True, help="pt2: also compile them, which takes minutes.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@json_option
def rewrite(
    model: str, plan_path: Path, texts: tuple[str, ...], measure: bool, sequences: int, context: int,
    dtype: str | None, shard_size: str, kind: str, aot: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL and its plan as one folder, to be opened by fhopt.load, by transformers, and as the exact original.

    Weights stay as they are: those of a Hugging Face folder are copied. MODEL must generate text, but for --format pt2.
    """
    import torch

    from fhopt.export import pt2_module, pt2_step, rewrite_folder
    from fhopt.models.loader import folder_of, load_model
    from fhopt.plan.latent_plan import LatentPlan

    out, source = Path(os.path.abspath(out)), folder_of(model)
    plan = LatentPlan.load(plan_path)
    own = rewrite_folder.stored_dtype(source) if source else None
    if kind == "pt2":
        pt2_step.check_out(out, pt2_step.DESCRIPTION, pt2_module.DESCRIPTION)
    loaded = load_model(model, getattr(torch, dtype) if dtype else own or torch.float32)
    if kind == "pt2":
        is_decoder = loaded.tokenizer is not None and hasattr(loaded.module, "generate")
        write = pt2_step.write_programs if is_decoder else pt2_module.write_module
        write(loaded, plan, out, compiled=aot)
        print_json({"path": str(out)}) if as_json else click.echo(f"programs written to {out}")
        return
    rewrite_folder.check(loaded, plan, out, source)
    with progress_bar(as_json) as progress:
        losses = rewrite_folder.losses(loaded, plan, texts if measure else (), sequences, context, progress)
    written = rewrite_folder.rewrite(loaded, plan, out, source, shard_size, losses)
    if as_json:
        print_json(asdict(written) | {"path": str(out), "digest": plan.digest(), "ratio": plan.ratio()})
        return
    console = output_console(as_json)
    for text, found in losses.items():
        console.print(f"{text}: perplexity {found.exact:.4f} -> {found.plan:.4f} ({found.increase_percent:+.2f} %)")
    console.print(
        f"{written.total_bytes:,} bytes written to {out}: {written.weight_bytes:,} of weights, {written.plan_bytes:,} "
        "of the plan.",
        soft_wrap=True,
        highlight=False,
    )


@main.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--target",
    required=True,
    help="mlir; a device of IREE: iree-cpu, iree-vulkan, iree-cuda, iree-rocm, iree-metal; or vllm, sglang.",
)
@click.option("--arch", default="", help="As IREE names it: aarch64:cortex-a76, sm_90, gfx942... [default: usual ones]")
@click.option("--dialect", type=click.Choice(["linalg", "torch"]), default="linalg", show_default=True)
@click.option("--bytecode", is_flag=True, help="MLIR as bytecode, not text.")
@click.option(
    "--kv-lora-rank",
    "rank",
    type=click.IntRange(min=1),
    help="vllm, sglang: cut the plan to a latent of so many numbers and one rotated key. [default: as it is]",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for it. [default: FOLDER-TARGET]")
@json_option
def export_step(
    folder: Path, target: str, arch: str, dialect: str, bytecode: bool, rank: int | None, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """A decode step of the rewritten model in FOLDER as MLIR or as a module of IREE, weights beside it.

    The latents are state that the caller keeps. Needs the extra mlir.

    For vllm and sglang: a checkpoint of DeepSeek's kind with the plan in its projections; or, of a plan that changes
    nothing but bits, what to serve the original with.
    """
    from fhopt.export.mla_checkpoint import ENGINES
    from fhopt.export.mlir import Target, export
    from fhopt.models.loader import load_model
    from fhopt.models.rewritten_folder import read_folder

    out = Path(os.path.abspath(out or folder.with_name(f"{folder.name}-{target}")))
    if target in ENGINES:
        if arch or bytecode or dialect != "linalg":
            raise FhoptError("--arch, --dialect and --bytecode are of MLIR; expected none of them with this target.")
        _export_checkpoint(folder, target, rank, out, as_json)
        return
    if rank is not None:
        raise FhoptError(f"--kv-lora-rank is of {' and '.join(ENGINES)}; expected it with one of these targets.")
    chosen = Target(target, arch, dialect, bytecode)
    chosen.check()
    plan = read_folder(folder).plan
    export(load_model(str(folder)), plan, chosen, out)
    files = {p.name: p.stat().st_size for p in sorted(out.iterdir()) if p.is_file()}
    if as_json:
        print_json({"path": str(out), "files": files})
        return
    for name, size in files.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"written to {out}")


def _export_checkpoint(folder: Path, target: str, rank: int | None, out: Path, as_json: bool) -> None:
    """For a serving engine: a checkpoint, or what to serve the original with."""
    from fhopt.export import mla, rewrite_folder
    from fhopt.export.mla_checkpoint import ENGINES, export
    from fhopt.models.loader import load_model
    from fhopt.models.rewritten_folder import read_folder

    plan, engine, made = read_folder(folder).plan, ENGINES[target], None
    plan = plan if rank is None else mla.truncate(plan, rank)
    if not mla.is_quantized_at_full_width(plan):
        made = export(load_model(str(folder)), plan, out, engine, folder, rewrite_folder.stored_dtype(folder))
    dtype = engine.cache_dtypes["auto" if made else mla.cache_dtype(plan)]
    command = engine.serve.format(path=out if made else "ORIGINAL", dtype=dtype)
    if as_json:
        written = asdict(made) | {"path": str(out)} if made else None
        print_json({"checkpoint": written, "kv_cache_dtype": dtype, "command": command})
        return
    if made:
        click.echo(
            f"{made.token_bytes:,} bytes a token in 16 bits (exact {made.exact_token_bytes:,}); logits are the plan's "
            f"to {made.error:.1e} of the largest\nwritten to {out}"
        )
    else:
        click.echo("Nothing is written: the plan changes bits alone, and engines do that to the original.")
    click.echo(command)


@main.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def verify_step(folder: Path, as_json: bool) -> None:
    """Prove from its code that the step in FOLDER never makes keys or values of its latents, and what a token takes.

    FOLDER was written by `fhopt export`, or by `fhopt rewrite`: then its step is lowered here. Exit code 1 where
    something does not hold. Needs the extra mlir.
    """
    from fhopt.export.mlir_check import verify_folder

    found = verify_folder(folder)
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(
            f"multiplications: {found.macs}, T sealed tokens\n"
            f"a token takes {found.bytes_per_token:,} bytes (exact {found.exact_bytes_per_token:,}), "
            f"{found.macs_per_token:,} multiplications\n"
            f"largest float tensor: {found.largest_per_token:,} numbers per token"
        )
        for fault in found.faults:
            click.echo(f"FAULT: {fault}")
        click.echo(f"{len(found.faults)} faults." if found.faults else "No key or value is ever rebuilt.")
    if found.faults:
        raise SystemExit(1)
