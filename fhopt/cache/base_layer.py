"""Layers of a `LatentCache`.

    LatentLayer         [ attention sinks | packed latents of quantized tokens | residual window ], growing
    SlidingLatentLayer  these, of the tokens that a sliding window shows
    StaticLatentLayer   these in places of fixed number, for torch.compile and CUDA graphs
    CrossLatentLayer    packed latents of everything that a decoder reads of its encoder

An `update` appends to the residual window; when the window holds `recent + block` tokens, its oldest block is encoded,
quantized and packed. Tokens of the call itself are always exact to each other; with `window_bits` 8 they are rounded,
once, when the call has read them, so later calls see them in 8 bits. Where a plan has one latent for keys and values
(layout "input"), it is stored once.

With `absorb=True` layers return `LatentTensor`s, on which attention runs without anything of full length
(fhopt/attention/offered_latents.py); with `absorb=False` ordinary tensors of full length, reconstructed in every call.

Where the sequences of a batch begin with padding, each keeps its own first tokens as attention sinks
(fhopt/cache/left_padding.py), as long as somebody says so before the first call: `fhopt.apply` does.

At a site with page selection, a sketch of each packed latent is stored beside it, and the index that a layer returns
says how attention selects pages (fhopt/attention/paged.py).

A static layer quantizes a token when it arrives and keeps it in the ring too; two numbers on the device say how many
tokens are read as latents, and which of the ring's places are read. So an update is the same operations at any length.

Layers implement transformers' `CacheLayerMixin` here and not in fhopt/hf, which is above: it applies these caches.

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
from fhopt.attention.offered_latents import Reader, offer
from fhopt.attention.paged import SAMPLE, log_fill
from fhopt.attention.sketches import PageIndex, Sketcher
from fhopt.cache.left_padding import PADDING, LeftPadding
from fhopt.cache.quantized_rows import (
    PackedLatents,
    Sketches,
    StaticPackedLatents,
    StaticSketches,
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
    """What the layers share: the checks, the stores and everything that moves whole sequences."""

    is_sliding = False
    is_croppable = True
    site: SitePlan
    packed_keys: PackedLatents
    packed_values: PackedLatents  # those of the keys, where one latent serves both
    sketches: Sketches | None = None  # where the plan has page selection at the site
    means: SequenceMeans | None = None  # where the plan has means
    padding: LeftPadding  # not of cross attention, which has no attention sinks
    lists: Tensor  # see `PageIndex.counters`, where it has
    rotation: SegmentRotation | None = None  # where keys are encoded relative to segments
    stores: dict[str, Store]  # by their names in files, see `named_stores`

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool, window: ResidualWindow | None = None) -> None:
        # Without the parent's `__init__`, which sets `keys` and `values`: here they are properties.
        self.plan, self.window, self.site, self.absorb = plan, plan.window if window is None else window, site, absorb
        self.reader = Reader()  # of the model that the cache is for, where a plan is applied
        self.is_initialized = False
        self.each_query = False  # whether each query of a call of several has its own pages, as it would alone
        self.observer: Callable[..., None] | None = None  # see `Latents`
        self.share, self.mass, self.lift = plan.page_share(site), plan.page_mass(site), plan.page_lift(site)
        self.fill: Tensor | None = None  # see `PageIndex`
        self._padded: tuple[Tensor, SegmentRotation] | None = None  # the last padding with which there were segments

    def _check_site(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError when the tokens do not fit the plan."""
        site = self.site.site
        sizes = (key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        expected = (site.kv_heads, site.key_dim, site.kv_heads, site.value_dim)
        if sizes != expected:
            raise FhoptError(
                f"{site.name}: keys and values have (heads, size) {sizes[:2]} and {sizes[2:]}, the plan expects "
                f"{expected[:2]} and {expected[2:]}. Is this the model that the plan was fitted for?"
            )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError when the tokens do not fit the plan or the cache."""
        self._check_site(key_states, value_states)
        site = self.site.site
        if self.is_initialized and (key_states.dtype != self.dtype or key_states.shape[0] != self.batch_size):
            raise FhoptError(
                f"{site.name}: new tokens are {key_states.dtype} of batch {key_states.shape[0]}, the cache holds "
                f"{self.dtype} of batch {self.batch_size}. Use one cache for each batch and dtype."
            )

    def _place_bases(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fetch the bases to where the tokens are."""
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
        """Return quantized tokens `start` to `stop` as attention reads them: keys and values.

        rounded: of the residual windows of both, where they are.
        """
        key, value = rounded or (None, None)
        key_mean, value_mean = (None, None) if self.means is None else self.means.parts
        return (
            self.packed_keys.side(start, stop, self.key_bases.decode, key, key_mean, self._rotation_now()),
            self.packed_values.side(start, stop, self.value_bases.decode, value, value_mean),
        )

    def _use_means(self, keys: ExactWindow | StaticWindow, values: ExactWindow | StaticWindow) -> None:
        """Keep means of the sequence where the plan has them. keys, values: residual windows."""
        if self.plan.mean_tokens:
            of_keys = not self.site.site.softcap
            self.means = self.stores[MEANS] = SequenceMeans(self.window.sinks, self.plan.mean_tokens, of_keys)
            for side, window in enumerate((keys, values)):
                window.means, window.side = self.means, side

    def _use_padding(self, room: int | None = None) -> None:
        """Keep what padding sequences begin with. room: as of `LeftPadding`."""
        self.padding = self.stores[PADDING] = LeftPadding(room)

    def _rotation_now(self) -> SegmentRotation | None:
        """Return the rotation of keys, of sequences that begin with padding each by its own positions."""
        if self.rotation is None or not self.padding.parts:
            return self.rotation
        (numbers,) = self.padding.parts
        if self._padded is None or self._padded[0] is not numbers:
            self._padded = numbers, self.rotation.after_padding(self.padding.behind)
        return self._padded[1]

    def _encode(
        self, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None], places: Tensor | int = 0
    ) -> None:
        """Call `use(side, x)` with what each encoder matrix reads of keys and values, less their means.

        places: numbers of the tokens behind the attention sinks, int64 [T], or that of the first.
        """
        rotation = self._rotation_now()
        if rotation is not None:
            if isinstance(places, int):
                places = torch.arange(keys.shape[2], device=keys.device) + places
            exact = keys.to(torch.promote_types(keys.dtype, torch.float32))  # a mean may be much larger than the rest
            keys = rotation.relative(exact, places)
        if self.means is not None:
            keys, values = self.means.differences(keys, values)
        encode_sides(self.site, keys, values, use)

    def _use_pages(self, make: Callable[[bool], Sketches]) -> None:
        """Keep sketches where the plan has page selection at the site. `make`: of whether there is a limit."""
        if self.plan.pages is not None and self.share < 1:
            self.sketches = self.stores[SKETCHES] = make(self.plan.pages.limit < 1)
            self.lists = torch.zeros(4, dtype=torch.int64)

    def _index(self, tokens: int) -> PageIndex | None:
        """Return what pages of the first `tokens` quantized tokens are selected by; None where all are read."""
        pages, sketches = self.plan.pages, self.sketches
        if sketches is None or pages is None:
            return None
        units = math.gcd(self.site.key.groups, self.site.value.groups)
        least = -(-pages.least // pages.tokens)
        numbers = (pages.tokens, self.share, self.mass, self.lift, least, pages.limit, units)
        return PageIndex(sketches.sketcher, sketches.read(tokens), *numbers, self.each_query, self.lists, self.fill)

    def _for_attention(self, keys: Tensor, values: Tensor, latents: AnyLatents) -> tuple[Tensor, Tensor]:
        """Return keys and values that are not quantized, with latents behind them, as the next attention reads them."""
        if self.absorb and (self.reader.active or not torch.compiler.is_compiling()):
            return offer(keys, values, latents, self.reader)
        return reconstructed(keys, latents.key, latents), reconstructed(values, latents.value, latents)

    # ---- what transformers asks of a layer

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first tokens."""
        return next((int(s.parts[0].shape[0]) for s in self.stores.values() if s.parts), -1)

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
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
        """Hold what another layer's `state` returned, on the device of its tensors.

        Raises FhoptError or ValueError when it is not the state of such a layer, which is empty then.
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
        """Put loaded parts into a store, in place where it has a fixed size. Raises ValueError."""
        is_fixed = isinstance(store, (StaticPackedLatents, StaticWindow, StaticSketches, SequenceMeans))
        expected = list(store.parts)
        if type(store) is Sketches and parts:
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
        """Return the parts of x where `name` is that of the packed latents of `side`, otherwise nothing."""
        return self._packed(side).encode(x) if name == PACKED[side] else ()

    def _packed(self, side: str) -> PackedLatents:
        return self.packed_keys if side == "key" else self.packed_values

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Return keys [B,G,0,D] and values [B,G,0,E] of no tokens."""
        raise NotImplementedError

    def _counters(self) -> dict[str, Any]:
        """Return the numbers by which the parts are read, by their names in files."""
        raise NotImplementedError

    def _count(self, counters: dict[str, Any]) -> None:
        """Take over what `_counters` returned. Raises ValueError when the parts have other tokens."""
        raise NotImplementedError

    # ---- bytes

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        return [part for store in self.stores.values() for part in store.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind the tokens: quantized values, scales, sinks, window, spare capacity."""
        return sum(self.regions().values())

    def regions(self) -> dict[str, int]:
        """Return the bytes of sinks, packed latents, their sketches, window, and spare capacity (see `REGIONS`)."""
        out = {"sinks": 0, QUANTIZED: 0, "index": 0, "window": 0, "spare": 0}
        quantized = self.quantized_tokens
        for store in self.stores.values():
            if isinstance(store, (PackedLatents, Sketches)):
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
        """Share of the page selections in which the plan's limit made all pages be read."""
        lists, complete, *_ = (0, 0) if self.sketches is None else self.lists.tolist()
        return float(complete / max(1, lists))

    def decode_step_bytes(self) -> tuple[int, int]:
        """Return the bytes that attention of the next token reads of the cache: (with all pages, with selected ones).

        Of selected pages it is the share that was read so far on average; before the first selection, the largest.
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
        """Tokens that are read as latents."""
        raise NotImplementedError


def make_packed(site: SitePlan, make: Callable[[SidePlan], Any]) -> tuple[Any, Any]:
    """Make the packed latents of keys and of values, the same where one latent serves both."""
    packed = make(site.key)
    return packed, packed if site.is_shared else make(site.value)


def encode_sides(site: SitePlan, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None]) -> None:
    """Call `use(side, x)` with what each encoder matrix reads: keys and values, or both side by side."""
    if site.gather is not None:
        keys, values = site.gather(keys, values)
    for side, x in encoder_inputs(keys, values, site.is_shared):
        use(side, x)


def _used(store: Store, quantized: int) -> int | None:
    """Return how much of a store that grows stands for `quantized` tokens; None: all of any other."""
    return quantized if type(store) in (PackedLatents, Sketches) else None


def _but_tokens(x: Tensor) -> tuple[int, ...]:
    """Return the shape without the dimension of tokens."""
    return (*x.shape[:2], *x.shape[3:])


def check_crop(tokens_to_remove: int, length: int) -> None:
    """Check how many tokens `crop` shall remove, a number from -length to 0. Raises FhoptError."""
    if tokens_to_remove > 0 or -tokens_to_remove > length:
        raise FhoptError(f"crop({tokens_to_remove}) of {length} tokens; expected a number from -{length} to 0.")
