"""A GGUF file of a small model with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import TEMPLATE
from tokenizers import pre_tokenizers

LAYERS, WIDTH, KV_WIDTH, INNER, CONTEXT = 2, 64, 32, 96, 2048


def save_text_gguf(path: Path, kinds: Mapping[str, str] | None = None, tied: bool = True) -> None:
    """Save a Llama with random weights, H=4, G=2, D=16, a byte-level tokenizer and a chat template.

    kinds: formats of matrices by a part of their names; "" for all others. tied: the head is the embedding.
    """
    gguf: Any = pytest.importorskip("gguf")
    torch.manual_seed(1)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *letters, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    numbers = dict(
        context_length=CONTEXT, embedding_length=WIDTH, block_count=LAYERS, feed_forward_length=INNER, head_count=4,
        head_count_kv=2, layer_norm_rms_eps=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_chat_template(TEMPLATE)
    head = {} if tied else {"output": (len(words), WIDTH)}
    for name, shape in (shapes(len(words)) | head).items():
        weight = torch.ones(shape) if "norm" in name else 0.2 * torch.randn(shape)
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), None)
        if kind is None or weight.dim() < 2:
            writer.add_tensor(f"{name}.weight", weight.numpy())
            continue
        type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight.numpy(), type), raw_dtype=type)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def shapes(words: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    found: dict[str, tuple[int, ...]] = {"token_embd": (words, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (KV_WIDTH, WIDTH),
            "attn_v": (KV_WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }  # fmt: skip
        found |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return found
