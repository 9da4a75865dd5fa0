"""KV-cache blocks as a serving engine allocates them: caches of one layer, and sequences written in parts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fhopt.plan.latent_plan import LatentPlan
from fhopt.serving.batch import NO_BLOCK, Batch, SequenceBlocks
from fhopt.serving.block_sizes import BlockSizes
from fhopt.serving.layer_cache import LayerCache
from fhopt.serving.layer_rows import CacheMemory, Caches


class Engine:
    """One layer's caches in shuffled blocks, for sequences given by `keys`, `values` and `queries` [T,heads,D]."""

    def __init__(
        self, plan: LatentPlan, sizes: BlockSizes, most: int = 256, count: int = 3, dtype: torch.dtype = torch.float32
    ) -> None:
        site = plan.sites[0]
        self.layer = LayerCache(plan, site, site.site.scale, dtype)
        self.sizes, self.window = sizes, plan.window
        rows = self.layer.latent_rows.size, self.layer.window_rows.size, self.layer.first_rows.size
        tokens = sizes.latents, sizes.window, 1
        spans = sizes.latents, sizes.window, sizes.first
        self.tables, self.caches = [], []
        for row, held, span in zip(rows, tokens, spans, strict=True):
            each = -(-most // span)
            order = 1 + torch.randperm(each * count).view(count, each)
            self.tables.append(order.int())
            self.caches.append(torch.randint(0, 256, (each * count + 1, 1, held, row), dtype=torch.uint8))

    def caches_of(self, starts: list[int], lengths: list[int], kept: int | None = None) -> Caches:
        """Return the caches of a batch. kept: window blocks of tokens before it are freed."""
        batch = Batch(starts, lengths)
        tables = [table.clone() for table in self.tables]
        if kept is not None:
            tables[1][:, : kept // self.sizes.window] = NO_BLOCK
        sizes = self.sizes.latents, self.sizes.window, self.sizes.first
        held = [
            CacheMemory(cache, SequenceBlocks(batch, table, size))
            for cache, table, size in zip(self.caches, tables, sizes, strict=True)
        ]
        return Caches(*held)

    def step(self, tokens: list[tuple[Tensor, Tensor, Tensor]], spans: list[tuple[int, int]]) -> list[Tensor]:
        """Write tokens `start` to `stop` of each sequence (queries, keys, values), and attend: [stop - start, H, E]."""
        starts = torch.tensor([0, *(stop - start for start, stop in spans)]).cumsum(0).tolist()
        pieces = [[x[start:stop] for x in one] for one, (start, stop) in zip(tokens, spans, strict=True)]
        query, key, value = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        caches = self.caches_of(starts, [stop for _, stop in spans])
        output = query.new_empty((*query.shape[:2], value.shape[2]))
        self.layer.write_and_attend(caches, query, key, value, output)
        return [output[begin:end] for begin, end in pairwise(starts)]


def random_tokens(plan: LatentPlan, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values of one sequence."""
    site = plan.sites[0].site
    sizes = (site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim)
    query, key, value = (torch.randn(count, *size) for size in sizes)
    return query, key + 2.0, value - 1.0
