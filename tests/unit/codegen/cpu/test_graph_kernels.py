"""Kernels of compiled graphs, called from C++ (codegen/cpu/graph_kernels.py), against the ops they replace."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from small_models import FittedModel, cached, token_ids
from torch import Tensor, fx

import fhopt
from fhopt.attention.attend import attend_latents_reference
from fhopt.codegen import dispatch
from fhopt.codegen.cpu import graph_kernels
from fhopt.hf.apply import latent_cache
from fhopt.ops import algebra, encode_rows, latent_attention, packing
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site import Rope

B, H, J, T, S = 2, 6, 3, 37, 2
PAGE = 32  # tokens
STEPS = {16: 1.0, 8: 0.06, 6: 0.14, 5: 0.24, 4: 0.4, 3: 0.7, 2: 1.05, 1: 1.6}
TIERS = [(), ((8, 16),), ((16, 8), (4, 8), (3, 16)), ((5, 8), (2, 16), (1, 8))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = [
    *((TIERS[0], TIERS[0], False, dtype) for dtype in DTYPES),
    (TIERS[1], TIERS[0], False, torch.bfloat16),
    *((TIERS[2], TIERS[3], softcap, dtype) for softcap in (False, True) for dtype in DTYPES),
]  # keys, values, softcap; a kernel with codes on both sides supports every dtype

pytestmark = needs_compiler
dispatch.register_kernels()


def side(tiers: Any, dtype: torch.dtype) -> tuple[algebra.BitGroups, tuple[Tensor, Tensor | None], int]:
    """(tiers, rows, width) of random latents."""
    arguments = algebra.BitGroups([b for b, _ in tiers], [w for _, w in tiers], [STEPS[b] for b, _ in tiers])
    width = sum(arguments[1]) or 24
    latent = torch.randn(B, J, T, width, dtype=dtype)
    return arguments, torch.ops.fhopt.pack(latent, *arguments) if tiers else (latent, None), width


def lists(pages: tuple[int, ...] | None) -> Tensor | None:
    """The same pages for every latent head."""
    return None if pages is None else torch.tensor(pages, dtype=torch.int32).expand(B, J, -1).contiguous()


def masks(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return torch.rand(T) > 0.4 if kind == "bool" else torch.randn(B, 1, S, T)


@settings(deadline=None)
@given(
    st.sampled_from(SPECS), st.sampled_from(["none", "bool", "numbers"]), st.sampled_from([None, 0, 1, 20, T, 99]),
    st.sampled_from([None, (0,), (1,), (0, 1, -1)]), st.integers(0, 99),
)  # fmt: skip
def test_a_kernel_agrees_with_its_op(
    of: Any, kind: str, length: int | None, listed: tuple[int, ...] | None, seed: int
) -> None:
    key_tiers, value_tiers, softcap, dtype = of
    torch.manual_seed(seed)
    (kt, key, width), (vt, value, value_width) = side(key_tiers, dtype), side(value_tiers, dtype)
    query = torch.randn(B, S, H, width, dtype=dtype).transpose(1, 2)
    mask, lengths = masks(kind), None if length is None else torch.tensor(length)
    cap, paging = 3.0 if softcap else 0.0, lists(listed)
    options: Any = algebra.group_options(kt, vt)
    expected = torch.ops.fhopt.latent_attention(
        query, *key, *value, mask, **options, scale=0.2, softcap=cap, lengths=lengths, pages=paging, page_tokens=PAGE
    )
    name = str(dtype).removeprefix("torch.") if not (key_tiers and value_tiers) else "float32"
    table: Any = [tuple(zip(*x, strict=True)) for x in (kt, vt)]
    spec = KernelSpec(table[0], table[1], width, value_width, name, softcap)
    assert graph_kernels.register_kernel(spec)
    numbers = (0.2, cap, value_width)
    found = torch.ops.fhopt.latent_kernel(spec.name, query, *key, *value, mask, lengths, paging, PAGE, *numbers)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@settings(deadline=None)
@given(st.sampled_from(TIERS[1:]), st.integers(0, 99), st.sampled_from([(), (3,), (2, 3), (2, 1, 5)]))
def test_packing_agrees_with_its_op(tiers: Any, seed: int, shape: tuple[int, ...]) -> None:
    assert graph_kernels.LIBRARY.load() is not None
    torch.manual_seed(seed)
    arguments = [b for b, _ in tiers], [w for _, w in tiers], [STEPS[b] for b, _ in tiers]
    wide = torch.randn(*shape, 2 * sum(arguments[1]))
    for latent in (wide[..., : sum(arguments[1])], wide[..., ::2], wide[..., : sum(arguments[1])].bfloat16()):
        for a, b in zip(
            torch.ops.fhopt.pack_kernel(latent, *arguments), torch.ops.fhopt.pack(latent, *arguments), strict=True
        ):
            assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("length", [0, 5, T, T + 3, -1])
@pytest.mark.parametrize("several", [False, True])
def test_lengths_mask_later_tokens(length: int, several: bool) -> None:
    torch.manual_seed(0)
    (tiers, rows, _), query = side(TIERS[2], torch.float32), torch.randn(B, H, S, 32)
    lengths = torch.tensor([length, 7] if several else length)
    mask = torch.rand(B, 1, S, T) > 0.3
    options: Any = {**algebra.group_options(tiers, tiers), "scale": 0.3}
    found = torch.ops.fhopt.latent_attention(query, *rows, *rows, mask, **options, lengths=lengths)
    seen = mask & (torch.arange(T) < lengths.reshape(-1, 1, 1, 1))
    expected = latent_attention.latent_attention_reference(query.double(), *rows, *rows, seen, **options)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from([0, 1, 20, T, None]), st.booleans(), st.booleans(), st.sampled_from(["", "half", "interleaved"]),
    st.integers(0, 99),
)  # fmt: skip
def test_attention_on_a_cache_equals_attention_on_its_parts(
    dtype: torch.dtype,
    window: bool,
    masked: bool,
    length: int | None,
    shared: bool,
    centred: bool,
    segments: str,
    seed: int,
) -> None:
    """Each part may be masked entirely. Latents may be differences from means, their keys relative to segments.

    length: number of visible latents; None: no latents. segments: channel order of the RoPE of segment-relative keys;
    "": no segments.
    """
    torch.manual_seed(seed)
    d, e, heads = 24, 24, 1 if shared else J  # the test above covers unquantized kernels
    tokens = 0 if length is None else T
    key_tiers, value_tiers = (
        algebra.BitGroups([b for b, _ in t], [w for _, w in t], [STEPS[b] for b, _ in t]) for t in TIERS[2:]
    )
    tiers = (key_tiers, value_tiers)
    rows = [torch.ops.fhopt.pack(torch.randn(B, heads, tokens, sum(t[1]), dtype=dtype), *t) for t in tiers]
    bases = [torch.randn(J, n, sum(t[1])).to(dtype) / 4 for n, t in ((d, key_tiers), (e, value_tiers))]
    rounded = [packing.round_rows(torch.randn(B, J, 9, n)) for n in (d, e)]
    query, key, value = (
        torch.randn(B, n, count, width, dtype=dtype) for n, count, width in ((H, 1, d), (J, 3, d), (J, 3, e))
    )
    masks = [torch.rand(n) > 0.5 if masked else None for n in (3, 9, tokens)]
    turning: tuple[Any, ...] = (None, None, 0)
    if segments:  # 8 tokens per segment, for several segments
        rotation = SegmentRotation.on(Rope(segments, 8, (0.9, 0.3, 0.1, 0.03), offset=4), 8, torch.device("cpu"))
        turning = rotation.pairs, rotation.phases(T // 8 + 1), 8
    operands: Any = (
        query.transpose(1, 2).contiguous().transpose(1, 2), key, value, *rows[0], bases[0], *rows[1], bases[1],
        *(x for pair in rounded for x in (pair if window else (None, None))),
        *masks, torch.tensor(length or 0), *(torch.randn(B, J, 1, n) if centred else None for n in (d, e)), *turning,
    )  # fmt: skip
    options: Any = algebra.group_options(key_tiers, value_tiers)
    expected = attend_latents_reference(*operands, **options, scale=0.3)
    table: Any = [tuple(zip(*t, strict=True)) for t in (key_tiers, value_tiers)]
    specs = (
        KernelSpec(table[0], table[1], 32, 32, "float32", False),
        KernelSpec(((8, d, 1.0),), ((8, e, 1.0),), d, e, "float32", False),
        KernelSpec((), (), d, e, str(dtype).removeprefix("torch."), False),
    )
    assert all(graph_kernels.register_kernel(spec) for spec in specs)
    found = torch.ops.fhopt.attend_kernel(*(spec.name for spec in specs), *operands, 0.3, 0.0)
    assert found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:  # parts are rounded in between, and low-bit codes are multiplied in int8
        assert (found - expected).float().norm() <= 0.015 * expected.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rows_are_rounded_into_a_window_bit_identically(dtype: torch.dtype, centred: bool, tokens: int) -> None:
    torch.manual_seed(0)
    assert graph_kernels.LIBRARY.load() is not None
    x = 3 * torch.randn(B, tokens, J, 24, dtype=dtype).transpose(1, 2)
    x[:, :1, :1] = 0.0
    mean = torch.randn(B, J, 1, 24) if centred else None
    found, expected = (
        (torch.full((B, J, 9, 24), 7, dtype=torch.uint8), torch.ones(B, J, 9, dtype=torch.float16)) for _ in range(2)
    )
    torch.ops.fhopt.round_rows_into(x, mean, *found, 3)
    assert packing.round_rows_into_reference(x, mean, *expected, 3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_row_with_nan_has_a_nan_scale_and_a_window_that_is_too_short_is_refused() -> None:
    assert graph_kernels.LIBRARY.load() is not None
    codes, scale = torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4, dtype=torch.float16)
    x = torch.ones(1, 1, 2, 8)
    x[0, 0, 0, 3] = torch.nan
    torch.ops.fhopt.round_rows_into(x, None, codes, scale, 0)
    assert scale[0, 0, 0].isnan() and scale[0, 0, 1].isfinite()
    with pytest.raises(RuntimeError, match="a window that does not fit"):
        torch.ops.fhopt.round_rows_into(x, None, codes, scale, 3)


D, TOKENS, AT = 24, 20, 44  # head size, window tokens to pack, tokens packed before


def turning(kind: str) -> tuple[Tensor, Tensor, int] | None:
    """Rotations of keys by kind: neighboring channel pairs or halves, with or without left padding."""
    if kind == "none":
        return None
    pairing, width = ("interleaved", 16) if kind == "neighbours" else ("half", D)
    rope = Rope(pairing, width, tuple(0.5**i for i in range(width // 2)))
    rotation = SegmentRotation.on(rope, 32, torch.device("cpu"))
    return (rotation.after_padding(torch.tensor([0, 7])) if kind == "padded" else rotation).of_tokens(AT + TOKENS)


ROW_TIERS = {
    "uniform": algebra.BitGroups([8, 4], [8, 24], [0.06, 0.4]),
    "trellis": algebra.BitGroups([8, 3], [8, 24], [0.06, -0.025]),
    "halves": algebra.BitGroups([16, 4], [8, 24], [1.0, 0.4]),
}


def places(tiers: algebra.BitGroups, heads: int) -> tuple[Tensor, Tensor]:
    codes = torch.full((B, heads, AT + TOKENS + 3, sum(b * w for b, w in zip(*tiers[:2], strict=True)) // 8), 7)
    return codes.to(torch.uint8), torch.ones(B, heads, AT + TOKENS + 3, dtype=torch.float16)


@pytest.mark.parametrize("tokens", [4, TOKENS])
@pytest.mark.parametrize("name", ROW_TIERS)
def test_rows_of_every_kind_are_packed_on_several_threads(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    width = 4 * D  # enough work for threads
    rounded = packing.round_rows(torch.randn(B, J, tokens, width))
    tiers, basis = ROW_TIERS[name], torch.randn(J, 32, width) / 8
    found, expected = places(tiers, J), places(tiers, J)
    for _ in range(3):  # memory is reused from call to call
        assert dispatch.pack_window(rounded, None, torch.float32, basis, found, AT, tiers, None) is not None
    encode_rows.pack_window_reference(rounded, None, torch.float32, basis, expected, AT, tiers, None)
    one, other = (torch.ops.fhopt.unpack(*[p[:, :, AT : AT + tokens] for p in x], *tiers) for x in (found, expected))
    assert float((one - other).abs().mean()) < 1e-3 * float(other.abs().mean())


@pytest.mark.parametrize("heads", [1, J])
@pytest.mark.parametrize("kind", ["none", "halves", "neighbours", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
def test_window_tokens_are_encoded_and_packed_after_others(
    centred: bool, dtype: torch.dtype, kind: str, heads: int
) -> None:
    torch.manual_seed(0)
    rounded = packing.round_rows(3 * torch.randn(B, J, TOKENS + 5, D, dtype=dtype))
    rounded = rounded[0][:, :, :TOKENS], rounded[1][:, :, :TOKENS]
    mean = 2 * torch.randn(B, J, 1, D) if centred else None
    basis = torch.randn(heads, 32, J // heads * D) / 8
    tiers = algebra.BitGroups([8, 4], [8, 24], [0.06, 0.4])
    found, expected = places(tiers, heads), places(tiers, heads)
    energy = dispatch.pack_window(rounded, mean, dtype, basis, found, AT, tiers, turning(kind))
    reference = encode_rows.pack_window_reference(rounded, mean, dtype, basis, expected, AT, tiers, turning(kind))
    assert energy == pytest.approx(reference, rel=1e-4)
    for a, b in zip(found, expected, strict=True):  # other rows are unchanged
        assert torch.equal(a[:, :, :AT], b[:, :, :AT]) and torch.equal(a[:, :, AT + TOKENS :], b[:, :, AT + TOKENS :])
    one, other = (torch.ops.fhopt.unpack(*[p[:, :, AT : AT + TOKENS] for p in x], *tiers) for x in (found, expected))
    assert float((one - other).abs().mean()) < 1e-3 * float(other.abs().mean())  # another sum order: few codes


def test_a_window_that_does_not_fit_is_not_packed() -> None:
    tiers = algebra.BitGroups([4], [32], [0.4])
    rounded, basis = packing.round_rows(torch.randn(B, J, TOKENS, D)), torch.randn(J, 32, D)
    refused = [
        ("a basis that does not fit", rounded, basis[:, :, :8].contiguous(), places(tiers, J), AT),
        ("places that do not fit", rounded, basis, places(tiers, J), AT + 4),
        ("places that do not fit", rounded, basis, places(tiers, 1), AT),
        ("a window that does not fit", (rounded[0], rounded[1][:, :, 1:]), basis, places(tiers, J), AT),
    ]
    for message, window, its_basis, where, at in refused:
        with pytest.raises(RuntimeError, match=message):
            dispatch.pack_window(window, None, torch.float32, its_basis, where, at, tiers, None)
    assert dispatch.pack_window(rounded, None, torch.float64, basis, places(tiers, J), AT, tiers, None) is None
    assert dispatch.pack_window(rounded, None, torch.float32, basis.half(), places(tiers, J), AT, tiers, None) is None


class Latent(torch.nn.Module):
    """A module that encodes a latent and attends to it, like a compiled cache layer."""

    def forward(self, query: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        tiers = algebra.BitGroups([b for b, _ in TIERS[2]], [w for _, w in TIERS[2]], [STEPS[b] for b, _ in TIERS[2]])
        rows = torch.ops.fhopt.pack(latent, *tiers)
        options: Any = algebra.group_options(tiers, tiers)
        return torch.ops.fhopt.latent_attention(query, *rows, *rows, mask, **options, scale=0.2)[0]


def called(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if "fhopt" in str(n.target)]


def graphs_of(mask: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the graph before and after."""
    found: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((module, graph_kernels.call_kernels(module)))
        return found[0][1]

    torch._dynamo.reset()
    model, inputs = Latent(), (torch.randn(B, H, 1, 32, dtype=dtype), torch.randn(B, J, T, 32, dtype=dtype), mask)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(*inputs), model(*inputs))
    return found[0]


