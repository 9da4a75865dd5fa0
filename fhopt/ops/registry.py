"""Registry of kernels: which function runs an op of `torch.ops.fhopt` on which type of device.

The references of this package need no entry. `fhopt.codegen.install` enters generated kernels; tests and users
enter their own by `use`. A kernel has the signature of the op's reference, and is called only inside the op; where
there is no op, by what asks for it by `kernel_of`, and does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]

# Op, and what has the signature of its kernels: its reference, or its schema.
OPS = {
    "latent_attention": "fhopt.ops.latent_attention.latent_attention_reference",
    "pack": "fhopt.ops.packing.pack_reference",
    "unpack": "fhopt.ops.packing.unpack_reference",
    "encode_rows": "fhopt.ops.encode_rows.encode_rows_reference",
    "rebuilt_attention": "fhopt.ops.prefill_attention.rebuilt_attention_reference",
    "open_attention": "fhopt.ops.prefill_attention.open_attention",  # None where it does not serve
    "page_weights": "fhopt.ops.paged_attention.page_weights_reference",
    "attend_pages": "fhopt.ops.paged_attention.attend_pages_reference",
    "round_rows_into": "fhopt.ops.packing.round_rows_into_reference",
    "pack_window": "fhopt.ops.encode_rows.pack_window_reference",
    "attend_latents": "fhopt.ops.cache_attention.SCHEMA",  # None where it does not serve
    "head_logits": "fhopt.ops.head_logits.head_logits_reference",
}
_kernels: dict[tuple[str, str], Kernel] = {}


def use(op: str, device_type: str, kernel: Kernel | None) -> Kernel | None:
    """Run `kernel` for `op` on tensors of `device_type` ("cpu", "cuda"); None: the op's reference.

    Returns the kernel that was used before, None for the reference. Raises KeyError for an op that has no kernels.
    """
    if op not in OPS:
        raise KeyError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    before = _kernels.pop((op, device_type), None)
    if kernel is not None:
        _kernels[op, device_type] = kernel
    return before


def kernel_of(op: str, device_type: str) -> Kernel | None:
    """Return the kernel of `op` for that type of device, None where its reference runs."""
    return _kernels.get((op, device_type))
