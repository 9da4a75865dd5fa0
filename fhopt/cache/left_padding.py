"""Padding on the left of the sequences of a batch, as a cache keeps it: see fhopt/attention/token_places.py.

Whoever calls the model knows its attention mask, a cache does not: `note_padding` tells the layers of an empty cache
before their first call. A layer brings the tokens of that call to their places, and keeps three numbers a sequence:
its padding, its attention sinks, and by how many positions its tokens are behind their numbers in the batch. That is
the padding where positions are counted without it, as `generate` does, and nothing where the model counts it.
Sequences of which the first call has no token at all (chunked prefill) stay as they come, with padding for attention
sinks; their means, and the segments of their keys, begin with their first token all the same.

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

PADDING = "padding"  # the store's name in files


@dataclass(frozen=True, eq=False)
class ExpectedPadding:
    """Padding of a first call of `tokens` tokens: numbers int64 [B,1,3], and reach as of `TokenPlaces`."""

    numbers: Tensor
    reach: int
    tokens: int

    @staticmethod
    def of(ahead: Tensor, behind: Tensor, sinks: int, tokens: int) -> ExpectedPadding:
        """Make it from the padding of each sequence and its positions behind numbers of tokens, both int64 [B].

        sinks: how many a cache has.
        """
        ahead = torch.where(ahead < tokens, ahead, 0)
        numbers = torch.stack([ahead, (tokens - ahead).clamp(max=sinks), behind], -1).unsqueeze(1)
        return ExpectedPadding(numbers, _reach(numbers), tokens)


def _reach(numbers: Tensor) -> int:
    return int(numbers[..., :2].sum(-1).max())


class LeftPadding(Store):
    """Padding before each sequence, its attention sinks, and positions that it is behind: int64 [B,1,3].

    No parts where all sequences have no padding and the positions of their tokens' numbers. moves: tokens are brought
    to other places.

    room: places of a cache of fixed size, None where it grows. expected: of the next call, if that is a first one.
    """

    def __init__(self, room: int | None = None) -> None:
        self.room, self.reach, self.moves = room, 0, True
        self.expected: ExpectedPadding | None = None

    @property
    def places(self) -> TokenPlaces | None:
        """Places of tokens; None where each stands in the place of its position."""
        if not self.parts or not self.moves:
            return None
        return TokenPlaces(self.parts[0][..., :2], self.reach if self.room is None else self.room)

    @property
    def starts(self) -> Tensor:
        """The first token behind the attention sinks of each sequence, int64 [B,1,1]. Expects parts."""
        return self.parts[0][..., :2].sum(-1, keepdim=True)

    @property
    def behind(self) -> Tensor:
        """By how many positions the tokens of each sequence are behind their numbers, int64 [B]. Expects parts."""
        return self.parts[0][:, 0, 2]

    def begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take what was expected of the first call, and return its keys and values [B,G,S,D] in order of places."""
        expected, self.expected = self.expected, None
        self.moves = True
        if expected is None or (len(expected.numbers), expected.tokens) != (keys.shape[0], keys.shape[2]):
            return keys, values
        self.parts = (expected.numbers.to(keys.device, copy=True),)
        self.reach = expected.reach
        places = TokenPlaces(self.parts[0][..., :2], self.reach)
        return places.by_place(keys, 2), places.by_place(values, 2)

    def follow(self, behind: Tensor, own: int) -> None:
        """Take positions behind numbers of tokens, int64 [B], and no padding. own: attention sinks so far."""
        zeros = torch.zeros_like(behind)
        self.parts, self.reach, self.moves = (torch.stack([zeros, zeros + own, behind], -1).unsqueeze(1),), own, False

    def learn(self, ahead: Tensor, behind: Tensor, before: int, tokens: int) -> None:
        """Take what `ExpectedPadding.of` takes of sequences whose first token is one of `tokens`, `before` behind."""
        late = (ahead >= before) & (ahead < before + tokens)
        if before == 0 or not bool(late.any()):
            return
        numbers = self.parts[0] if self.parts else ahead.new_zeros((len(ahead), 1, 3))
        own = torch.stack([ahead, torch.zeros_like(ahead), behind], -1).unsqueeze(1)
        self.moves = True
        self.parts = (torch.where(late[:, None, None].to(numbers.device), own.to(numbers.device), numbers),)
        self.reach = _reach(self.parts[0])

    def shorten(self, sinks: int, tokens: int) -> None:
        """Expect the same sequences again, their first `tokens` tokens alone."""
        (numbers,) = self.parts
        ahead, _, behind = numbers[:, 0].unbind(-1)
        self.expected, self.parts = ExpectedPadding.of(ahead, behind, sinks, tokens) if tokens else None, ()

    def forget(self) -> None:
        """Know of no padding."""
        self.parts, self.expected = (), None

    def restore(self, parts: list[Tensor], batch: int, length: int) -> None:
        """Hold saved parts, of a cache of `length` tokens. Raises ValueError when they cannot be such."""
        if not parts:
            return
        (numbers,) = parts
        if numbers.dtype == torch.int64 and tuple(numbers.shape) == (batch, 1, 2):  # of files before there were three
            numbers = torch.cat([numbers, numbers[..., :1]], -1)
        if numbers.dtype != torch.int64 or tuple(numbers.shape) != (batch, 1, 3):
            raise ValueError(f"{PADDING} is {numbers.dtype} {tuple(numbers.shape)}, not int64 {(batch, 1, 3)}")
        self.reach = _reach(numbers)
        if int(numbers[..., :2].min()) < 0 or self.reach > length:
            raise ValueError(f"{PADDING} up to token {self.reach} of {length}")
        self.parts = (numbers,)


