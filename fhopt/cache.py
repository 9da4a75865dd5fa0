"""`LatentCache`: a transformers cache that holds latents, and attention that runs on them.

    [ sinks: first tokens, exact | sealed blocks of latents, packed tiers | open window: newest tokens, exact or 8-bit ]

An `update` appends to the window; when the window holds `recent + block` tokens, its oldest block is encoded, packed
and sealed. Tokens of the call itself are always exact to each other; with `plan.window_bits` 8 they are rounded, once,
when the call has read them, so later calls see them in 8 bits. Where a plan has one latent for keys and values (layout
"input"), its rows are stored once. With `absorb=True` (what `fhopt.apply` makes), `update` returns the open keys and
values only, and `latent_attention` below reads the rest as latents: nothing of full length is rebuilt. With
`absorb=False` any attention works: `update` returns rebuilt keys and values of full length.

Letters: B batch, H query heads, G kv heads, S queries, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from fhopt import ops
from fhopt.errors import FhoptError
from fhopt.spec import LatentPlan, SidePlan, SitePlan

GROWTH = 8  # sealed storage grows by 1/GROWTH of its size, at least one block: at most that share is spare


@dataclass
class Latents:
    """What an attention call may read beside the open keys and values it is given.

    Rows cover `visible` tokens that stand behind the first `sinks` and before the other open ones.
    """

    layer: LatentLayer
    visible: int
    key: tuple[Tensor, Tensor | None] | None = None
    value: tuple[Tensor, Tensor | None] | None = None


class _Store:
    """Tensors of some tokens: batch in dimension 0, tokens in dimension 2. No parts: not started yet."""

    parts: tuple[Tensor, ...] = ()

    def each(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the stored tensors."""
        self.parts = tuple([function(part) for part in self.parts])


class _Exact(_Store):
    """Open tokens of one side, [sinks | window], as they came: one part [B, G, N, D]."""

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        self.parts = (like[:, :, :0],)

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.parts[0].shape[0])

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them, as attention reads them."""
        return torch.cat([*self.parts, *new], 2) if new else self.parts[0]

    def keep(self, tokens: Tensor, sealed: int) -> None:
        """Hold `tokens`, what `read` gave with new ones, without the `sealed` oldest of the window."""
        if sealed:
            tokens = torch.cat([tokens[:, :, : self.sinks], tokens[:, :, self.sinks + sealed :]], 2)
        self.parts = (tokens,)

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window."""
        self.parts = (_insert(self.parts[0], rebuilt, self.sinks),)

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        self.parts = (self.parts[0][:, :, :count].clone(),)


class _Rounded(_Exact):
    """The same with a window of 8 bits: parts are sinks [B,G,N,D], codes int8 [B,G,M,D] and their scales [B,G,M]."""

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        nothing = like[:, :, :0].clone()  # a view would keep the memory of `like`
        self.parts = (nothing, *ops.round_rows(nothing))

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2] + self.parts[1].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them exactly as they came, in the dtype of the sinks."""
        sinks, codes, scale = self.parts
        return torch.cat([sinks, ops.unround_rows(codes, scale, sinks.dtype), *new], 2)

    def keep(self, tokens: Tensor, sealed: int) -> None:
        """As above; only tokens that have no codes yet are rounded."""
        sinks, codes, scale = self.parts
        fresh = max(self.count, self.sinks + sealed)
        more_codes, more_scale = ops.round_rows(tokens[:, :, fresh:])
        if sinks.shape[2] < self.sinks:
            sinks = tokens[:, :, : self.sinks].clone()
        codes = torch.cat([codes[:, :, sealed:], more_codes], 2)
        self.parts = (sinks, codes, torch.cat([scale[:, :, sealed:], more_scale], 2))

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window, rounded."""
        sinks, *window = self.parts
        more = ops.round_rows(rebuilt)
        self.parts = (sinks, *[torch.cat([new, old], 2) for new, old in zip(more, window, strict=True)])

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        sinks, *window = self.parts
        rest = max(0, count - self.sinks)
        self.parts = (sinks[:, :, :count].clone(), *[part[:, :, :rest].clone() for part in window])


