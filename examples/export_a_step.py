"""Export a decode step as two programs that need only torch; the latents are state that the caller keeps.

python examples/export_a_step.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fhopt
from fhopt.export import pt2_step, step_state
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.models.capture import capture
from fhopt.passes import pipeline


def small_model() -> Any:
    """Make a language model with random weights and a vocabulary of 64 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def main() -> None:
    model, ids = small_model(), torch.randint(0, 64, (1, 40))
    sites = pipeline.find_attentions(capture(model, (), {"input_ids": ids, "use_cache": False}).program).sites
    plan = fit_plan.exact_plan(sites.values(), recent=8, block=8)  # or a plan from fhopt.fit
    exported = pt2_step.export_pt2(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for name in ("step", "seal"):
            path = Path(folder) / f"{name}.pt2"
            torch.export.save(getattr(exported, name), path)
            programs.append(torch.export.load(path).module())
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    state = step_state.StepState(plan, exported.state, *programs)  # what a caller does between two decode steps
    fhopt.apply(model, plan)
    cache, difference = latent_cache(model), 0.0
    for token in ids.split(1, 1):
        wanted = model(token, cache=cache).logits
        difference = max(difference, float((state.step(token) - wanted).abs().max()))
    print(f"{state.tokens} tokens, {state.quantized} of them quantized; largest difference of a logit {difference:.1e}")
    for tensor in exported.state:
        print(f"  {tensor.name} {tensor.shape} {tensor.dtype}")


if __name__ == "__main__":
    main()
