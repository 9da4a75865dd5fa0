"""What a latent cache layer keeps its tokens in: open tokens as they came or in 8 bits, sealed tokens as rows of codes.

    dynamic   [ sinks | window ]  as long as it has tokens;   rows  grow in place, by 1/GROWTH of their number
    static    [ sinks | ring ]    of fixed size;              rows  of fixed size

Where a plan has pages, sketches of the sealed tokens (fhopt/pages.py) are a store of their own, of the same length.

Every store is a tuple of tensors `parts` with sequences in dimension 0 and tokens in dimension 2, so that beams, batch
selection and offloading are one line each. The static stores are written by index, without a look at how many tokens
there are; each part of theirs has one place more than it needs, the last, for tokens that are not to be kept.

Letters: B batch, G kv heads, N tokens, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt import encoding, ops
from fhopt.pages import Sketcher, SketchRows
from fhopt.spec import SidePlan

GROWTH = 64  # sealed rows grow by 1/GROWTH of their number, at least one block: at most that share is spare


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


class OpenTokens(Store):
    """Open tokens of one side, [sinks | window], as they came: one part [B, G, N, D]."""

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        self.parts = (like[:, :, :0].clone(),)  # a view would keep the memory of `like`

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.parts[0].shape[0])

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2])

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sinks among `nbytes`."""
        return self.parts[0][:, :, : self.sinks].nbytes if self.parts else 0

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them."""
        return torch.cat([*self.parts, *new], 2) if new else self.parts[0]

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """The same as attention reads them: tokens as they came, and codes of those in the window."""
        return self.read(*new), None

    def keep(self, new: Tensor, sealed: int) -> None:
        """Hold new tokens too, without the `sealed` oldest of the window."""
        tokens = torch.cat([*self.parts, new], 2)
        if sealed:
            tokens = torch.cat([tokens[:, :, : self.sinks], tokens[:, :, self.sinks + sealed :]], 2)
        self.parts = (tokens,)

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window."""
        (held,) = self.parts
        self.parts = (torch.cat([held[:, :, : self.sinks], rebuilt.to(held.dtype), held[:, :, self.sinks :]], 2),)

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        self.parts = (self.parts[0][:, :, :count].clone(),)


class RoundedTokens(OpenTokens):
    """The same with a window of 8 bits: parts are sinks [B,G,N,D], codes uint8 [B,G,M,D] and their scales [B,G,M]."""

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        nothing = like[:, :, :0].clone()
        self.parts = (nothing, *ops.round_rows(nothing))

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2] + self.parts[1].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them exactly as they came, in the dtype of the sinks."""
        sinks, codes, scale = self.parts
        return torch.cat([sinks, ops.unround_rows(codes, scale, sinks.dtype), *new], 2)

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """As above."""
        sinks, codes, scale = self.parts
        return (torch.cat([sinks, *new], 2) if new else sinks), (codes, scale)

    def keep(self, new: Tensor, sealed: int) -> None:
        """As above; only tokens that stay are rounded."""
        sinks, codes, scale = self.parts
        more_codes, more_scale = ops.round_rows(new[:, :, max(0, self.sinks + sealed - self.count) :])
        if sinks.shape[2] < self.sinks:  # and the window is empty
            sinks = torch.cat([sinks, new], 2)[:, :, : self.sinks].clone()
        codes = torch.cat([codes[:, :, sealed:], more_codes], 2)
        self.parts = (sinks, codes, _joined([scale[:, :, sealed:], more_scale]))

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window, rounded."""
        sinks, *window = self.parts
        more = ops.round_rows(rebuilt)
        self.parts = (sinks, *[_joined([new, old]) for new, old in zip(more, window, strict=True)])

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        sinks, *window = self.parts
        rest = max(0, count - self.sinks)
        self.parts = (sinks[:, :, :count].clone(), *[part[:, :, :rest].clone() for part in window])


def _joined(parts: list[Tensor]) -> Tensor:
    """Codes or scales, one behind the other; as integers, since autocast on a CPU cannot join float16."""
    if parts[0].dtype != torch.float16:
        return torch.cat(parts, 2)
    return torch.cat([part.contiguous().view(torch.int16) for part in parts], 2).view(torch.float16)


class SealedRows(Store):
    """Sealed rows of one encoder, grown in place: codes [B,J,capacity,bytes] and scales [B,J,capacity], or numbers."""

    def __init__(self, plan: SidePlan) -> None:
        self.plan = plan
        keep_static(plan.encode, plan.decode)
        self._tiers = ops.tier_arguments(plan)
        self._text = "|".join(",".join(map(repr, numbers)) for numbers in self._tiers)
        self.bases: Bases | None = None  # before the first tokens come

    @property
    def tiers(self) -> ops.TierArguments:
        """Bits, widths and steps; in a compiled graph from one text, which costs one guard and not one a number."""
        if not torch.compiler.is_compiling():
            return self._tiers
        bits, widths, steps = [part.split(",") if part else [] for part in self._text.split("|")]
        return [int(b) for b in bits], [int(w) for w in widths], [float(s) for s in steps]

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parts that stand for x [B,G,N,D]. No gradient goes through codes."""
        assert self.bases is not None
        basis = self.bases.encode
        tiers = self.tiers
        x = x.detach() if tiers[0] else x
        if tiers[0] and encoding.encodes_at_once(x, basis):
            return torch.ops.fhopt.encode_rows(x, basis, *tiers)
        latent = ops.encode(x.to(basis.dtype), basis)
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
        codes, scale = self.sketcher.codes(latents)
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


# --------------------------------------------------------------------------------------------------- static stores


class StaticTokens(Store):
    """Open tokens in fixed places: sinks [B,G,sinks+1,D] and a ring [B,G,window+1,D], or its codes and scales."""

    def __init__(self, sinks: int, window: int, bits: int) -> None:
        self.sinks, self.window, self.bits = sinks, window, bits

    def start(self, like: Tensor) -> None:
        """Reserve the places, of the shape and dtype of `like`."""
        blank = [like.new_zeros((*like.shape[:2], count + 1, like.shape[3])) for count in (self.sinks, self.window)]
        self.parts = tuple(blank) if self.bits == 16 else (blank[0], *ops.round_rows(blank[1]))

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.parts[0].shape[0])

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sinks among `nbytes`."""
        return self.parts[0].nbytes if self.parts else 0

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """What stands in the places, sinks then ring, and `new` tokens behind, as attention reads them (see above)."""
        sinks, *ring = [part[:, :, :-1] for part in self.parts]
        if self.bits == 16:
            return torch.cat([sinks, *ring, *new], 2), None
        return torch.cat([sinks, *new], 2), (ring[0], ring[1])

    def write(self, tokens: Tensor, sink_places: Tensor, ring_places: Tensor) -> None:
        """Put tokens [B,G,S,D] into their places [S], the last place for those that have none."""
        window = (tokens,) if self.bits == 16 else ops.round_rows(tokens)
        self.parts[0].index_copy_(2, sink_places, tokens)
        for part, new in zip(self.parts[1:], window, strict=True):
            part.index_copy_(2, ring_places, new)


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
