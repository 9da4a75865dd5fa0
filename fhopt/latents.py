"""What attention may read of a cache: open keys and values, and latents of sealed tokens; and attention that reads it.

    attend     softmax(q K^T) V    latents and open tokens apart, through the canonical op, merged by log-sum-exp
    scores     q K^T               for attention that is written out, in order of position
    mix        p V

K and V are never rebuilt: queries are absorbed (q . D z = D^T q . z), outputs expanded. Both kinds of `Latents` say
which places of [sinks | sealed | window] are open and which are latents: `split` cuts what has a number per token,
`place` puts it together again.

Where there is an index of pages, a query alone reads the latents of those that it chooses (fhopt/pages.py).

Where the window is rounded to 8 bits, its tokens are rows too, and those of the open tokens that are given as numbers
are the others: the sinks and what is new. `SideRows.open` gives all of them as numbers.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T all tokens, N open ones, M of these in the
window, V rows of latents, D head size, R latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt import chunks, ops, page_ops, pages
from fhopt.pages import PageIndex

TILE = 1024  # tokens that are unpacked at a time where attention is written out


@dataclass(frozen=True, eq=False)
class SideRows:
    """Latent rows of keys or values, as the canonical op takes them, and their decoder [G, D, R].

    window: codes [B,G,M,D] and scales [B,G,M] of open tokens in the window, as `ops.round_rows` gives them.
    """

    tiers: ops.TierArguments
    rows: Tensor
    scale: Tensor | None
    decode: Tensor
    window: tuple[Tensor, Tensor] | None = None

    @property
    def rounded(self) -> int:
        """M."""
        return 0 if self.window is None else self.window[0].shape[2]

    def open(self, opened: Tensor, sinks: int) -> Tensor:
        """All open tokens [B,G,N,D], from those that are given as numbers."""
        if self.window is None:
            return opened
        window = ops.unround_rows(*self.window, opened.dtype)
        return torch.cat([opened[:, :, :sinks], window, opened[:, :, sinks:]], 2)

    def rebuild(self) -> Tensor:
        """Keys or values [B,G,V,D]: what the latents kept."""
        latent = self.rows if self.scale is None else torch.ops.fhopt.unpack(self.rows, self.scale, *self.tiers)
        return ops.decode(latent.to(self.decode.dtype), self.decode)


@dataclass(frozen=True, eq=False)
class Latents:
    """Rows for `visible` tokens that stand behind the first `sinks` open ones and before the others.

    index: what pages of them are chosen by; None: all are read. observer: called before attention, which then reads all
    pages (fhopt/paging.py).
    """

    key: SideRows
    value: SideRows
    sinks: int
    visible: int
    index: PageIndex | None = None
    observer: Callable[..., None] | None = None

    @property
    def lengths(self) -> None:
        """All rows stand for tokens."""
        return None

    def length(self, opened: Tensor) -> int:
        """T: all tokens. opened: those that are given as numbers."""
        return self.visible + self.key.rounded + opened.shape[2]

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """x [..., T], numbers of tokens in order of position -> [..., N] of the open ones, [..., V] of the latents."""
        end = self.sinks + self.visible
        return torch.cat([x[..., : self.sinks], x[..., end:]], -1), x[..., self.sinks : end]

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """The inverse of `split`, along `dim`."""
        first, rest = opened.narrow(dim, 0, self.sinks), opened.narrow(dim, self.sinks, opened.shape[dim] - self.sinks)
        return torch.cat([first, latent.to(opened.dtype), rest], dim)

    def causal(self, queries: int, opened: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Masks (open, latents) of the newest `queries` tokens where none is given: none sees what follows it."""
        count = self.key.rounded + opened.shape[2]
        return (ops.causal_mask(queries, count, opened.device) if queries > 1 else None), None