def test_a_graph_calls_its_kernels_from_cpp() -> None:
    before, after = graphs_of(torch.rand(T) > 0.4)
    assert called(after) == ["fhopt.pack_kernel.default", "fhopt.latent_kernel.default"]
    assert called(before) != called(after), "the graph that Dynamo keeps is not touched"


def test_a_graph_leaves_unsupported_calls_unchanged() -> None:
    before, after = graphs_of(torch.randn(T, dtype=torch.float64))  # a mask that would need a conversion
    assert called(after) == ["fhopt.pack_kernel.default", "fhopt.latent_attention"]
    before, after = graphs_of(None, torch.float64)
    assert after is before


def test_without_a_library_a_graph_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_kernels, "LIBRARY", replace(graph_kernels.LIBRARY, bind=lambda _: None))
    graph_kernels._served.clear()
    before, after = graphs_of(None)
    assert after is before
    graph_kernels._served.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(query=torch.randn(B, H, 1, 16)), "queries of another width"),
        (dict(key=torch.zeros(B, J, T + 1, 24)), "keys or values that do not fit"),
        (dict(value=torch.zeros(B, 4, T, 24)), "keys or values that do not fit"),
        (dict(mask=torch.zeros(T + 1)), "a mask that does not fit"),
        (dict(kernel="nothing"), "a name that nothing was built for"),
        (dict(pages=torch.zeros(B, 1, 1)), "lists of pages that do not fit"),
        (dict(pages=torch.zeros(B, J + 1, 1, dtype=torch.int32)), "lists of pages that do not fit"),
        (dict(pages=torch.zeros(B, 1, 1, dtype=torch.int32), page_tokens=20), "lists of pages that do not fit"),
    ],
)
def test_operands_that_native_code_would_misread_are_refused(change: dict[str, Any], what: str) -> None:
    spec = KernelSpec((), (), 24, 24, "float32", False)
    assert graph_kernels.register_kernel(spec)
    rows = torch.randn(B, J, T, 24)
    given: dict[str, Any] = dict(
        kernel=spec.name, query=torch.randn(B, H, 1, 24), key=rows, key_scale=None, value=rows, value_scale=None,
        mask=None, lengths=None, pages=None, page_tokens=PAGE, scale=0.1, softcap=0.0, value_width=24,
    )  # fmt: skip
    torch.ops.fhopt.latent_kernel(**given)
    with pytest.raises(RuntimeError):
        torch.ops.fhopt.latent_kernel(**{**given, **change})


