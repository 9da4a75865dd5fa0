"""Operators `torch.ops.fhopt.*` and their eager references. Importing this package registers all of them.

attention          fhopt::attention: grouped-query attention, the canonical node of graphs
latent_attention   fhopt::latent_attention: attention on latents, packed or not
prefill_attention  fhopt::rebuilt_attention, fhopt::open_attention: prefill
packing            fhopt::pack, fhopt::unpack: latents to packed latents and back
trellis            trellis-coded quantization
encode_rows        fhopt::encode_rows: keys or values to packed latents in one kernel
page_selection     page selection, in torch operations
paged_attention    fhopt::page_weights, fhopt::attend_pages: single-query attention on selected pages
cache_attention    fhopt::attend_latents: a decode step on all parts of a KV cache
head_logits        fhopt::head_logits: the largest logits of a language-model head
algebra            encode, decode, absorb, expand, merge; bit groups as op arguments
masks              masks: additive, causal, by length, by page list
registry           kernels that implement the ops on this machine
"""

from fhopt.ops import (
    attention,
    cache_attention,
    encode_rows,
    head_logits,
    latent_attention,
    packing,
    paged_attention,
    prefill_attention,
)
from fhopt.ops.algebra import absorb, decode, encode, expand, merge
from fhopt.ops.attention import attention_reference
from fhopt.ops.latent_attention import latent_attention_reference
from fhopt.ops.packing import pack_reference, unpack_reference

__all__ = [
    "absorb",
    "attention",
    "attention_reference",
    "cache_attention",
    "decode",
    "encode",
    "encode_rows",
    "expand",
    "head_logits",
    "latent_attention",
    "latent_attention_reference",
    "merge",
    "pack_reference",
    "packing",
    "paged_attention",
    "prefill_attention",
    "unpack_reference",
]
