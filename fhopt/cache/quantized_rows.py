"""Quantized tokens of a cache layer: packed latents of one encoder matrix, and their sketches.

    dynamic   grow in place, by 1/GROWTH of their tokens
    static    of fixed size, written by index, independent of the number of tokens

A store is a tuple of tensors `parts` with sequences in dimension 0 and tokens in dimension 2, so that beam search,
batch selection and offloading are one line each. Packed latents are bytes uint8 [B,J,N,bytes] and scales float16
[B,J,N], or unquantized latents [B,J,N,R] if the plan has no bit groups. With page selection, sketches of the quantized
tokens (fhopt/attention/paged.py) are a separate store of the same length. Each part of a static store has an extra last
slot for tokens to discard.

Letters: B batch, G kv heads, S new tokens, N tokens, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.attention.sketches import Sketcher, SketchRows
from fhopt.cache.store import Bases, RoundedPart, Store, keep_static
from fhopt.ops import algebra, encode_rows, registry
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site_plan import SidePlan

SAMPLED = 256  # tokens measured by `LatentEnergy`
GROWTH = 64  # storage grows by 1/GROWTH of its tokens, at least one block; this bounds spare capacity


@dataclass
class LatentEnergy:
    """Mean square of latents, over channels, of the first SAMPLED quantized tokens.

    The encoder of a fitted plan divides each channel by its standard deviation in calibration, so the mean square is 1
    on such text. It is larger on text with energy in channels that were small in calibration and got few or no bits.
    Measured (values, geometric mean over layers): 1.06 on the domain that calibrated SmolLM2, 1.1 to 1.3 on source code
    and English prose, 1.4 to 1.6 on other languages and the King James Bible.
    """

    total: Tensor | float = 0.0
    tokens: int = 0

    def see(self, latent: Tensor) -> None:
        """Add latents [B,J,N,R], before quantization."""
        count = latent.shape[2]
        if count == 0 or self.tokens >= SAMPLED or torch.compiler.is_compiling() or type(latent) is not Tensor:
            return
        mean = latent.detach().float().square().mean()
        self.take(mean.item() if mean.is_cpu else mean, count)  # no device synchronization

    def take(self, mean: Tensor | float, count: int) -> None:
        """Add latents of `count` tokens, given their mean square."""
        if self.tokens < SAMPLED:
            self.total = self.total + count * mean
            self.tokens += count

    @property
    def mean(self) -> float | None:
        """The mean square; None before SAMPLED tokens."""
        return float(self.total) / self.tokens if self.tokens >= SAMPLED else None


class PackedLatents(Store):
    """Packed latents of one encoder matrix, grown in place."""

    def __init__(self, plan: SidePlan) -> None:
        self.plan = plan
        keep_static(plan.encode, plan.decode)
        self._tiers = algebra.bit_groups(plan)
        self._text = "|".join(",".join(map(repr, numbers)) for numbers in self._tiers)
        self.bases: Bases | None = None  # None before the first tokens
        self.energy = LatentEnergy()

    @property
    def tiers(self) -> algebra.BitGroups:
        """Bits, widths and steps; while compiling, parsed from one string: one guard instead of one per value."""
        if not torch.compiler.is_compiling():
            return self._tiers
        bits, widths, steps = [part.split(",") if part else [] for part in self._text.split("|")]
        return algebra.BitGroups([int(b) for b in bits], [int(w) for w in widths], [float(s) for s in steps])

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode x [B,G,N,D] to parts. No gradient flows through quantized values."""
        assert self.bases is not None
        basis = self.bases.encode
        tiers = self.tiers
        x = x.detach() if tiers[0] else x
        if tiers[0] and encode_rows.encodes_at_once(x, basis):
            return torch.ops.fhopt.encode_rows(x, basis, *tiers)
        latent = algebra.encode(x.to(basis.dtype), basis)
        if not tiers[0]:
            return (latent.to(x.dtype),)
        self.energy.see(latent)
        return torch.ops.fhopt.pack(latent, *tiers)

    def append(self, x: Tensor, at: int, block: int) -> None:
        """Quantize x [B,G,N,D] and store it after the first `at` tokens. block: growth increment."""
        self.parts = _appended(self.parts, self.encode(x), at, block)

    def takes_windows(self, dtype: torch.dtype) -> bool:
        """Return whether `append_window` may support this dtype, for this device and plan."""
        if self.bases is None or self.is_uncoded or not self.parts or dtype == torch.float64:
            return False
        basis = self.bases.encode
        return basis.is_contiguous() and registry.kernel_of("pack_window", basis.device.type) is not None

    def append_window(
        self, rounded: tuple[Tensor, Tensor], mean: Tensor | None, dtype: torch.dtype, at: int, block: int,
        turning: tuple[Tensor, Tensor, int] | None,
    ) -> bool:  # fmt: skip
        """Quantize tokens of an 8-bit window by a native kernel, and store them after the first `at` tokens.

        Requires `takes_windows`. Returns False if the kernel does not support the arguments, which are those of
        `fhopt.ops.encode_rows.pack_window_reference`.
        """
        codes = rounded[0]
        kernel = registry.kernel_of("pack_window", codes.device.type)
        assert kernel is not None and self.bases is not None, "it takes windows"
        packed, scale = [_with_room(part, part, at, at + codes.shape[2], block) for part in self.parts]
        energy = kernel(rounded, mean, dtype, self.bases.encode, (packed, scale), at, self.tiers, turning)
        if energy is None:
            return False
        self.parts = (packed, scale)
        self.energy.take(energy, codes.shape[2])
        return True

    def insert(self, x: Tensor, count: int) -> None:
        """Quantize x [B,G,N,D] and store it before the `count` held tokens."""
        held = [part[:, :, :count] for part in self.parts]
        new = self.encode(x)
        self.parts = tuple([torch.cat(pair, 2) for pair in zip(new, held, strict=True)]) if held else new

    def drop(self, first: int, count: int) -> None:
        """Drop the first tokens of the `count` held."""
        self.parts = tuple([part[:, :, first:count].clone() for part in self.parts])

    @property
    def is_uncoded(self) -> bool:
        """Whether latents are unquantized."""
        return not self._tiers[0]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return packed latents and scales (None without bit groups) of tokens `start` to `stop`, as views."""
        packed, *scale = [part[:, :, start:stop] for part in self.parts]
        return packed, scale[0] if scale else None

    def side(
        self, start: int, stop: int, decode: Tensor, rounded: RoundedPart = None, mean: Tensor | None = None,
        rotation: SegmentRotation | None = None,
    ) -> SideRows:  # fmt: skip
        """Return tokens `start` to `stop` for attention.

        decode [G,D,R]: the decoder matrix of keys or of values. rounded: the 8-bit residual window, if any. mean
        [B,G,1,D]: subtracted from keys or values before encoding. rotation: of keys relative to segments.
        """
        return SideRows(self.tiers, *self.read(start, stop), decode, rounded, mean, rotation, start if rotation else 0)

    def unpack(self, start: int, stop: int) -> Tensor:
        """Unpack the latents [B,J,stop-start,R] of tokens `start` to `stop`."""
        return self._unpacked(*self.read(start, stop))

    def _unpacked(self, packed: Tensor, scale: Tensor | None = None) -> Tensor:
        return packed if scale is None else torch.ops.fhopt.unpack(packed, scale, *self.tiers)

    def trim(self, count: int, block: int) -> None:
        """Free spare capacity after shrinking to `count` tokens, beyond normal growth."""
        self.parts = _trimmed(self.parts, count, block)


class TokenSketches(Store):
    """Sketches of quantized tokens, grown in place: values uint8 [B,J,N,bytes], scales, and with a limit errors."""

    sketcher: Sketcher  # set when the first tokens arrive

    def __init__(self, limited: bool) -> None:
        self.limited = limited

    def make(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Encode latents [B,J,N,R] to parts."""
        values, scale = self.sketcher.encode(latents)
        return (values, scale, self.sketcher.lost(latents, values, scale)) if self.limited else (values, scale)

    def append(self, latents: Tensor, at: int, block: int) -> None:
        """Sketch latents [B,J,N,R] and store the sketches after those of the first `at` tokens."""
        self.parts = _appended(self.parts, self.make(latents), at, block)

    def read(self, stop: int) -> SketchRows:
        """Return the sketches of the first `stop` tokens, as views."""
        values, scale, *lost = [part[:, :, :stop] for part in self.parts]
        return values, scale, lost[0] if lost else None

    def trim(self, count: int, block: int) -> None:
        """Free spare capacity after shrinking to `count` tokens, beyond normal growth."""
        self.parts = _trimmed(self.parts, count, block)


