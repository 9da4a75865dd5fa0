"""Skinny GEMMs (cpu/skinny_linear.py): accuracy, and which matmuls of a graph they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from torch import Tensor, fx, nn

from fhopt.codegen.cpu import graph_kernels, skinny_linear
from fhopt.codegen.cpu.graph_kernels import call_kernels

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest product: a float32 sum of at most 600 terms, then one rounding to the dtype.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES), st.integers(1, skinny_linear.MAX_ROWS), st.integers(1, 600), st.integers(1, 70),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_matmuls_agree_with_float64(
    dtype: torch.dtype, rows: int, width: int, columns: int, has_bias: bool, is_strided: bool, seed: int
) -> None:
    assert graph_kernels.serve_linear()
    torch.manual_seed(seed)
    x = torch.randn(rows, 1, 2 * width)[..., ::2] if is_strided else torch.randn(rows, 1, width)
    weight = torch.randn(columns, width + 3)[:, :width] if is_strided else torch.randn(columns, width)
    x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype) if has_bias else None
    found = torch.ops.fhopt.linear_kernel(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()).max()
    assert float((found.double() - expected).abs().max()) <= TOLERANCES[dtype] * float(size)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, skinny_linear.MAX_ROWS),
    st.integers(1, 600),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 99),
)
def test_int8_weights_have_a_scale_per_row(
    dtype: torch.dtype, rows: int, width: int, columns: int, has_bias: bool, seed: int
) -> None:
    assert graph_kernels.serve_linear()
    torch.manual_seed(seed)
    x, bias = torch.randn(rows, width).to(dtype), torch.randn(columns).to(dtype) if has_bias else None
    values, scale = torch.randint(-128, 128, (columns, width), dtype=torch.int8), torch.rand(columns, 1) / 100
    found = torch.ops.fhopt.linear_kernel(x, values, bias, scale)
    weight = values.double() * scale.double()
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs()).max()
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) <= 2 * TOLERANCES[dtype] * float(size)


def test_scales_that_do_not_fit_are_refused() -> None:
    assert graph_kernels.serve_linear()
    x, values = torch.randn(2, 8), torch.ones(4, 8, dtype=torch.int8)
    for weight, scale in ((values, torch.ones(3)), (values, torch.ones(4).double()), (values.float(), torch.ones(4))):
        with pytest.raises(RuntimeError, match="the kernel linear was called with"):
            torch.ops.fhopt.linear_kernel(x, weight, None, scale)


@pytest.mark.parametrize("kind", ["plain", "bias", "bytes", "bytes and bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_neither_threads_nor_other_rows(dtype: torch.dtype, kind: str) -> None:
    assert graph_kernels.serve_linear()
    x, bias = torch.randn(12, 300).to(dtype), torch.randn(1003).to(dtype) if "bias" in kind else None
    weight, scale = torch.randn(1003, 300).to(dtype), None
    if "bytes" in kind:
        weight, scale = torch.randint(-128, 128, (1003, 300), dtype=torch.int8), torch.rand(1003, 1) / 100
    torch.set_num_threads(1)
    alone = torch.cat([torch.ops.fhopt.linear_kernel(row[None], weight, bias, scale) for row in x])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 8, 12):
            assert torch.equal(torch.ops.fhopt.linear_kernel(x[:rows], weight, bias, scale), alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_inputs_propagate(dtype: torch.dtype) -> None:
    assert graph_kernels.serve_linear()
    weight = torch.ones(40, 64, dtype=dtype)
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    found = torch.ops.fhopt.linear_kernel(x, weight, None)
    assert bool(found[0].isnan().all()) and bool((found[1] == float("inf")).all())
    large = torch.full((1, 64), 3e4 if dtype == torch.float16 else 3e38, dtype=dtype)
    assert bool((torch.ops.fhopt.linear_kernel(large, weight, None) == float("inf")).all())


def test_operands_that_do_not_fit_are_refused() -> None:
    assert graph_kernels.serve_linear()
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for operands in (
        (x[:, :7], weight, None),
        (x, weight.double(), None),
        (x, weight.t().contiguous().t(), None),
        (x, weight, torch.randn(5)),
    ):
        with pytest.raises(RuntimeError, match="linear was called with"):
            torch.ops.fhopt.linear_kernel(*operands)


class _Layer(nn.Module):
    """Two linear layers with 300 KB of weights each."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(256, 300, dtype=dtype)
        self.down = nn.Linear(300, 256, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


def products(model: Callable[..., Any], *inputs: Tensor, allowed: bool = True) -> tuple[int, Tensor]:
    """Return how many matmuls of the graph went to the kernel, and its output."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(call_kernels(module, allowed))
        return graphs[-1].forward

    torch._dynamo.reset()
    output: Tensor = torch.compile(model, backend=backend)(*inputs)
    targets = [n.target for graph in graphs for n in graph.graph.nodes]
    return targets.count(torch.ops.fhopt.linear_kernel.default), output


@torch.no_grad()
@pytest.mark.parametrize(("rows", "expected"), [(1, 2), (skinny_linear.MAX_ROWS, 2), (skinny_linear.MAX_ROWS + 1, 0)])
def test_skinny_gemms_go_to_the_kernel(rows: int, expected: int) -> None:
    model, x = _Layer(), torch.randn(rows, 1, 256)
    found, output = products(model, x)
    assert found == expected
    torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-6)  # sums in another order


@torch.no_grad()
def test_rows_are_counted_over_all_leading_dimensions() -> None:
    assert products(_Layer(), torch.randn(2, 8, 256))[0] == 2
    assert products(_Layer(), torch.randn(3, 8, 256))[0] == 0
    assert products(_Layer(), torch.randn(256))[0] == 2


@torch.no_grad()
def test_other_operations_are_not_replaced() -> None:
    x = torch.randn(2, 256)
    small, weight = nn.Linear(256, 8), torch.randn(256, 300)
    assert products(small, x)[0] == 0  # fits into the CPU cache
    assert products(lambda y: F.linear(y, weight.t()), x)[0] == 0  # rows of the weight are not contiguous
    assert products(_Layer(torch.float64), x.double())[0] == 0
    assert products(_Layer(), x, allowed=False)[0] == 0


@torch.no_grad()
def test_under_autocast_matmuls_are_unchanged() -> None:
    model, x = _Layer(), torch.randn(2, 256)

    def inside(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(y)

    assert products(inside, x)[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert products(model, x)[0] == 0


@torch.no_grad()
def test_the_option_leaves_matmuls_to_inductor() -> None:
    model, x = _Layer(), torch.randn(2, 256)
    expected = model(x)
    chosen: list[dict[str, Any]] = [{"ratio": 1}, {"ratio": 1, "skinny_products": False}]
    for options in chosen:
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(model, backend="flashhead", options=options)(x), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_training_leaves_matmuls_with_gradients_unchanged() -> None:
    model, x = _Layer(), torch.randn(2, 256)
    compiled = torch.compile(model, backend="flashhead", options={"ratio": 1})
    compiled(x).sum().backward()
    expected = _Layer()
    expected.load_state_dict(model.state_dict())
    expected(x).sum().backward()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
