"""What a latent cache layer keeps its tokens in: open tokens as they came or in 8 bits, sealed tokens as rows of codes.

    dynamic   [ sinks | window ]  as long as it has tokens;   rows  grow in place, by 1/GROWTH of their number
    static    [ sinks | ring ]    of fixed size;              rows  of fixed size

Where a plan has pages, sketches of the sealed tokens (fhopt/attention/paged.py) are a store of their own, of the same
length.

Every store is a tuple of tensors `parts` with sequences in dimension 0 and tokens in dimension 2, so that beams, batch
selection and offloading are one line each. The static stores are written by index, without a look at how many tokens
there are; each part of theirs has one place more than it needs, the last, for tokens that are not to be kept.

Letters: B batch, G kv heads, N tokens, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.attention.sketches import Sketcher, SketchRows
from fhopt.cache.store import Bases, Store, keep_static
from fhopt.ops import algebra, encode_rows
from fhopt.plan.site_plan import SidePlan

GROWTH = 64  # sealed rows grow by 1/GROWTH of their number, at least one block: at most that share is spare


class SealedRows(Store):
    """Sealed rows of one encoder, grown in place: codes [B,J,capacity,bytes] and scales [B,J,capacity], or numbers."""

    def __init__(self, plan: SidePlan) -> None:
        self.plan = plan
        keep_static(plan.encode, plan.decode)
        self._tiers = algebra.bit_groups(plan)
        self._text = "|".join(",".join(map(repr, numbers)) for numbers in self._tiers)
        self.bases: Bases | None = None  # before the first tokens come

    @property
    def tiers(self) -> algebra.BitGroups:
        """Bits, widths and steps; in a compiled graph from one text, which costs one guard and not one a number."""
        if not torch.compiler.is_compiling():
            return self._tiers
        bits, widths, steps = [part.split(",") if part else [] for part in self._text.split("|")]
        return algebra.BitGroups([int(b) for b in bits], [int(w) for w in widths], [float(s) for s in steps])

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parts that stand for x [B,G,N,D]. No gradient goes through codes."""
        assert self.bases is not None
        basis = self.bases.encode
        tiers = self.tiers
        x = x.detach() if tiers[0] else x
        if tiers[0] and encode_rows.encodes_at_once(x, basis):
            return torch.ops.fhopt.encode_rows(x, basis, *tiers)
        latent = algebra.encode(x.to(basis.dtype), basis)
        return torch.ops.fhopt.pack(latent, *tiers) if tiers[0] else (latent.to(x.dtype),)

    def seal(self, x: Tensor, at: int, block: int) -> None:
        """Encode x [B,G,N,D] and store it at rows `at` to `at + N`."""
        self.parts = _written(self.parts, self.encode(x), at, block)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows and their scales (None for uncoded latents), as views."""
        rows, *scale = [part[:, :, start:stop] for part in self.parts]
        return rows, scale[0] if scale else None

    def latents(self, start: int, stop: int) -> Tensor:
        """The latents [B,J,stop-start,R] that rows stand for."""
        return self._unpacked(*self.read(start, stop))

    def _unpacked(self, rows: Tensor, scale: Tensor | None = None) -> Tensor:
        return rows if scale is None else torch.ops.fhopt.unpack(rows, scale, *self.tiers)

    def trim(self, count: int, block: int) -> None:
        """Give back what `count` rows leave spare, beyond what growing would have taken."""
        self.parts = _trimmed(self.parts, count, block)


class Sketches(Store):
    """Sketches of sealed rows, grown in place: codes [B,J,capacity,bytes], scales, with a limit what they lost."""

    sketcher: Sketcher  # before the first tokens come, there is none

    def __init__(self, limited: bool) -> None:
        self.limited = limited

    def make(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Parts that stand for latents [B,J,N,R]."""
        codes, scale = self.sketcher.encode(latents)
        return (codes, scale, self.sketcher.lost(latents, codes, scale)) if self.limited else (codes, scale)

    def seal(self, latents: Tensor, at: int, block: int) -> None:
        """Sketch the latents [B,J,N,R] of rows `at` to `at + N`."""
        self.parts = _written(self.parts, self.make(latents), at, block)

    def read(self, stop: int) -> SketchRows:
        """Of the first `stop` rows, as views."""
        codes, scale, *lost = [part[:, :, :stop] for part in self.parts]
        return codes, scale, lost[0] if lost else None

    def trim(self, count: int, block: int) -> None:
        """As of rows."""
        self.parts = _trimmed(self.parts, count, block)


def _trimmed(parts: tuple[Tensor, ...], count: int, block: int) -> tuple[Tensor, ...]:
    if not parts or parts[0].shape[2] <= _room(count, block):
        return parts
    return tuple([part[:, :, :count].clone() for part in parts])


def _written(parts: tuple[Tensor, ...], new: tuple[Tensor, ...], at: int, block: int) -> tuple[Tensor, ...]:
    """Every part with its new rows from row `at` on."""
    return tuple([_write(o, n, at, block) for o, n in zip(parts or [None] * len(new), new, strict=True)])


def _write(storage: Tensor | None, new: Tensor, at: int, block: int) -> Tensor:
    """Write `new` [B,J,N,...] behind row `at`, growing the storage when it is full."""
    need = at + new.shape[2]
    if storage is None or storage.shape[2] < need:
        capacity = need if storage is None else max(need, _room(at, block))
        grown = new.new_empty((*new.shape[:2], capacity, *new.shape[3:]))
        if storage is not None:
            grown[:, :, :at] = storage[:, :, :at]
        storage = grown
    storage[:, :, at:need] = new
    return storage


def _room(count: int, block: int) -> int:
    """Rows that storage for `count` rows may have: 1/GROWTH more, in whole blocks."""
    return -(-(count + count // GROWTH) // block) * block


class StaticRows(SealedRows):
    """Rows in fixed places: the same parts, with `capacity` + 1 rows."""

    def __init__(self, plan: SidePlan, capacity: int) -> None:
        super().__init__(plan)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Reserve the rows for tokens like `like` [B,G,N,D]."""
        parts = self.encode(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])
        keep_static(*[part for part in self.parts if part.dim() == 4], axis=3)  # the plan's; others are the caller's

    def write(self, x: Tensor, places: Tensor) -> None:
        """Encode x [B,G,S,D] into rows `places` [S]."""
        for part, new in zip(self.parts, self.encode(x), strict=True):
            part.index_copy_(2, places, new)

    def gather(self, places: Tensor) -> Tensor:
        """The latents [B,J,N,R] that the rows `places` [N] stand for."""
        return self._unpacked(*[part.index_select(2, places) for part in self.parts])


class StaticSketches(Sketches):
    """Sketches in fixed places: the same parts, with `capacity` + 1 rows."""

    def __init__(self, limited: bool, capacity: int) -> None:
        super().__init__(limited)
        self.capacity = capacity

    def start(self, like: Tensor) -> None:
        """Reserve the places for sketches of latents like `like` [B,J,N,R]."""
        parts = self.make(like[:, :, :0])
        self.parts = tuple([p.new_zeros((*p.shape[:2], self.capacity + 1, *p.shape[3:])) for p in parts])

    def write(self, latents: Tensor, places: Tensor) -> None:
        """Sketch the latents [B,J,S,R] of the rows `places` [S]."""
        for part, new in zip(self.parts, self.make(latents), strict=True):
            part.index_copy_(2, places, new)