def _trimmed(parts: tuple[Tensor, ...], count: int, block: int) -> tuple[Tensor, ...]:
    if not parts or parts[0].shape[2] <= _room(count, block):
        return parts
    return tuple([part[:, :, :count].clone() for part in parts])


def _appended(parts: tuple[Tensor, ...], new: tuple[Tensor, ...], at: int, block: int) -> tuple[Tensor, ...]:
    """Return every part with its new tokens after the first `at`."""
    return tuple([_append(o, n, at, block) for o, n in zip(parts or [None] * len(new), new, strict=True)])


def _append(storage: Tensor | None, new: Tensor, at: int, block: int) -> Tensor:
    """Write `new` [B,J,N,...] after the first `at` tokens, growing the storage if it is full."""
    need = at + new.shape[2]
    storage = _with_room(storage, new, at, need, block)
    storage[:, :, at:need] = new
    return storage


def _with_room(storage: Tensor | None, like: Tensor, at: int, need: int, block: int) -> Tensor:
    """Return storage for at least `need` tokens that starts with the first `at` of `storage`."""
    if storage is not None and storage.shape[2] >= need:
        return storage
    capacity = need if storage is None else max(need, _room(at, block))
    grown = like.new_empty((*like.shape[:2], capacity, *like.shape[3:]))
    if storage is not None:
        grown[:, :, :at] = storage[:, :, :at]
    return grown


