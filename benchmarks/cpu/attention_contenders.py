"""Implementations of single-token attention to compare on a CPU, each with a float64 reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.cpu.attention_shapes import DTYPES, SHAPES, AttentionCase
from fhopt.codegen.tiers import Tiers
from fhopt.ops import algebra, attention, latent_attention

Attend = Callable[[], Tensor]
RATIOS = {"float32": (4, 8, 16), "bfloat16": (2, 4, 8)}  # max 8 bits per quantized value
FALL = 9.0  # difference in bits between the strongest and the weakest channel of a spectrum


@dataclass
class AttentionContender:
    """One implementation. `size`: bytes loaded per call. `error`: why it cannot run, or how its result is wrong."""

    name: str
    attend: Attend
    size: int
    ours: bool = False
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    def call(self) -> float:
        """Return the seconds of one call."""
        start = time.perf_counter()
        self.attend()
        return time.perf_counter() - start

    @property
    def time_ms(self) -> float:
        """Median time of a call in milliseconds."""
        return 1e3 * statistics.median(self.seconds)


def spectrum_tiers(dim: int, size: int) -> Tiers:
    """Return bit groups of a packed latent of at most `size` bytes: water-filling of a spectrum decaying by FALL bits.

    Each group of eight channels gets the bits between its level and the water level, 0 to 6 or 8.
    """
    levels = [FALL * (1 - i / (dim // 8 - 1)) for i in range(dim // 8)]

    def bits(water: float) -> list[int]:
        rounded = [round(max(0.0, level - water)) for level in levels]
        return [8 if b > 6 else b for b in rounded]

    water = next(w / 64 for w in range(-512, 640) if sum(bits(w / 64)) <= size)
    counts = {b: bits(water).count(b) for b in sorted(set(bits(water)), reverse=True) if b}
    return tuple((b, 8 * n, 3.5 / 2**b) for b, n in counts.items())


def quantized(case: AttentionCase, ratio: int, query: Tensor) -> tuple[AttentionContender, Callable[[], Tensor]]:
    """Return attention on latents quantized to 1/`ratio` of the bytes, and the reference."""
    _, groups, dim = SHAPES[case.shape]
    side = dim * query.element_size() // ratio - 2  # minus 2 bytes for the scale
    tiers = spectrum_tiers(dim, side)
    row, width = sum(b * w for b, w, _ in tiers) // 8, sum(w for _, w, _ in tiers)
    shape = (case.batch, groups, case.tokens)
    packed = [torch.randint(0, 256, (*shape, row), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(shape).add(0.5).to(torch.float16) for _ in range(2)]
    table: Any = tuple(map(list, zip(*tiers, strict=True)))
    options: dict[str, Any] = algebra.group_options(table, table) | dict(scale=dim**-0.5)
    absorbed = query[..., :width].contiguous()
    operands: Any = (absorbed, packed[0], scales[0], packed[1], scales[1], None)

    def attend() -> Tensor:
        return torch.ops.fhopt.latent_attention(*operands, **options)[0]

    def reference() -> Tensor:
        exact = (absorbed.double(), *operands[1:])
        return latent_attention.latent_attention_reference(*exact, **options)[0]

    size = sum(x.numel() * x.element_size() for x in (*packed, *scales))
    return AttentionContender(f"fhopt {ratio}x", attend, size, ours=True), reference


def unquantized(
    name: str, query: Tensor, key: Tensor, value: Tensor
) -> tuple[AttentionContender, Callable[[], Tensor]]:
    """Return attention on unquantized latents, and the reference."""
    options: dict[str, Any] = algebra.uncoded_options() | dict(scale=key.shape[-1] ** -0.5)

    def attend() -> Tensor:
        return torch.ops.fhopt.latent_attention(query, key, None, value, None, None, **options)[0]

    size = 2 * key.numel() * key.element_size()
    return AttentionContender(name, attend, size, ours=True), lambda: exact_attention(query, key, value)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention in float64, one sequence at a time."""
    return torch.cat([_exact(*[x.double() for x in rows]) for rows in _sequences(query, key, value)])


def _sequences(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*[x.split(1) for x in tensors], strict=True)


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = attention.grouped_scores(query * key.shape[-1] ** -0.5, key)
    return attention.grouped_mix(torch.softmax(logits, -1), value)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with two batched matmuls and a softmax, queries of a kv head as rows."""
    b, h, s, d = query.shape
    g = key.shape[1]
    rows = query.reshape(b * g, h // g * s, d) * d**-0.5
    weights = torch.softmax(torch.bmm(rows, key.reshape(b * g, -1, d).transpose(1, 2)), -1, dtype=torch.float32)
    return torch.bmm(weights.to(value.dtype), value.reshape(b * g, -1, d)).reshape(b, h, s, d)


def torch_implementations(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[str, Attend]]:
    """Yield (name, call) of the implementations in torch."""
    b, h, s, d = query.shape
    g = key.shape[1]
    shared: dict[str, Any] = dict(enable_gqa=True) if h != g else {}
    yield "sdpa", lambda: F.scaled_dot_product_attention(query, key, value, **shared)
    if h != g:
        rows = query.reshape(b, g, h // g * s, d)
        yield "sdpa, heads as queries", lambda: F.scaled_dot_product_attention(rows, key, value).reshape(b, h, s, d)
    yield "bmm", lambda: products(query, key, value)
    plain = torch.compile(products, dynamic=False)
    unmatched = torch.compile(products, dynamic=False, options={"pattern_matcher": False})
    yield "bmm, inductor", lambda: plain(query, key, value)
    yield "bmm, inductor, no pattern matcher", lambda: unmatched(query, key, value)
    flex = torch.compile(flex_attention, dynamic=False)
    yield "flex_attention", lambda: flex(query, key, value, **shared)


def contenders(case: AttentionCase) -> Iterator[tuple[AttentionContender, Callable[[], Tensor]]]:
    """Yield all implementations of a case, each with its reference in float64."""
    heads, groups, dim = SHAPES[case.shape]
    dtype = DTYPES[case.dtype]
    query = torch.randn(case.batch, heads, 1, dim).to(dtype)
    key, value = (torch.randn(case.batch, groups, case.tokens, dim).to(dtype) for _ in range(2))
    reference = exact_attention(query, key, value)
    for name, attend in torch_implementations(query, key, value):
        yield AttentionContender(name, attend, case.exact_bytes), lambda: reference
    yield unquantized("fhopt full", query, key, value)
    half = [x[..., : dim // 2].contiguous() for x in (query, key, value)]
    yield unquantized("fhopt half width", *half)
    if dtype == torch.float32:
        yield unquantized("fhopt half width, float16", half[0], *[x.half() for x in half[1:]])
    for ratio in RATIOS[case.dtype]:
        yield quantized(case, ratio, query)