# --------------------------------------------------------------------------------------------------- the mask


def note_padding(layers: Iterable[Any], mask: Any, tokens: int, positions: Any = None) -> None:
    """Tell latent layers of a cache what padding their first call begins with, and later ones of several tokens.

    tokens: of the call, S. mask: the model's attention mask: [B,T], or [B,1,S,T], bool or additive; None, or anything
    else: nothing is known of padding. positions: those of the call's tokens, int64 [B,S] or [1,S]; None, or anything
    else: the model counts all tokens.
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
    expected: dict[int, ExpectedPadding | None] = {}  # by the number of attention sinks
    for layer in waiting:
        sinks = layer.window.sinks
        if sinks not in expected:
            expected[sinks] = None if ahead is None else ExpectedPadding.of(ahead, behind, sinks, tokens)
        layer.padding.expected = expected[sinks]


def note_positions(layers: Iterable[Any], positions: Any, tokens: int) -> None:
    """Tell latent layers whose keys are relative to segments the positions of their first call, within a graph.

    There padding is not known, and stays in the attention sinks; without its positions keys would be read wrongly.
    positions: as of `note_padding`, of each sequence; of a single one none are taken: it seldom has padding.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or len(positions) == 1:
        return
    for layer in layers:
        padding = getattr(layer, PADDING, None)
        if isinstance(padding, LeftPadding) and not padding.parts and layer.site.segment:
            before = layer.get_seq_length() if layer.is_initialized else 0
            padding.follow(before + tokens - 1 - positions[:, -1], min(layer.window.sinks, tokens))


def _behind(positions: Any, tokens: int, ahead: Tensor | None) -> Any:
    """Return by how many positions the newest of `tokens` tokens of each sequence is behind its number, int64 [B].

    None where neither positions nor padding are known.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None if ahead is None else torch.zeros_like(ahead)
    behind = tokens - 1 - positions[:, -1].long()
    return behind if ahead is None else behind.to(ahead.device).expand(len(ahead))


def padding_ahead(mask: Tensor, any_query: bool = False) -> Tensor | None:
    """Count the tokens of padding before each sequence: mask as of `note_padding` -> int64 [B], None where none has.

    any_query: of a mask with queries, what any of them sees is no padding; else what the newest one does, from which a
    sliding window may hide more.
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
