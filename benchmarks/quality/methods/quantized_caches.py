"""Other small KV caches as transformers caches, and their bytes.

    quantize a block:  keys, values [B,G,N,D]  ->  the method's quantizer or projection and back  ->  the cache

Only quality is compared, so a quantized token is stored as its dequantized value, and bytes are computed, for T tokens
of L layers with G heads of D channels each. With s attention sinks, r recent tokens and blocks of b, as in a plan,

    quantized(T) = floor((T - s - r) / b) * b,    bytes = L G (quantized(T) c + (T - quantized(T)) 4 D)

where 4 D are the 16-bit key and value of a token and c is the size of a quantized token, keys and values together:

    kivi        2 D (n + 32 / g) / 8    n bits per channel, a 16-bit scale and zero point per group of g = 32
    rtn         2 (D n / 8 + 2)         n bits per channel, a 16-bit scale per token

The other quantizers are in separate modules, each with its formula: rotated_codecs.py, float_codecs.py and
transform_codecs.py per head, joint_caches.py and kvtc.py for all heads and layers of a token together.
evicting_caches.py evicts tokens. Fitted data (bases, codebooks, rotations) is not counted, as a plan's bases are not.

transformers' own cache (quanto, hqq) has no attention sinks. It quantizes the whole first call, then stores new tokens
in full precision until there are 128 (its `residual_length`):

    exact(T) = (T - first call) mod 128,    c = 2 D (n + 32 / g) / 8    with a scale and zero point per g = 64

KIVI: arXiv 2402.02750. quanto and hqq are run by `transformers.QuantizedCache`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer

NUMBER_BYTES = 2  # per full-precision value
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
PACKAGES = {
    "quanto": "optimum-quanto",
    "hqq": "hqq",
}  # hqq is not an extra, since it slows down every import of transformers


@dataclass(frozen=True)
class Schedule:
    """Which tokens stay in full precision; the fields have the meaning of a plan's."""

    sinks: int = 4
    recent: int = 64
    block: int = 64

    def quantized(self, tokens: int) -> int:
        """Return how many of `tokens` tokens are quantized."""
        return max(0, tokens - self.sinks - self.recent) // self.block * self.block

    @property
    def first_step(self) -> int:
        """Return the number of tokens at which the first block is quantized."""
        return self.sinks + self.recent + self.block


@dataclass(frozen=True)
class CacheShape:
    """L layers of G kv heads of D channels."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Heads of all layers."""
        return self.layers * self.kv_heads

    @property
    def exact_token_bytes(self) -> int:
        """Bytes of one token's keys and values in 16 bits."""
        return self.heads * 2 * self.head_dim * NUMBER_BYTES

    @staticmethod
    def of(model: Any) -> CacheShape:
        """Return the shape of a transformers decoder's cache."""
        config = model.config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return CacheShape(config.num_hidden_layers, heads, dim)


class Baseline(Protocol):
    """A KV-cache compression method. `family` names the line in a plot, `name` the point on it."""

    @property
    def family(self) -> str:
        """Return the name that all sizes of the method share."""

    @property
    def name(self) -> str:
        """Family and size."""

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache for `model`."""

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return the context in which `model` runs with a new cache."""

    def cache_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Return the bytes of one sequence of `tokens` tokens, everything included, unquantized values in 16 bits."""


# --------------------------------------------------------------------------------------------------- codecs


class Codec(Protocol):
    """The quantizer of a method."""

    @property
    def family(self) -> str:
        """Name of the method."""

    @property
    def name(self) -> str:
        """Name of the method at this size."""

    def token_bytes(self, head_dim: int) -> float:
        """Return the bytes of one token's key and value in one head."""

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Return keys x [B,G,N,D], quantized and dequantized."""

    def value(self, x: Tensor, layer: int) -> Tensor:
        """Return values x [B,G,N,D], quantized and dequantized."""


@dataclass(frozen=True)
class Kivi:
    """Keys per channel in groups of tokens, values per token in groups of channels, with a zero point (KIVI, 3.2)."""

    bits: int
    group: int = 32
    family: str = "kivi"

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits}bit"

    def token_bytes(self, head_dim: int) -> float:
        """Return bytes of quantized values, and of a 16-bit scale and zero point per group."""
        return 2 * head_dim * (self.bits + 32 / self.group) / 8

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize keys in groups of tokens; N is a multiple of the group."""
        grouped = x.unflatten(2, (-1, self.group))  # [B, G, N/g, g, D]
        return asymmetric(grouped, self.bits, 3).flatten(2, 3)

    def value(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize values in groups of channels, all of them if there are fewer than a group."""
        grouped = x.unflatten(3, (-1, min(self.group, x.shape[3])))  # [B, G, N, D/g, g]
        return asymmetric(grouped, self.bits, 4).flatten(3)


@dataclass(frozen=True)
class RoundToNearest:
    """One scale per token and head, from its largest magnitude; quantized values symmetric about zero."""

    bits: int
    family: str = "rtn"

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits}bit"

    def token_bytes(self, head_dim: int) -> float:
        """Return bytes of quantized values and a 16-bit scale, of key and value."""
        return 2 * (head_dim * self.bits / 8 + 2)

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D] by token."""
        most = 2 ** (self.bits - 1) - 1
        scale = to_16_bits(x.abs().amax(3, keepdim=True) / most).clamp_min(SMALLEST_SCALE)
        return (x / scale).round().clamp(-most - 1, most) * scale

    value = key


@dataclass(frozen=True)
class AsymmetricCodes:
    """Quantized values 0 ... 2^bits - 1, their scale and zero point, broadcastable to them and rounded to 16 bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def of(x: Tensor, bits: int, dim: int, clip: float = 1.0) -> AsymmetricCodes:
        """Round along `dim` to 2^bits levels from `clip` x minimum to `clip` x maximum (KIVI, equation 1)."""
        least, most = clip * x.amin(dim, keepdim=True), clip * x.amax(dim, keepdim=True)
        scale = to_16_bits((most - least) / (2**bits - 1)).clamp_min(SMALLEST_SCALE)
        zero = to_16_bits(least)
        return AsymmetricCodes(((x - zero) / scale).round().clamp(0, 2**bits - 1), scale, zero)

    def dequantized(self) -> Tensor:
        """Return the dequantized values."""
        return self.codes * self.scale + self.zero


def asymmetric(x: Tensor, bits: int, dim: int, clip: float = 1.0) -> Tensor:
    """Quantize and dequantize values along `dim`, with a scale and a zero point (see `AsymmetricCodes`)."""
    return AsymmetricCodes.of(x, bits, dim, clip).dequantized()


def to_16_bits(x: Tensor) -> Tensor:
    """Round values to float16, in their own dtype."""
    return x.to(torch.float16).to(x.dtype)


# --------------------------------------------------------------------------------------------------- caches


class RoundTripLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that quantizes the tokens that a plan would; they are stored dequantized by the codec.

    The codec computes in float32, whatever the model's dtype.
    """

    def __init__(self, codec: Codec, schedule: Schedule, index: int) -> None:
        super().__init__()
        self.codec, self.schedule, self.index = codec, schedule, index
        self.quantized = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D]; within the call, its tokens are attended to in full precision."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        until = self.schedule.quantized(keys.shape[2])
        if until > self.quantized:
            start, stop = self.schedule.sinks + self.quantized, self.schedule.sinks + until
            self.keys = replaced(keys, start, stop, self.codec.key(keys[:, :, start:stop].float(), self.index))
            self.values = replaced(values, start, stop, self.codec.value(values[:, :, start:stop].float(), self.index))
            self.quantized = until
        return keys, values


