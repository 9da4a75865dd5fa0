"""The C++ decode step on blocks (codegen/cpu/block_tables.py), against plain attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from needs import needs_compiler
from torch.nn import functional as F

from fhopt.codegen.block_layout import BlockLayout, SideLayout
from fhopt.codegen.cpu import block_tables
from fhopt.codegen.cpu.block_tables import attention_of, step_of, table_of
from fhopt.ops import packing
from fhopt.plan.window import ResidualWindow

H, G, D, SIZE = 4, 2, 16, 8  # query heads, kv heads, head size, tokens per block
LENGTHS = (37, 20, 5)
QUANTIZED = (24, 8, 0)

pytestmark = needs_compiler


def layout() -> BlockLayout:
    """Latents that are the keys and values, in float32; an unquantized window; no sinks."""
    one = torch.eye(D).expand(G, D, D)
    key, value = (SideLayout(one, one, (), 4 * D, start, 0) for start in (0, 4 * G * D))
    return BlockLayout(
        heads=H, kv_heads=G, sizes=(D, D), dtype=torch.float32, scale=0.25, key=key, value=value, is_shared=False,
        window=ResidualWindow(0, 1, 8), window_rows=(0, 4 * G * D, 0, 0), first_rows=(0, 0, 0, 0), means_from=0,
    )  # fmt: skip


def test_it_attends_through_block_tables() -> None:
    torch.manual_seed(0)
    attention = attention_of(layout())
    assert attention is not None
    count, blocks = len(LENGTHS), 8
    key, value = (torch.randn(count, G, max(LENGTHS), D) for _ in range(2))
    caches = [torch.zeros(1 + count * blocks, 1, SIZE, 2 * 4 * G * D, dtype=torch.uint8) for _ in range(3)]
    tables = [1 + torch.randperm(count * blocks).view(count, blocks).int() for _ in range(3)]
    for b, length in enumerate(LENGTHS):
        for t in range(length - 1):  # the step writes the last token
            row = torch.cat([key[b, :, t].flatten(), value[b, :, t].flatten()]).view(torch.uint8)
            for cache, table in zip(caches, tables, strict=True):
                cache[table[b, t // SIZE], 0, t % SIZE] = row
    new = [torch.stack([x[b, :, length - 1] for b, length in enumerate(LENGTHS)]) for x in (key, value)]
    query, output = torch.randn(count, H, D), torch.empty(count, H, D)
    step = step_of([(i, i, length - 1, QUANTIZED[i]) for i, length in enumerate(LENGTHS)])
    latents, window, first = (table_of(table, SIZE) for table in tables)
    memory = caches[0], caches[1], caches[2]
    attention(step, memory, (latents, window, first), query, new[0], new[1], output, writes=True)
    for b, length in enumerate(LENGTHS):
        k, v = key[b : b + 1, :, :length], value[b : b + 1, :, :length]
        expected = F.scaled_dot_product_attention(query[b, :, None][None], k, v, scale=0.25, enable_gqa=True)
        assert torch.allclose(output[b], expected[0, :, 0], atol=1e-5)


def test_dtypes_without_kernels_are_left_to_torch() -> None:
    assert attention_of(replace(layout(), dtype=torch.float64)) is None
    attention = attention_of(layout())
    rows = torch.zeros(2, 1, SIZE, 12, dtype=torch.uint8)
    assert attention is not None and attention.serves(torch.zeros(1, H, D), rows, rows, rows)
    assert not attention.serves(torch.zeros(1, H, D).half(), rows, rows, rows)
    odd = rows[..., :10].contiguous()  # elements would not be aligned
    assert not attention.serves(torch.zeros(1, H, D), rows, odd, rows)
    assert attention.serves(torch.zeros(1, H, D), rows, rows, rows)  # later calls may pass other caches


def test_the_file_is_compiled_once() -> None:
    assert attention_of(layout()) is not None
    assert not block_tables.LIBRARY.compiles()  # the file exists now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2000])  # with 2,000, the work is split over several threads
def test_rows_of_a_window_are_rounded_like_torch(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 2 * G, 40).to(dtype)[:, ::2]  # in engines, key heads are interleaved with query heads
    x[0, 0] = 0
    x[-1, -1, 3] = torch.nan
    codes, scale = torch.zeros(1, G, tokens, 40, dtype=torch.uint8), torch.zeros(1, G, tokens, dtype=torch.float16)
    packing.round_rows_into_reference(x.transpose(0, 1)[None], None, codes, scale, 0)
    rows = torch.zeros(tokens, 8 + G * 40 + 2 * G, dtype=torch.uint8)
    assert block_tables.round_window_rows(x, rows, 8, 8 + G * 40)
    scales = rows[:, 8 + G * 40 :].view(torch.float16)
    known = scales.isfinite()
    assert torch.equal(scales[known], scale[0].t()[known]) and int((~known).sum()) == 1
    assert torch.equal(rows[:, 8 : 8 + G * 40].unflatten(1, (G, 40))[known], codes[0].transpose(0, 1)[known])
    assert not rows[:, :8].any()
    assert not block_tables.round_window_rows(x.double(), rows, 8, 8 + G * 40)


def test_rows_are_placed_in_blocks() -> None:
    torch.manual_seed(0)
    cache = torch.zeros(40, 3, SIZE, 150, dtype=torch.uint8)[:, 1:2]  # interleaved with those of other layers
    places = torch.randperm(40 * SIZE)[: 30 * SIZE]
    blocks, offsets = places // SIZE, places % SIZE
    rows = torch.randint(1, 256, (len(places), 160), dtype=torch.uint8)[:, :140]
    expected = cache.clone()
    expected[blocks, 0, offsets, :140] = rows
    assert block_tables.write_block_rows(cache, blocks, offsets, rows)
    assert torch.equal(cache, expected)
