"""The C++ prefill kernel against the reference, for every dtype, size, stride and mask."""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler, sampled
from torch import Tensor

from fhopt.codegen.background import Builder
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.cpu import prefill
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.hardware.this_cpu import vector_units
from fhopt.ops import algebra
from fhopt.ops.latent_attention import latent_attention_reference
from fhopt.ops.prefill_attention import rebuilt_attention_reference

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
rebuilt: Any = prefill.rebuilt_attention_cpu
reference: Any = rebuilt_attention_reference
TIERS = algebra.BitGroups([8, 4, 3], [8, 16, 16], [0.06, 0.4, 0.7])


UNITS = {"this CPU": "native", "AVX-512 BF16": "cooperlake", "AVX2": "x86-64-v3", "SSE": "x86-64"}


@pytest.fixture(autouse=True, params=sampled(UNITS.values(), 4), ids=list(UNITS))
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernel, for this CPU or a lesser one, even if 4-float vectors would not pay."""
    if request.param != "native" and platform.machine() != "x86_64":
        pytest.skip("an instruction set of x86-64")
    if request.param == UNITS["AVX-512 BF16"] and "AVX-512 BF16" not in vector_units():
        pytest.skip("an instruction set that this CPU does not have")
    monkeypatch.setenv("FHOPT_ISA", request.param)
    monkeypatch.setattr(prefill, "builder", Builder())
    monkeypatch.setattr(prefill, "MIN_LANES", 1)
    cpu_library._load.cache_clear()


def expected(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attend in float64."""
    if causal:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    options |= algebra.uncoded_options()
    return latent_attention_reference(query.double(), key.double(), None, value.double(), None, mask, **options)


