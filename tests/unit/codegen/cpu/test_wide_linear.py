"""GEMMs with many rows (cpu/wide_linear.py): accuracy, and use only where torch lacks native GEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from torch import Tensor, fx

import fhopt
from fhopt.codegen.cpu import graph_kernels, skinny_linear, wide_linear
from fhopt.codegen.cpu.graph_kernels import call_kernels

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest product: a float32 sum of at most 900 terms, then one rounding to the dtype.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def served() -> None:
    """Make the linear op run the kernel for many rows, on any CPU."""
    assert graph_kernels.serve_linear() and graph_kernels.serve_wide()


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that the CPU has no native 16-bit GEMM."""
    monkeypatch.setattr(wide_linear, "multiplies_by_loops", lambda dtype: True)
    yield


def check(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """Compare a matmul by the op with float64."""
    found = torch.ops.fhopt.linear_kernel(x, weight, bias, scale)
    exact = weight.double() if scale is None else weight.double() * scale.double()
    expected = F.linear(x.double(), exact, None if bias is None else bias.double())
    assert found.dtype == x.dtype and found.shape == expected.shape and found.is_contiguous()
    if not expected.numel():
        return
    size = F.linear(x.double().abs(), exact.abs(), None if bias is None else bias.double().abs()).max()
    assert float((found.double() - expected).abs().max()) <= TOLERANCES[x.dtype] * float(size)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES), st.booleans(), st.integers(17, 60), st.integers(0, 900), st.integers(0, 300),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_matmuls_agree_with_float64(
    dtype: torch.dtype, bytes: bool, rows: int, width: int, columns: int, has_bias: bool, is_strided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, 1, 2 * width)[..., ::2] if is_strided else torch.randn(rows, 1, width)
    weight, scale = torch.randn(columns, width + 3)[:, :width] if is_strided else torch.randn(columns, width), None
    bias = torch.randn(columns).to(dtype) if has_bias else None
    if bytes:
        weight, scale = (30 * weight).round().clamp(-128, 127).to(torch.int8), torch.rand(columns, 1) / 100
    check(x.to(dtype), weight if bytes else weight.to(dtype), bias, scale)


@pytest.mark.parametrize("rows", [17, 767, 768, 769, 1600])
def test_rows_are_split_into_equal_parts(rows: int) -> None:
    x, weight = torch.randn(rows, 400).bfloat16(), torch.randn(150, 400).bfloat16()
    check(x, weight, None, None)