def _room(count: int, block: int) -> int:
    """Return the capacity for `count` tokens: 1/GROWTH more, in whole blocks."""
    return -(-(count + count // GROWTH) // block) * block


class StaticPackedLatents(PackedLatents):
    """Packed latents in fixed slots: the parts of `PackedLatents`, with `capacity` + 1 slots."""

    def __init__(self, plan: SidePlan, capacity: int) -> None:
        super().__init__(plan)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Allocate the slots for tokens like `like` [B,G,N,D]."""
        parts = self.encode(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])
        keep_static(*[part for part in self.parts if part.dim() == 4], axis=3)  # set by the plan

    def write(self, x: Tensor, places: Tensor) -> None:
        """Quantize x [B,G,S,D] into slots `places` [S]."""
        for part, new in zip(self.parts, self.encode(x), strict=True):
            part.index_copy_(2, places, new)

    def unpack_at(self, places: Tensor) -> Tensor:
        """Unpack the latents [B,J,N,R] in slots `places` [N]."""
        return self._unpacked(*[part.index_select(2, places) for part in self.parts])


class StaticSketches(TokenSketches):
    """Sketches in fixed slots: the parts of `Sketches`, with `capacity` + 1 slots."""

    def __init__(self, limited: bool, capacity: int) -> None:
        super().__init__(limited)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Allocate the slots for sketches of latents like `like` [B,J,N,R]."""
        parts = self.make(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])

    def write(self, latents: Tensor, places: Tensor) -> None:
        """Sketch the latents [B,J,S,R] into slots `places` [S]."""
        for part, new in zip(self.parts, self.make(latents), strict=True):
            part.index_copy_(2, places, new)


def encoder_inputs(keys: Tensor, values: Tensor, is_shared: bool) -> list[tuple[str, Tensor]]:
    """Return each encoder matrix's input by side: keys and values, or both concatenated."""
    return [("key", torch.cat([keys, values], -1))] if is_shared else [("key", keys), ("value", values)]