def assert_near(found: tuple[Tensor, Tensor] | None, wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Require outputs within the rounding of the dtype, LSEs within that of float32, and -inf at the same places."""
    assert found is not None
    (output, lse), tolerance = found, TOLERANCES[dtype]
    assert output.dtype == dtype and output.shape == wanted[0].shape and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)


def masks(kind: str, b: int, h: int, s: int, t: int) -> Tensor | None:
    """Make a mask of that kind."""
    if kind == "bool":
        return torch.rand(b, 1, s, t) < 0.6
    if kind == "additive":
        return torch.randn(1, h, s, t).masked_fill(torch.rand(1, h, s, t) < 0.2, -math.inf)
    if kind == "row":
        return torch.rand(b, 1, 1, t) < 0.5
    if kind == "queries":
        return torch.rand(s, 1) < 0.7
    if kind == "window":  # whole tiles are masked
        return (torch.arange(t) >= t - 40).expand(s, t)
    return torch.zeros(s, t, dtype=torch.bool) if kind == "nothing" else None


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(
        st.integers(1, 2), st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(1, 130), st.integers(1, 600)
    ),
    heads=st.tuples(st.sampled_from([5, 33, 64, 80, 128]), st.sampled_from([7, 24, 64, 96, 160])),
    kind=st.sampled_from(["none", "causal", "bool", "additive", "row", "queries", "window", "nothing"]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_it_equals_attention(
    sizes: tuple[int, tuple[int, int], int, int], heads: tuple[int, int], kind: str, softcap: float, dtype: torch.dtype
) -> None:
    (b, (h, g), s, t), (d, e) = sizes, heads
    query, key = torch.randn(b, h, s, d).to(dtype), torch.randn(b, g, t, d).to(dtype)
    value, mask = torch.randn(b, g, t, e).to(dtype), masks(kind, b, h, s, t)
    options: Any = {"scale": d**-0.5, "softcap": softcap}
    found = prefill.open_attention_cpu(query, key, value, mask, causal=kind == "causal", **options)
    assert_near(found, expected(query, key, value, mask, kind == "causal", **options), dtype)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 130), st.integers(1, 900)), width=st.integers(-5, 400), dtype=st.sampled_from(DTYPES)
)
def test_each_query_has_a_span_of_keys(shape: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    queries, tokens = shape
    query, key = torch.randn(2, 4, queries, 32).to(dtype), torch.randn(2, 2, tokens, 32).to(dtype)
    first = torch.randint(-10, tokens + 10, (queries,)).sort().values
    spans = torch.stack([first, first + width], -1)
    places = torch.arange(tokens)
    mask = (places >= first[:, None]) & (places < first[:, None] + width)
    found = prefill.open_attention_cpu(query, key, key, None, spans=spans, scale=0.2)
    wanted = expected(query, key, key, mask, False, scale=0.2)
    assert found is not None and found[0].dtype == torch.float32
    assert_near((found[0].to(dtype), found[1]), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands_are_supported(dtype: torch.dtype) -> None:
    projected = torch.randn(2, 70, 4 + 2 + 2, 64).to(dtype).transpose(1, 2)
    query, key, value = projected.split([4, 2, 2], 1)
    mask = torch.rand(70, 2, 70)[:, 0] < 0.5
    found = prefill.open_attention_cpu(query, key, value, mask, scale=0.1)
    assert_near(found, expected(query, key, value, mask, False, scale=0.1), dtype)
    reversed_mask = mask.t()
    odd = prefill.open_attention_cpu(query, key, value[..., ::2], reversed_mask, scale=0.1)
    assert_near(odd, expected(query, key, value[..., ::2], reversed_mask, False, scale=0.1), dtype)


def test_output_is_laid_out_as_tokens_then_heads() -> None:
    query, key = torch.randn(2, 4, 20, 32), torch.randn(2, 2, 30, 32)
    found = prefill.open_attention_cpu(query, key, key, None, scale=0.1)
    assert found is not None and found[0].transpose(1, 2).is_contiguous()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    query, key = 300 * torch.randn(1, 2, 40, 64), torch.randn(1, 1, 500, 64)
    options: Any = {"scale": 1.0}
    found, wanted = (
        prefill.open_attention_cpu(query, key, key, None, **options),
        expected(query, key, key, None, False, **options),
    )
    assert found is not None and found[0].isfinite().all()
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-6, atol=0.0)  # logits have errors of 1e-3
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0.0, atol=1e-2)


def test_results_do_not_depend_on_threads_nor_on_how_many_heads_are_packed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key = torch.randn(2, 8, 200, 64), torch.randn(2, 8, 300, 64)
    alone = prefill.open_attention_cpu(query, key, key, None, causal=True, scale=0.1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = prefill.open_attention_cpu(query, key, key, None, causal=True, scale=0.1)
    text = prefill.LIBRARY.text()
    assert "MAX_BYTES = 1 << 24" in text
    cpu_library._load.cache_clear()
    monkeypatch.setattr(CppLibrary, "text", lambda _: text.replace("MAX_BYTES = 1 << 24", "MAX_BYTES = 1"))
    monkeypatch.setattr(prefill, "builder", Builder())
    one_by_one = prefill.open_attention_cpu(query, key, key, None, causal=True, scale=0.1)
    assert alone is not None and several is not None and one_by_one is not None
    for found in (several, one_by_one):
        assert all(torch.equal(x, y) for x, y in zip(alone, found, strict=True))


@pytest.mark.parametrize("case", ["float64", "types", "empty", "no keys", "heads", "meta"])
def test_other_tensors_are_refused(case: str) -> None:
    query, key, value = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    if case == "float64":
        query, key, value = query.double(), key.double(), value.double()
    elif case == "types":
        query = query.bfloat16()
    elif case == "empty":
        query = query[:, :, :0]
    elif case == "no keys":
        key, value = key[:, :, :0], value[:, :, :0]
    elif case == "heads":
        query = query[:, :3]
    else:
        query, key, value = query.to("meta"), key.to("meta"), value.to("meta")
    assert prefill.open_attention_cpu(query, key, value, None, scale=0.1) is None


def test_vectors_that_are_too_short_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MIN_LANES", 17)
    query = torch.randn(1, 2, 20, 16)
    assert prefill.open_attention_cpu(query, query, query, None, scale=0.1) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("length", [None, 0, 17, 700])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_are_reconstructed(
    dtype: torch.dtype, coded: bool, length: int | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "NUMBERS", 1)  # MIN_TOKENS at once
    b, h, g, j, s, t, d = 2, 6, 3, 1, 40, 600, 24
    sides: list[Any] = []
    for _ in range(2):
        latent = torch.randn(b, j, t, sum(TIERS.widths))
        sides += torch.ops.fhopt.pack(latent, *TIERS) if coded else (latent.to(dtype), None)
        sides.append((torch.randn(g, d, sum(TIERS.widths)) / 6).to(dtype))
    query, mask = torch.randn(b, h, s, d).to(dtype), torch.rand(s, t) < 0.7 if masked else None
    lengths = None if length is None else torch.tensor(length)
    groups = algebra.group_options(TIERS, TIERS) if coded else algebra.uncoded_options()
    options: Any = {**groups, "scale": 0.3}
    found = rebuilt(query, *sides, mask, lengths, **options)
    exact = [x.double() if i in (2, 5) or (not coded and i in (0, 3)) else x for i, x in enumerate(sides)]
    wanted = reference(query.double(), *exact, mask, lengths, **options)
    assert found is not None and found[0].dtype == dtype
    tolerance = 3 * TOLERANCES[dtype]
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].double(), wanted[1].double(), rtol=tolerance, atol=5 * tolerance)


def test_keys_and_values_may_have_different_codes() -> None:
    keys, values = torch.randn(2, 1, 2, 300, 32)
    query, groups = torch.randn(1, 4, 33, 32), algebra.BitGroups([8], [32], [0.02])
    rows: Any = [*torch.ops.fhopt.pack(keys, *groups), None, *torch.ops.fhopt.pack(values, *groups), None]
    options: Any = {**algebra.group_options(groups, groups), "scale": 0.3}
    found = rebuilt(query, *rows, None, None, **options)
    wanted = reference(query.double(), *rows, None, None, **options)
    assert_near(found, wanted, torch.float32)