@pytest.mark.parametrize("kind", ["plain", "bytes and bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_neither_threads_nor_other_rows(dtype: torch.dtype, kind: str) -> None:
    x, bias = torch.randn(900, 500).to(dtype), torch.randn(203).to(dtype) if "bias" in kind else None
    weight, scale = torch.randn(203, 500).to(dtype), None
    if "bytes" in kind:
        weight, scale = torch.randint(-128, 128, (203, 500), dtype=torch.int8), torch.rand(203, 1) / 100
    torch.set_num_threads(1)
    whole = torch.ops.fhopt.linear_kernel(x, weight, bias, scale)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (17, 100, 900):
            part = slice(900 - rows, 900)
            assert torch.equal(torch.ops.fhopt.linear_kernel(x[part], weight, bias, scale), whole[part])
        assert torch.equal(torch.ops.fhopt.linear_kernel(x, weight[7:], None, scale if scale is None else scale[7:]),
                           torch.ops.fhopt.linear_kernel(x, weight, None, scale)[:, 7:])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_propagate_only_in_their_row_and_column(dtype: torch.dtype) -> None:
    x, weight = torch.ones(20, 64, dtype=dtype), torch.ones(41, 64, dtype=dtype)
    x[0, 3], x[1, 5], weight[40, 0] = float("nan"), float("inf"), float("inf")
    found = torch.ops.fhopt.linear_kernel(x, weight, None)
    assert bool(found[0].isnan().all()) and bool((found[1] == float("inf")).all())
    assert bool((found[2:, 40] == float("inf")).all()) and bool((found[2:, :40] == 64).all())
    large = torch.full((20, 64), 3e4 if dtype == torch.float16 else 3e38, dtype=dtype)
    assert bool((torch.ops.fhopt.linear_kernel(large, weight, None) == float("inf")).all())


def test_it_serves_many_16_bit_rows_where_torch_lacks_native_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_linear, "multiplies_by_loops", lambda dtype: dtype == torch.bfloat16)
    assert wide_linear.takes_many_rows(skinny_linear.MAX_ROWS + 1, torch.bfloat16) and wide_linear.is_wanted()
    assert not wide_linear.takes_many_rows(skinny_linear.MAX_ROWS, torch.bfloat16)
    assert not wide_linear.takes_many_rows(1000, torch.float16) and not wide_linear.takes_many_rows(1000, torch.float32)
    for loops in ((), (torch.float16,)):  # AVX-512 without float16: float32 matmuls have equally wide vectors
        monkeypatch.setattr(wide_linear, "multiplies_by_loops", lambda dtype, loops=loops: dtype in loops)
        assert not wide_linear.is_wanted() and not wide_linear.takes_many_rows(1000, torch.float16)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_eager_calls_go_to_the_kernel_where_torch_lacks_native_gemm(dtype: torch.dtype) -> None:
    fhopt.codegen.prepare_linear()
    x, weight, bias = torch.randn(3, 20, 64).to(dtype), torch.randn(30, 64).to(dtype), torch.randn(30).to(dtype)
    found = fhopt.codegen.dispatch_linear(x, weight, bias)
    assert (found is None) == (dtype == torch.float32)
    if found is not None:
        assert torch.equal(found, torch.ops.fhopt.linear_kernel(x, weight, bias))
    assert (
        fhopt.codegen.dispatch_linear(x[0, :5], weight, bias) is None
    )  # few rows, and a weight that fits into the cache
    assert fhopt.codegen.dispatch_linear(x, weight.t().contiguous().t(), bias) is None


@pytest.mark.usefixtures("loops")
@torch.no_grad()
def test_without_a_compiled_kernel_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_kernels, "serve_wide", lambda: False)
    fhopt.codegen.prepare_linear()
    x, weight = torch.randn(30, 64).bfloat16(), torch.randn(30, 64).bfloat16()
    assert fhopt.codegen.dispatch_linear(x, weight, None) is None
    assert targets(lambda y: F.linear(y, weight), x)[0] == [F.linear]


def targets(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> tuple[list[Any], Tensor]:
    """Return what the graph of a function calls once kernels are in it, and its output."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(call_kernels(module))
        return graphs[-1].forward

    torch._dynamo.reset()
    output: Tensor = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    called = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
    return [t for t in called if t in (F.linear, torch.ops.fhopt.linear_kernel.default)], output


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_graphs_call_it_for_many_rows_and_for_a_dynamic_number(dynamic: bool) -> None:
    for dtype, expected in ((torch.bfloat16, torch.ops.fhopt.linear_kernel.default), (torch.float32, F.linear)):
        x, layer = torch.randn(2, 20, 256).to(dtype), torch.nn.Linear(256, 300, bias=False, dtype=dtype)
        found, output = targets(layer, x, dynamic=dynamic)
        assert found == [expected]
        exact = F.linear(x.double(), layer.weight.double())
        torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("shape", [(), (1,), (1, 30)])
@torch.no_grad()
def test_a_bias_that_is_broadcast_is_left_to_torch(shape: tuple[int, ...]) -> None:
    fhopt.codegen.prepare_linear()
    x, weight, bias = torch.randn(20, 64).bfloat16(), torch.randn(30, 64).bfloat16(), torch.randn(shape).bfloat16()
    found, output = targets(lambda y: F.linear(y, weight, bias), x)
    assert found == [F.linear] and output.shape == (20, 30)
    assert fhopt.codegen.dispatch_linear(x, weight, bias) is None


@torch.no_grad()
def test_elsewhere_graphs_leave_many_rows_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_linear, "multiplies_by_loops", lambda dtype: False)
    layer = torch.nn.Linear(256, 300).bfloat16()
    for dynamic in (False, True):
        assert targets(layer, torch.randn(2, 20, 256).bfloat16(), dynamic=dynamic)[0] == [F.linear]
