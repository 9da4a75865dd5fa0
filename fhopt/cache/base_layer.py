"""Base class of the layers of a `LatentCache`.

    LatentLayer         [ attention sinks | packed latents of quantized tokens | residual window ], dynamic
    SlidingLatentLayer  the same, for the tokens of a sliding window
    StaticLatentLayer   the same in slots of fixed number, for torch.compile and CUDA graphs
    CrossLatentLayer    packed latents of all encoder tokens

`update` appends to the residual window. When the window holds `recent + block` tokens, its oldest block is encoded,
quantized and packed. Tokens of one call attend to each other in full precision; with `window_bits` 8 they are rounded
to 8 bits after the call, so later calls see them rounded. If keys and values share one latent (layout "input"), it is
stored once.

With `absorb=True` layers return `LatentTensor`s, on which attention runs without full-length K/V
(fhopt/attention/offered_latents.py). With `absorb=False` they return full-length K/V, reconstructed in every call.

In a left-padded batch, each sequence has its own first tokens as attention sinks (fhopt/cache/left_padding.py), if the
padding is reported before the first call; `fhopt.apply` reports it.

At a site with page selection, each packed latent has a sketch, and the layer returns an index that tells attention how
to select pages (fhopt/attention/paged.py).

A static layer quantizes a token on arrival and also stores it in a ring buffer. Two counters on the device say how many
tokens are attended as latents and which ring slots are attended, so an update runs the same operations at any length.

Layers subclass transformers' `CacheLayerMixin` here because fhopt/hf, a higher layer, imports this package.

Letters: B batch, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fhopt.attention.cache_view import AnyLatents, SideRows
from fhopt.attention.manual_attention import reconstructed
from fhopt.attention.offered_latents import LatentReader, offer
from fhopt.attention.paged import SAMPLE, log_fill
from fhopt.attention.sketches import PageIndex, Sketcher
from fhopt.cache.left_padding import PADDING, LeftPadding
from fhopt.cache.quantized_rows import (
    PackedLatents,
    StaticPackedLatents,
    StaticSketches,
    TokenSketches,
    encoder_inputs,
)
from fhopt.cache.residual_window import ExactWindow, StaticWindow
from fhopt.cache.sequence_means import MEANS, SequenceMeans
from fhopt.cache.store import PACKED, QUANTIZED, SKETCHES, RoundedPart, Store, place_bases
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site_plan import SidePlan, SitePlan
from fhopt.plan.window import ResidualWindow


class LatentLayerBase(CacheLayerMixin):  # type: ignore[misc]
    """Shared part of the layers: checks, stores, and operations on whole sequences."""

    is_sliding = False
    is_croppable = True
    site: SitePlan
    packed_keys: PackedLatents
    packed_values: PackedLatents  # the same object as `packed_keys` if keys and values share a latent
    sketches: TokenSketches | None = None  # if the plan has page selection at the site
    means: SequenceMeans | None = None  # if the plan has means
    padding: LeftPadding  # not in cross attention, which has no attention sinks
    lists: Tensor  # `PageIndex.counters`, with page selection
    rotation: SegmentRotation | None = None  # if keys are encoded relative to segments
    stores: dict[str, Store]  # by name in files, see `named_stores`

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool, window: ResidualWindow | None = None) -> None:
        # Does not call the parent's `__init__`, which would set the properties `keys` and `values`.
        self.plan, self.window, self.site, self.absorb = plan, plan.window if window is None else window, site, absorb
        self.reader = LatentReader()  # the model's, once a plan is applied
        self.is_initialized = False
        self.each_query = False  # whether each query of a multi-query call selects its own pages
        self.observer: Callable[..., None] | None = None  # see `CacheView`
        self.share, self.mass, self.lift = plan.page_share(site), plan.page_mass(site), plan.page_lift(site)
        self.fill: Tensor | None = None  # see `PageIndex`
        self._padded: tuple[Tensor, SegmentRotation] | None = None  # last padding combined with segments

    def _check_site(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError if the tokens do not fit the plan."""
        site = self.site.site
        sizes = (key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        expected = (site.kv_heads, site.key_dim, site.kv_heads, site.value_dim)
        if sizes != expected:
            raise FhoptError(
                f"{site.name}: keys and values have (heads, size) {sizes[:2]} and {sizes[2:]}; expected "
                f"{expected[:2]} and {expected[2:]} as in the plan. Use a plan that was fitted for this model."
            )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError if the tokens do not fit the plan or the cache."""
        self._check_site(key_states, value_states)
        site = self.site.site
        if self.is_initialized and (key_states.dtype != self.dtype or key_states.shape[0] != self.batch_size):
            raise FhoptError(
                f"{site.name}: new tokens are {key_states.dtype} with batch size {key_states.shape[0]}; "
                f"expected {self.dtype} with batch size {self.batch_size}, as in the cache. Use one cache per "
                "batch and dtype."
            )

    def _place_bases(self, key_states: Tensor, value_states: Tensor) -> None:
        """Copy the bases to the device of the tokens."""
        self.device, self.dtype = key_states.device, key_states.dtype
        if self.site.segment and self.site.site.rope is not None:
            self.rotation = SegmentRotation.on(self.site.site.rope, self.site.segment, self.device)
        if self.sketches is not None and self.site.sketch is not None:
            self.sketches.sketcher = Sketcher.on(self.site.sketch, self.device)
            self.lists = self.lists.to(self.device)
            self.fill = log_fill(self.plan.page_fill(self.site), self.device)
        self.key_bases = self.packed_keys.bases = place_bases(self.site.key, key_states)
        self.value_bases = place_bases(self.site.value, value_states)
        if not self.site.is_shared:
            self.packed_values.bases = self.value_bases

    def _sides(self, start: int, stop: int, *rounded: RoundedPart) -> tuple[SideRows, SideRows]:
        """Return keys and values of quantized tokens `start` to `stop` for attention.

        rounded: the 8-bit residual windows of keys and of values, if any.
        """
        key, value = rounded or (None, None)
        key_mean, value_mean = (None, None) if self.means is None else self.means.parts
        return (
            self.packed_keys.side(start, stop, self.key_bases.decode, key, key_mean, self._rotation_now()),
            self.packed_values.side(start, stop, self.value_bases.decode, value, value_mean),
        )

    def _use_means(self, keys: ExactWindow | StaticWindow, values: ExactWindow | StaticWindow) -> None:
        """Use sequence means if the plan has them. keys, values: residual windows."""
        if self.plan.mean_tokens:
            of_keys = not self.site.site.softcap
            self.means = self.stores[MEANS] = SequenceMeans(self.window.sinks, self.plan.mean_tokens, of_keys)
            for side, window in enumerate((keys, values)):
                window.means, window.side = self.means, side

    def _use_padding(self, room: int | None = None) -> None:
        """Track left padding. room: as of `LeftPadding`."""
        self.padding = self.stores[PADDING] = LeftPadding(room)

    def _rotation_now(self) -> SegmentRotation | None:
        """Return the rotation of keys; with left padding, by each sequence's own positions."""
        if self.rotation is None or not self.padding.parts:
            return self.rotation
        (numbers,) = self.padding.parts
        if self._padded is None or self._padded[0] is not numbers:
            self._padded = numbers, self.rotation.after_padding(self.padding.behind)
        return self._padded[1]

    def _encode(
        self, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None], places: Tensor | int = 0
    ) -> None:
        """Call `use(side, x)` with each encoder matrix's input, means subtracted.

        places: indices of the tokens, counted after the attention sinks, int64 [T], or the first index.
        """
        rotation = self._rotation_now()
        if rotation is not None:
            if isinstance(places, int):
                places = torch.arange(keys.shape[2], device=keys.device) + places
            exact = keys.to(torch.promote_types(keys.dtype, torch.float32))  # a mean may dominate
            keys = rotation.relative(exact, places)
        if self.means is not None:
            keys, values = self.means.differences(keys, values)
        encode_sides(self.site, keys, values, use)

    def _use_pages(self, make: Callable[[bool], TokenSketches]) -> None:
        """Store sketches if the plan has page selection at the site. make: called with whether there is a limit."""
        if self.plan.pages is not None and self.share < 1:
            self.sketches = self.stores[SKETCHES] = make(self.plan.pages.limit < 1)
            self.lists = torch.zeros(4, dtype=torch.int64)

    def _index(self, tokens: int) -> PageIndex | None:
        """Return the page index over the first `tokens` quantized tokens; None if attention uses all pages."""
        pages, sketches = self.plan.pages, self.sketches
        if sketches is None or pages is None:
            return None
        units = math.gcd(self.site.key.groups, self.site.value.groups)
        least = -(-pages.least // pages.tokens)
        numbers = (pages.tokens, self.share, self.mass, self.lift, least, pages.limit, units)
        return PageIndex(sketches.sketcher, sketches.read(tokens), *numbers, self.each_query, self.lists, self.fill)

    def _for_attention(self, keys: Tensor, values: Tensor, latents: AnyLatents) -> tuple[Tensor, Tensor]:
        """Return exact keys and values combined with latents, in the form that the next attention needs."""
        if self.absorb and (self.reader.active or not torch.compiler.is_compiling()):
            return offer(keys, values, latents, self.reader)
        return reconstructed(keys, latents.key, latents), reconstructed(values, latents.value, latents)

    # ---- interface of transformers' cache layers

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first tokens."""
        return next((int(s.parts[0].shape[0]) for s in self.stores.values() if s.parts), -1)

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.each(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences `beam_idx` (beam search)."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the sequences `indices`."""
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move all tokens to the CPU."""
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tokens back to the model's device."""
        self._each(lambda t: t.to(self.device, non_blocking=True))

    # ---- files

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs, without spare capacity. Expects a layer with tokens."""
        used = self.quantized_tokens
        parts = {
            name: [part[:, :, : _used(store, used)] for part in store.parts]
            for name, store in self.stores.items()
            if name != PADDING or store.parts
        }
        return {"parts": parts, "blank": list(self._blank()), **self._counters()}

    def restore(self, state: dict[str, Any]) -> None:
        """Load another layer's `state`, on the device of its tensors.

        Raises FhoptError or ValueError, and leaves the layer empty, if the state does not fit.
        """
        self.reset()
        try:
            self._check(*state["blank"])
            self.lazy_initialization(*state["blank"])
            for name, store in self.stores.items():
                if name != PADDING:
                    self._fill(name, store, state["parts"][name])
            self._count(state)
            if PADDING in state["parts"]:
                self.padding.restore(state["parts"][PADDING], self.batch_size, int(self.get_seq_length()))
        except Exception:
            self.reset()
            raise

    def _fill(self, name: str, store: Store, parts: list[Tensor]) -> None:
        """Put loaded parts into a store, in place if its size is fixed. Raises ValueError."""
        is_fixed = isinstance(store, (StaticPackedLatents, StaticWindow, StaticSketches, SequenceMeans))
        expected = list(store.parts)
        if type(store) is TokenSketches and parts:
            blank, key = self._blank()[0], self.site.key
            expected = list(store.make(blank.new_zeros(blank.shape[0], key.groups, 0, key.width)))
        if type(store) is PackedLatents and parts:
            encode_sides(self.site, *self._blank(), lambda side, x: expected.extend(self._encoded(side, name, x)))
        for part, like in zip(parts, expected, strict=True):
            same = part.shape == like.shape if is_fixed else _but_tokens(part) == _but_tokens(like)
            if not same or part.dtype != like.dtype:
                raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}, not {like.dtype} {tuple(like.shape)}")
            if is_fixed:
                like.copy_(part)
        if not is_fixed:
            store.parts = tuple(parts)

    def _encoded(self, side: str, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of x if `name` is the packed-latents store of `side`, otherwise nothing."""
        return self._packed(side).encode(x) if name == PACKED[side] else ()

    def _packed(self, side: str) -> PackedLatents:
        return self.packed_keys if side == "key" else self.packed_values

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Return empty keys [B,G,0,D] and values [B,G,0,E]."""
        raise NotImplementedError

    def _counters(self) -> dict[str, Any]:
        """Return the counters that describe the parts, by name in files."""
        raise NotImplementedError

    def _count(self, counters: dict[str, Any]) -> None:
        """Load what `_counters` returned. Raises ValueError if the parts hold another number of tokens."""
        raise NotImplementedError

    # ---- bytes

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that hold tokens."""
        return [part for store in self.stores.values() for part in store.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of storage: quantized values, scales, sinks, window, spare capacity."""
        return sum(self.regions().values())

    def regions(self) -> dict[str, int]:
        """Return the bytes by region (`REGIONS`): sinks, packed latents, sketches, window, spare capacity."""
        out = {"sinks": 0, QUANTIZED: 0, "index": 0, "window": 0, "spare": 0}
        quantized = self.quantized_tokens
        for store in self.stores.values():
            if isinstance(store, (PackedLatents, TokenSketches)):
                used = sum(part[:, :, :quantized].nbytes for part in store.parts)
                out[QUANTIZED if isinstance(store, PackedLatents) else "index"] += used
                out["spare"] += store.nbytes - used
            elif isinstance(store, (ExactWindow, StaticWindow)):
                used = sum(part.nbytes for part in store.parts)
                out["sinks"] += store.sink_bytes
                out["window"] += used - store.sink_bytes
                out["spare"] += store.nbytes - used
            elif isinstance(store, (SequenceMeans, LeftPadding)):
                out["sinks"] += store.nbytes
        return out

    @property
    def completed(self) -> float:
        """Fraction of page selections that the plan's limit extended to all pages."""
        lists, complete, *_ = (0, 0) if self.sketches is None else self.lists.tolist()
        return float(complete / max(1, lists))

    def decode_step_bytes(self) -> tuple[int, int]:
        """Return the bytes that attention of the next token loads from the cache: (all pages, selected pages).

        The selected fraction is the average so far; before the first selection, the maximum.
        """
        held, index = self.regions(), self._index(self.quantized_tokens) if self.quantized_tokens else None
        every = held["sinks"] + held[QUANTIZED] + held["window"]
        if index is None or index.most == index.count:
            return every, every
        _, _, listed, available = self.lists.tolist()
        part = listed / available if available else index.most / index.count
        sampled = 0.0 if index.fill is None else min(1.0, SAMPLE / index.count)
        return every, every - held[QUANTIZED] + held["index"] + int(held[QUANTIZED] * min(1.0, part + sampled))

    @property
    def quantized_tokens(self) -> int:
        """Number of tokens held as latents."""
        raise NotImplementedError


def make_packed(site: SitePlan, make: Callable[[SidePlan], Any]) -> tuple[Any, Any]:
    """Make the packed latents of keys and of values; one shared object if they share a latent."""
    packed = make(site.key)
    return packed, packed if site.is_shared else make(site.value)


def encode_sides(site: SitePlan, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None]) -> None:
    """Call `use(side, x)` with each encoder matrix's input: keys and values, or both concatenated."""
    if site.gather is not None:
        keys, values = site.gather(keys, values)
    for side, x in encoder_inputs(keys, values, site.is_shared):
        use(side, x)


def _used(store: Store, quantized: int) -> int | None:
    """Return the slice end for `quantized` tokens in a dynamic store; None (all) for other stores."""
    return quantized if type(store) in (PackedLatents, TokenSketches) else None


def _but_tokens(x: Tensor) -> tuple[int, ...]:
    """Return the shape without the token dimension."""
    return (*x.shape[:2], *x.shape[3:])


def check_crop(tokens_to_remove: int, length: int) -> None:
    """Check the argument of `crop`, a number from -length to 0. Raises FhoptError."""
    if tokens_to_remove > 0 or -tokens_to_remove > length:
        raise FhoptError(
            f"crop({tokens_to_remove}) is out of range for {length} tokens; expected a number from -{length} to 0."
        )
