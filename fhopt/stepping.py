"""A decode step with the cache as explicit state: what is exported to run elsewhere.

    step(ids [B,S], counts [2], state...)  ->  logits [B,S,V], new keys and values [B,G,S,D] of each site
    seal(keys [B,G,n,D], values [B,G,n,D] of each site)  ->  rows of each site

The state is read and never written: the caller puts new tokens behind the open ones and, when the window is full, rows
of its oldest block behind the sealed ones (`State` does so). counts says how many open and how many sealed places of
the state are in use, so that buffers may be larger than what they hold.

Per site the state is

    open_key [B,G,N,D], open_value [B,G,N,E]    sinks, then the window; N = sinks + recent + block, in the model's dtype
    key_rows, value_rows [B,J,T,bytes]          codes of the plan's tiers (uint8), or uncoded latents [B,J,T,R]
    key_scale, value_scale [B,J,T]              float16, where there are codes

T is the only size that grows. Attention reads the rows where they lie: queries are absorbed, each tier is one product,
and keys and values are never rebuilt (`fhopt verify` proves it of what was exported). With `kernels=True` the sealed
part is the C++ op of codegen/cpu/graph_kernels.py in place of torch operations.

Letters: B batch, H query heads, G kv heads, J latent heads, S new tokens, N open places, T sealed places, D and E head
sizes, R latent width, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fhopt import ops
from fhopt.applying import attended_by, cache_argument
from fhopt.cache import layer_indices
from fhopt.errors import FhoptError
from fhopt.fitting import check_model
from fhopt.spec import KernelSpec, LatentPlan, SidePlan, SitePlan, sealed_tokens

IMPLEMENTATION = "fhopt_step"
_MASKED = -1e30  # a logit that takes no weight and, unlike -inf, no part of NaN
_HALF_EXPONENTS = [2.0 ** (e - 25) for e in range(32)]


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state. `shape` has None for T."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def empty(self, rows: int) -> Tensor:
        """Zeros with room for `rows` sealed tokens."""
        return torch.zeros([rows if n is None else n for n in self.shape], dtype=self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one sealed token; 0 for what does not grow."""
        if None not in self.shape:
            return 0
        return math.prod(n for n in self.shape if n is not None) * self.dtype.itemsize


def state_tensors(plan: LatentPlan, dtype: torch.dtype, batch: int = 1) -> list[StateTensor]:
    """The state of every site, in the order in which `Step` takes it."""
    found = []
    for site_plan in plan.sites:
        site, name = site_plan.site, site_plan.site.name
        for side, dim in (("key", site.key_dim), ("value", site.value_dim)):
            places = plan.sinks + plan.window
            found.append(StateTensor(f"{name}.open_{side}", (batch, site.kv_heads, places, dim), dtype))
        for side, one in _row_sides(site_plan):
            width = one.row_bytes() if one.tiers else one.width
            kind = torch.uint8 if one.tiers else dtype
            found.append(StateTensor(f"{name}.{side}_rows", (batch, one.groups, None, width), kind))
            if one.tiers:
                found.append(StateTensor(f"{name}.{side}_scale", (batch, one.groups, None), torch.float16))
    return found


def _row_sides(site: SitePlan) -> list[tuple[str, SidePlan]]:
    """The sides that have rows of their own: one where keys and values are read from the same."""
    return [("key", site.key)] if site.is_shared else [("key", site.key), ("value", site.value)]


# --------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Rows:
    """Rows [B,J,T,...] of one side, their scales, and the decoder [G,D,R] as a tensor of the graph."""

    plan: SidePlan
    rows: Tensor
    scale: Tensor | None
    decode: Tensor


