"""Quantized tokens of a cache layer: packed latents of one encoder matrix, and their sketches.

    dynamic   grow in place, by 1/GROWTH of their number
    static    of fixed size, written by index, without a look at how many tokens there are

A store is a tuple of tensors `parts` with sequences in dimension 0 and tokens in dimension 2, so that beams, batch
selection and offloading are one line each. Packed latents are bytes uint8 [B,J,N,bytes] and scales float16 [B,J,N], or
latents [B,J,N,R] as numbers where the plan has no bit groups. Where a plan has pages, sketches of the quantized tokens
(fhopt/attention/paged.py) are a store of their own, of the same length. Each part of a static store has one place more
than it needs, the last, for tokens that are not to be kept.

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

SAMPLED = 256  # tokens whose latents are looked at, see `LatentEnergy`
GROWTH = 64  # storage grows by 1/GROWTH of its tokens, at least one block: at most that share is spare


@dataclass
class LatentEnergy:
    """Mean square of latents, over channels, of the first SAMPLED tokens that are quantized.

    The encoder of a fitted plan divides each channel by its deviation in calibration, so that it is 1 on such text, and
    more on text that excites what calibration hardly did: directions that few bits or none were given to. Measured
    (values, geometric mean over layers): 1.06 on the kind of text that calibrated SmolLM2, 1.1 to 1.3 on source code
    and English prose, 1.4 to 1.6 on other languages and the King James Bible.
    """

    total: Tensor | float = 0.0
    tokens: int = 0

    def see(self, latent: Tensor) -> None:
        """Count latents [B,J,N,R] as they are before quantization."""
        count = latent.shape[2]
        if count == 0 or self.tokens >= SAMPLED or torch.compiler.is_compiling() or type(latent) is not Tensor:
            return
        mean = latent.detach().float().square().mean()
        self.take(mean.item() if mean.is_cpu else mean, count)  # others are not waited for

    def take(self, mean: Tensor | float, count: int) -> None:
        """Count latents of `count` tokens, of that mean square."""
        if self.tokens < SAMPLED:
            self.total = self.total + count * mean
            self.tokens += count

    @property
    def mean(self) -> float | None:
        """The mean square; None before SAMPLED tokens were seen."""
        return float(self.total) / self.tokens if self.tokens >= SAMPLED else None


class PackedLatents(Store):
    """Packed latents of one encoder matrix, grown in place."""

    def __init__(self, plan: SidePlan) -> None:
        self.plan = plan
        keep_static(plan.encode, plan.decode)
        self._tiers = algebra.bit_groups(plan)
        self._text = "|".join(",".join(map(repr, numbers)) for numbers in self._tiers)
        self.bases: Bases | None = None  # before the first tokens come
        self.energy = LatentEnergy()

    @property
    def tiers(self) -> algebra.BitGroups:
        """Bits, widths and steps; in a compiled graph from one text, which costs one guard and not one a number."""
        if not torch.compiler.is_compiling():
            return self._tiers
        bits, widths, steps = [part.split(",") if part else [] for part in self._text.split("|")]
        return algebra.BitGroups([int(b) for b in bits], [int(w) for w in widths], [float(s) for s in steps])

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parts that stand for x [B,G,N,D]. No gradient goes through quantized values."""
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
        """Quantize x [B,G,N,D] and store it behind the first `at` tokens. block: tokens by which storage grows."""
        self.parts = _appended(self.parts, self.encode(x), at, block)

    def takes_windows(self, dtype: torch.dtype) -> bool:
        """Return whether `append_window` may serve tokens of this dtype: on this device, of this plan."""
        if self.bases is None or self.is_uncoded or not self.parts or dtype == torch.float64:
            return False
        basis = self.bases.encode
        return basis.is_contiguous() and registry.kernel_of("pack_window", basis.device.type) is not None

    def append_window(
        self, rounded: tuple[Tensor, Tensor], mean: Tensor | None, dtype: torch.dtype, at: int, block: int,
        turning: tuple[Tensor, Tensor, int] | None,
    ) -> bool:  # fmt: skip
        """Quantize tokens of a window in 8 bits by machine code, and store them behind the first `at` tokens.

        Where `takes_windows`. Returns whether it did. Arguments are those of
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
        """Quantize x [B,G,N,D] and store it before the `count` tokens held."""
        held = [part[:, :, :count] for part in self.parts]
        new = self.encode(x)
        self.parts = tuple([torch.cat(pair, 2) for pair in zip(new, held, strict=True)]) if held else new

    def drop(self, first: int, count: int) -> None:
        """Give back the first tokens of the `count` held."""
        self.parts = tuple([part[:, :, first:count].clone() for part in self.parts])

    @property
    def is_uncoded(self) -> bool:
        """Whether latents are kept as numbers."""
        return not self._tiers[0]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return packed latents and their scales (None without bit groups) of tokens `start` to `stop`, as views."""
        packed, *scale = [part[:, :, start:stop] for part in self.parts]
        return packed, scale[0] if scale else None

    def side(
        self, start: int, stop: int, decode: Tensor, rounded: RoundedPart = None, mean: Tensor | None = None,
        rotation: SegmentRotation | None = None,
    ) -> SideRows:  # fmt: skip
        """Return tokens `start` to `stop` as attention reads them.

        decode [G,D,R]: the decoder matrix, of keys or of values. rounded: of the residual window, where it is. mean
        [B,G,1,D]: from which latents are differences. rotation: of keys that are relative to segments.
        """
        return SideRows(self.tiers, *self.read(start, stop), decode, rounded, mean, rotation, start if rotation else 0)

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return the latents [B,J,stop-start,R] of tokens `start` to `stop`."""
        return self._unpacked(*self.read(start, stop))

    def _unpacked(self, packed: Tensor, scale: Tensor | None = None) -> Tensor:
        return packed if scale is None else torch.ops.fhopt.unpack(packed, scale, *self.tiers)

    def trim(self, count: int, block: int) -> None:
        """Give back what `count` tokens leave spare, beyond what growing would have taken."""
        self.parts = _trimmed(self.parts, count, block)


class Sketches(Store):
    """Sketches of quantized tokens, grown in place: values uint8 [B,J,N,bytes], scales, with a limit what they lost."""

    sketcher: Sketcher  # before the first tokens come, there is none

    def __init__(self, limited: bool) -> None:
        self.limited = limited

    def make(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return the parts that stand for latents [B,J,N,R]."""
        values, scale = self.sketcher.encode(latents)
        return (values, scale, self.sketcher.lost(latents, values, scale)) if self.limited else (values, scale)

    def append(self, latents: Tensor, at: int, block: int) -> None:
        """Sketch latents [B,J,N,R] and store the sketches behind those of the first `at` tokens."""
        self.parts = _appended(self.parts, self.make(latents), at, block)

    def read(self, stop: int) -> SketchRows:
        """Return the sketches of the first `stop` tokens, as views."""
        values, scale, *lost = [part[:, :, :stop] for part in self.parts]
        return values, scale, lost[0] if lost else None

    def trim(self, count: int, block: int) -> None:
        """Give back what `count` tokens leave spare, beyond what growing would have taken."""
        self.parts = _trimmed(self.parts, count, block)


