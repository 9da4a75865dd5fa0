"""Matmuls faster than torch's: where they are used, their accuracy, and that torch's settings are restored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from needs import needs_compiler
from torch.overrides import _get_current_function_mode_stack

from fhopt import codegen
from fhopt.codegen.cpu import wide_linear
from fhopt.hardware import float_products
from fhopt.hardware.float_products import fast_products, is_onednn_faster

PRECISION: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
ZEN = {"vendor_id": "AuthenticAMD", "flags": "avx2 avx512f avx512_bf16"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Clear cached detection results before and after a test."""
    is_onednn_faster.cache_clear()
    yield
    is_onednn_faster.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, fields: dict[str, str] | None = None, error: float = 0.0) -> None:
    """Mock /proc/cpuinfo, the error of a oneDNN matmul, and native 16-bit GEMM."""
    monkeypatch.setattr(float_products, "multiplies_by_loops", lambda dtype: False)
    monkeypatch.setattr(float_products, "reported", lambda field: (ZEN | (fields or {}))[field])
    monkeypatch.setattr(float_products, "_error", lambda: error)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def test_matmuls_are_exact_here_and_torch_settings_are_restored() -> None:
    before = PRECISION.fp32_precision
    x, y = torch.randn(2, 200, 200)
    with fast_products():
        product = x @ y
    exact = x.double() @ y.double()
    assert (product - exact).norm() / exact.norm() < float_products.ROUNDING
    assert PRECISION.fp32_precision == before


def test_they_are_allowed_on_such_a_cpu_until_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    before = PRECISION.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products():
        assert PRECISION.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert PRECISION.fp32_precision == before


@pytest.mark.parametrize(
    "fields",
    [
        {"vendor_id": "GenuineIntel"},
        {"vendor_id": ""},
        {"flags": "avx2"},
        {"flags": "avx2 avx512f avx512_bf16 amx_bf16"},
    ],
    ids=["another vendor", "unknown", "no AVX-512", "AMX rounds operands"],
)
def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]) -> None:
    pretend(monkeypatch, fields)
    before = PRECISION.fp32_precision
    with fast_products():
        assert PRECISION.fp32_precision == before
    assert not is_onednn_faster()