def replaced(x: Tensor, start: int, stop: int, new: Tensor) -> Tensor:
    """Return x [B,G,T,D] with tokens start ... stop - 1 replaced by `new`, in the dtype of x."""
    return torch.cat([x[:, :, :start], new.to(x.dtype), x[:, :, stop:]], 2)


@dataclass(frozen=True)
class BlockCodec:
    """A codec, of any kind, for all tokens between a plan's attention sinks and recent window."""

    codec: Any
    schedule: Schedule

    @property
    def family(self) -> str:
        """Name of the codec's family."""
        return str(self.codec.family)

    @property
    def name(self) -> str:
        """Name of the codec."""
        return str(self.codec.name)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def token_bytes(self, shape: CacheShape) -> float:
        """Return the bytes of one quantized token, keys and values of all heads and layers."""
        raise NotImplementedError

    def cache_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Return the bytes with the quantized tokens in the codec, and all others in full precision."""
        quantized = self.schedule.quantized(tokens)
        return math.ceil(quantized * self.token_bytes(shape)) + (tokens - quantized) * shape.exact_token_bytes


@dataclass(frozen=True)
class QuantizedBlocks(BlockCodec):
    """A codec that quantizes keys and values of each head and layer separately."""

    codec: Codec

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache."""
        layers = range(CacheShape.of(model).layers)
        return Cache(layers=[RoundTripLayer(self.codec, self.schedule, index) for index in layers])

    def token_bytes(self, shape: CacheShape) -> float:
        """Return the bytes of one quantized token, keys and values of all heads and layers."""
        return shape.heads * self.codec.token_bytes(shape.head_dim)


@dataclass(frozen=True)
class Transformers:
    """`transformers.QuantizedCache`: keys and values per token in groups of channels, in the axis its docs recommend.

    `first_step` is the number of tokens that the first call prefills and quantizes.
    """

    backend: str
    bits: int
    first_step: int
    group: int = 64
    residual: int = 128

    @property
    def family(self) -> str:
        """The backend."""
        return self.backend

    @property
    def name(self) -> str:
        """Backend and bits."""
        return f"{self.backend}-{self.bits}bit"

    @property
    def missing(self) -> str | None:
        """How to install the backend if it is missing; None if it is installed."""
        package = PACKAGES[self.backend]
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{self.name} is left out: {package} is not installed. Install it with: pip install {package}"
        return None

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache."""
        axis = 1 if self.backend == "hqq" else 0
        return QuantizedCache(
            self.backend, model.config, nbits=self.bits, axis_key=axis, axis_value=axis, q_group_size=self.group,
            residual_length=self.residual,
        )  # fmt: skip

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def cache_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Return the bytes with all tokens quantized, except those since the last full residual window."""
        exact = max(0, tokens - self.first_step) % self.residual
        packed_bytes = 2 * shape.head_dim * (self.bits + 32 / self.group) / 8
        return math.ceil((tokens - exact) * shape.heads * packed_bytes) + exact * shape.exact_token_bytes
