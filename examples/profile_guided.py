"""Fit a plan to the first calls of a compiled model, without a plan or a text.

python examples/profile_guided.py
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fhopt


def small_model() -> Any:
    """Make a language model with random weights and a vocabulary of 64 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main() -> None:
    logging.basicConfig(level=logging.WARNING)  # fhopt logs once what it has done
    model = small_model()
    # 4x smaller, if that loses at most 2 %, fitted to the first 4,096 tokens. Defaults: at most 1 %, 16,384 tokens.
    model.compile(backend="flashhead", options={"ratio": 4, "max_loss": "2%", "calibration_tokens": 4096})
    with torch.no_grad():
        for _ in range(9):  # the program's normal calls; the ninth completes the calibration tokens
            model(input_ids=torch.randint(2, 64, (1, 480)), use_cache=False)
        prompt = torch.randint(2, 64, (1, 300))
        print("generated:", model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 300:].tolist())
    print(fhopt.report(model))


if __name__ == "__main__":
    main()
