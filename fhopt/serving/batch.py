"""Token layout of one vLLM batch: slots, and whether a query attends to a token as sink, latent or recent token.

A new token is written to both caches: as packed latents, and to the residual window. The cache that a query at position
p uses for a token depends only on p, as in token-by-token decoding:

    [ attention sinks | packed latents of quantized_tokens(p) tokens | residual window, p the last of it ]

A prompt therefore gives the same results in one piece, in chunks, after a cached prefix of another request, and after a
preemption. Queries that attend to the same latents form one `QueryTile`.

If a plan has means, packed latents are differences from the means of the sequence's first tokens after the sinks.
Tokens are encoded once these are available (`means_from`); the first tokens are then encoded from the residual window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpu import block_tables
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.window import ResidualWindow

NO_BLOCK = 0  # vLLM's null block, for tokens that are not stored


@dataclass(frozen=True)
class Sequence:
    """New tokens of one sequence: `index` in the batch, range `begin` to `end` of the batch's tokens.

    start: position of the first one.
    """

    index: int
    begin: int
    end: int
    start: int

    @property
    def stop(self) -> int:
        """Tokens of the sequence, including the new ones."""
        return self.start + self.end - self.begin


@dataclass(frozen=True)
class QueryTile:
    """Queries at positions `start` to `stop` that attend to `quantized` tokens as latents."""

    start: int
    stop: int
    quantized: int


def split_queries(window: ResidualWindow, start: int, stop: int) -> Iterator[QueryTile]:
    """Split queries at positions `start` to `stop` where the number of tokens attended as latents changes."""
    while start < stop:
        behind = start - window.first_length  # from here on it changes with every block
        end = min(stop, start - behind if behind < 0 else start + window.block - behind % window.block)
        yield QueryTile(start, end, window.quantized_tokens(start))
        start = end


def means_from(plan: LatentPlan) -> int:
    """Return the token count from which a sequence has means, taken over all earlier tokens except the sinks.

    0 if the plan has none. At most the capacity of the residual window, which still holds these tokens.
    """
    return plan.sinks + min(plan.mean_tokens, plan.window.capacity) if plan.mean_tokens else 0


@dataclass(eq=False)
class Batch:
    """New tokens of several sequences, concatenated.

    starts [sequences + 1]: offsets of the sequences' new tokens in the batch. lengths: tokens per sequence, including
    the new ones; a device tensor is copied to the host only on demand.
    """

    starts: list[int]
    lengths: list[int] | Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    made: dict[object, Any] = field(default_factory=dict, repr=False)  # cache shared by all layers

    @cached_property
    def sequences(self) -> list[Sequence]:
        """The sequences with new tokens."""
        lengths = self.lengths.tolist() if isinstance(self.lengths, Tensor) else self.lengths
        spans = zip(self.starts, self.starts[1:], lengths, strict=False)
        return [Sequence(i, b, e, length - e + b) for i, (b, e, length) in enumerate(spans) if e > b]

    @property
    def tokens(self) -> int:
        """Number of new tokens of all sequences."""
        return self.starts[-1]

    @cached_property
    def is_step(self) -> bool:
        """Whether every sequence has one new token, as in a decode step; sequences without any may follow."""
        return self.tokens > 0 and self.starts[: self.tokens + 1] == list(range(self.tokens + 1))

    @cached_property
    def lengths_there(self) -> Tensor:
        """Tokens per sequence, int32 on the device."""
        return torch.as_tensor(self.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def owners(self) -> Tensor:
        """Sequence index of each new token, int64 [tokens]."""
        counts = torch.tensor([s.end - s.begin for s in self.sequences])
        index = torch.tensor([s.index for s in self.sequences])
        return index.repeat_interleave(counts).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each new token in its sequence, int64 [tokens]."""
        return torch.cat([torch.arange(s.start, s.stop) for s in self.sequences]).to(self.device)

    @cached_property
    def singles(self) -> list[Sequence]:
        """Sequences with one new token (decode)."""
        return [s for s in self.sequences if s.end - s.begin == 1]

    @cached_property
    def several(self) -> list[Sequence]:
        """Sequences with several new tokens (prefill)."""
        return [s for s in self.sequences if s.end - s.begin > 1]

    def encoded(self, means_from: int) -> Tensor | None:
        """Return the new tokens, int64, of sequences that already had means or need none; None: all."""
        if means_from not in self.made:
            chosen = [s for s in self.sequences if s.start >= means_from]
            every = len(chosen) == len(self.sequences)
            index = torch.cat([torch.arange(0), *(torch.arange(s.begin, s.end) for s in chosen)])
            self.made[means_from] = None if every else index.to(self.device)
        found: Tensor | None = self.made[means_from]
        return found

    def gaining_means(self, means_from: int) -> list[Sequence]:
        """Return the sequences that reach `means_from` tokens in this batch."""
        return [s for s in self.sequences if s.start < means_from <= s.stop]


class SequenceBlocks:
    """Block table of one cache: int32 [sequences, blocks of each], with `size` tokens per block."""

    def __init__(self, batch: Batch, table: Tensor, size: int) -> None:
        self.batch, self.table, self.size = batch, table, size
        self.compiled: Any = None  # kernel arguments for the table, shared by all layers
        self._read: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def _new(self) -> tuple[Tensor, Tensor, Tensor | None]:
        blocks, offsets = self.places(self.batch.owners, self.batch.positions)
        kept = blocks != NO_BLOCK
        if bool(kept.all()):
            return blocks, offsets, None
        return blocks[kept], offsets[kept], kept

    def places(self, owners: Tensor | int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (block, offset) of tokens of sequences `owners` at `positions`, int64 each."""
        return self.table[owners, positions // self.size].long(), positions % self.size

    def write_new(self, cache: Tensor, rows: Tensor) -> None:
        """Write a row for each new token of the batch; tokens without a block are skipped.

        cache uint8 [blocks, 1, size, bytes]; rows uint8 [tokens, up to `bytes`].
        """
        blocks, offsets, kept = self._new
        place_rows(cache, blocks, offsets, rows if kept is None else rows[kept])

    def span(self, owners: Tensor, start: int, stop: int) -> tuple[Tensor, int]:
        """Return (blocks int64 [sequences, blocks] of positions `start` to `stop`, offset of `start` in the first)."""
        first, last = start // self.size, -(-stop // self.size)
        return self.table[owners, first:last].long(), start - first * self.size

    def read(self, cache: Tensor, sequence: int, start: int, stop: int) -> Tensor:
        """Return the rows uint8 [stop - start, bytes] of a sequence's tokens at positions `start` to `stop`."""
        key = (sequence, first := start // self.size, last := -(-stop // self.size))
        if key not in self._read:
            self._read[key] = self.table[sequence, first:last].long()
        rows = cache[self._read[key], 0].flatten(0, 1)  # [blocks * size, bytes]
        return rows[start - first * self.size : stop - first * self.size]


def place_rows(cache: Tensor, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
    """Write rows uint8 [N, up to `bytes`] into a cache uint8 [blocks, 1, size, bytes].

    blocks, offsets int64 [N]: destination of each row.
    """
    if not block_tables.write_block_rows(cache, blocks, offsets, rows):
        cache[blocks, 0, offsets, : rows.shape[1]] = rows