# An 8-bit window rounds 0.1% of elements differently if sums differ in their last bits, and more if it is centered.
@pytest.mark.slow
@pytest.mark.parametrize(("window_bits", "mean_tokens", "tolerance"), [(8, 0, 1e-2), (16, 16, 1e-5)])
def test_a_compiled_cache_step_calls_its_kernels_from_cpp(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch, window_bits: int, mean_tokens: int, tolerance: float
) -> None:
    """Check every layer: attention, and the encoding of keys and values."""
    seen: list[str] = []

    def compile_fx(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        seen.extend(called(module))
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, ids = copy.deepcopy(llama.model), token_ids(2, 60)
    fhopt.apply(model, llama.plan(4, window_bits=window_bits, mean_tokens=mean_tokens))
    torch._dynamo.reset()
    step: Any = torch.compile(model.forward, backend="flashhead", fullgraph=True)
    with torch.no_grad():
        eager, compiled = (latent_cache(model, max_cache_len=80) for _ in range(2))
        model(ids[:, :50], **cached(eager))
        model(ids[:, :50], **cached(compiled))
        for i in range(50, 60):
            expected = model(ids[:, i : i + 1], **cached(eager)).logits
            found = step(input_ids=ids[:, i : i + 1], **cached(compiled), use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert sorted(seen) == 2 * ["fhopt.attend_kernel.default"] + 2 * 2 * ["fhopt.pack_kernel.default"]