class _Rows(_Store):
    """Sealed rows of one encoder, grown in place: codes [B,J,capacity,bytes] and scales [B,J,capacity], or numbers."""

    def __init__(self, plan: SidePlan) -> None:
        self.plan = plan
        self.tiers = ops.tier_arguments(plan)
        self.encoder: Tensor | None = None  # float32, on the device of the model

    def seal(self, x: Tensor, at: int, block: int) -> None:
        """Encode x [B,G,N,D] and store it at rows `at` to `at + N`."""
        assert self.encoder is not None
        latent = ops.encode(x.to(self.encoder.dtype), self.encoder)
        new = torch.ops.fhopt.pack(latent, *self.tiers) if self.plan.tiers else (latent.to(x.dtype),)
        old = self.parts or [None] * len(new)
        self.parts = tuple([_write(o, n, at, block) for o, n in zip(old, new, strict=True)])

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows and their scales (None for uncoded latents), as views."""
        rows, *scale = [part[:, :, start:stop] for part in self.parts]
        return rows, scale[0] if scale else None

    def latents(self, start: int, stop: int) -> Tensor:
        """The same as numbers [B, J, stop - start, R]."""
        rows, scale = self.read(start, stop)
        return rows if scale is None else torch.ops.fhopt.unpack(rows, scale, *self.tiers)


class _Side:
    """Keys or values of one layer: open tokens, and sealed ones in `rows`, which may be those of the other side too."""

    def __init__(self, plan: SidePlan, rows: _Rows, opened: _Exact) -> None:
        self.plan, self.rows, self.open = plan, rows, opened
        self.decoder: Tensor | None = None

    def prepare(self, like: Tensor) -> None:
        """No tokens yet, and the bases on the device of the model: encoder float32, decoder in the model's dtype."""
        self.open.start(like)
        self.rows.encoder = self.rows.plan.encode.to(like.device)
        self.decoder = self.plan.decode.to(like.device, like.dtype)

    def rebuild(self, start: int, stop: int) -> Tensor:
        """Keys or values [B,G,stop-start,D] from rows: what the latents kept."""
        assert self.decoder is not None
        return ops.decode(self.rows.latents(start, stop).to(self.decoder.dtype), self.decoder)


