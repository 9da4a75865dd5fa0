"""Passing of latents from a cache layer to attention through the model's K/V arguments.

A cache layer returns `LatentTensor`s instead of full-length keys and values. They have the same shape, dtype and device
but no storage; attention uses their exact tokens and latents:

    attention of transformers' interface, set by `fhopt.apply`       fhopt/hf/attention_interface.py
    F.scaled_dot_product_attention(q, k, v)                          `attend`, in a model that calls it
    q @ k.transpose(-1, -2), bmm, baddbmm; p @ v                     `scores` and `mix`, in manual attention code

Any other operation gets reconstructed keys or values, with a warning: correct, but of full length. Under torch.compile
the tensors are the exact tokens themselves, with the latents as an attribute that Dynamo tracks; only the attention of
the interface supports it.

Letters: B batch, G kv heads, N exact tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.latent_tensor import LatentTensor, joined_latents
from fhopt.errors import FhoptError

ATTRIBUTE = "fhopt_latents"  # attribute of exact keys under torch.compile


class LatentReader:
    """State of the attention that consumes a cache's latents.

    active: it is `latent_attention_forward`, which supports latents in compiled graphs, too. pending: in a compiled
    graph, offered latents have not been consumed yet.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.pending = active, False


def offer(key: Tensor, value: Tensor, latents: AnyLatents, reader: LatentReader) -> tuple[Tensor, Tensor]:
    """Attach latents to exact keys and values [B,G,N,D] for attention.

    Raises FhoptError in a compiled graph if the previous layer's latents were not consumed: an operation on its keys
    has dropped them.
    """
    if not torch.compiler.is_compiling():
        return LatentTensor(key, latents, True), LatentTensor(value, latents, False)
    if reader.pending:
        reader.pending = False
        raise FhoptError(
            "a compiled model modifies cached keys before its attention, so fhopt cannot use their latents; "
            "expected unmodified keys. Create the cache with absorb=False, or do not compile the model."
        )
    reader.pending = True
    offered = key.view_as(key)
    setattr(offered, ATTRIBUTE, (latents, reader))
    return offered, value


def read_offered(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, AnyLatents | None]:
    """Return the arguments of `offer`: exact keys and values [B,G,N,D], and latents; None: all tokens are exact."""
    if isinstance(key, LatentTensor) and isinstance(value, LatentTensor):
        return key.exact, value.exact, joined_latents(key, value)
    latents, reader = getattr(key, ATTRIBUTE, (None, None))
    if reader is not None:
        reader.pending = False
    return key, value, latents
