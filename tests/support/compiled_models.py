"""Small models compiled by fhopt's backend."""

from __future__ import annotations

from typing import Any

import torch
from small_models import token_ids

from fhopt.models.capture import Captured, capture
from fhopt.passes import outcome, pipeline


def with_backend(model: Any, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="flashhead", dynamic=dynamic, options=options or None)


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def tiny_bert() -> Any:
    """BERT: 2 layers, H=G=4, D=16, bidirectional, with nontrivial biases and norms."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def with_biases(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 5)
    return model


def captured_sites(model: Any, tokens: int = 96) -> tuple[Captured, outcome.Outcome]:
    options = {"use_cache": False} if hasattr(model, "lm_head") else {}
    captured = capture(model, (), {"input_ids": token_ids(1, tokens), **options})
    return captured, pipeline.find_attentions(captured.program)
