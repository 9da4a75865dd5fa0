"""The C++ latent-attention kernel, and the one on torch operations, on unquantized keys and values."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    EIGHT,
    UNCODED,
    KernelCase,
    Make,
    assert_same,
    build_cpp,
    expected,
    inputs,
)
from needs import needs_compiler

from fhopt.codegen.build import build_torch
from fhopt.ops import algebra
from fhopt.plan.kernel_spec import KernelSpec

pytestmark = pytest.mark.usefixtures("nothing_built")

TARGETS = [pytest.param(build_cpp, id="cpp", marks=needs_compiler), pytest.param(build_torch, id="torch")]


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_latents_are_loaded_without_conversion(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    case = KernelCase(UNCODED, EIGHT, 6, 2, 1, 2, 50, dtype=dtype)
    x = inputs(case)
    output, lse = make(case.spec())(*x, None, **case.options())
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert_same((output, lse), expected(case, x, None), 4 * tolerance)  # the output is rounded to dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_masked_entirely_by_a_finite_value_attends_uniformly(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (3, 300, 300))
    mask = torch.zeros(1, 1, 3, 300, dtype=dtype)
    mask[:, :, 1] = torch.finfo(dtype).min
    options = algebra.uncoded_options()
    expected, _ = torch.ops.fhopt.latent_attention(
        query.double(), key.double(), None, value.double(), None, mask, scale=0.25, **options
    )
    kernel = build_cpp(KernelSpec((), (), 16, 16, str(dtype).removeprefix("torch."), False))
    found, _ = kernel(query, key, None, value, None, mask, scale=0.25)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # for a mean rounded to bfloat16
    torch.testing.assert_close(found, expected.to(dtype), rtol=bound, atol=bound)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("is_bfloat16", [True, False], ids=["queries in bfloat16", "others"])
def test_keys_in_bfloat16_are_multiplied_without_further_rounding(is_bfloat16: bool, rows: int) -> None:
    """AVX512-BF16 multiplies 32 at a time if queries are bfloat16 values; sums are always float32."""
    query = torch.randn(2, 2 * rows, 1, 64)
    query = query.to(torch.bfloat16).float() if is_bfloat16 else query
    keys, values = (torch.randn(2, 2, 200, 64).to(torch.bfloat16) for _ in range(2))
    kernel = build_cpp(KernelSpec((), (), 64, 64, "bfloat16", False))
    found, lse = kernel(query, keys, None, values, None, None, scale=0.3)
    logits = query.view(2, 2, rows, 64).double() @ keys.double().mT * 0.3
    wanted = (logits.softmax(-1) @ values.double()).view(2, 2 * rows, 1, 64)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1).view(2, 2 * rows, 1), rtol=1e-6, atol=1e-5)
