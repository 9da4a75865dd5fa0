"""Left padding of a batch's sequences in a cache; see fhopt/attention/token_places.py.

A cache does not see the attention mask: `note_padding` reports it to the layers of an empty cache before their first
call. A layer reorders that call's tokens into slots, and stores three integers per sequence: its padding, its number of
attention sinks, and the offset of its token indices from its positions. The offset is the padding if positions exclude
padding, as in `generate`, and 0 if the model counts it. Sequences without any token in the first call (chunked prefill)
are not reordered, and padding takes their attention sinks; their means and key segments still start at their first
token.

Letters: B batch, G kv heads, S new tokens, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.token_places import TokenPlaces
from fhopt.cache.store import Store

PADDING = "padding"  # store name in files


@dataclass(frozen=True, eq=False)
class ExpectedPadding:
    """Padding of a first call of `tokens` tokens: numbers int64 [B,1,3]; reach as of `TokenPlaces`."""

    numbers: Tensor
    reach: int
    tokens: int

    @staticmethod
    def of(ahead: Tensor, behind: Tensor, sinks: int, tokens: int) -> ExpectedPadding:
        """Make it from each sequence's padding and position offset, both int64 [B].

        sinks: of the cache.
        """
        ahead = torch.where(ahead < tokens, ahead, 0)
        numbers = torch.stack([ahead, (tokens - ahead).clamp(max=sinks), behind], -1).unsqueeze(1)
        return ExpectedPadding(numbers, _reach(numbers), tokens)


def _reach(numbers: Tensor) -> int:
    return int(numbers[..., :2].sum(-1).max())


class LeftPadding(Store):
    """Padding, attention sinks and position offset of each sequence: int64 [B,1,3].

    Empty if no sequence has padding and all offsets are 0. moves: whether tokens are reordered into other slots.

    room: slots of a static cache; None if dynamic. expected: of the next call, if it is a first one.
    """

    def __init__(self, room: int | None = None) -> None:
        self.room, self.reach, self.moves = room, 0, True
        self.expected: ExpectedPadding | None = None

    @property
    def places(self) -> TokenPlaces | None:
        """Slots of tokens; None if each token's slot is its position."""
        if not self.parts or not self.moves:
            return None
        return TokenPlaces(self.parts[0][..., :2], self.reach if self.room is None else self.room)

    @property
    def starts(self) -> Tensor:
        """The first token after the attention sinks of each sequence, int64 [B,1,1]. Expects parts."""
        return self.parts[0][..., :2].sum(-1, keepdim=True)

    @property
    def behind(self) -> Tensor:
        """Offset of each sequence's token indices from its positions, int64 [B]. Expects parts."""
        return self.parts[0][:, 0, 2]

    def begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the padding expected of the first call, and return its keys and values [B,G,S,D] in slot order."""
        expected, self.expected = self.expected, None
        self.moves = True
        if expected is None or (len(expected.numbers), expected.tokens) != (keys.shape[0], keys.shape[2]):
            return keys, values
        self.parts = (expected.numbers.to(keys.device, copy=True),)
        self.reach = expected.reach
        places = TokenPlaces(self.parts[0][..., :2], self.reach)
        return places.by_place(keys, 2), places.by_place(values, 2)

    def follow(self, behind: Tensor, own: int) -> None:
        """Record position offsets, int64 [B], without padding. own: attention sinks so far."""
        zeros = torch.zeros_like(behind)
        self.parts, self.reach, self.moves = (torch.stack([zeros, zeros + own, behind], -1).unsqueeze(1),), own, False

    def learn(self, ahead: Tensor, behind: Tensor, before: int, tokens: int) -> None:
        """Record padding as `ExpectedPadding.of` does, for sequences that start in tokens `before` to +`tokens`."""
        late = (ahead >= before) & (ahead < before + tokens)
        if before == 0 or not bool(late.any()):
            return
        numbers = self.parts[0] if self.parts else ahead.new_zeros((len(ahead), 1, 3))
        own = torch.stack([ahead, torch.zeros_like(ahead), behind], -1).unsqueeze(1)
        self.moves = True
        self.parts = (torch.where(late[:, None, None].to(numbers.device), own.to(numbers.device), numbers),)
        self.reach = _reach(self.parts[0])

    def shorten(self, sinks: int, tokens: int) -> None:
        """Expect only the first `tokens` tokens of the same sequences in the next call."""
        (numbers,) = self.parts
        ahead, _, behind = numbers[:, 0].unbind(-1)
        self.expected, self.parts = ExpectedPadding.of(ahead, behind, sinks, tokens) if tokens else None, ()

    def forget(self) -> None:
        """Drop all padding."""
        self.parts, self.expected = (), None

    def restore(self, parts: list[Tensor], batch: int, length: int) -> None:
        """Load saved parts of a cache of `length` tokens. Raises ValueError if they are invalid."""
        if not parts:
            return
        (numbers,) = parts
        if numbers.dtype == torch.int64 and tuple(numbers.shape) == (batch, 1, 2):  # older files
            numbers = torch.cat([numbers, numbers[..., :1]], -1)
        if numbers.dtype != torch.int64 or tuple(numbers.shape) != (batch, 1, 3):
            raise ValueError(f"{PADDING} is {numbers.dtype} {tuple(numbers.shape)}, not int64 {(batch, 1, 3)}")
        self.reach = _reach(numbers)
        if int(numbers[..., :2].min()) < 0 or self.reach > length:
            raise ValueError(f"{PADDING} up to token {self.reach} of {length}")
        self.parts = (numbers,)


# --------------------------------------------------------------------------------------------------- the mask


def note_padding(layers: Iterable[Any], mask: Any, tokens: int, positions: Any = None) -> None:
    """Report left padding to latent layers of a cache: that of the first call, or of sequences that start later.

    tokens: S, of the call. mask: the model's attention mask: [B,T], or [B,1,S,T], bool or additive; otherwise padding
    is unknown. positions: of the call's tokens, int64 [B,S] or [1,S]; otherwise the model counts all tokens.
    """
    waiting = [layer for layer in layers if isinstance(getattr(layer, PADDING, None), LeftPadding)]
    if not waiting:
        return
    before = int(waiting[0].get_seq_length()) if waiting[0].is_initialized else 0
    ahead = padding_ahead(mask, any_query=before > 0) if isinstance(mask, Tensor) else None
    behind = _behind(positions, before + tokens, ahead)
    if before:
        for layer in waiting if ahead is not None and len(ahead) == waiting[0].batch_size else ():
            layer.padding.learn(ahead, behind, before, tokens)
        return
    if ahead is None and behind is not None and bool(behind.any()):
        ahead = torch.zeros_like(behind)
    expected: dict[int, ExpectedPadding | None] = {}  # by number of attention sinks
    for layer in waiting:
        sinks = layer.window.sinks
        if sinks not in expected:
            expected[sinks] = None if ahead is None else ExpectedPadding.of(ahead, behind, sinks, tokens)
        layer.padding.expected = expected[sinks]


def note_positions(layers: Iterable[Any], positions: Any, tokens: int) -> None:
    """Report the positions of a first call to latent layers with key segments, inside a graph.

    In a graph padding is unknown and stays in the attention sinks; without positions keys would be decoded wrongly.
    positions: as of `note_padding`, for a batch; a single sequence, which is rarely padded, is skipped.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or len(positions) == 1:
        return
    for layer in layers:
        padding = getattr(layer, PADDING, None)
        if isinstance(padding, LeftPadding) and not padding.parts and layer.site.segment:
            before = layer.get_seq_length() if layer.is_initialized else 0
            padding.follow(before + tokens - 1 - positions[:, -1], min(layer.window.sinks, tokens))


def _behind(positions: Any, tokens: int, ahead: Tensor | None) -> Any:
    """Return each sequence's offset of token indices from positions, from the newest of `tokens` tokens, int64 [B].

    None if neither positions nor padding are known.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None if ahead is None else torch.zeros_like(ahead)
    behind = tokens - 1 - positions[:, -1].long()
    return behind if ahead is None else behind.to(ahead.device).expand(len(ahead))


def padding_ahead(mask: Tensor, any_query: bool = False) -> Tensor | None:
    """Count the padding tokens before each sequence: mask as of `note_padding` -> int64 [B]; None if there is none.

    any_query: in a mask with queries, a token that any query sees is not padding; otherwise only the newest query
    counts, from which a sliding window may hide more.
    """
    if mask.dim() == 4:
        mask = mask[:, 0] if any_query else mask[:, 0, -1:]
        seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
        seen = seen.any(1)
    elif mask.dim() == 2:
        seen = mask != 0
    else:
        return None
    if bool(seen[:, 0].all()):
        return None
    return seen.int().argmax(-1)
