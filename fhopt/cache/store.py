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
    """Never let Dynamo take sizes of these for numbers that change, as it does where another plan has other ones.

    axis: the one whose size is meant; None: all.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, axis)


_placed: weakref.WeakKeyDictionary[SidePlan, dict[tuple[torch.device, torch.dtype], Bases]] = (
    weakref.WeakKeyDictionary()
)


def place_bases(plan: SidePlan, like: Tensor) -> Bases:
    """The bases of `plan` on the device of `like`, made once for each device and dtype."""
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


Window = tuple[Tensor, Tensor] | None  # codes uint8 [B,G,M,D] and scales [B,G,M], None where tokens are as they came


class Store:
    """Tensors of some tokens: batch in dimension 0, tokens in dimension 2. No parts: not started yet."""

    parts: tuple[Tensor, ...] = ()

    def each(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the stored tensors."""
        self.parts = tuple([function(part) for part in self.parts])

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind the parts, spare room included."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.parts}.values())
