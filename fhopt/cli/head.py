"""`fhopt head`: a retrieval language-model head, which finds the largest logits from few of its bytes."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import MODEL
from fhopt.cli.options import DTYPES, halved_text_option, json_option, output_console, print_json, progress_bar


@main.command()
@click.argument("model", type=MODEL)
@halved_text_option
@click.option("--sequences", type=int, default=8, show_default=True, help="Calibration sequences.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens per sequence.")
@click.option("--clusters", type=int, help="Number of row clusters. [default: one per 64 rows]")
@click.option(
    "--bits",
    default="auto",
    show_default=True,
    help="Bits per weight: 4, 8, or auto (the mix that loads the fewest bytes).",
)
@click.option(
    "--held-out", type=click.IntRange(min=1), default=1024, show_default=True, help="Held-out tokens to measure on."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Random seed.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Dtype of the model that will use the head.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the head to.")
@json_option
def head(model: str, held_out: int, dtype: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fit a retrieval head for MODEL: finds the largest logits by reading only candidate rows.

    A certificate shows for every hidden state that the result is the dense head's. In Python:
    fhopt.lm_head.apply_head(model, Head.load(FOLDER)).
    """
    from fhopt.files import check_folder, check_writable
    from fhopt.lm_head.options import FILES, HeadOptions

    out = Path(os.path.abspath(out))
    chosen = HeadOptions(**options)
    chosen.check()
    check_folder(out, FILES)
    check_writable(out.parent)

    import torch

    from fhopt.lm_head.evaluate import measure_head
    from fhopt.lm_head.fitting import fit_head
    from fhopt.models.loader import load_model

    shares = {"loading": 1.0, "states": 5.0, "basis": 1.0, "clusters": 10.0, "quantize": 1.0, "measuring": 5.0}
    with progress_bar(as_json, shares) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model, getattr(torch, dtype))
        made = fit_head(loaded, chosen, progress)
        progress("measuring", 0, 1)
        result = measure_head(loaded, made, chosen.texts, held_out, min(chosen.context, held_out))
    made.save(out)
    if as_json:
        about = {"head_path": str(out), "site": asdict(made.site), "fitted": made.about, "clusters": made.clusters}
        print_json(about | {"probes": made.probes, "measured": asdict(result)})
        return
    console = output_console(as_json)
    console.print(
        f"{made.site.weight}: {made.site.vocabulary:,} x {made.site.width:,}, "
        f"{dtype}\n{result.certified_percent:.2f}% of {result.positions:,} held-out tokens certified, "
        f"{result.agreement_percent:.2f}% equal to the dense head\nbytes loaded per token "
        f"{result.dense_bytes_per_row:,} -> {result.bytes_per_row:,.0f}, time {result.dense_time_ms:.2f} -> "
        f"{result.time_ms:.2f} ms on {result.threads} threads\nwithout a certificate, {made.probes} of "
        f"{made.clusters} clusters: {result.probed_agreement_percent:.2f}% equal",
        highlight=False,
    )
    console.print(f"head written to {out}", soft_wrap=True, highlight=False)
