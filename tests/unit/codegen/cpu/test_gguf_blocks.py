"""Weights in GGUF blocks (cpu/gguf_blocks.py): dequantized as gguf does, and matmuls with them."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from quantized_blocks import HALVES, random_blocks, random_rows
from torch import Tensor

from fhopt import codegen
from fhopt.codegen.compiler import compile_and_load
from fhopt.codegen.cpu import gguf_blocks
from fhopt.codegen.cpu.calls import kernels
from fhopt.codegen.cpu.calls.formats import Format
from fhopt.codegen.cpu.calls.kernels import Skinny
from fhopt.codegen.cpu.calls.layouts import packer
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS, BlockedWeight
from fhopt.hardware.this_cpu import vector_units

gguf: Any = pytest.importorskip("gguf")
pytestmark = needs_compiler
# Relative to the norms of the operands: 15-bit inputs, or one rounding to the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FORMATS = sorted(HALVES)
SKINNY = packer(Skinny)


@pytest.fixture(autouse=True)
def served() -> None:
    codegen.register_kernels()
    codegen.prepare_blocks()


def numbers_of(blocks: BlockedWeight) -> Tensor:
    kind = gguf.GGMLQuantizationType(blocks.format)
    return torch.from_numpy(gguf.dequantize(gguf_blocks.as_in_file(blocks), kind))


def product(x: Tensor, blocks: BlockedWeight, bias: Tensor | None = None) -> Tensor:
    made: Tensor = torch.ops.fhopt.linear_kernel(x, blocks.values, bias, None, blocks.format)
    return made


def test_all_formats_are_tested_and_have_the_sizes_of_gguf() -> None:
    assert set(FORMATS) == gguf_blocks.FORMATS.keys()
    for format, size in gguf_blocks.FORMATS.items():
        kind = gguf.GGMLQuantizationType(format)
        assert gguf.GGML_QUANT_SIZES[kind] == size and Format(format).name == kind.name
        assert gguf_blocks.blocked_row_bytes(format, 512) == 512 // size[0] * size[1]


@pytest.mark.parametrize("rows", [1, 7, 8, 29])
@pytest.mark.parametrize("format", FORMATS)
def test_rearranged_rows_restore_the_file_order(format: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests compare values after restoring the file's order."""
    monkeypatch.setattr(gguf_blocks, "_PART", 8 * gguf_blocks.blocked_row_bytes(format, 512))  # parts of eight rows
    given_ = random_rows(format, rows, 512)
    blocks = gguf_blocks.interleave_rows(given_, format, 512)
    assert np.array_equal(gguf_blocks.as_in_file(blocks), given_)
    assert np.array_equal(blocks.values, given_) == (rows < 8)
    assert np.array_equal(blocks.values[rows // 8 * 8 :], given_[rows // 8 * 8 :])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dequantized_values_equal_those_of_gguf(format: int, dtype: torch.dtype) -> None:
    blocks = random_blocks(format, 37, 512)
    expected = numbers_of(blocks)
    found = gguf_blocks.unpack_rows(blocks, dtype)
    assert found is not None and found.dtype == dtype
    assert torch.allclose(found.float(), expected.to(dtype).float(), rtol=2e-6 if dtype == torch.float32 else 8e-3)
    some = gguf_blocks.unpack_rows(blocks, dtype, 5, 12)
    assert some is not None and torch.equal(some, found[5:12])
    which = torch.tensor([36, 0, 31, 32, 0])
    listed = gguf_blocks.unpack_rows(blocks, dtype, which=which)
    assert listed is not None and torch.equal(listed, found[which])
    for nothing in (
        gguf_blocks.unpack_rows(blocks, dtype, 9, 9),
        gguf_blocks.unpack_rows(blocks, dtype, which=which[:0]),
    ):
        assert nothing is not None and nothing.shape == (0, 512)
    with pytest.raises(IndexError, match="of a weight of 37 rows"):
        gguf_blocks.unpack_rows(blocks, dtype, which=torch.tensor([3, 37]))


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(FORMATS), st.sampled_from(sorted(TOLERANCES, key=str)), st.integers(1, 3 * MAX_ROWS),
    st.integers(1, 60), st.integers(1, 12), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_matmuls_agree_with_float64(
    format: int, dtype: torch.dtype, rows: int, columns: int, blocks_of_row: int, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    width = blocks_of_row * gguf_blocks.FORMATS[format][0]
    blocks = random_blocks(format, columns, width, seed)
    x, bias = torch.randn(rows, 1, width).to(dtype), torch.randn(columns).to(dtype) if has_bias else None
    found = product(x, blocks, bias)
    expected = x.double() @ numbers_of(blocks).double().T
    size = (x.double().norm(dim=-1, keepdim=True) * numbers_of(blocks).double().norm(dim=1)).clamp_min(1e-30)
    if bias is not None:
        expected = expected + bias.double()
        size = size + bias.double().abs()
    assert found.dtype == dtype and found.shape == (rows, 1, columns)
    assert float(((found.double() - expected).abs() / size).max()) <= TOLERANCES[dtype]


@pytest.mark.parametrize("format", FORMATS)
def test_small_elements_stay_accurate_next_to_outliers(format: int) -> None:
    """Each group of an input has its own scale, so an outlier does not affect other groups."""
    blocks = random_blocks(format, 40, 512)
    x = torch.randn(1, 512)
    x[:, :32] *= 1e4
    x[:, 64:96] = 0
    rest = x.clone()
    rest[:, :32] = 0
    numbers = numbers_of(blocks)
    alone = product(rest, blocks) - rest @ numbers.T
    assert float(alone.norm()) <= 1e-4 * float(rest.norm() * numbers.norm())
    assert float((product(x, blocks) - x @ numbers.T).norm()) <= 1e-4 * float(x.norm() * numbers[:, :32].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_results_depend_on_neither_threads_nor_other_rows(format: int, dtype: torch.dtype) -> None:
    blocks, x = random_blocks(format, 700, 768), torch.randn(7, 768).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([product(row[None], blocks) for row in x])
        torch.set_num_threads(3)
        assert torch.equal(product(x, blocks), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [[1], [0, 4]])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_inputs_propagate(format: int, broken: float, rows: list[int]) -> None:
    blocks, x = random_blocks(format, 20, 512), torch.randn(5, 512)
    x[rows, 300] = broken
    found = product(x, blocks)
    others = [r for r in range(5) if r not in rows]
    assert bool(found[others].isfinite().all()) and not bool(found[rows].isfinite().any())


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_codes_and_inputs_do_not_overflow(format: int, byte: int) -> None:
    """Sums of products of bytes are 16-bit for a few steps."""
    rows = np.full((25, gguf_blocks.blocked_row_bytes(format, 512)), byte, np.uint8)
    blocks_of_rows = rows.reshape(-1, gguf_blocks.FORMATS[format][1])
    for at in HALVES[format]:
        blocks_of_rows[:, at : at + 2] = np.full((len(blocks_of_rows), 1), 0.01, np.float16).view(np.uint8)
    blocks = gguf_blocks.interleave_rows(rows, format, 512)
    ones = torch.ones(512)
    x = torch.stack([ones, -ones, ones - 2 * (torch.arange(512) % 2), ones - 2 * (torch.arange(512) // 2 % 2), ones])
    expected = x.double() @ numbers_of(blocks).double().T
    size = x.double().norm(dim=1)[:, None] * numbers_of(blocks).double().norm(dim=1)
    assert bool(((product(x, blocks).double() - expected).abs() <= 1e-4 * size + 1e-12).all())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [3, 5, 40])
@pytest.mark.parametrize("is_float", [False, True])
def test_several_weights_multiply_one_input(is_float: bool, rows: int, threads: int) -> None:
    """Layer programs call it like this. Inputs computed by a program are float32."""
    format, width = 12, 1024
    weights = [random_blocks(format, columns, width, columns) for columns in (210, 80, 135)]  # enough for three threads
    x = torch.randn(rows, width).bfloat16()
    given = x.float() if is_float else x
    made = [torch.zeros(rows, len(b.values), dtype=given.dtype) for b in weights]
    calls = [
        SKINNY(
            rows, width, len(b.values), threads, kernels.FORMATS * format + 1, given.data_ptr(), width,
            b.values.data_ptr(), b.values.stride(0), 0, y.data_ptr(), 0, is_float,
        ) for b, y in zip(weights, made, strict=True)
    ]  # fmt: skip
    library = gguf_blocks.LIBRARY.load()
    assert library is not None
    library.block_group(b"".join(calls), ctypes.c_int64(len(calls)))
    for blocks, y in zip(weights, made, strict=True):
        expected = product(x, blocks)
        assert torch.equal(y.bfloat16(), expected)


def test_rows_are_unpacked_into_given_memory_if_they_fit() -> None:
    blocks = random_blocks(12, 37, 512)
    expected, memory = gguf_blocks.unpack_rows(blocks, torch.float32), torch.zeros(20 * 512)
    some = gguf_blocks.unpack_rows(blocks, torch.float32, 5, 25, memory=memory)
    assert expected is not None and some is not None
    assert some.data_ptr() == memory.data_ptr() and torch.equal(some, expected[5:25])
    more = gguf_blocks.unpack_rows(blocks, torch.float32, 0, 21, memory=memory)
    assert more is not None and more.data_ptr() != memory.data_ptr() and torch.equal(more, expected[:21])
    assert torch.equal(some, expected[5:25])
    for other in (memory.half(), memory.view(2, -1), memory[::2]):
        with pytest.raises(ValueError, match=r"expected torch\.float32, one dimension, dense, on the CPU"):
            gguf_blocks.unpack_rows(blocks, torch.float32, 0, 2, memory=other)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction set of x86-64")
@pytest.mark.parametrize("isa", ["x86-64", "x86-64-v2", "x86-64-v3", "alderlake", "x86-64-v4", "cascadelake"])
def test_results_agree_between_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"alderlake": "AVX-VNNI", "x86-64-v4": "AVX-512", "cascadelake": "AVX-512 VNNI", "x86-64-v3": "AVX2"}
    if needed.get(isa, "") not in ("", *vector_units()):
        pytest.skip(f"this CPU has no {needed[isa]}")
    x, numbers = torch.randn(7, 768), {}
    for format in FORMATS:
        blocks = random_blocks(format, 43, 768)
        numbers[format] = blocks, product(x, blocks), gguf_blocks.unpack_rows(blocks, torch.float32)
    monkeypatch.setenv("FHOPT_ISA", isa)
    library = compile_and_load(gguf_blocks.LIBRARY.name, gguf_blocks.LIBRARY.text())
    for format, (blocks, expected, unpacked) in numbers.items():
        made = torch.zeros(7, 43)
        call = SKINNY(
            7, 768, 43, 1, kernels.FORMATS * format, x.data_ptr(), 768, blocks.values.data_ptr(),
            blocks.values.stride(0), 0, made.data_ptr(), 0, True,
        )  # fmt: skip
        library.block_group(call, ctypes.c_int64(1))
        assert unpacked is not None
        assert float((made - expected).norm()) <= 1e-5 * float(x.norm() * unpacked.norm())


def test_zero_and_empty_inputs_give_zero_and_empty_outputs() -> None:
    blocks = random_blocks(12, 9, 256)
    assert torch.equal(product(torch.zeros(2, 256), blocks), torch.zeros(2, 9))
    assert product(torch.zeros(0, 256), blocks).shape == (0, 9)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, b: (x[:, :-1], b),
        lambda x, b: (x, BlockedWeight(b.values[:, :-1].contiguous(), b.format, b.width)),
        lambda x, b: (x, BlockedWeight(b.values.to(torch.int8), b.format, b.width)),
        lambda x, b: (x, BlockedWeight(b.values, 7, b.width)),
        lambda x, b: (x, BlockedWeight(b.values[::2], b.format, b.width)),  # blocks of eight rows must be dense
        lambda x, b: (x[:, :128], BlockedWeight(b.values[:, :72].contiguous(), b.format, 128)),  # half a block
    ],
)
def test_operands_that_do_not_fit_are_refused(change: Any) -> None:
    x, blocks = change(torch.randn(1, 512), random_blocks(12, 9, 512))
    with pytest.raises(RuntimeError, match="weight"):
        product(x, blocks)


def test_random_blocks_have_every_byte_and_finite_scales() -> None:
    """So that tests cover all codes, and all scales of a block."""
    values = random_blocks(12, 64, 4096).values.numpy()
    assert len(np.unique(values)) == 256 and bool(numbers_of(random_blocks(12, 64, 4096)).isfinite().all())
