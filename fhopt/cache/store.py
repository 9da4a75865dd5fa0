"""Storage of cache layers: encoders and decoders on their device, tensors that grow or stay."""

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
    """The bases of one side where a model needs them: all caches of a plan share them, copies of a cache too."""

    encode: Tensor  # [J, R, n*D], as exact as the plan has it
    decode: Tensor  # [G, D, R], in the dtype of the model

    def __deepcopy__(self, memo: Any) -> Bases:
        return self


def keep_static(*tensors: Tensor, axis: int | None = None) -> None:
    """Keep Dynamo from taking sizes of these for numbers that change, as it does where another plan has other ones.

    axis: the one whose size is meant; None: all.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, axis)


_placed: weakref.WeakKeyDictionary[SidePlan, dict[tuple[torch.device, torch.dtype], Bases]] = (
    weakref.WeakKeyDictionary()
)


def place_bases(plan: SidePlan, like: Tensor) -> Bases:
    """Return the bases of `plan` on the device of `like`, made once for each device and dtype."""
    if torch.compiler.is_compiling():  # the table is not for Dynamo to guard
        return Bases(plan.encode.to(like.device), plan.decode.to(like.device, like.dtype))
    table, key = _placed.setdefault(plan, {}), (like.device, like.dtype)
    if key in table:
        return table[key]
    with torch.inference_mode(False), torch.no_grad():  # others may train with them
        made = Bases(plan.encode.to(like.device), plan.decode.to(like.device, like.dtype))
    if type(made.decode) is Tensor and type(made.encode) is Tensor:  # not of a fake mode, which ends
        keep_static(made.encode, made.decode)
        table[key] = made
    return made


# --------------------------------------------------------------------------------------------------- stores


# Quantized values uint8 [B,G,M,D] and scales [B,G,M] of a residual window; None where its tokens are as they came.
RoundedPart = tuple[Tensor, Tensor] | None


class Store:
    """Tensors of some tokens: batch in dimension 0, tokens in dimension 2. No parts: not started yet."""

    parts: tuple[Tensor, ...] = ()

    def each(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the stored tensors."""
        self.parts = tuple([function(part) for part in self.parts])

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind the parts, spare capacity included."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.parts}.values())


# --------------------------------------------------------------------------------------------------- names

# Keys of saved prompt caches and of reports, which stay as they were first written.
WINDOW_KEYS, WINDOW_VALUES = "open_keys", "open_values"  # attributes window_keys, window_values of a layer
PACKED = {"key": "key_rows", "value": "value_rows"}  # attributes packed_keys, packed_values
SKETCHES = "sketches"
QUANTIZED = "sealed"  # the counter `quantized` of a layer; in reports the bytes of packed latents
QUANTIZED_TOKENS = "sealed_tokens"  # in reports
REGIONS = ("sinks", QUANTIZED, "index", "window", "exact", "spare")  # of bytes, in reports


def named_stores(window: tuple[Store, Store] | None, packed: tuple[Store, Store]) -> dict[str, Store]:
    """Return the stores of a layer by their names in files.

    window: of keys and of values, None where all tokens are quantized. packed: of keys and of values, the same twice
    where one latent serves both.
    """
    stores = {} if window is None else dict(zip((WINDOW_KEYS, WINDOW_VALUES), window, strict=True))
    stores[PACKED["key"]] = packed[0]
    return stores if packed[1] is packed[0] else stores | {PACKED["value"]: packed[1]}