class SiteAttention(nn.Module):
    """Attention of one site on its state and on the new tokens. `kernel`: name of the C++ kernel, "" for torch ops."""

    def __init__(self, site: SitePlan, plan: LatentPlan, kernel: str = "") -> None:
        super().__init__()
        self.site, self.sinks, self.kernel = site, plan.sinks, kernel
        for side in ("key", "value"):
            one = getattr(site, side)
            self.register_buffer(f"{side}_decode", one.decode.clone())
            self.register_buffer(f"{side}_encode", one.encode.clone())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor, state: Sequence[Tensor], scale: float
    ) -> Tensor:
        """query [B,H,S,D], new key and value [B,G,S,D] -> [B,H,S,E] in float32; the mask is causal."""
        open_key, open_value, *rows = state
        rows_of_key, rows_of_value = self._rows(rows)
        query = query.float() * scale
        opened = self._open_logits(query, torch.cat([open_key, key], 2).float(), counts[0], open_key.shape[2])
        values = torch.cat([open_value, value], 2).float()
        if self.kernel:
            return self._by_kernel(query, opened, values, counts[1], rows_of_key, rows_of_value)
        sealed = self._sealed_logits(query, rows_of_key, counts[1])
        top = torch.maximum(opened.amax(-1, keepdim=True), sealed.amax(-1, keepdim=True))
        near, far = torch.exp(opened - top), torch.exp(sealed - top)
        total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
        mixed = ops.expand(self._mix(far, rows_of_value), rows_of_value.decode)
        return (_grouped(near, values) + mixed) / total

    def _rows(self, rows: Sequence[Tensor]) -> tuple[_Rows, _Rows]:
        found = []
        given = iter(rows)
        for _, side in _row_sides(self.site):
            found.append((next(given), next(given) if side.tiers else None))
        decoders: Any = (self.key_decode, self.value_decode)
        key = _Rows(self.site.key, *found[0], decoders[0])
        return key, _Rows(self.site.value, *found[-1], decoders[1])

    def _open_logits(self, query: Tensor, keys: Tensor, count: Tensor, places: int) -> Tensor:
        """[B,H,S,N+S], masked where a place holds no token or one that follows its query."""
        logits = _capped(_grouped(query, keys.transpose(-1, -2)), self.site.site.softcap)
        place = torch.arange(keys.shape[2], device=keys.device)
        row = torch.arange(query.shape[2], device=keys.device).unsqueeze(1)
        is_seen = torch.where(place < places, place < count, place - places <= row)  # [S, N+S]
        return torch.where(is_seen, logits, _MASKED)

    def _sealed_logits(self, query: Tensor, rows: _Rows, count: Tensor) -> Tensor:
        """[B,H,S,T]: one product for each tier of the rows."""
        absorbed = ops.absorb(query, rows.decode)
        parts: list[Tensor] = []
        scaled: list[Tensor] = []
        for channels, values, has_scale in _tiers(rows):
            logits = _grouped(absorbed[..., channels], values.transpose(-1, -2))
            (scaled if has_scale else parts).append(logits)
        if scaled:
            assert rows.scale is not None
            parts.append(_sum(scaled) * _per_head(rows.scale, query.shape[1]))
        logits = _capped(_sum(parts), self.site.site.softcap)
        place = torch.arange(logits.shape[-1], device=logits.device)
        return torch.where(place < count, logits, _MASKED)

    def _mix(self, weights: Tensor, rows: _Rows) -> Tensor:
        """[B,H,S,T] -> [B,H,S,R]: what the weights make of the values' latents."""
        heads = weights.shape[1]
        scaled = weights if rows.scale is None else weights * _per_head(rows.scale, heads)
        parts = [_grouped(scaled if has_scale else weights, values) for _, values, has_scale in _tiers(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _by_kernel(
        self, query: Tensor, opened: Tensor, values: Tensor, count: Tensor, keys: _Rows, mixed: _Rows
    ) -> Tensor:
        """The same with the sealed part in C++."""
        absorbed = ops.absorb(query, keys.decode)
        latent, lse = torch.ops.fhopt.latent_kernel(
            self.kernel, absorbed, keys.rows, keys.scale, mixed.rows, mixed.scale, None, count, None, 0, 1.0,
            self.site.site.softcap, mixed.plan.width,
        )  # fmt: skip
        near_lse = torch.logsumexp(opened, -1)
        near = _grouped(torch.exp(opened - near_lse.unsqueeze(-1)), values)
        return ops.merge([(near, near_lse), (ops.expand(latent, mixed.decode), lse)])

    def seal(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Rows of keys and values [B,G,n,D]: codes and scales, or latents as they are."""
        encoders: Any = {"key": self.key_encode, "value": self.value_encode}
        given = {"key": torch.cat([key, value], -1) if self.site.is_shared else key, "value": value}
        made: list[Tensor] = []
        for side, one in _row_sides(self.site):
            latent = ops.encode(given[side].float(), encoders[side])
            made += list(_packed(latent, one)) if one.tiers else [latent.to(key.dtype)]
        return made


def _packed(latent: Tensor, side: SidePlan) -> tuple[Tensor, Tensor]:
    return ops.pack_reference(latent, *ops.tier_arguments(side))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _sum(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _per_head(scale: Tensor, heads: int) -> Tensor:
    """Scales [B,J,T] -> float32 [B,H,1,T]."""
    return scale.float().repeat_interleave(heads // scale.shape[1], 1).unsqueeze(2)


def _grouped(rows: Tensor, latents: Tensor) -> Tensor:
    """[B,H,S,m] x [B,J,m,n] -> [B,H,S,n] by one bmm: a matmul would spread `latents` over heads where sizes grow."""
    b, h, s, m = rows.shape
    j, n = latents.shape[1], latents.shape[3]
    return torch.bmm(rows.reshape(b * j, h // j * s, m), latents.flatten(0, 1)).view(b, h, s, n)


def _tiers(rows: _Rows) -> Iterator[tuple[slice, Tensor, bool]]:
    """(channels, numbers [B,J,T,width] without the token's scale, whether that scale belongs to them) of each tier.

    Codes stay bytes until the last step, which goes into the product that reads them.
    """
    if not rows.plan.tiers:
        yield slice(0, rows.plan.width), rows.rows.float(), False
        return
    byte = channel = 0
    for tier in rows.plan.tiers:
        size = tier.bits * tier.width // 8
        piece = rows.rows[..., byte : byte + size]
        channels = slice(channel, channel + tier.width)
        if tier.bits == 16:
            yield channels, _halves(piece), False
        else:
            yield channels, (_codes(piece, tier.bits).float() - (2**tier.bits - 1) / 2) * tier.step, True
        byte, channel = byte + size, channel + tier.width


def _codes(piece: Tensor, bits: int) -> Tensor:
    """Bit planes [..., W*bits/8] -> codes int32 [..., W], by operations that every compiler knows."""
    found: Tensor | None = None
    start, widths = 0, ops.planes(bits)
    count = piece.shape[-1] // bits  # bytes of a plane of one bit
    for width in widths:
        plane = _lanes(piece[..., start : start + count * width].int(), width)
        found = plane if found is None else (found << width) | plane
        start += count * width
    assert found is not None
    return found


def _lanes(plane: Tensor, width: int) -> Tensor:
    """Bytes [..., n], int32 -> codes int32 [..., n * 8/width], low-order ones first."""
    if width == 8:
        return plane
    lanes = [(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(lanes, -1).flatten(-2)


def _halves(piece: Tensor) -> Tensor:
    """Bytes [..., 2n] that hold float16 -> float32 [..., n], by arithmetic: few compilers know how to view bytes."""
    low, high = piece.unflatten(-1, (-1, 2)).int().unbind(-1)
    exponent, fraction = (high >> 2) & 31, ((high & 3) * 256 + low).float()
    table = torch.tensor(_HALF_EXPONENTS, device=piece.device)
    size = torch.where(exponent == 0, fraction * 2.0**-24, (fraction + 1024) * table[exponent.long()])
    return torch.where(high >= 128, -size, size)


# --------------------------------------------------------------------------------------------------- modules


class Step(nn.Module):
    """The module docstring's `step`, of a transformers model whose attention goes through transformers' interface."""

    def __init__(self, model: nn.Module, plan: LatentPlan, kernels: bool = False) -> None:
        super().__init__()
        _check(model, plan)
        self.model, self.plan = model, plan
        dtype = next(model.parameters()).dtype
        names = [_serve(site) if kernels else "" for site in plan.sites]
        self.sites = nn.ModuleList(SiteAttention(s, plan, n) for s, n in zip(plan.sites, names, strict=True))
        indices = layer_indices([s.site for s in plan.sites])
        self.layers = [int(getattr(model.get_submodule(n), "layer_idx", i)) for n, i in indices.items()]
        self.tensors = state_tensors(plan, dtype)
        self.sizes = [sum(t.name.rpartition(".")[0] == s.site.name for t in self.tensors) for s in plan.sites]

    def forward(self, ids: Tensor, counts: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """ids [B,S] int64, counts [2] int64 -> (logits [B,S,V], key and value of each site)."""
        cache = _new_tokens(len(self.layers), self.layers)
        parts = dict(zip(self.layers, zip(self.sites, _split(state, self.sizes), strict=True), strict=True))
        positions = (torch.arange(ids.shape[1], device=ids.device) + counts.sum()).unsqueeze(0).expand(ids.shape)
        with attending(self.model, parts, counts):
            options = {
                "input_ids": ids,
                "position_ids": positions,
                "use_cache": True,
                cache_argument(self.model): cache,
            }
            logits = self.model(**options).logits
        return (logits, *(x for layer in self.layers for x in cache.taken[layer]))


class Seal(nn.Module):
    """The module docstring's `seal`."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.sites = step.sites

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [B,G,n,D] of each site -> their rows, in the order of the state."""
        pairs = zip(self.sites, tokens[::2], tokens[1::2], strict=True)
        return tuple(rows for site, key, value in pairs for rows in site.seal(key, value))  # type: ignore[operator]


def _check(model: Any, plan: LatentPlan) -> None:
    """Raise FhoptError for models and plans of which no step can be made."""
    if (
        not hasattr(model, "set_attn_implementation")
        or "position_ids" not in inspect.signature(model.forward).parameters
    ):
        raise FhoptError(
            f"{type(model).__name__} takes no position_ids; expected a causal language model of transformers that does."
        )
    check_model(plan, dict(model.named_parameters()), type(model).__name__)
    module = inspect.getmodule(type(model))
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        raise FhoptError(f"{type(model).__name__} writes its attention out; expected one that calls transformers' own.")
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    for plan_ in plan.sites:
        site = plan_.site
        if site.kind != "self" or site.mask != "causal" or site.sinks or site.window:
            raise FhoptError(
                f"{site.name} has a mask of kind {site.mask!r} or reads an encoder; a decode step can be exported of "
                "causal self-attention alone. Use `fhopt.apply` for this model."
            )
    if len(plan.sites) != layers:
        raise FhoptError(f"the plan has {len(plan.sites)} sites for {layers} layers; expected one for each layer.")


def _serve(site: SitePlan) -> str:
    """Name of the kernel of a site, built. Raises FhoptError where there is no compiler."""
    from fhopt.codegen.cpu import graph_kernels

    spec = kernel_spec(site)
    if not graph_kernels.serve(spec):
        raise FhoptError("the kernels could not be compiled; expected g++ or clang++ on PATH. Install one.")
    return spec.name


def kernel_spec(site: SitePlan) -> KernelSpec:
    """The kernel that reads the rows of a site for float32 queries."""
    key, value = ([(t.bits, t.width, t.step) for t in side.tiers] for side in (site.key, site.value))
    widths = (site.key.width, site.value.width)
    return KernelSpec(tuple(key), tuple(value), *widths, "float32", site.site.softcap != 0.0)


def _split(state: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    start = 0
    for size in sizes:
        yield state[start : start + size]
        start += size


def _new_tokens(count: int, layers: Sequence[int]) -> Any:
    """A cache that gives back what it gets, and remembers it."""
    from transformers.cache_utils import Cache, DynamicLayer

    class NewTokens(Cache):  # type: ignore[misc]
        """`taken`: keys and values by layer."""

        def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.taken[layer_idx] = key, value
            return key, value

    cache = NewTokens(layers=[DynamicLayer() for _ in range(max(layers) + 1)])
    cache.taken = {}
    return cache


@contextmanager
def attending(model: Any, parts: dict[int, Any], counts: Tensor) -> Iterator[None]:
    """The model's attention reads the state inside."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        site, state = parts[module.layer_idx]
        out = site(query, key, value, counts, state, float(options.get("scaling") or query.shape[-1] ** -0.5))
        return out.transpose(1, 2).to(query.dtype), None

    with attended_by(model, IMPLEMENTATION, attention):
        yield


# --------------------------------------------------------------------------------------------------- state


class State:
    """The caller's side: buffers, and what to do with the results of a step. `capacity`: sealed places from the start.

    run_step and run_seal are anything that computes what `Step` and `Seal` do, in torch tensors.
    """

    def __init__(self, plan: LatentPlan, tensors: Sequence[StateTensor], run_step: Any, run_seal: Any) -> None:
        self.plan, self.run_step, self.run_seal = plan, run_step, run_seal
        self.names = [t.name for t in tensors]
        self.buffers = [t.empty(plan.block) for t in tensors]
        self.tokens = self.sealed = 0

    @property
    def counts(self) -> Tensor:
        """Open and sealed tokens."""
        return torch.tensor([self.tokens - self.sealed, self.sealed])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Logits [B,S,V] of new tokens [B,S], which are in the state afterwards."""
        logits, *new = self.run_step(ids, self.counts, *self.buffers)
        opened = [i for i, name in enumerate(self.names) if ".open_" in name]
        at = self.tokens - self.sealed
        for i, tokens in zip(opened, new, strict=True):
            self.buffers[i][:, :, at : at + ids.shape[1]] = tokens
        self.tokens += ids.shape[1]
        while sealed_tokens(self.tokens, self.plan.sinks, self.plan.recent, self.plan.block) > self.sealed:
            self._seal(opened)
        result: Tensor = logits
        return result

    def _seal(self, opened: Sequence[int]) -> None:
        """Put the oldest block of the window behind the sealed rows."""
        first, block = self.plan.sinks, self.plan.block
        rows = self.run_seal(*(self.buffers[i][:, :, first : first + block].contiguous() for i in opened))
        grown = [i for i in range(len(self.buffers)) if i not in opened]
        for i, new in zip(grown, rows, strict=True):
            buffer = self.buffers[i]
            if buffer.shape[2] < self.sealed + block:  # twice the room, so that moving costs little
                buffer = torch.cat([buffer, torch.zeros_like(buffer)], 2)
            buffer[:, :, self.sealed : self.sealed + block] = new
            self.buffers[i] = buffer
        for i in opened:
            buffer = self.buffers[i]
            buffer[:, :, first : buffer.shape[2] - block] = buffer[:, :, first + block :].clone()
        self.sealed += block


def unrounded(plan: LatentPlan) -> LatentPlan:
    """The same plan with a window that stays as it came, as the state keeps it."""
    return replace(plan, window_bits=16)
