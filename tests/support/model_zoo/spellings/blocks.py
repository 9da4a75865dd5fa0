"""The block around every spelling, decorators that turn functions into entries, and shared helpers.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels, N = H // G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo import Entry, ZooCase
from model_zoo.functional import Functional, Has, Run, settled

B, H, G, T, D = 2, 4, 2, 12, 8
C, N, P = H * D, H // G, 7  # P: tokens in a cache
SCALE = D**-0.5
LOWEST = torch.finfo(torch.float32).min
WINDOWS, WINDOW = 3, 4  # T = WINDOWS * WINDOW, also the rows and columns of an image
Heads = tuple[Tensor, Tensor, Tensor]


class SpellingBlock(Functional):
    """Projections q, k, v, o and a causal triangle [T, T]. Unused members do not enter a spelling's graph."""

    def __init__(self, run: Run, has: Has, kv_heads: int) -> None:
        super().__init__(run, {})
        self.q, self.o = nn.Linear(C, C), nn.Linear(C, C)
        self.k, self.v = nn.Linear(C, kv_heads * D), nn.Linear(C, kv_heads * D)
        self.register_buffer("triangle", torch.ones(T, T, dtype=torch.bool).tril())
        self.hold(has)  # may replace these modules

    def split(self, x: Tensor) -> Heads:
        """Project x [B, T, C] to q [B, H, T, D], k and v [B, G, T, D]."""
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def join(self, o: Tensor) -> Tensor:
        """Join the heads of o [B, H, T, D] and project to [B, T, C]."""
        return self.o(o.transpose(1, 2).reshape(o.shape[0], -1, C))


def tokens() -> tuple[Any, ...]:
    return (torch.randn(B, T, C),)


class Spellings:
    """The spellings of one module as entries, in the order in which its functions are decorated.

    Options of the decorators: `has` (makers of parameters, buffers and modules of the Block), `inputs` (maker of the
    arguments), `read_heads` (key heads of a site, if they differ from the Block's), and fields of Entry.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def core(self, **options: Any) -> Callable[[Run], Run]:
        """Add an entry for f(m, q, k, v) -> o, called between the projections of a Block."""
        return self._add(lambda f: lambda m, x, *more: m.join(f(m, *m.split(x), *more)), options)

    def heads(self, **options: Any) -> Callable[[Run], Run]:
        """Add an entry for f(m, x) -> q, k, v, called before a causal scaled_dot_product_attention."""
        return self._add(lambda f: lambda m, x, *more: m.join(attend(*f(m, x, *more), is_causal=True)), options)

    def whole(self, **options: Any) -> Callable[[Run], Run]:
        """Add an entry for f(m, x) -> y, which uses only the weights of the Block."""
        return self._add(lambda f: f, options)

    def _add(self, around: Callable[[Run], Run], options: Mapping[str, Any]) -> Callable[[Run], Run]:
        traits = dict(options)
        has, inputs, read = traits.pop("has", {}), traits.pop("inputs", tokens), traits.pop("read_heads", 0)
        traits = dict(heads=H, kv_heads=H, head_dim=D, sites=1) | traits
        rows = traits["kv_heads"] * H // traits["heads"] or G  # kv heads of the Block, which always has H query heads
        traits |= {"kv_heads": read} if read else {}
        if traits["sites"] == 0:
            traits = dict(explained=1) | traits | dict(heads=0, kv_heads=0, head_dim=0)

        def add(function: Run) -> Run:
            def build() -> ZooCase:
                torch.manual_seed(1)
                return ZooCase(settled(SpellingBlock(around(function), has, rows)), inputs())

            self.entries.append(Entry(function.__name__, "spelling", build, **traits))
            return function

        return add


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)) * SCALE  # [B, H, S, T]


def split(t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], -1, D).transpose(1, 2)  # [B, heads, T, D]


def fold(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-2], D)  # [B*H, T, D]


def alibi() -> Tensor:
    return -(2.0 ** -torch.arange(1, H + 1)).view(1, H, 1, 1) * torch.arange(T - 1, -1, -1)  # [1, H, 1, T]


def folded_alibi() -> Tensor:
    return alibi().expand(B, H, 1, T).reshape(B * H, 1, T)


def table_index() -> Tensor:
    return torch.arange(T)[:, None] - torch.arange(T) + T - 1  # [T, T], 0 .. 2T-2


def packs() -> Tensor:
    return torch.tensor([0] * 5 + [1] * 3 + [2] * 4)  # [T]: which of three sequences a token belongs to


def with_padding() -> tuple[Any, ...]:
    return (*tokens(), torch.arange(T) < torch.tensor([[T], [T - 4]]))


def angles(size: int = D) -> Tensor:
    return torch.arange(T)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)  # [T, size / 2]


def float_triangle() -> Tensor:
    return torch.zeros(T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), LOWEST)
