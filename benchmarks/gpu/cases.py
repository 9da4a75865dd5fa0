"""Attention shapes, models and sizes that benchmarks/gpu/suite.py measures.

Letters: B batch, H query heads, G kv heads, T tokens, D head size, J latent heads, R latent width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig

from fhopt.codegen.gpu.tuning import token_bytes
from fhopt.codegen.tiers import Tiers
from fhopt.plan.kernel_spec import KernelSpec

SPARE = 128  # positions of static caches after their tokens


def tiers(*pairs: tuple[int, int]) -> Tiers:
    """Return bit groups from (bits, width), with steps for random values of standard deviation about 1."""
    return tuple((bits, width, 3.5 / 2**bits) for bits, width in pairs)


@dataclass(frozen=True)
class LatentStorage:
    """Storage of keys and values: J latent heads, and the bit groups of both sides; empty: unquantized."""

    heads: int
    key: Tiers = ()
    value: Tiers = ()


@dataclass(frozen=True)
class HeadShape:
    """H query heads and G kv heads of D channels, and the latents that may replace the keys and values."""

    heads: int
    kv_heads: int
    dim: int
    latents: tuple[LatentStorage, ...]

    @property
    def name(self) -> str:
        """Name used in tables."""
        heads = f"MHA {self.heads}" if self.is_mha else f"GQA {self.heads}/{self.kv_heads}"
        return f"{heads}x{self.dim}"

    @property
    def is_mha(self) -> bool:
        """Whether every query head has its own keys."""
        return self.heads == self.kv_heads

    def spec(self, latent: LatentStorage, dtype: torch.dtype) -> KernelSpec:
        """Return the kernel spec of a latent."""
        key_width, value_width = (sum(w for _, w, _ in side) or self.dim for side in (latent.key, latent.value))
        return KernelSpec(latent.key, latent.value, key_width, value_width, dtype_name(dtype), False)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the keys and values of a token."""
        return 2 * self.kv_heads * self.dim * dtype.itemsize

    def latent_bytes(self, latent: LatentStorage, dtype: torch.dtype) -> int:
        """Return bytes of the quantized values and scales of a token."""
        return latent.heads * token_bytes(self.spec(latent, dtype))

    def label(self, latent: LatentStorage, dtype: torch.dtype) -> str:
        """Return the name of a latent in tables: its compression ratio."""
        ratio = self.dense_bytes(dtype) / self.latent_bytes(latent, dtype)
        return f"fhopt {ratio:.1f}x" if latent.key else "fhopt, uncoded"


FOUR = tiers((4, 128))
# Planes of whole words of 32 bytes or more, as in plans for GPUs.
MHA_SIXTH = LatentStorage(
    8, tiers((8, 32), (4, 128), (2, 256)), tiers((8, 32), (4, 96), (2, 256))
)  # for 4 kv heads each
MHA_EIGHTH = LatentStorage(8, *[tiers((8, 32), (4, 64), (2, 256))] * 2)
GQA_FIFTH = LatentStorage(4, *[tiers((8, 32), (4, 64), (2, 128))] * 2)  # for 2 each
GQA_EIGHTH = LatentStorage(4, *[tiers((4, 64), (2, 128))] * 2)
MHA = HeadShape(32, 32, 128, (LatentStorage(32), LatentStorage(32, FOUR, FOUR), MHA_SIXTH, MHA_EIGHTH))
GQA = HeadShape(32, 8, 128, (LatentStorage(8), LatentStorage(8, FOUR, FOUR), GQA_FIFTH, GQA_EIGHTH))
WIDE_GQA = replace(GQA, heads=64)


@dataclass(frozen=True)
class ModelShapes:
    """A model by its shapes. `latents`: those of its attention to measure."""

    name: str
    shape: HeadShape
    latents: tuple[LatentStorage, ...]
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    batches: tuple[int, ...]

    def config(self, layers: int, tokens: int) -> Any:
        """Return the configuration for transformers: `layers` layers, positions for `tokens` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=layers, num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv_heads, head_dim=self.shape.dim, max_position_embeddings=tokens,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def depth(self, batch: int, tokens: int, numbers: float) -> int:
        """Return how many layers, with weights and full-precision cache, fit into a memory of `numbers` elements."""
        heads, width = self.shape.heads + self.shape.kv_heads, self.shape.dim
        weights = self.hidden * (2 * heads * width + 3 * self.intermediate)
        place = 2 * batch * (tokens + SPARE) * width  # of keys and values, per head
        rest = 2 * self.vocabulary * self.hidden + 2 * place * self.shape.heads
        return max(0, min(self.layers, int((numbers - rest) // (weights + place * self.shape.kv_heads))))


LLAMA_2_7B = ModelShapes("Llama-2-7B", MHA, (MHA_SIXTH, MHA_EIGHTH), 32, 4096, 11008, 32000, (8,))
LLAMA_31_8B = ModelShapes("Llama-3.1-8B", GQA, (GQA_FIFTH, GQA_EIGHTH), 32, 4096, 14336, 128256, (16,))


@dataclass(frozen=True)
class RunSizes:
    """The sizes of a run. checked: tokens of the checks, whole pages of `page`."""

    shapes: tuple[HeadShape, ...] = (MHA, GQA, WIDE_GQA)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    tokens: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    networks: tuple[ModelShapes, ...] = (LLAMA_2_7B, LLAMA_31_8B)
    step_tokens: tuple[int, ...] = (16384, 32768)
    tuned: tuple[int, int] = (8, 32768)  # batch and tokens for timing configurations
    checked: int = 1088
    page: int = 64
    check_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


QUICK = RunSizes(batches=(8,), tokens=(32768,), networks=(replace(LLAMA_31_8B, layers=8),), step_tokens=(16384,))
TINY = HeadShape(4, 2, 16, (LatentStorage(2), LatentStorage(1, tiers((4, 16), (2, 8)), tiers((4, 16)))))
TINY_NETWORK = ModelShapes("tiny", TINY, TINY.latents[1:], 1, 32, 48, 64, (1,))
TINY_SIZES = RunSizes((TINY,), (1,), (32, 2048), (TINY_NETWORK,), (40,), (1, 32), 48, 16, (torch.float32,))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
