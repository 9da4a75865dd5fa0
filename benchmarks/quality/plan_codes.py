"""Quality of plans with different codes at the same size, on the same tokens and full-precision tokens.

    python -m benchmarks.quality.plan_codes --plan uniform@8x=FOLDER --plan trellis@8x=FOLDER --text FILE ...
                                                       SmolLM2: benchmarks/results/quality-NAME-codes.json
    python -m benchmarks.quality.plan_codes --model FOLDER --dtype bfloat16 ...  another model

Plans of one calibration file: `fhopt fit --statistics FILE --ratio 8 --code trellis -o FOLDER`. The first `--context`
tokens of the second half of each text are used, with the model in float32 by default; each token attends to the tokens
it would attend to in decoding. A plan's baseline is the uniform one of its size, if there is one. The file is written
after each text; results of texts from earlier runs stay in it.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.recording import Row, kept_rows, screen, table, write
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, paired, read_steps, switched
from fhopt.fitting.codes import UNIFORM
from fhopt.models.loader import load_model
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens


def measured(model: object, ids: Tensor, plans: dict[str, LatentPlan]) -> dict[str, tuple[float, float]]:
    """Return KL (nats/token) and perplexity increase (percent) of each plan on token ids [T]."""
    first = next(iter(plans.values()))
    parts: dict[str, list[Tensor]] = {name: [] for name in plans}
    with torch.inference_mode(), switched(model, first):
        caches = [new_cache(model, None), *(new_cache(model, plan) for plan in plans.values())]
        for at, (exact, *others) in read_steps(model, ids[None, :-1], caches, first):
            for name, logits in zip(plans, others, strict=True):
                parts[name].append(paired(exact[0], logits[0], ids[at + 1 :]))
    found = {}
    for name, costs in parts.items():
        exact, planned, kl = torch.cat(costs, -1).mean(-1)
        found[name] = float(kl), 100 * float((planned - exact).exp() - 1)
    return found


def rows_of(text: str, found: dict[str, tuple[float, float]]) -> list[Row]:
    """Return the rows of a text; plans are named CODE@SIZE."""
    rows = []
    for name, (kl, increase) in found.items():
        code, size = name.split("@")
        beside = found.get(f"{UNIFORM}@{size}")
        baseline = None if beside is None else beside[0]
        case, impl = f"{text}@{size}", f"fhopt, {code}"
        rows.append(Row(case, impl, "kl", kl, "nats/token", baseline, None if baseline is None else baseline / kl))
        rows.append(Row(case, impl, "perplexity_increase_percent", increase, "%"))
    return rows


@click.command()
@click.option("--model", default="demo", show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--plan", "plans", multiple=True, required=True, metavar="CODE@SIZE=FOLDER", help="A plan; repeatable.")
@click.option("--text", "texts", multiple=True, required=True, help="A file or a built-in name; repeatable.")
@click.option("--context", default=1024, show_default=True, help="Tokens of each text.")
def main(model: str, dtype: str, plans: tuple[str, ...], texts: tuple[str, ...], context: int) -> None:
    """Measure all plans on each text."""
    if not all(re.fullmatch(r"[^@=]+@[\d.]+x=.+", plan) for plan in plans):
        raise click.BadParameter("expected CODE@SIZE=FOLDER, such as trellis@8x=plans/8t.", param_hint="--plan")
    try:
        loaded = load_model(model, getattr(torch, dtype))
        fitted = {name: LatentPlan.load(folder) for name, folder in (plan.split("=", 1) for plan in plans)}
        if len({(plan.window, plan.mean_tokens) for plan in fitted.values()}) > 1:
            raise FhoptError("the plans have different windows or means; expected those of one calibration.")
        label = "SmolLM2-135M-Instruct" if model == "demo" else Path(model).name.removesuffix(".gguf")
        rows: list[Row] = []
        for text in texts:
            half = tokens.halves(tokens.read_text(text))[1]
            (ids,) = tokens.sequences(loaded.tokenizer, half, count=1, length=context, what=text)
            rows += rows_of(Path(text).stem, measured(loaded.language_model(), ids, fitted))
            name = f"quality-{label}-codes"
            anew = {row.case for row in rows}
            write(name, [*kept_rows(name, anew.__contains__), *rows])
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    screen().print(table(name, rows))


if __name__ == "__main__":
    main()
