"""Launch of the decode-step Triton kernels: checks of tensors, splits, and the merge of their results.

Nothing here synchronizes with the device, so that a call may be captured in a CUDA graph.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, P pages, R latent width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.gpu.attention import MERGED
from fhopt.codegen.gpu.configs import Config, default_config, scattered_config, tuned_config
from fhopt.codegen.gpu.row_layout import SMALLEST_PIECE, is_crowded, places
from fhopt.codegen.rows import PAGE_QUANTUM, RowFormat
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.window import ResidualWindow

WARPS = 16  # of these kernels per multiprocessor, approximately; limited by registers
SHORTEST = 256  # min tokens per range
MAX_SPLITS = 128
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # types that kernels load without conversion
Rows = tuple[Tensor, Tensor | None, tuple[int, ...], int]  # rows, scales, their strides, the divisor of the row strides


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens of one kind that the newest token of a sequence attends to, in that kind's cache (rule: `window`).

    table int32 [B,P]: keys and values are pools [pages,J,page,...], and page i of a sequence is at table[b, i].
    """

    kind: int
    window: ResidualWindow
    table: Tensor

    QUANTIZED, OPEN, FIRST = 1, 2, 3  # kinds, numbered as in the kernel

    def most(self, tokens: int) -> int:
        """Return the maximum number of such tokens among `tokens` tokens."""
        return min(tokens, {self.OPEN: self.window.capacity, self.FIRST: self.window.sinks}.get(self.kind, tokens))

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The rule, in the order of the kernel's arguments."""
        return self.window.sinks, self.window.recent, self.window.block


@dataclass(frozen=True, eq=False)
class Features:
    """Optional tensors of a call, in the shapes that the kernel takes."""

    mask: Tensor | None  # [B, H, S, T]
    lengths: Tensor | None  # [B]
    table: Tensor | None  # [B, P]
    pages: Tensor | None  # [B, units, n]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the kernel's arguments."""
        return (self.mask, self.lengths, self.table, self.pages)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the dimensions that are not dense, in the order of the kernel's arguments."""
        pairs = ((self.mask, 4), (self.lengths, 1), (self.table, 1), (self.pages, 2))
        return tuple(n for x, count in pairs for n in ((0,) * count if x is None else x.stride()[:count]))


