"""The operations `torch.ops.fhopt.*` and their eager references. Importing this package registers all of them."""

from fhopt.ops import attention, encode_rows, latent_attention, packing, page_selection, prefill_attention
from fhopt.ops.algebra import absorb, decode, encode, expand, merge
from fhopt.ops.attention import attention_reference
from fhopt.ops.latent_attention import latent_attention_reference
from fhopt.ops.packing import pack_reference, unpack_reference

__all__ = [
    "absorb",
    "attention",
    "attention_reference",
    "decode",
    "encode",
    "encode_rows",
    "expand",
    "latent_attention",
    "latent_attention_reference",
    "merge",
    "pack_reference",
    "packing",
    "page_selection",
    "prefill_attention",
    "unpack_reference",
]
