"""Fit a plan for the demo's model, save it, load it, and generate with latents.

python examples/fit_and_generate.py
"""

from __future__ import annotations

import tempfile

import fhopt
from fhopt.calibration.options import FitOptions
from fhopt.models.loader import load_model
from fhopt.planning.pipeline import fit_to_text


def main() -> None:
    loaded = load_model("demo")
    fitted = fit_to_text(loaded, FitOptions(ratio=4, sequences=4, rate_sequences=4))
    with tempfile.TemporaryDirectory() as folder:
        plan = fhopt.LatentPlan.load(fitted.plan.save(f"{folder}/plan"))
    model, tokenizer = loaded.language_model(), loaded.tokenizer
    fhopt.apply(model, plan)
    inputs = tokenizer("The with statement is used to", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    print(f"{len(plan.sites)} sites, {plan.ratio():.2f}x smaller:", tokenizer.decode(output[0]))


if __name__ == "__main__":
    main()