def _trimmed(parts: tuple[Tensor, ...], count: int, block: int) -> tuple[Tensor, ...]:
    if not parts or parts[0].shape[2] <= _room(count, block):
        return parts
    return tuple([part[:, :, :count].clone() for part in parts])


def _appended(parts: tuple[Tensor, ...], new: tuple[Tensor, ...], at: int, block: int) -> tuple[Tensor, ...]:
    """Return every part with its new tokens behind the first `at`."""
    return tuple([_append(o, n, at, block) for o, n in zip(parts or [None] * len(new), new, strict=True)])


def _append(storage: Tensor | None, new: Tensor, at: int, block: int) -> Tensor:
    """Write `new` [B,J,N,...] behind the first `at` tokens, growing the storage when it is full."""
    need = at + new.shape[2]
    storage = _with_room(storage, new, at, need, block)
    storage[:, :, at:need] = new
    return storage


def _with_room(storage: Tensor | None, like: Tensor, at: int, need: int, block: int) -> Tensor:
    """Return storage for at least `need` tokens, of which the first `at` are those of `storage`."""
    if storage is not None and storage.shape[2] >= need:
        return storage
    capacity = need if storage is None else max(need, _room(at, block))
    grown = like.new_empty((*like.shape[:2], capacity, *like.shape[3:]))
    if storage is not None:
        grown[:, :, :at] = storage[:, :, :at]
    return grown


def _room(count: int, block: int) -> int:
    """Return for how many tokens the storage of `count` may have room: 1/GROWTH more, in whole blocks."""
    return -(-(count + count // GROWTH) // block) * block


class StaticPackedLatents(PackedLatents):
    """Packed latents in fixed places: the parts of `PackedLatents`, with `capacity` + 1 places."""

    def __init__(self, plan: SidePlan, capacity: int) -> None:
        super().__init__(plan)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Reserve the places for tokens like `like` [B,G,N,D]."""
        parts = self.encode(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])
        keep_static(*[part for part in self.parts if part.dim() == 4], axis=3)  # the plan's; others are the caller's

    def write(self, x: Tensor, places: Tensor) -> None:
        """Quantize x [B,G,S,D] into `places` [S]."""
        for part, new in zip(self.parts, self.encode(x), strict=True):
            part.index_copy_(2, places, new)

    def unpack_at(self, places: Tensor) -> Tensor:
        """Return the latents [B,J,N,R] of the tokens in `places` [N]."""
        return self._unpacked(*[part.index_select(2, places) for part in self.parts])


class StaticSketches(Sketches):
    """Sketches in fixed places: the parts of `Sketches`, with `capacity` + 1 places."""

    def __init__(self, limited: bool, capacity: int) -> None:
        super().__init__(limited)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Reserve the places for sketches of latents like `like` [B,J,N,R]."""
        parts = self.make(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])

    def write(self, latents: Tensor, places: Tensor) -> None:
        """Sketch the latents [B,J,S,R] into `places` [S]."""
        for part, new in zip(self.parts, self.make(latents), strict=True):
            part.index_copy_(2, places, new)


def encoder_inputs(keys: Tensor, values: Tensor, is_shared: bool) -> list[tuple[str, Tensor]]:
    """Return what each encoder matrix reads, by its side: keys and values, or both side by side."""
    return [("key", torch.cat([keys, values], -1))] if is_shared else [("key", keys), ("value", values)]
