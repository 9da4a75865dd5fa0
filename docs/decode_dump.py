"""Write the decode program of a model with layers of SmolLM2-135M's shapes, for the page that explains it.

    python docs/decode_dump.py         writes docs/explanation/decode_step.txt

The weights are random: the program does not depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import fhopt
from fhopt.decode.dump import program_text
from fhopt.decode.programs import decode_programs
from fhopt.fitting.fit_plan import exact_plan
from fhopt.hf.apply import latent_cache
from fhopt.models.capture import capture
from fhopt.models.model_facts import cache_argument
from fhopt.passes import pipeline

FILE = Path(__file__).resolve().parent / "explanation" / "decode_step.txt"
LAYERS = 3  # the fewest with two segments between layers


def model_of_smollm2_layers() -> Any:
    """Return a Llama with layers of SmolLM2-135M's shapes, and a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def dump() -> str:
    """Return the text of the program. Raises RuntimeError without a C++ compiler."""
    model, ids = model_of_smollm2_layers(), torch.ones(1, 32, dtype=torch.int64)
    found = pipeline.find_attentions(capture(model, (), {"input_ids": ids, "use_cache": False}).program)
    fhopt.prepare(fhopt.apply(model, exact_plan(found.sites.values(), recent=8, block=8)))
    cache = latent_cache(model)
    with torch.no_grad():
        for tokens in (ids, ids[:, :1]):
            model(tokens, **{cache_argument(model): cache})
    state = decode_programs(model)
    if state is None or not state.programs:
        raise RuntimeError("there is no program; expected a C++ compiler. Install g++")
    return program_text(model, state.programs[0])


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else FILE).write_text(dump(), encoding="utf-8")
