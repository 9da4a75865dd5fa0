"""Registry of the kernels that implement ops of `torch.ops.fhopt`, by device type.

The references of this package need no entry. `fhopt.codegen.install` registers generated kernels; tests and users
register their own with `use`. A kernel has the signature of the op's reference and is called only inside the op.
Kernels without an op are looked up with `kernel_of` by callers that can do without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]

# Op, and the reference or schema that defines its kernels' signature.
OPS = {
    "latent_attention": "fhopt.ops.latent_attention.latent_attention_reference",
    "pack": "fhopt.ops.packing.pack_reference",
    "unpack": "fhopt.ops.packing.unpack_reference",
    "encode_rows": "fhopt.ops.encode_rows.encode_rows_reference",
    "rebuilt_attention": "fhopt.ops.prefill_attention.rebuilt_attention_reference",
    "open_attention": "fhopt.ops.prefill_attention.open_attention",  # returns None if unsupported
    "page_weights": "fhopt.ops.paged_attention.page_weights_reference",
    "attend_pages": "fhopt.ops.paged_attention.attend_pages_reference",
    "round_rows_into": "fhopt.ops.packing.round_rows_into_reference",
    "pack_window": "fhopt.ops.encode_rows.pack_window_reference",
    "attend_latents": "fhopt.ops.cache_attention.SCHEMA",  # returns None if unsupported
    "head_logits": "fhopt.ops.head_logits.head_logits_reference",
}
_kernels: dict[tuple[str, str], Kernel] = {}


def use(op: str, device_type: str, kernel: Kernel | None) -> Kernel | None:
    """Use `kernel` for `op` on tensors of `device_type` ("cpu", "cuda"); None: the op's reference.

    Returns the previous kernel; None for the reference. Raises KeyError for an unknown op.
    """
    if op not in OPS:
        raise KeyError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    before = _kernels.pop((op, device_type), None)
    if kernel is not None:
        _kernels[op, device_type] = kernel
    return before


def kernel_of(op: str, device_type: str) -> Kernel | None:
    """Return the kernel of `op` for a device type; None if the reference is used."""
    return _kernels.get((op, device_type))
