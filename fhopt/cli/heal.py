"""`fhopt heal`: a plan whose decoders bring a model closer to its exact outputs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import MODEL, PLAN
from fhopt.cli.options import DTYPES, busy, halved_text_option, json_option, output_console, print_json, progress_bar

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan


@main.command()
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_path", type=PLAN, required=True, help="Plan to heal.")
@halved_text_option
@click.option("--tokens", type=int, default=50_000, show_default=True, help="Number of calibration tokens.")
@click.option("--context", type=int, default=1024, show_default=True, help="Tokens per sequence.")
@click.option("--ridge", type=float, help="Regularization toward the plan's decoder matrices.")
@click.option("--held-out", type=int, default=2, show_default=True, help="Held-out sequences to measure on.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Checkpoint file, from which the same command resumes. [default: next to the healed plan]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Dtype of the model; the plan keeps its own.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the healed plan to.")
@json_option
def heal_command(
    model: str, plan_path: Path, ridge: float | None, checkpoint: Path | None, dtype: str, out: Path,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Refit a plan's decoder matrices to reduce its output error, and write a plan of the same size.

    The same command resumes an interrupted healing. MODEL must be a causal language model with a tokenizer.
    """
    from fhopt.files import check_writable
    from fhopt.models.model_files import check_plan_place
    from fhopt.refine.options import HealOptions

    out = Path(os.path.abspath(out))
    chosen = HealOptions(checkpoint=checkpoint or out.with_name(f".{out.name}.healing"), **options)
    chosen = chosen if ridge is None else replace(chosen, ridge=ridge)
    chosen.check()
    check_plan_place(out)

    import torch

    from fhopt.models.loader import load_model
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.refine.heal import heal as improve

    plan = LatentPlan.load(plan_path)
    chosen.check_plan(plan)
    with busy("loading", as_json):
        loaded = load_model(model, getattr(torch, dtype))
    loaded.language_model()
    check_writable(out.parent)
    with progress_bar(as_json, {"before": 1.0, "heal": 10.0, "after": 1.0}) as progress:
        progress("before", 0, 1)
        healed = improve(loaded, plan, chosen, progress)
    healed.save(out)
    _show_healed(healed, out, as_json)


def _show_healed(plan: LatentPlan, out: Path, as_json: bool) -> None:
    healing = plan.provenance["healing"]
    if as_json:
        about = {"plan_path": str(out), "sites": len(plan.sites), "ratio": plan.ratio(), "digest": plan.digest()}
        print_json(about | {"healing": healing})
        return
    before, after = healing["before"], healing["after"]
    console = output_console(as_json)
    console.print(
        f"healed on {healing['tokens']:,} tokens, measured on {after['tokens']:,} held-out tokens:\nKL from "
        f"the full-precision model {before['kl']:.4g} -> {after['kl']:.4g} nats/token\nperplexity increase  "
        f"{before['increase_percent']:+.2f}% -> {after['increase_percent']:+.2f}%",
        highlight=False,
    )
    console.print(f"{plan.ratio():.2f}x plan written to {out}", soft_wrap=True, highlight=False)