class TritonKernel:
    """The kernels of a rendered file, with the signature of `fhopt.ops.latent_attention_reference` and extensions.

    It ignores the arguments for bit groups. Calls run with the configuration that was tuned or chosen for the GPU
    (tuning.py), else with the default. Raises ValueError if a shape or type does not fit the spec.
    """

    def __init__(self, module: ModuleType, spec: KernelSpec) -> None:
        self._attention, self._merge = module.attention_kernel, module.merge_kernel
        self._spec = spec
        self._places = places(spec)
        self._crowded = is_crowded(spec)
        self._configs: dict[tuple[int, torch.device], Config] = {}
        self._sides = (
            RowFormat("key", spec.key_tiers, spec.key_width, spec.dtype),
            RowFormat("value", spec.value_tiers, spec.value_width, spec.dtype),
        )

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        key_scale: Tensor | None,
        value: Tensor,
        value_scale: Tensor | None,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        lengths: Tensor | None = None,
        pages: Tensor | None = None,
        page_tokens: int = 0,
        span: Span | None = None,
        splits: int | None = None,
        config: Config | None = None,
        **_tiers: object,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention on latents: o~ [B,H,S,R_V] in the dtype of query, lse [B,H,S] float32.

        lengths, integers [B] or one: tokens per sequence. pages [B,U,n]: attend only to these pages of `page_tokens`
        tokens, query head h to those of list h*U//H; -1: no page. span, not with `pages`: attend only to these tokens
        of sequences of `lengths` tokens, in pages of any size; a program derives them from the length it loads. splits,
        config: tiling.
        """
        self._check(query, softcap)
        b, h, s, _ = query.shape
        query = query if query.stride(3) == 1 else query.contiguous()
        tokens, page = key.shape[2], page_tokens
        if span is not None:
            tokens, page = span.table.shape[1] * key.shape[2], key.shape[2]
        sides = [
            rows_as_read(side, x, factors, (b, h, s), tokens, span is not None)
            for side, x, factors in zip(self._sides, (key, value), (key_scale, value_scale), strict=True)
        ]
        shared = gcd(h // key.shape[1], h // value.shape[1])  # query heads per unit
        features = Features(
            mask=None if mask is None else mask_as_read(mask, (b, h, s, tokens)),
            lengths=None if lengths is None else lengths.reshape(-1).expand(b),
            table=None if span is None else span.table,
            pages=None if pages is None else _per_unit(pages, b, h // shared),
        )
        config = config or self._config(shared * s, query.device)
        if span is not None:
            config = scattered_config(config)
        elif pages is not None:
            config = _within(config, page)
        slots = tokens if features.pages is None else features.pages.shape[2] * page
        most = slots if span is None else span.most(slots)
        programs = b * (h // shared) * -(-shared * s // config.block_m)
        splits = splits or choose_splits(programs, most, processors(query.device) * max(1, WARPS // config.num_warps))
        sizes = (h, h // shared, s, tokens, slots, splits, h // shared // key.shape[1], h // shared // value.shape[1])
        constants = _constants(config, query.is_cuda) | {"PAGE": page}
        rule, constants["SPAN"] = ((0, 0, 1), 0) if span is None else (span.numbers, span.kind)
        return self._launch((programs, splits), query, sides, features, (*sizes, *rule, scale, softcap), constants)

    def _check(self, query: Tensor, softcap: float) -> None:
        """Raise ValueError for queries of another kernel."""
        if query.shape[3] != self._spec.key_width or (softcap != 0.0) != self._spec.softcap:
            raise ValueError(
                f"{self._spec.name} takes no queries {tuple(query.shape)} with softcap {softcap}; build their kernel."
            )

    def _config(self, rows: int, device: torch.device) -> Config:
        """Return the configuration for M = `rows` up to the next power of two, cached."""
        at = _power(max(1, rows)), device
        if at not in self._configs:
            self._configs[at] = find_config(self._spec, at[0], device)
        return self._configs[at]

    def _launch(
        self,
        grid: tuple[int, int],
        query: Tensor,
        sides: Sequence[Rows],
        features: Features,
        numbers: tuple[float, ...],
        constants: dict[str, object],
    ) -> tuple[Tensor, Tensor]:
        """Run the kernels for programs and splits `grid`."""
        (key, key_scale, key_strides, key_align), (value, value_scale, value_strides, value_align) = sides
        splits = grid[1]
        whole = splits == 1 and self._places == self._spec.value_width
        output = query.new_empty((*query.shape[:3], self._spec.value_width))
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not output.numel():
            return output, lse
        parts = (output, lse, None) if whole else _parts(query, splits, self._places)
        with torch.cuda.device_of(query):
            compiled = self._attention[grid](
                query, key, key_scale, value, value_scale, *features.tensors, *parts,
                *query.stride()[:3], *key_strides, *value_strides, *features.strides, *numbers,
                WHOLE=whole, KEY_ALIGN=key_align, VALUE_ALIGN=value_align, **constants,
            )  # fmt: skip
            if self._crowded:
                warn_of_spills(self._spec, compiled)
            if not whole:
                rows = (lse.numel(), -(-self._spec.value_width // MERGED))
                self._merge[rows](*parts, output, lse, splits, BLOCK_S=_power(splits), BLOCK_R=MERGED)
        return output, lse


def find_config(spec: KernelSpec, rows: int, device: torch.device) -> Config:
    """Return the configuration tuned or chosen for this GPU, else the default, also under Triton's interpreter."""
    tuned = tuned_config(spec, rows, torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return tuned or default_config(spec, rows, _backend())


def _constants(config: Config, on_gpu: bool) -> dict[str, object]:
    """Return the constants and options of a launch for its configuration and device."""
    return {
        "PACKED": on_gpu and _backend() == "cuda", "BLOCK_T": config.block_t, "BLOCK_M": config.block_m,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"


_warned: set[str] = set()


def warn_of_spills(spec: KernelSpec, compiled: Any) -> None:
    """Warn, once per process, if bit groups exceed the registers. compiled: None under the interpreter."""
    words = getattr(compiled, "n_spills", 0)
    if words and "spills" not in _warned:
        _warned.add("spills")
        warnings.warn(
            f"{spec.name} spills {4 * words} bytes of registers per thread, because its plan uses bit widths "
            "not chosen for GPUs. Results are correct but slow. Refit for this GPU, e.g.: fhopt fit MODEL "
            "--device h100.",
            RuntimeWarning,
            stacklevel=2,
        )


def choose_splits(programs: int, tokens: int, places: int) -> int:
    """Choose the number of token ranges that fills a device of `places` programs in whole rounds, none too short."""
    return _splits(programs, max(1, min(tokens // SHORTEST, MAX_SPLITS)), places)


@functools.lru_cache(4096)
def _splits(programs: int, most: int, places: int) -> int:
    """Choose the number of ranges with the fewest rounds per token; within 5%, the smallest."""
    rounds = [-(-programs * n // places) / n for n in range(1, most + 1)]
    return next(n for n, cost in enumerate(rounds, 1) if cost <= 1.05 * min(rounds))


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessor count of a GPU; 1 for any other device, which runs Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _per_unit(pages: Tensor, batch: int, units: int) -> Tensor:
    """Expand page lists [B,U,n] to the kernel's shape, one per unit. Raises ValueError."""
    if units % pages.shape[1]:
        raise ValueError(
            f"pages have shape {tuple(pages.shape)}; expected [{batch}, U, n], U a divisor of {units}: the runs of "
            "query heads that share latent heads."
        )
    if pages.shape[1] in (1, units):
        return pages.expand(batch, units, -1)
    return pages.expand(batch, -1, -1).repeat_interleave(units // pages.shape[1], 1)


def _within(config: Config, page: int) -> Config:
    """Reduce tiles so that they do not cross a page, if pages are as large as a tile can be."""
    if not page or page % PAGE_QUANTUM:
        raise ValueError(f"pages have {page} tokens; expected a multiple of {PAGE_QUANTUM}. Quantize larger blocks.")
    return replace(config, block_t=gcd(page, config.block_t)) if page % SMALLEST_PIECE == 0 else config


def rows_as_read(
    side: RowFormat, x: Tensor, scale: Tensor | None, query: tuple[int, ...], tokens: int, paged: bool
) -> Rows:
    """Convert the rows of one side to the kernel's format. Raises ValueError."""
    x = side.rows(x) if side.coded or x.dtype not in FLOATS else x if x.stride(3) == 1 else x.contiguous()
    if paged:  # any number of pages, independent of the sequences
        query, tokens = (x.shape[0], *query[1:]), x.shape[2]
    side.check(x, scale, query, tokens)
    strides = tuple(n if size > 1 else 0 for n, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    align = gcd(16, *strides)
    if side.coded and side.row % 2 == 0 and (align % 2 or x.data_ptr() % 2):  # the kernel loads 16-bit words
        x = x.clone(memory_format=torch.contiguous_format)
        strides = x.stride()[:3]
        align = gcd(16, *strides)
    factors = scale if side.scaled else None
    scale_strides = (0, 0, 1) if factors is None else factors.stride()
    return x, factors, (*(n // align for n in strides), *scale_strides), align


def mask_as_read(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert the mask to the kernel's format [B,H,S,T]: bytes or floats."""
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    elif not mask.is_floating_point() or mask.dtype == torch.float64:
        mask = mask.to(torch.float32)
    return mask.expand(shape)


def _parts(query: Tensor, splits: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the programs' results: sums, their bases, totals."""
    shape = (*query.shape[:3], splits)
    exact = functools.partial(query.new_empty, dtype=torch.float32)
    return exact((*shape, places)), exact(shape), exact(shape)


def _power(n: int) -> int:
    """Round n up to a power of two."""
    return 1 << (n - 1).bit_length()