def _write(storage: Tensor | None, new: Tensor, at: int, block: int) -> Tensor:
    """Write `new` [B,J,N,...] behind row `at`, growing the storage when it is full."""
    need = at + new.shape[2]
    if storage is None or storage.shape[2] < need:
        capacity = need if storage is None else max(need, _round_up(at + at // GROWTH, block))
        grown = new.new_empty((*new.shape[:2], capacity, *new.shape[3:]))
        if storage is not None:
            grown[:, :, :at] = storage[:, :, :at]
        storage = grown
    storage[:, :, at:need] = new
    return storage


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class LatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `LatentCache`. `keys` and `values` are the open tokens: sinks, then the window."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self, site: SitePlan, sinks: int, recent: int, block: int, absorb: bool, window_bits: int = 16
    ) -> None:
        # Without the parent's `__init__`, which sets `keys` and `values`: here they are read from the sides.
        self.site, self.sinks, self.recent, self.block, self.absorb = site, sinks, recent, block, absorb
        open_tokens = _Exact if window_bits == 16 else _Rounded
        rows = _Rows(site.key)
        self.key_side = _Side(site.key, rows, open_tokens(sinks))
        self.value_side = _Side(site.value, rows if site.is_shared else _Rows(site.value), open_tokens(sinks))
        self.is_initialized = False
        self.sealed = 0
        self.unread = False  # latents were offered to an attention call that has not taken them

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty open parts with the shapes and dtype of the first tokens."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self.key_side.prepare(key_states)
        self.value_side.prepare(value_states)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """The open keys [B,G,N,D] as attention reads them, None before the first tokens."""
        return self.key_side.open.read() if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """The open values [B,G,N,E] as attention reads them, None before the first tokens."""
        return self.value_side.open.read() if self.is_initialized else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D]; returns what attention reads (see the module docstring).

        Raises FhoptError, and changes nothing, when the tokens do not fit the plan or the cache, or when the model's
        attention ignores the latents.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible = self.sealed
        keys, values = self.key_side.open.read(key_states), self.value_side.open.read(value_states)
        latents = Latents(self, visible)
        if visible:
            latents.key, latents.value = self.key_side.rows.read(0, visible), self.value_side.rows.read(0, visible)
        result = self._offer(keys, values, latents)
        self._seal(keys, values)
        return result

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        site = self.site.site
        found = (key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        wanted = (site.kv_heads, site.key_dim, site.kv_heads, site.value_dim)
        if found != wanted:
            raise FhoptError(
                f"{site.name}: keys and values have (heads, size) {found[:2]} and {found[2:]}, the plan expects "
                f"{wanted[:2]} and {wanted[2:]}. Is this the model that the plan was fitted for?"
            )
        held = self.key_side.open
        if self.is_initialized and (key_states.dtype != self.dtype or key_states.shape[0] != held.batch):
            raise FhoptError(
                f"{site.name}: new tokens are {key_states.dtype} of batch {key_states.shape[0]}, the cache holds "
                f"{self.dtype} of batch {held.batch}. Use one cache for each batch and dtype."
            )
        if self.unread:
            raise FhoptError(
                f"{site.name}: the model's attention did not read the latents (expected the 'fhopt' implementation). "
                "Call fhopt.apply(model, plan), or make LatentCache(plan, absorb=False)."
            )

    def _offer(self, keys: Tensor, values: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        if self.absorb:
            self.unread = True
            offered = keys.view_as(keys)  # not `keys`, which may be held: layer -> keys -> latents -> layer
            offered.fhopt_latents = latents  # type: ignore[attr-defined]
            return offered, values
        if not latents.visible:
            return keys, values
        return (
            _insert(keys, self.key_side.rebuild(0, latents.visible), self.sinks),
            _insert(values, self.value_side.rebuild(0, latents.visible), self.sinks),
        )

    def _seal(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values; move whole blocks that left the recent tokens into the sealed rows."""
        ready = max(0, keys.shape[2] - self.sinks - self.recent) // self.block * self.block
        if ready:
            end = self.sinks + ready
            self._encode(keys[:, :, self.sinks : end], values[:, :, self.sinks : end])
            self.sealed += ready
        self.key_side.open.keep(keys, ready)
        self.value_side.open.keep(values, ready)

    def _encode(self, keys: Tensor, values: Tensor) -> None:
        """Append to the sealed rows."""
        if self.site.is_shared:
            self.key_side.rows.seal(torch.cat([keys, values], -1), self.sealed, self.block)
        else:
            self.key_side.rows.seal(keys, self.sealed, self.block)
            self.value_side.rows.seal(values, self.sealed, self.block)

    # ---- the rest of the interface of a cache layer

    def get_seq_length(self) -> int:
        """Tokens held, open and sealed."""
        return self.sealed + self.key_side.open.count if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: all tokens, in order of position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows without a limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        for store in self._stores:
            store.parts = ()
        self.sealed, self.unread, self.is_initialized = 0, False, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; a block that is cut is rebuilt into the window.

        Raises FhoptError for a positive number or for more tokens than are held.
        """
        length = self.get_seq_length()
        if tokens_to_remove > 0 or -tokens_to_remove > length:
            raise FhoptError(f"crop({tokens_to_remove}) of {length} tokens; expected a number from -{length} to 0.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        target = length + tokens_to_remove
        keep = max(0, target - self.sinks) // self.block * self.block
        for side in (self.key_side, self.value_side):
            if self.sealed > keep:
                side.open.insert(side.rebuild(keep, self.sealed))
            side.open.crop(target - min(keep, self.sealed))
        self.sealed = min(keep, self.sealed)

    @property
    def _stores(self) -> list[_Store]:
        """Everything that holds tokens, each once."""
        key, value = self.key_side, self.value_side
        return [key.open, value.open, key.rows, *([] if value.rows is key.rows else [value.rows])]

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores:
            store.each(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences `beam_idx` (beam search)."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move all tokens to the CPU."""
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tokens back to the device of the model."""
        self._each(lambda t: t.to(self.device, non_blocking=True))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        return [part for store in self._stores for part in store.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind the tokens: codes, scales, sinks, window, spare room."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}.values())


def _insert(exact: Tensor, rebuilt: Tensor, sinks: int) -> Tensor:
    """[sinks | window] and rebuilt tokens -> [sinks | rebuilt | window], in order of position."""
    return torch.cat([exact[:, :, :sinks], rebuilt.to(exact.dtype), exact[:, :, sinks:]], 2)


def layer_index(name: str) -> int:
    """Index of the layer that a site belongs to: the last number in its module path. Raises FhoptError."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not numbers:
        raise FhoptError(
            f"site {name!r} has no layer number in its name; expected one like 'model.layers.3.self_attn'."
        )
    return int(numbers[-1])


class LatentCache(Cache):  # type: ignore[misc]
    """A cache for one model and plan.

    Args:
        plan: what to keep of each layer; layers that it does not name stay exact.
        config: the model's configuration; needed when the plan leaves layers out.
        absorb: offer latents to the 'fhopt' attention (see the module docstring); False works with any attention.
    """

    def __init__(self, plan: LatentPlan, config: Any = None, *, absorb: bool = False) -> None:
        sites = {layer_index(p.site.name): p for p in plan.sites if p.site.kind == "self"}
        plain = list(DynamicCache(config=config.get_text_config(decoder=True)).layers) if config is not None else []
        last = max([-1, *sites])
        if last < 0 or (plain and last >= len(plain)):
            raise FhoptError(f"the plan names layer {last}, the model has {len(plain)}. Fit a plan for this model.")
        count = max(len(plain), last + 1)
        layers = [
            LatentLayer(sites[i], plan.sinks, plan.recent, plan.block, absorb, plan.window_bits)
            if i in sites and not (i < len(plain) and plain[i].is_sliding)  # a window is smaller than any plan
            else plain[i]
            if i < len(plain)
            else DynamicLayer()
            for i in range(count)
        ]
        super().__init__(layers=layers)
        self.plan = plan

    @property
    def nbytes(self) -> int:
        """Bytes of storage that the cache holds, all layers, everything counted."""
        return sum(row["bytes"] for row in self.report())

    def report(self) -> list[dict[str, Any]]:
        """One row a layer: tokens, sealed tokens, bytes."""
        rows = []
        for index, layer in enumerate(self.layers):
            latent = isinstance(layer, LatentLayer)
            rows.append(
                {
                    "layer": index,
                    "kind": layer.site.layout if latent else "exact",
                    "tokens": layer.get_seq_length(),
                    "sealed": layer.sealed if latent else 0,
                    "bytes": layer.nbytes if latent else tensor_bytes(layer),
                }
            )
        return rows


def tensor_bytes(layer: Any) -> int:
    """Bytes of storage of an ordinary cache layer."""
    tensors = [t for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --------------------------------------------------------------------------------------------------- attention


def latent_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The 'fhopt' attention of transformers' `AttentionInterface`.

    query [B,H,S,D], key and value [B,G,T,D] as the cache returned them, mask [B,1,S,all tokens] or None; returns
    [B,S,H,D] and no weights. Raises FhoptError for score features that it does not know.
    """
    unknown = [name for name in ("s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]
    if unknown:
        raise FhoptError(f"attention with {unknown[0]} is not supported on latents yet. Call fhopt.unapply(model).")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cap = softcap or 0.0
    latents: Latents | None = getattr(key, "fhopt_latents", None)
    if latents is not None:
        latents.layer.unread = False
    if latents is None or not latents.visible:
        output = _exact(module, query, key, value, attention_mask, scale, cap, dropout, kwargs.get("is_causal"))
    else:
        output = _merged(query, key, value, attention_mask, scale, cap, latents)
    return output.transpose(1, 2).contiguous(), None


def _exact(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float,
    dropout: float, is_causal: bool | None,
) -> Tensor:  # fmt: skip
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and 1 < queries < keys:
        mask = ops.causal_mask(queries, keys, query.device)
    aligned = mask is None and causal and queries > 1
    mask = None if mask is None else mask[..., :keys]
    return ops.attention_reference(
        query, key, value, mask, scale=scale, is_causal=aligned, softcap=cap, dropout=dropout
    )


def _merged(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float, latents: Latents
) -> Tensor:
    """Attention over the sealed latents and over the open tokens, merged by log-sum-exp."""
    layer, visible = latents.layer, latents.visible
    key_side, value_side = layer.key_side, layer.value_side
    assert latents.key is not None and latents.value is not None and key_side.decoder is not None
    assert value_side.decoder is not None
    near, far = _column_masks(query, key, mask, layer.sinks, visible)
    codes = (*latents.key, *latents.value, far)
    absorbed = ops.absorb(query, key_side.decoder)
    options = ops.latent_options(layer.site.key, layer.site.value)
    latent, far_lse = torch.ops.fhopt.latent_attention(absorbed, *codes, **options, scale=scale, softcap=cap)
    options = ops.latent_options(None, None)
    exact, near_lse = torch.ops.fhopt.latent_attention(
        query, key, None, value, None, near, **options, scale=scale, softcap=cap
    )
    return ops.merge([(ops.expand(latent, value_side.decoder), far_lse), (exact, near_lse)])


def _column_masks(
    query: Tensor, key: Tensor, mask: Tensor | None, sinks: int, visible: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mask of the open tokens, mask of the latents) from the mask over all tokens in order of position."""
    if mask is not None:
        near = torch.cat([mask[..., :sinks], mask[..., sinks + visible :]], -1)
        return near, mask[..., sinks : sinks + visible]
    queries = query.shape[2]
    return (ops.causal_mask(queries, key.shape[2], query.device) if queries > 1 else None), None
