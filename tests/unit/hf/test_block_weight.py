"""A `BlockWeight` behaves like its dequantized weight."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from needs import needs_compiler
from quantized_blocks import HALVES, random_blocks
from torch import Tensor

from fhopt import codegen
from fhopt.codegen.cpu import gguf_blocks
from fhopt.codegen.cpu.skinny_linear import DTYPES, MAX_BLOCK_ROWS, MAX_ROWS, BlockedWeight
from fhopt.hf import block_weight
from fhopt.hf.block_weight import BlockWeight

pytestmark = needs_compiler
FORMATS = sorted(HALVES)


@pytest.fixture(autouse=True)
def served() -> None:
    codegen.register_kernels()
    codegen.prepare_blocks()


def weight_of(format: int = 12, dtype: torch.dtype = torch.float32, rows: int = 50, width: int = 512) -> BlockWeight:
    return BlockWeight(random_blocks(format, rows, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 49, 128, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_layer_agrees_with_the_dequantized_weight(format: int, rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = weight_of(format, dtype), torch.randn(2, rows, 512)[:1].to(dtype), torch.randn(50).to(dtype)
    whole = weight.dequantize()
    layer = torch.nn.Linear(512, 50, device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), torch.nn.Parameter(bias)
    with torch.no_grad():
        found, expected = layer(x), F.linear(x, whole, bias)
        is_served = rows <= gguf_blocks.most_rows(format, x.dtype)
        assert (codegen.dispatch_linear(x, layer.weight, bias) is not None) == is_served, "a kernel serves few rows"
    assert found.shape == expected.shape and found.dtype == dtype
    rounding = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert float((found - expected).float().norm()) <= rounding * float(x.float().norm() * whole.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_supports_at_least_as_many_rows_as_for_other_weights(format: int, dtype: torch.dtype) -> None:
    assert MAX_ROWS <= gguf_blocks.most_rows(format, dtype) <= MAX_BLOCK_ROWS


def test_weights_are_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(dtype=torch.float64), torch.randn(40, 512, dtype=torch.float64)  # float64 has no kernel
    expected = F.linear(x, weight)
    monkeypatch.setattr(block_weight, "PART", 7 * 512)
    assert torch.allclose(F.linear(x, weight), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_dequantized_into_reused_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs must not alias that memory. The block kernel does not support 200 input rows."""
    monkeypatch.setattr(block_weight, "PART", 16 * 512)  # 16 of 50 rows
    weights = [weight_of(dtype=dtype) for _ in range(2)]
    x, bias = torch.randn(200, 512).to(dtype), torch.randn(50).to(dtype)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [F.linear(x, weight, bias) for weight in weights]

    with torch.inference_mode():
        first = [F.linear(x, weight, bias) for weight in weights]
    kept = [memory for memory in map(block_weight._memory.of, (*DTYPES, torch.float64)) if memory is not None]
    assert [memory.dtype for memory in kept] == list(DTYPES) and len({memory.data_ptr() for memory in kept}) == 1
    with ThreadPoolExecutor(2) as threads:
        others = [thread.result() for thread in [threads.submit(run) for _ in range(8)]]
    for found in (first, run(), *others):
        for y, weight in zip(found, weights, strict=True):
            expected = F.linear(x.float(), weight.dequantize().float(), bias.float())
            rounding = 1e-4 if dtype == torch.float32 else 1e-2
            assert float((y.float() - expected).norm()) <= rounding * float(expected.norm())


