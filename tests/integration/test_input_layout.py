"""Keys and values that are linear in one input: one lossless latent for both, in families that allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs import sampled
from small_models import run, tiny_gpt2, tiny_llama
from torch import Tensor

import fhopt
from fhopt.calibration.data import of_batches
from fhopt.errors import FhoptError
from fhopt.models.capture import capture
from fhopt.passes import pipeline as passes_pipeline
from fhopt.plan.latent_plan import LatentPlan

TOKENS, SEQUENCES = 40, 12  # many more tokens than the width of the latents, 64
Batch = dict[str, Tensor]


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 97, (1, tokens))


def tiny_opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=97, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config).eval()


def tiny_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=2.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=40,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None, init_std=0.2,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def text_batch() -> Batch:
    return {"input_ids": ids()}


def pair_batch() -> Batch:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def sound_batch() -> Batch:
    return {"input_features": torch.randn(1, 8, 2 * TOKENS), "decoder_input_ids": ids()}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Batch], int]] = {
    "gpt2": (tiny_gpt2, text_batch, 2),
    "opt": (tiny_opt, text_batch, 2),
    "bert": (tiny_bert, text_batch, 2),
    "t5": (tiny_t5, pair_batch, 4),  # self and cross of the decoder: the encoder caches nothing
    "whisper": (tiny_whisper, sound_batch, 4),
}
OPTIONS: dict[str, Any] = dict(
    rate_sequences=1, sinks=0, recent=1, block=1, context=TOKENS, tokens=TOKENS, window_bits=16
)


def fitted(name: str, sequences: int = SEQUENCES, **options: Any) -> tuple[Any, Batch, LatentPlan]:
    make, batch, _ = FAMILIES[name]
    model = make().requires_grad_(False)
    given = [batch() for _ in range(sequences + 1)]
    for each in given:
        each |= {"use_cache": False} if hasattr(model, "generate") else {}  # type: ignore[dict-item]
    return model, given[-1], fhopt.fit(model, batches=given, sequences=sequences, **(OPTIONS | options))


@pytest.mark.parametrize("name", sampled(FAMILIES, 3))
def test_one_latent_of_the_input_halves_keys_and_values_without_loss(name: str) -> None:
    model, batch, plan = fitted(name, ratio=2, layout="input")
    assert len(plan.sites) == FAMILIES[name][2]
    for site in plan.sites:
        assert 2 * site.token_bytes() <= 2 * site.site.exact_numbers_per_token  # 16-bit elements have two bytes
    captured = capture(model, (), batch)
    exact = run(captured)
    outcome = passes_pipeline.optimize(passes_pipeline.find_attentions(captured.program), plan)
    assert len(outcome.compressed) == len(plan.sites)
    found = run(captured)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-4  # the promise; about 1e-6 is measured


@pytest.mark.slow
def test_a_shared_latent_beats_separate_ones_at_the_same_bytes() -> None:
    """Each input dimension is stored once instead of twice, and gets twice the bits."""
    torch.manual_seed(0)
    model, batch, shared = fitted("bert", 40, ratio=6)
    assert {site.layout for site in shared.sites} == {"input"}
    torch.manual_seed(0)  # the same weights, which the plan requires
    _, _, separate = fitted("bert", 40, ratio=6, layout="band")
    assert shared.provenance["predicted_nats"] < separate.provenance["predicted_nats"]
    losses = []
    for plan in (shared, separate):
        captured = capture(model, (), batch)
        exact = run(captured)
        assert passes_pipeline.optimize(passes_pipeline.find_attentions(captured.program), plan).compressed
        losses.append(float((run(captured) - exact).square().mean()))
    assert losses[0] < losses[1] / 2


def test_keys_that_rotate_are_refused_with_the_reason() -> None:
    batches = [{"input_ids": ids(), "use_cache": False} for _ in range(SEQUENCES)]
    with pytest.raises(FhoptError, match="its keys rotate"):
        fhopt.fit(tiny_llama(), batches=batches, sequences=SEQUENCES, ratio=2, layout="input", **OPTIONS)  # type: ignore[arg-type]


def test_no_batches_are_refused() -> None:
    with pytest.raises(FhoptError, match="there are no batches"):
        of_batches(tiny_gpt2(), [])