def test_rounded_operands_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, error=2**-9)
    assert not is_onednn_faster()


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("shape", [(256,), (2, 150), (3, 256), (700,)])
def test_a_linear_layer_is_exact_and_needs_no_switch(
    shape: tuple[int, ...], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = torch.randn(*shape, 64), torch.randn(40, 64), torch.randn(40)
    monkeypatch.setattr(float_products, "is_onednn_faster", lambda: faster)
    before = PRECISION.fp32_precision
    for y, w, b in ((x, weight, bias), (x, weight, None), (x[..., :30], weight[:, :30], bias)):
        exact = torch.nn.functional.linear(y.double(), w.double(), None if b is None else b.double())
        torch.testing.assert_close(float_products.fastest_linear(y, w, b).double(), exact, rtol=1e-5, atol=1e-4)
    assert PRECISION.fp32_precision == before


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock a CPU without native 16-bit GEMM and without kernels, and convert weights in several parts."""
    monkeypatch.setattr(float_products, "multiplies_by_loops", lambda dtype: True)
    monkeypatch.setattr(codegen, "dispatch_linear", lambda *_: None)
    monkeypatch.setattr(float_products, "CONVERTED", 1000)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(17,), (2, 150)])
def test_16_bit_linear_layers_are_exact_to_their_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((*shape, 64), (40, 64), (40,)))
    strided = weight.t().contiguous().t()
    for y, w, b in ((x, weight, bias), (x, weight, None), (x[..., :30], weight[:, :30], bias), (x, strided, bias)):
        assert float_products._way(y, w, b) is float_products._in_float32
        exact = torch.nn.functional.linear(y.double(), w.double(), None if b is None else b.double())
        found = float_products.fastest_linear(y, w, b)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)  # rounded once


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_available_kernel_runs_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (float_products, wide_linear):
        monkeypatch.setattr(module, "multiplies_by_loops", lambda dtype: True)
    monkeypatch.setattr(float_products, "_parts", lambda *_: pytest.fail("a weight is converted"))
    layer, x = torch.nn.Linear(64, 40).to(dtype).requires_grad_(False), torch.randn(2, 30, 64).to(dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for needs_gradient in (False, True):
        with fast_products():
            found = layer(x.requires_grad_(needs_gradient))
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)  # rounded once


@pytest.mark.usefixtures("slow")
def test_inside_the_input_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = float_products._in_float32

    def counted(*args: Any) -> torch.Tensor:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(float_products, "_in_float32", counted)
    layer = torch.nn.Linear(64, 40).bfloat16().requires_grad_(False)
    x, grad = torch.randn(2, 30, 64).bfloat16().requires_grad_(), torch.randn(2, 30, 40).bfloat16()
    with fast_products():
        (found,) = torch.autograd.grad(layer(x), x, grad)
    assert made and found.dtype == torch.bfloat16
    exact = grad.double() @ layer.weight.double()
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)  # rounded once
    layer(x)
    assert len(made) == 1


@pytest.mark.usefixtures("slow")
def test_the_output_of_a_layer_may_be_written_to() -> None:
    layer = torch.nn.Linear(64, 40).bfloat16().requires_grad_(False)
    x = torch.randn(2, 30, 64).bfloat16().requires_grad_()
    with fast_products():
        y = layer(x)
        assert y.grad_fn is not None and "_InFloat32" in y.grad_fn.name()
        y.clamp_(-0.1, 0.1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    kept = (y.abs() < 0.1).double()
    torch.testing.assert_close(grad.double(), kept @ layer.weight.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusual_calls_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_products, "is_onednn_faster", lambda: True)
    x, weight = torch.randn(300, 64).to(dtype), torch.randn(40, 64).to(dtype)
    linear = torch.nn.functional.linear
    calls: list[Any] = [
        lambda: linear(x, weight[0]),
        lambda: linear(x, weight, torch.ones((), dtype=dtype)),
        lambda: linear(x, weight, torch.ones(1, dtype=dtype)),
        lambda: linear(x, weight, torch.ones(1, 40, dtype=dtype)),
    ]
    monkeypatch.setattr(float_products, "_allowed", nullcontext())
    for call in calls:
        expected = call()
        with fast_products():
            assert torch.equal(call(), expected)


@pytest.mark.usefixtures("slow")
def test_functions_transformed_by_torch_use_its_matmuls() -> None:
    x, weight = torch.randn(20, 8).bfloat16(), torch.randn(4, 8).bfloat16()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight).float().sum()

    expected = torch.func.grad(loss)(x)
    with fast_products():
        assert torch.equal(torch.func.grad(loss)(x), expected)


def test_calls_are_intercepted_only_without_native_gemm_for_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_products, "multiplies_by_loops", lambda dtype: dtype == torch.bfloat16)
    for dtype, count in ((torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 1)):
        with fast_products([torch.ones(1, dtype=dtype)]), fast_products():  # the inner one has no weights
            modes = [type(mode).__name__ for mode in _get_current_function_mode_stack()]
        assert modes == ["_Linears"]
        with fast_products([torch.ones(1, dtype=dtype)]):
            assert len(_get_current_function_mode_stack()) == count


@pytest.mark.usefixtures("slow")
def test_trained_weights_get_their_gradients() -> None:
    layer, x = torch.nn.Linear(64, 40).bfloat16(), torch.randn(30, 64).bfloat16()
    with fast_products():
        layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


@pytest.mark.parametrize("case", ["dtype", "empty", "few", "subclass", "autocast"])
def test_other_layers_are_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_products, "is_onednn_faster", lambda: pytest.fail("was asked"))
    x, weight = torch.randn(260, 8), torch.randn(4, 8)
    if case == "dtype":
        x, weight = x.double(), weight.double()
    elif case == "empty":
        x = x[:0]
    elif case == "few":
        x = x[:255]
    elif case == "subclass":
        x = torch.nn.Parameter(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(float_products.fastest_linear(x, weight, None), torch.nn.functional.linear(x, weight))


def test_the_last_thread_to_leave_switches_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    before, entered, may_leave = PRECISION.fp32_precision, threading.Event(), threading.Event()

    def other() -> None:
        with fast_products():
            entered.set()
            may_leave.wait(30)

    thread = threading.Thread(target=other)
    with fast_products():
        thread.start()
        assert entered.wait(30)
    assert PRECISION.fp32_precision == "bf16"
    may_leave.set()
    thread.join()
    assert PRECISION.fp32_precision == before
