"""Offer the latents of a cache layer to attention, and read them there.

A cache layer returns `LatentTensor`s in place of keys and values of full length. They have the shape, dtype and device
of these but no memory; attention reads the exact tokens and the latents behind them:

    attention of transformers' interface, set by `fhopt.apply`       fhopt/hf/attention_interface.py
    F.scaled_dot_product_attention(q, k, v)                          `attend`, in a model that calls it itself
    q @ k.transpose(-1, -2), bmm, baddbmm; p @ v                     `scores` and `mix`, in a model that spells it out

Any other operation gets reconstructed keys or values, with a warning: right, but of full length. Under torch.compile
the tensors are the exact tokens themselves, with the latents as an attribute that Dynamo follows; only the attention of
the interface reads it.

Letters: B batch, G kv heads, N exact tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.latent_tensor import LatentTensor, joined_latents
from fhopt.errors import FhoptError

ATTRIBUTE = "fhopt_latents"  # of exact keys, under torch.compile


class Reader:
    """The attention that reads the layers of a cache, as far as these know it.

    active: it is `latent_attention_forward`, which reads latents in compiled graphs, too. pending: in a compiled graph,
    latents were offered and have not been read yet.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.pending = active, False


def offer(key: Tensor, value: Tensor, latents: AnyLatents, reader: Reader) -> tuple[Tensor, Tensor]:
    """Offer exact keys and values [B,G,N,D] with latents behind them to attention.

    Raises FhoptError in a compiled graph where the latents of the layer before have not been read: an operation on its
    keys has lost them.
    """
    if not torch.compiler.is_compiling():
        return LatentTensor(key, latents, True), LatentTensor(value, latents, False)
    if reader.pending:
        reader.pending = False
        raise FhoptError(
            "a compiled model changes cached keys before its attention reads them, and loses the latents. Make the "
            "cache with absorb=False, or do not compile."
        )
    reader.pending = True
    offered = key.view_as(key)
    setattr(offered, ATTRIBUTE, (latents, reader))
    return offered, value


def read_offered(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, AnyLatents | None]:
    """Return what `offer` was given: exact keys and values [B,G,N,D], and latents; without latents, all tokens."""
    if isinstance(key, LatentTensor) and isinstance(value, LatentTensor):
        return key.exact, value.exact, joined_latents(key, value)
    latents, reader = getattr(key, ATTRIBUTE, (None, None))
    if reader is not None:
        reader.pending = False
    return key, value, latents
