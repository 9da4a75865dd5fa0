"""Compress the cross-attention cache of an encoder-decoder to one latent of half the size, without loss.

python examples/cross_attention.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, logging

import fhopt

SPECIAL: dict[str, Any] = dict(
    bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None, forced_decoder_ids=None,
)  # fmt: skip


def small_model() -> Any:
    """Make a Whisper with random weights: 8 mel channels, 60 frames, 30 encoder states."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=30,
        max_target_positions=200, init_std=0.2, **SPECIAL,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def main() -> None:
    logging.set_verbosity_error()
    model, options = small_model(), dict(min_new_tokens=24, max_new_tokens=24, do_sample=False)
    batches = [
        {"input_features": torch.randn(1, 8, 60), "decoder_input_ids": torch.randint(3, 64, (1, 150))} for _ in range(8)
    ]
    plan = fhopt.fit(
        model, batches=batches, ratio=2, layout="input", sequences=5, rate_sequences=3, context=150, tokens=160,
        recent=8, block=8,
    )  # fmt: skip
    heard = torch.randn(1, 8, 60)
    exact = model.generate(heard, **options)
    fhopt.apply(model, plan)
    found = model.generate(heard, **options)
    for site in plan.sites:
        latent = site.key.width if site.layout == "input" else site.key.width + site.value.width  # of one latent head
        print(f"{site.site.name}: {site.layout}, {site.site.exact_numbers_per_token} numbers a token, now {latent}")
    print("the same tokens:", bool(torch.equal(exact, found)), "of", found.shape[1])


if __name__ == "__main__":
    main()