@dataclass(frozen=True, eq=False)
class StaticLatents:
    """The same with fixed sizes: what stands where is told by tensors.

    positions [N]: of the open places, -1 where there is no token. seen: which rows stand for their token, which is
    `sinks` + row; bool [V], or int64 [], how many first ones. All T places have a score, those without a token 0.
    """

    key: SideRows
    value: SideRows
    sinks: int
    positions: Tensor
    seen: Tensor
    tokens: int
    index: PageIndex | None = None

    @property
    def lengths(self) -> Tensor | None:
        """How many first rows stand for tokens, where that is all there is to say."""
        return None if self.seen.dtype == torch.bool else self.seen

    def seen_rows(self) -> Tensor:
        """Bool [V]."""
        rows = self.key.rows.shape[2]
        return self.seen if self.lengths is None else torch.arange(rows, device=self.seen.device) < self.seen

    def length(self, opened: Tensor) -> int:
        """T: places."""
        return self.tokens

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """As above; `fill` where there is no token."""
        opened = x.index_select(-1, self.positions.clamp(min=0)).masked_fill(self.positions < 0, fill)
        rows = x[..., self.sinks : self.sinks + self.key.rows.shape[2]]
        return opened, rows.masked_fill(~self.seen_rows(), fill)

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """As above."""
        shape = list(opened.shape)
        shape[dim] = self.tokens + 1  # the last for what is no token
        whole, rows = opened.new_zeros(shape), self.key.rows.shape[2]
        if rows:
            whole.narrow(dim, self.sinks, rows).copy_(latent)
        whole.index_copy_(dim, torch.where(self.positions < 0, self.tokens, self.positions), opened)
        return whole.narrow(dim, 0, self.tokens)

    def causal(self, queries: int, opened: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As above."""
        asking = self.positions[-queries:, None]
        far = self.seen.expand(queries, -1) if self.lengths is None else None
        return (self.positions >= 0) & (self.positions <= asking), far


AnyLatents = Latents | StaticLatents


def attend(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, mask: Tensor | None, *, scale: float,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention over open keys and values [B,G,N,D] and over latents. query [B,H,S,D] -> [B,H,S,E].

    mask, broadcastable to [B,H,S,T]: bool or additive, over all tokens in order of position; None: causal. sinks,
    broadcastable to [B,H,S]: one further logit that takes weight and gives nothing.
    """
    near, far = _masks(query, key, latents, mask)
    near, inside = _without(near, latents.sinks, latents.key.rounded)
    sides = latents.key, latents.value
    operands: Any = (
        query, key, value,
        *[x for side in sides for x in (side.rows, side.scale, side.decode)],
        *[x for side in sides for x in (side.window or (None, None))],
        near, inside, far, latents.lengths,
    )  # fmt: skip
    options: dict[str, Any] = dict(**ops.tier_options(*[side.tiers for side in sides]), scale=scale, softcap=softcap)
    causal = mask is None and isinstance(latents, Latents)
    index = latents.index
    observer = latents.observer if isinstance(latents, Latents) else None
    if observer is not None:
        observer(query, key, value, latents, scale, softcap)
    elif index is not None and _chooses(query, index):
        return _attend_chosen(*operands, index=index, sinks=sinks, causal=causal, **options)
    if sinks is None and _is_step(query, key, latents):
        output: Tensor = torch.ops.fhopt.attend_latents(*operands, **options)
        return output
    return attend_parts(*operands, **options, sinks=sinks, causal=causal)


def attend_parts(
    query: Tensor, key: Tensor, value: Tensor,
    key_rows: Tensor, key_scale: Tensor | None, key_decode: Tensor,
    value_rows: Tensor, value_scale: Tensor | None, value_decode: Tensor,
    window_keys: Tensor | None, window_key_scale: Tensor | None,
    window_values: Tensor | None, window_value_scale: Tensor | None,
    near: Tensor | None, inside: Tensor | None, far: Tensor | None, lengths: Tensor | None,
    *, sinks: Tensor | None = None, causal: bool = False, scale: float, softcap: float = 0.0, **tiers: Any,
) -> Tensor:  # fmt: skip
    """Attention over latents, a window of codes and open tokens, merged. Masks: near of the open tokens, inside of the
    window, far of the latents, of which the first `lengths` count. causal: near and inside say nothing more."""
    numbers, parts, coded = dict(scale=scale, softcap=softcap), [], bool(tiers["key_bits"] or tiers["value_bits"])
    if key_rows.shape[2] and chunks.rebuilds(query, key_rows, key_decode, value_rows, value_decode, far, coded):
        sides = key_rows, key_scale, key_decode, value_rows, value_scale, value_decode
        parts.append(torch.ops.fhopt.rebuilt_attention(query, *sides, far, lengths, **tiers, **numbers))
    elif key_rows.shape[2]:
        output, lse = ops.latent_attention(
            ops.absorb(query, key_decode), key_rows, key_scale, value_rows, value_scale, far,
            **tiers, **numbers, lengths=lengths,
        )  # fmt: skip
        parts.append((ops.expand(output, value_decode), lse))
    window = window_keys, window_key_scale, window_values, window_value_scale
    parts += _open_parts(query, key, value, window, (near, inside), sinks, causal, numbers)
    return ops.merge(parts) if len(parts) > 1 else parts[0][0]


def _open_parts(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[Tensor | None, ...], masks: tuple[Tensor | None, ...],
    sinks: Tensor | None, causal: bool, numbers: dict[str, float],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(output, lse) of the window, of the open tokens and of further logits, each where there are any."""
    near, inside = masks
    parts: list[tuple[Tensor, Tensor]] = []
    keys, key_scale, values, value_scale = window
    if keys is not None and values is not None:
        options = _window_options(query, value) | numbers
        parts.append(ops.latent_attention(query, keys, key_scale, values, value_scale, inside, **options))
    if key.shape[2] and chunks.serves(query, key, value, near):
        parts.append(torch.ops.fhopt.open_attention(query, key, value, near, causal=causal, **numbers))
    elif key.shape[2]:
        options = ops.latent_options(None, None)
        parts.append(ops.latent_attention(query, key, None, value, None, near, **options, **numbers))
    if sinks is not None:
        blank = query.new_zeros((*query.shape[:3], value.shape[3]))
        lse = sinks.to(torch.promote_types(query.dtype, torch.float32)).expand(query.shape[:3])
        parts.append((blank, lse))
    return parts


def _chooses(query: Tensor, index: PageIndex) -> bool:
    """True for a query that is alone, or counts as such, and has more pages than it may read."""
    return (index.each_query or query.shape[2] == 1) and index.most < index.count


def _attend_chosen(
    query: Tensor, key: Tensor, value: Tensor,
    key_rows: Tensor, key_scale: Tensor | None, key_decode: Tensor,
    value_rows: Tensor, value_scale: Tensor | None, value_decode: Tensor,
    window_keys: Tensor | None, window_key_scale: Tensor | None,
    window_values: Tensor | None, window_value_scale: Tensor | None,
    near: Tensor | None, inside: Tensor | None, far: Tensor | None, lengths: Tensor | None,
    *, index: PageIndex, sinks: Tensor | None, causal: bool, scale: float, softcap: float = 0.0, **tiers: Any,
) -> Tensor:  # fmt: skip
    """`attend_parts` with latents of chosen pages alone; with those of the others too, for the units of which these
    might weigh more than the index allows."""
    numbers = dict(scale=scale, softcap=softcap)
    absorbed = ops.absorb(query, key_decode)
    rows = key_rows, key_scale, value_rows, value_scale

    def values() -> Tensor | None:
        if index.fill is None or (index.mean is not None and far is None and lengths is None):
            return index.mean
        return mean_values(absorbed, *rows, far, lengths, index.tokens, **tiers)

    def read(mask: Tensor | None, listed: dict[str, Any], odds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = dict(**tiers, **numbers, **listed)
        output, lse = ops.latent_attention(absorbed, *rows, mask, **options, lengths=lengths)
        if odds is not None:
            output, lse = page_ops.stand_in(output, lse, values(), odds, index.fill)
        return ops.expand(output, value_decode), lse

    window = window_keys, window_key_scale, window_values, window_value_scale
    others = _open_parts(query, key, value, window, (near, inside), sinks, causal, numbers)
    others_lse = _lse_of(others)
    if index.limit == 1 and pages.is_one_step(absorbed, far, lengths, softcap):
        output, lse = pages.attend(absorbed, rows, index, far, lengths, others_lse, values(), scale=scale, **tiers)
        parts = [(ops.expand(output, value_decode), lse), *others]
        return ops.merge(parts) if len(parts) > 1 else parts[0][0]
    estimates, count = pages.page_estimates(absorbed, index, far, lengths, **numbers), key_rows.shape[2]
    weights = page_ops.expected_weights(estimates, index.units, others_lse)
    chosen = pages.keep_best(weights, index, pages.available_pages(index, lengths))
    odds = None if index.fill is None else page_ops.odds_left_out(estimates, chosen)
    parts = [read(*_listed(chosen, index, index.most, query, far, count), odds), *others]
    if index.limit < 1:
        lse_of_all = _lse_of(parts)
        assert lse_of_all is not None, "pages were read"
        most = ops.page_logits(pages.token_logits(absorbed, index, far, lengths, **numbers, at_most=True), index.tokens)
        share = pages.left_out(most, chosen, lse_of_all)
        rest = ~chosen & pages.to_complete(share, index).unsqueeze(-1)
        parts.append(read(*_listed(rest, index, index.count, query, far, count)))
    return ops.merge(parts) if len(parts) > 1 else parts[0][0]


def _lse_of(parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Log of the weight of all parts [B,H,S]; None where there is none."""
    if len(parts) < 2:
        return parts[0][1] if parts else None
    return torch.stack([lse for _, lse in parts], -1).logsumexp(-1)


def mean_values(
    query: Tensor, key_rows: Tensor, key_scale: Tensor | None, value_rows: Tensor, value_scale: Tensor | None,
    far: Tensor | None, lengths: Tensor | None, page_tokens: int, **tiers: Any,
) -> Tensor:  # fmt: skip
    """Mean of the value latents of some pages that each query may see: what a query of zeros reads.

    query [B,H,S,R] is absorbed; the others as of `attend_parts` -> [B,n,S,R], S that of the mask `far` or 1, n a
    divisor of H.
    """
    (b, heads), rows = query.shape[:2], math.lcm(key_rows.shape[1], value_rows.shape[1])
    shape = (1, 1) if far is None or far.dim() < 3 else far.shape[-3:-1]
    asking = query.new_zeros((b, heads if shape[0] > 1 else rows, shape[1], query.shape[3]))
    count = -(-(key_rows.shape[2] if lengths is None else lengths.reshape(-1)) // page_tokens)
    lists = pages.sampled(count, query.device).reshape(-1, 1, pages.SAMPLE).expand(b, 1, -1)
    mean, _ = ops.latent_attention(
        asking, key_rows, key_scale, value_rows, value_scale, far, **tiers, scale=1.0, lengths=lengths, pages=lists,
        page_tokens=page_tokens,
    )  # fmt: skip
    return mean


def _listed(
    chosen: Tensor, index: PageIndex, most: int, query: Tensor, far: Tensor | None, tokens: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """(mask, options) with which `fhopt::latent_attention` reads the latents of chosen pages, bool [B,U,S,P]."""
    if query.shape[2] == 1:
        return far, {"pages": page_ops.page_lists(chosen.squeeze(2), most), "page_tokens": index.tokens}
    mask = pages.page_mask(chosen, index.tokens, query.shape[1], tokens)
    return (mask if far is None else ops.restricted(far, mask)), {}


_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "attend_latents(Tensor query, Tensor key, Tensor value, Tensor key_rows, Tensor? key_scale, Tensor key_decode, "
    "Tensor value_rows, Tensor? value_scale, Tensor value_decode, Tensor? window_keys, Tensor? window_key_scale, "
    "Tensor? window_values, Tensor? window_value_scale, Tensor? near, Tensor? inside, Tensor? far, Tensor? lengths, *, "
    "int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, "
    "float scale, float softcap=0.0) -> Tensor"
)


def _attend_latents_fake(query: Tensor, key: Tensor, value: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_LIB.impl("attend_latents", attend_parts, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::attend_latents", _attend_latents_fake, lib=_LIB)


def _is_step(query: Tensor, key: Tensor, latents: AnyLatents) -> bool:
    """True in compiled graphs where all of it is one op (`codegen.cpu.graph_kernels`): decoding on a CPU."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or query.device.type != "cpu":
        return False
    typed = query.dtype == key.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return typed and query.shape[2] == 1 and key.shape[2] != 0 and latents.key.rows.shape[2] != 0


def _without(mask: Tensor | None, start: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask over keys without `count` of them from `start` on, and that over these."""
    if mask is None or count == 0:
        return mask, None
    end = start + count
    return torch.cat([mask[..., :start], mask[..., end:]], -1), mask[..., start:end]


def _window_options(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Keyword arguments of `fhopt::latent_attention` for a window of 8 bits (`ops.round_rows`)."""
    widths, steps = [query.shape[-1]], [1.0]
    key: dict[str, Any] = dict(key_bits=[8], key_widths=widths, key_steps=steps)
    return key | dict(value_bits=[8], value_widths=[value.shape[-1]], value_steps=steps)


def _masks(query: Tensor, key: Tensor, latents: AnyLatents, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(mask of the open tokens, mask of the latents)."""
    if mask is None:
        return latents.causal(query.shape[2], key)
    if mask.shape[-1] == 1:  # one rule for all tokens
        mask = mask.expand(*mask.shape[:-1], latents.length(key))
    near, far = latents.split(mask, False if mask.dtype == torch.bool else -math.inf)
    if latents.lengths is not None:  # says the rest
        far = mask[..., latents.sinks : latents.sinks + latents.key.rows.shape[2]]
    return near, far


def far_logits(query: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0) -> Tensor:
    """Logits of all latent rows: query [B,H,S,D] -> [B,H,S,V], float32 or more exact."""
    queries = ops.absorb(query, latents.key.decode)
    exact = torch.promote_types(query.dtype, torch.float32)
    tiles = [ops.grouped_scores(queries.to(exact) * scale, tile.to(exact)) for _, tile in _tiles(latents.key)]
    logits = torch.cat(tiles, -1)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def open_part(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(output [B,H,S,E], lse [B,H,S]) of the open tokens, of which the newest S queries see those before them."""
    near = latents.key.open(key, latents.sinks), latents.value.open(value, latents.sinks)
    mask = ops.causal_mask(query.shape[2], near[0].shape[2], query.device)
    options: Any = dict(**ops.latent_options(None, None), scale=scale, softcap=softcap)
    return ops.latent_attention(query, near[0], None, near[1], None, mask, **options)


def scores(query: Tensor, key: Tensor, latents: AnyLatents) -> Tensor:
    """q k^T for all tokens in order of position. query [B,H,S,D], open keys [B,G,N,D] -> [B,H,S,T]."""
    side = latents.key
    near = ops.grouped_scores(query, side.open(key, latents.sinks))
    queries = ops.absorb(query, side.decode)
    far = [ops.grouped_scores(queries, tile.to(queries.dtype)) for _, tile in _tiles(side)]
    return latents.place(near, torch.cat(far, -1) if far else near[..., :0], -1)


def mix(weights: Tensor, value: Tensor, latents: AnyLatents) -> Tensor:
    """p v over all tokens. weights [B,H,S,T], open values [B,G,N,E] -> [B,H,S,E]."""
    near, far = latents.split(weights)
    side = latents.value
    output = ops.grouped_mix(near, side.open(value, latents.sinks))
    total = sum(ops.grouped_mix(far[..., cut], tile.to(far.dtype)) for cut, tile in _tiles(side))
    return output if isinstance(total, int) else output + ops.expand(total, side.decode)


def _tiles(side: SideRows) -> Iterator[tuple[slice, Tensor]]:
    """Latents as numbers [B,J,TILE,R], a tile at a time where they are codes: never all of them at once."""
    for start in range(0, side.rows.shape[2], TILE):
        cut = slice(start, start + TILE)
        rows = side.rows[:, :, cut]
        yield cut, rows if side.scale is None else torch.ops.fhopt.unpack(rows, side.scale[:, :, cut], *side.tiers)


def rebuilt(opened: Tensor, side: SideRows, latents: AnyLatents) -> Tensor:
    """All keys or values [B,G,T,D] from the open ones and the latents: what the latents kept."""
    return latents.place(side.open(opened, latents.sinks), side.rebuild(), 2)
