"""Storage of cache layers: bases on their device, dynamic and static tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.plan.site_plan import SidePlan

# --------------------------------------------------------------------------------------------------- bases


@dataclass(frozen=True, eq=False)
class Bases:
    """Encoder and decoder matrices of one side on a device, shared by all caches of a plan and by copies of a cache."""

    encode: Tensor  # [J, R, n*D], in the plan's precision
    decode: Tensor  # [G, D, R], in the model's dtype

    def __deepcopy__(self, memo: Any) -> Bases:
        return self


def keep_static(*tensors: Tensor, axis: int | None = None) -> None:
    """Mark sizes as static for Dynamo, which would make them dynamic when another plan has other sizes.

    axis: the dimension to mark; None: all.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, axis)


_placed: weakref.WeakKeyDictionary[SidePlan, dict[tuple[torch.device, torch.dtype], Bases]] = (
    weakref.WeakKeyDictionary()
)


def place_bases(plan: SidePlan, like: Tensor) -> Bases:
    """Return the bases of `plan` on the device of `like`, copied once per device and dtype."""
    if torch.compiler.is_compiling():  # Dynamo must not guard the table
        return Bases(plan.encode.to(like.device), plan.decode.to(like.device, like.dtype))
    table, key = _placed.setdefault(plan, {}), (like.device, like.dtype)
    if key in table:
        return table[key]
    with torch.inference_mode(False), torch.no_grad():  # so that autograd can use them too
        made = Bases(plan.encode.to(like.device), plan.decode.to(like.device, like.dtype))
    if type(made.decode) is Tensor and type(made.encode) is Tensor:  # fake tensors do not outlive their mode
        keep_static(made.encode, made.decode)
        table[key] = made
    return made


# --------------------------------------------------------------------------------------------------- stores


# Quantized values uint8 [B,G,M,D] and scales [B,G,M] of a residual window; None if the window is exact.
RoundedPart = tuple[Tensor, Tensor] | None


class Store:
    """Tensors of a set of tokens: batch in dimension 0, tokens in dimension 2. Empty until started."""

    parts: tuple[Tensor, ...] = ()

    def each(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the stored tensors."""
        self.parts = tuple([function(part) for part in self.parts])

    @property
    def nbytes(self) -> int:
        """Bytes of storage, spare capacity included."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.parts}.values())


# --------------------------------------------------------------------------------------------------- names

# Keys of saved prompt caches and of reports; fixed for compatibility.
WINDOW_KEYS, WINDOW_VALUES = "open_keys", "open_values"  # attributes window_keys, window_values of a layer
PACKED = {"key": "key_rows", "value": "value_rows"}  # attributes packed_keys, packed_values
SKETCHES = "sketches"
QUANTIZED = "sealed"  # the counter `quantized` of a layer; in reports, bytes of packed latents
QUANTIZED_TOKENS = "sealed_tokens"  # in reports
REGIONS = ("sinks", QUANTIZED, "index", "window", "exact", "spare")  # of bytes, in reports


def named_stores(window: tuple[Store, Store] | None, packed: tuple[Store, Store]) -> dict[str, Store]:
    """Return the stores of a layer by their names in files.

    window: of keys and of values; None if all tokens are quantized. packed: of keys and of values; the same object
    twice if they share a latent.
    """
    stores = {} if window is None else dict(zip((WINDOW_KEYS, WINDOW_VALUES), window, strict=True))
    stores[PACKED["key"]] = packed[0]
    return stores if packed[1] is packed[0] else stores | {PACKED["value"]: packed[1]}