def test_only_the_input_gets_gradients() -> None:
    weight, x = weight_of(), torch.randn(3, 512, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_embedding_returns_dequantized_rows(dtype: torch.dtype) -> None:
    weight, ids = weight_of(dtype=dtype), torch.tensor([[3, 0], [49, 3]])
    found = F.embedding(ids, weight)
    assert found.dtype == dtype and torch.equal(found, weight.dequantize()[ids])
    assert torch.equal(F.embedding(ids.int(), weight), found)


def test_other_operations_use_the_dequantized_weight() -> None:
    weight, other = weight_of(), torch.randn(50, 512)
    whole = weight.dequantize()
    assert weight.shape == (50, 512) and weight.dtype == torch.float32 and weight.is_cpu
    assert torch.equal(weight + other, whole + other) and torch.equal(weight[3], whole[3])
    assert torch.equal(weight.t() @ torch.ones(50), whole.t() @ torch.ones(50))
    assert float(weight.double().square().sum()) == pytest.approx(float(whole.double().square().sum()))


def test_casts_and_copies_stay_in_blocks() -> None:
    weight = weight_of()
    layer = torch.nn.Linear(512, 50, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    cast = copy.deepcopy(layer).to(torch.bfloat16).weight
    assert isinstance(cast, BlockWeight) and cast.dtype == torch.bfloat16
    assert torch.equal(cast.dequantize(), weight.dequantize().bfloat16())
    assert cast.gguf_blocks.values.data_ptr() != weight.gguf_blocks.values.data_ptr()  # the copy's
    copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, torch.nn.Parameter) and not copied.weight.requires_grad
    layer.weight = copied.weight
    assert copied.to("meta").weight.is_meta
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert isinstance(again, BlockWeight) and torch.equal(again.dequantize(), weight.dequantize())
    assert "format=12" in repr(weight)


def test_writes_to_it_are_refused() -> None:
    layer = torch.nn.Linear(512, 50, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight_of(), requires_grad=False)
    before = layer.weight.dequantize()
    other = weight_of(14)
    layer.weight.data = other
    assert vars(layer.weight)["gguf_blocks"] is other.gguf_blocks
    layer.weight.data = weight_of()
    for write in (
        lambda: setattr(layer.weight, "data", torch.zeros(50, 512)),
        lambda: layer.weight.copy_(torch.zeros(50, 512)),
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.add_(1),
        lambda: layer.load_state_dict({"weight": torch.zeros(50, 512)}),
    ):
        with pytest.raises(RuntimeError, match="Load the file dequantized"):
            write()
    assert torch.equal(layer.weight.dequantize(), before)


def test_it_may_be_any_operand_of_a_matmul() -> None:
    weight, other = weight_of(), torch.randn(30, 512)
    whole = weight.dequantize()
    assert torch.equal(F.linear(weight, other), F.linear(whole, other))
    assert torch.equal(F.linear(weight, weight), F.linear(whole, whole))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(other, weight).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([-1]), weight)
    with pytest.raises(TypeError, match=r"expected torch.int64 on the CPU"):
        F.embedding(torch.tensor([1.5]), weight)


def test_unknown_formats_and_partial_blocks_are_refused() -> None:
    values = torch.zeros(4, 144, dtype=torch.uint8)
    for blocks in (
        BlockedWeight(values, 12, 300),
        BlockedWeight(values, 7, 256),
        BlockedWeight(values.to("meta"), 12, 256),
    ):
        with pytest.raises(ValueError, match="whole blocks, and the CPU"):
            BlockWeight(blocks, torch.float32)


@pytest.mark.parametrize(
    "values", [torch.zeros(4, 143, dtype=torch.uint8), torch.zeros(4, 144), torch.zeros(144, dtype=torch.uint8)]
)
def test_other_bytes_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected contiguous torch.uint8 \[N, 144\]"):
        BlockWeight(BlockedWeight(values, 12, 256), torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_without_a_compiler_gguf_dequantizes(format: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    weight, x = weight_of(format), torch.randn(3, 512)
    whole = weight.dequantize()
    monkeypatch.setattr(gguf_blocks, "LIBRARY", replace(gguf_blocks.LIBRARY, bind=lambda _: None))
    monkeypatch.setattr(codegen, "dispatch_linear", lambda *_: None)
    assert torch.allclose(weight.dequantize(), whole, rtol=2e-6)
    assert torch.allclose(F.embedding(torch.tensor([3, 49]), weight), whole[[3, 49]], rtol=2e-6)
    assert torch.allclose(F.linear(x, weight), F.linear(x, whole), atol=1e-3)
