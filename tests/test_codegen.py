"""Generated kernels: right numbers, readable files, and a file cache that survives what users do to it."""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Fitted, token_ids
from torch import Tensor

from fhopt import ops
from fhopt.cache import LatentCache
from fhopt.codegen import build, install, latent_attention, render
from fhopt.codegen.build import build_cpp, build_torch
from fhopt.codegen.compiler import find_compiler, load
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.tiers import Tiers
from fhopt.errors import FhoptError
from fhopt.evaluate import switched
from fhopt.ops import LatentKernel, latent_attention_reference, pack_reference, planes, unpack_reference, use_kernel
from fhopt.spec import SUPPORTED_BITS, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
BUILD = importlib.import_module("fhopt.codegen.build")  # `fhopt.codegen.build` as an attribute is the function
COMPILER = importlib.import_module("fhopt.codegen.compiler")
DISPATCH = importlib.import_module("fhopt.codegen.dispatch")

MIXED: Tiers = ((8, 16, 0.02), (4, 40, 0.3), (2, 8, 0.9))
HALVES: Tiers = ((16, 8, 0.0), (4, 16, 0.3), (16, 16, 0.0), (8, 8, 0.02))
FOUR: Tiers = ((4, 64, 0.3),)
TWO: Tiers = ((2, 24, 0.9),)
PLANES: Tiers = ((6, 16, 0.08), (5, 24, 0.15), (3, 40, 0.5), (1, 8, 1.6))
ODD: Tiers = ((3, 8, 0.5), (16, 8, 0.0), (1, 24, 1.6), (5, 8, 0.15), (4, 24, 0.3))  # float16 from byte 3 on
EVERY: Tiers = tuple((bits, width, 2 / 2**bits) for bits in SUPPORTED_BITS for width in (8, 16, 24))
LONGEST: Tiers = tuple((bits, 128, math.pi / 2**bits) for bits in reversed(SUPPORTED_BITS))
UNCODED: Tiers = ()

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="there is no C++ compiler"
)
Make = Callable[[KernelSpec], LatentKernel]
TARGETS = [pytest.param(build_cpp, id="cpp", marks=needs_compiler), pytest.param(build_torch, id="torch")]


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]  # query, key and its scale, value and its scale


@dataclass(frozen=True)
class Case:
    """One kernel and the shapes it is tried on."""

    key_tiers: Tiers
    value_tiers: Tiers
    heads: int  # H
    key_heads: int  # J of the keys
    value_heads: int  # J of the values
    queries: int  # S
    tokens: int  # T
    softcap: float = 0.0
    width: int = 24  # R of uncoded sides
    dtype: torch.dtype = torch.float32

    @property
    def key_width(self) -> int:
        return sum(w for _, w, _ in self.key_tiers) or self.width

    @property
    def value_width(self) -> int:
        return sum(w for _, w, _ in self.value_tiers) or self.width

    def spec(self) -> KernelSpec:
        dtype = str(self.dtype).removeprefix("torch.")
        return KernelSpec(
            self.key_tiers, self.value_tiers, self.key_width, self.value_width, dtype, self.softcap != 0.0
        )

    def options(self) -> dict[str, list[int] | list[float] | float]:
        return {
            "key_bits": [b for b, _, _ in self.key_tiers],
            "key_widths": [w for _, w, _ in self.key_tiers],
            "key_steps": [s for _, _, s in self.key_tiers],
            "value_bits": [b for b, _, _ in self.value_tiers],
            "value_widths": [w for _, w, _ in self.value_tiers],
            "value_steps": [s for _, _, s in self.value_tiers],
            "scale": 0.25,
            "softcap": self.softcap,
        }


CASES = {
    "9 heads read one latent": Case(MIXED, MIXED, 9, 1, 1, 1, 203),
    "keys shared by 9 heads, values by 3": Case(FOUR, MIXED, 9, 1, 3, 5, 70),
    "float16 channels beside codes, softcap": Case(HALVES, TWO, 6, 2, 3, 1, 131, softcap=4.0),
    "a head for each latent head, values uncoded": Case(TWO, UNCODED, 4, 4, 4, 5, 77, width=20),
    "tiers of one and two bit planes": Case(PLANES, ODD, 9, 3, 1, 1, 203),
    "tiers of two bit planes, several queries, softcap": Case(ODD, PLANES, 6, 1, 2, 3, 67, softcap=4.0),
    "one token": Case(HALVES, HALVES, 3, 1, 1, 1, 1),
    "uncoded, several queries": Case(UNCODED, UNCODED, 9, 3, 3, 5, 100, width=16),
}


def side(tiers: Tiers, heads: int, tokens: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Random latents of one side: codes and scales, or floats."""
    z = torch.randn(batch, heads, tokens, width) * (0.5 + torch.rand(batch, heads, tokens, 1))
    if not tiers:
        return z, None
    return pack_reference(z, [b for b, _, _ in tiers], [w for _, w, _ in tiers], [s for _, _, s in tiers])


def inputs(case: Case) -> Inputs:
    query = torch.randn(2, case.heads, case.queries, case.key_width)
    key, key_scale = side(case.key_tiers, case.key_heads, case.tokens, case.key_width)
    value, value_scale = side(case.value_tiers, case.value_heads, case.tokens, case.value_width)
    key, value = (x if x.dtype == torch.uint8 else x.to(case.dtype) for x in (key, value))
    return query.to(case.dtype), key, key_scale, value, value_scale


def masks(case: Case) -> list[Tensor | None]:
    """None, bool with a row that sees nothing, additive of full shape, bool for all queries alike, additive [T]."""
    whole = torch.rand(2, 1, case.queries, case.tokens) > 0.4
    whole[0, 0, -1] = False
    whole[1, 0, -1, 0] = True
    bias = torch.randn(2, case.heads, case.queries, case.tokens)
    bias[1, :, 0] = -torch.inf
    padding = torch.arange(case.tokens).expand(2, 1, 1, case.tokens) >= torch.tensor([0, 60]).view(2, 1, 1, 1)
    return [None, whole, bias, padding, torch.randn(case.tokens)]


def expected(case: Case, x: Inputs, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference on unpacked latents, products in float64."""
    query, key, key_scale, value, value_scale = x
    unpacked = []
    for rows, scale, tiers in ((key, key_scale, case.key_tiers), (value, value_scale, case.value_tiers)):
        bits, widths, steps = [b for b, _, _ in tiers], [w for _, w, _ in tiers], [s for _, _, s in tiers]
        unpacked.append((rows if scale is None else unpack_reference(rows, scale, bits, widths, steps)).double())
    options = Case(UNCODED, UNCODED, 0, 0, 0, 0, 0, softcap=case.softcap).options()
    return latent_attention_reference(query.double(), unpacked[0], None, unpacked[1], None, mask, **options)  # type: ignore[arg-type]


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    """1e-5: sums of up to 203 products of size 3 in float32, as codes, whose middle is subtracted at the end."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def fresh(module_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of this module in one temporary folder; nothing built or said before the test counts."""
    torch.manual_seed(0)
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(module_cache))
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    build.cache_clear()
    yield
    build.cache_clear()


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_agrees_with_the_reference_under_every_mask(name: str, make: Make) -> None:
    case = CASES[name]
    x, kernel = inputs(case), make(case.spec())
    for mask in masks(case):
        assert_same(kernel(*x, mask, **case.options()), expected(case, x, mask))


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_latents_are_read_as_they_are(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(UNCODED, FOUR, 6, 2, 1, 2, 50, dtype=dtype)
    x = inputs(case)
    output, lse = make(case.spec())(*x, None, **case.options())
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert_same((output, lse), expected(case, x, None), 4 * tolerance)  # the output is rounded to dtype


@pytest.mark.parametrize("make", TARGETS)
def test_kernels_give_zero_and_minus_infinity_where_there_is_no_token(make: Make) -> None:
    case = Case(ODD, ODD, 4, 2, 2, 1, 5)
    query, *rest = inputs(case)
    empty = [None if x is None else x[:, :, :0] for x in rest]
    output, lse = make(case.spec())(query, *empty, None, **case.options())
    assert not output.any() and bool((lse == -math.inf).all())


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("tokens", [1, 15, 17])
def test_codes_of_every_width_are_read_right(make: Make, tokens: int) -> None:
    case = Case(ODD, EVERY, tokens, tokens, tokens, 1, tokens)
    query, key, key_scale, value, value_scale = inputs(case)
    assert value_scale is not None
    only_own = torch.eye(tokens, dtype=torch.bool).view(1, tokens, 1, tokens)  # head t sees token t and nothing else
    output, _ = make(case.spec())(query, key, key_scale, value, value_scale, only_own, **case.options())
    bits, widths, steps = zip(*EVERY, strict=True)
    unpacked = unpack_reference(value, value_scale, bits, widths, steps)
    wanted = unpacked.diagonal(dim1=1, dim2=2).mT.unsqueeze(2)  # [B, H, 1, R_V]
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)  # one product with the step, one with the scale


@pytest.mark.parametrize("make", TARGETS)
def test_float16_channels_of_a_single_row_may_start_at_an_odd_byte(make: Make) -> None:
    case = Case(ODD, ODD, 3, 1, 1, 1, 1)
    query, *rest = (None if x is None else x[:1] for x in inputs(case))
    assert query is not None
    x: Inputs = (query, *rest)  # type: ignore[assignment]
    assert_same(make(case.spec())(*x, None, **case.options()), expected(case, x, None))


@needs_compiler
@pytest.mark.parametrize("bits", SUPPORTED_BITS[::-1])
def test_bytes_and_floats_of_one_tier_agree_with_the_reference(bits: int) -> None:
    """Keys of one width, values of another; in every second tier the wide ones are the values."""
    step = 2 / 2**bits
    narrow, wide = ((bits, 8, step),), ((bits, 256, step),)
    if SUPPORTED_BITS.index(bits) % 2:
        case = Case(narrow, wide, 6, 3, 1, 1, 17)
    else:
        case = Case(wide, narrow, 9, 1, 9, 1, 130)
    assert_bytes_and_floats_agree(case)


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_bytes_and_floats_of_random_tiers_agree_with_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    halves: Tiers = ((16, 8 * draw.randint(1, 2), 0.0),) if seed % 3 == 0 else ()
    key_heads, value_heads = draw.choice([(1, 1), (3, 3), (9, 9), (1, 3), (3, 1)])
    case = Case(
        (*halves, *random_tiers(draw)),
        (*(halves if seed % 2 else ()), *random_tiers(draw)),
        draw.choice([9, 18, 45]) if seed != 5 else 108,
        key_heads,
        value_heads,
        draw.choice([1, 1, 5]),
        draw.choice([1, 2, 15, 16, 63, 129, 200, 1000]),
        softcap=4.0 if seed % 4 == 3 else 0.0,
    )
    assert_bytes_and_floats_agree(case)


def random_tiers(draw: random.Random) -> Tiers:
    kinds = sorted(draw.sample([b for b in SUPPORTED_BITS if b < 16], draw.randint(1, 7)), reverse=True)
    return tuple((bits, 8 * draw.randint(1, 4), 3 / 2**bits) for bits in kinds)


def assert_bytes_and_floats_agree(case: Case) -> None:
    """The two ways to multiply codes in C++ (the same one on a CPU without AVX-512 VNNI) and the reference."""
    x, spec = inputs(case), case.spec()
    floats: LatentKernel = LibraryKernel(
        load(spec.name, render(spec, "cpp"), ("-DFHOPT_FLOAT",)).latent_attention, spec
    )
    for mask in masks(case):
        wanted = expected(case, x, mask)
        assert_same(floats(*x, mask, **case.options()), wanted)
        assert_same(build_cpp(spec)(*x, mask, **case.options()), wanted)


@needs_compiler
def test_nothing_is_read_outside_of_the_rows() -> None:
    case = Case(ODD, PLANES, 9, 1, 1, 1, 19)
    query, key, key_scale, value, value_scale = (None if x is None else x[:1] for x in inputs(case))
    assert query is not None and key is not None and value is not None
    found = build_cpp(case.spec())(
        query, at_end_of_page(key), key_scale, at_end_of_page(value), value_scale, None, **case.options()
    )
    assert_same(found, expected(case, (query, key, key_scale, value, value_scale), None))


def at_end_of_page(x: Tensor) -> Tensor:
    """A copy of `x` that ends where memory ends: the next page may not be read."""
    size = (x.numel() + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=x.numel(), offset=size - x.numel()).view(x.shape)
    return copy.copy_(x)


@needs_compiler
def test_threads_over_ranges_of_tokens_give_the_same_numbers() -> None:
    case = Case(MIXED, MIXED, 9, 1, 1, 1, 3001)
    x, kernel, before = inputs(case), build_cpp(case.spec()), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(kernel(*x, None, **case.options()), expected(case, x, None))
    finally:
        torch.set_num_threads(before)


PAGED = {
    "codes": Case(MIXED, PLANES, 6, 1, 3, 1, 1000),
    "float16 channels beside codes": Case(HALVES, HALVES, 6, 3, 3, 1, 777, softcap=4.0),
    "uncoded, several queries": Case(UNCODED, UNCODED, 8, 2, 2, 5, 300, width=16),
    "uncoded, 16 bits": Case(UNCODED, UNCODED, 8, 4, 4, 1, 999, width=32, dtype=torch.bfloat16),
}


@needs_compiler
@pytest.mark.parametrize("page_tokens", [8, 16, 24, 48, 64, 256])
@pytest.mark.parametrize("name", PAGED)
def test_only_tokens_of_listed_pages_are_attended_to(name: str, page_tokens: int) -> None:
    case = PAGED[name]
    x, kernel = inputs(case), build_cpp(case.spec())
    pages = page_lists(math.gcd(case.key_heads, case.value_heads), case.tokens, page_tokens)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2**-6  # the output is rounded
    for length in (None, case.tokens // 2):
        lengths = None if length is None else torch.tensor(length)
        listed = page_mask(pages, page_tokens, case) & (torch.arange(case.tokens) < (length or case.tokens))
        for mask in masks(case):
            options = case.options() | dict(lengths=lengths, pages=pages, page_tokens=page_tokens)
            if mask is None or mask.dtype == torch.bool:
                wanted = listed if mask is None else listed & mask
            else:
                wanted = mask.masked_fill(~listed, -math.inf)
            assert_same(kernel(*x, mask, **options), expected(case, x, wanted), tolerance)


def page_lists(heads: int, tokens: int, page_tokens: int) -> Tensor:
    """Lists [2, heads, N] of a third of the pages, of different lengths; the last is empty, one has a short page."""
    count = -(-tokens // page_tokens)
    lists = torch.full((2, heads, count // 3 + 2), -1, dtype=torch.int32)
    for index, row in enumerate(lists.flatten(0, 1)):
        chosen = torch.randperm(count)[: max(1, count // 3 - index % 2)]
        row[: len(chosen)] = chosen.sort().values
    lists[0, 0, :2] = torch.tensor([0, count - 1])
    lists[0, 0, 2:] = -1
    lists[1, -1] = -1
    return lists


def page_mask(pages: Tensor, page_tokens: int, case: Case) -> Tensor:
    """[B, H, 1, T]: is the token in a listed page?"""
    page_of = torch.arange(case.tokens) // page_tokens
    listed = (pages.unsqueeze(-1) == page_of).any(2)  # [B, U, T]
    return listed.repeat_interleave(case.heads // pages.shape[1], 1).unsqueeze(2)


@needs_compiler
def test_what_is_no_number_stays_in_its_own_sequence() -> None:
    """Also behind a list that ends in the middle of 16 tokens, where nothing is read."""
    case = Case(((4, 32, 0.33),), ((4, 32, 0.33),), 2, 1, 1, 1, 40)
    query, key, key_scale, value, value_scale = inputs(case)
    assert value_scale is not None
    pages = torch.tensor([[[0, 1]], [[0, -1]]], dtype=torch.int32)
    kernel, options = build_cpp(case.spec()), case.options() | dict(pages=pages, page_tokens=8)
    before, expected_ = torch.get_num_threads(), kernel(query, key, key_scale, value, value_scale, None, **options)
    value_scale[0, 0, 9] = math.nan
    try:
        torch.set_num_threads(1)
        found = kernel(query, key, key_scale, value, value_scale, None, **options)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(found[0][0], expected_[0][0]) and torch.equal(found[0][1], expected_[0][1])


@needs_compiler
@pytest.mark.parametrize("name", PAGED)
def test_all_pages_are_the_same_bits_as_no_list(name: str) -> None:
    case = PAGED[name]
    x, kernel = inputs(case), build_cpp(case.spec())
    heads = math.gcd(case.key_heads, case.value_heads)
    for page_tokens in (64, 128):
        count = -(-case.tokens // page_tokens)
        pages = torch.arange(count, dtype=torch.int32).expand(2, heads, count).contiguous()
        found = kernel(*x, None, **case.options(), pages=pages, page_tokens=page_tokens)
        for one, other in zip(found, kernel(*x, None, **case.options()), strict=True):
            assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize(
    ("pages", "page_tokens", "message"),
    [
        (torch.zeros(2, 1, 1, dtype=torch.int64), 16, "torch.int64"),
        (torch.zeros(2, 2, 1, dtype=torch.int32), 16, r"\[2, a divisor of 1, N\]"),
        (torch.zeros(2, 1, 1, dtype=torch.int32), 20, "multiple of 8"),
        (torch.full((2, 1, 1), 13, dtype=torch.int32), 16, "page 13 of 16 tokens is listed, but there are 203 tokens"),
    ],
)
def test_page_lists_that_the_kernel_cannot_read_are_refused(pages: Tensor, page_tokens: int, message: str) -> None:
    case = CASES["9 heads read one latent"]
    with pytest.raises(ValueError, match=message):
        build_cpp(case.spec())(*inputs(case), None, **case.options(), pages=pages, page_tokens=page_tokens)


@pytest.mark.parametrize("make", TARGETS)
def test_views_into_larger_tensors_are_read_in_place(make: Make) -> None:
    case = CASES["9 heads read one latent"]
    query, key, key_scale, value, value_scale = inputs(case)
    assert key_scale is not None and value_scale is not None
    wide = torch.zeros(2, 3, 500, key.shape[-1], dtype=torch.uint8)
    wide[:, 1:2, 100 : 100 + case.tokens] = key
    scales = torch.zeros(case.tokens, 2, 1, dtype=torch.float16)
    scales.copy_(key_scale.permute(2, 0, 1))
    view, turned = wide[:, 1:2, 100 : 100 + case.tokens], query.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = make(case.spec())(turned, view, scales.permute(1, 2, 0), value, value_scale, None, **case.options())
    assert_same(found, expected(case, (query, key, key_scale, value, value_scale), None))


def test_torch_kernels_merge_tiles_of_tokens() -> None:
    case = Case(FOUR, FOUR, 2, 1, 1, 1, 4500)
    x = inputs(case)
    assert_same(build_torch(case.spec())(*x, None, **case.options()), expected(case, x, None))


# --------------------------------------------------------------------------------------------------- dispatch


def test_kernels_that_are_expected_are_built_with_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, each once; others bring nothing with them, and what was expected before is forgotten."""
    forgotten, *awaited, other = [KernelSpec((), (), width, width, "float32", False) for width in (8, 9, 10, 11)]
    built: list[str] = []
    together = threading.Barrier(2, timeout=30)

    def watched(spec: KernelSpec) -> LatentKernel:
        built.append(spec.name)
        if built.count(spec.name) == 1 and spec in awaited:
            together.wait()
        return build_torch(spec)

    def read(width: int) -> None:
        rows = torch.randn(1, 1, 3, width)
        options: Any = ops.latent_options(None, None)
        latent_attention(rows, rows, None, rows, None, None, scale=1.0, **options)

    monkeypatch.setattr(DISPATCH, "build", watched)
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    monkeypatch.setattr(DISPATCH, "cores", lambda: 2)
    DISPATCH.expect([forgotten])
    DISPATCH.expect(awaited)
    read(11)
    assert built == [other.name]
    read(9)
    assert set(built) == {other.name, *(spec.name for spec in awaited)}
    read(10)
    assert sorted(built[1:]) == sorted([spec.name for spec in awaited] * 2)  # built, and asked for again
    assert DISPATCH._expected == set()


def test_a_plan_expects_the_kernels_that_its_cache_will_call(llama: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[KernelSpec] = set()
    expected: list[set[KernelSpec]] = []

    def watched(spec: KernelSpec) -> LatentKernel:
        asked.add(spec)
        return build_torch(spec)

    monkeypatch.setattr(DISPATCH, "_kernels", {})
    monkeypatch.setattr(DISPATCH, "build", watched)
    monkeypatch.setattr("fhopt.codegen.expect", lambda specs: expected.append(set(specs)))
    plan = llama.plan(4, window_bits=16)
    with torch.no_grad(), switched(llama.model, plan):
        cache = LatentCache(plan, llama.model.config)
        llama.model(token_ids(1, 60), past_key_values=cache)
        llama.model(token_ids(1, 1), past_key_values=cache)
    assert len(expected) == 1 and expected[0] and expected[0] <= asked
    assert {spec for spec in asked if spec.key_tiers} == expected[0]


def test_the_op_runs_through_the_kernel_of_its_arguments_once_installed() -> None:
    case = CASES["keys shared by 9 heads, values by 3"]
    x, before = inputs(case), use_kernel("cpu", None)
    try:
        install()
        found = torch.ops.fhopt.latent_attention(*x, None, **case.options())
    finally:
        use_kernel("cpu", before)
    assert_same(found, expected(case, x, None))
    assert len(DISPATCH._kernels) == 1


def test_a_call_that_needs_gradients_runs_the_reference() -> None:
    case = CASES["uncoded, several queries"]
    x = inputs(case)
    x[0].requires_grad_()
    output, _ = latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
    output.sum().backward()
    assert x[0].grad is not None


def test_float64_latents_run_the_reference() -> None:
    case = Case(UNCODED, UNCODED, 2, 1, 1, 1, 9, dtype=torch.float64)
    x = inputs(case)
    output, _ = latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
    assert output.dtype == torch.float64
    assert torch.equal(output, expected(case, x, None)[0])


@needs_compiler
@pytest.mark.parametrize("change", ["tokens", "width", "scale", "type", "softcap"])
def test_tensors_that_do_not_fit_the_kernel_are_refused(change: str) -> None:
    case = CASES["9 heads read one latent"]
    query, key, key_scale, value, value_scale = inputs(case)
    options = case.options()
    if change == "tokens":
        value = value[:, :, 1:]
    elif change == "width":
        query = query[..., 1:]
    elif change == "scale":
        key_scale = None
    elif change == "type":
        key = key.float()
    else:
        options["softcap"] = 3.0
    with pytest.raises(ValueError, match=r"latent_k16b8x40b4x8b2|value has shape|key_scale is none|key has type"):
        build_cpp(case.spec())(query, key, key_scale, value, value_scale, None, **options)


# --------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_the_same_spec_gives_the_same_bytes(target: str) -> None:
    texts = {name: render(case.spec(), target) for name, case in CASES.items()}
    assert texts == {name: render(case.spec(), target) for name, case in CASES.items()}
    assert len(set(texts.values())) == len(texts)
    assert str(ROOT) not in "".join(texts.values())


@pytest.mark.parametrize("case", [*CASES.values(), Case(LONGEST, LONGEST, 1, 1, 1, 1, 1)], ids=[*CASES, "longest"])
def test_a_generated_torch_file_passes_its_linter(case: Case, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    path, config = tmp_path / "kernel.py", ROOT / "pyproject.toml"
    path.write_text(render(case.spec(), "torch"))
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "--config", config, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@needs_compiler
@pytest.mark.parametrize("tiers", [HALVES, LONGEST])
def test_a_generated_cpp_file_compiles_without_a_warning(tiers: Tiers, tmp_path: Path) -> None:
    path = tmp_path / "kernel.cpp"
    path.write_text(render(Case(tiers, TWO, 1, 1, 1, 1, 1, softcap=4.0).spec(), "cpp"))
    assert max(map(len, path.read_text().splitlines())) <= 120
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")  # no OpenMP; no AVX
    command = [find_compiler(), "-std=c++17", *warnings, "-fsyntax-only", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(FhoptError, match=r"no renderer for 'fortran'.*cpp, torch"):
        render(CASES["one token"].spec(), "fortran")


@pytest.mark.parametrize("target", ["cpp", "torch"])
@pytest.mark.parametrize("bits", [3, 5, 6])
def test_a_file_reads_only_the_planes_that_its_tiers_have(target: str, bits: int) -> None:
    tiers: Tiers = ((bits, 8, 0.3),)
    text = render(KernelSpec(tiers, UNCODED, 8, 8, "float32", False), target)
    assert "3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2" in text  # the format stands in the head
    if target == "cpp":
        assert f"copy_codes<{bits}, 8>(row + 0, z + 0);" in text
    else:
        functions = {n for n in range(1, 9) if f"def codes{n}(" in text}
        assert functions == {bits, *planes(bits)}


@pytest.mark.parametrize("target", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("tiers", "width", "dtype", "reason"),
    [
        (((7, 8, 0.3),), 8, "float32", "cannot become a kernel"),
        (((4, 12, 0.3),), 12, "float32", "multiples of 8"),
        (((4, 16, 0.3),), 24, "float32", "do not add up"),
        ((), 24, "float64", "no kernel reads uncoded float64"),
    ],
)
def test_a_spec_that_no_kernel_serves_is_refused(
    target: str, tiers: Tiers, width: int, dtype: str, reason: str
) -> None:
    with pytest.raises(FhoptError, match=reason):
        render(KernelSpec(tiers, tiers, width, width, dtype, False), target)


# --------------------------------------------------------------------------------------------------- files


def test_without_a_compiler_the_torch_kernel_runs_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("9 heads read one latent", "one token"):
        case = CASES[name]
        x = inputs(case)
        assert_same(build(case.spec())(*x, None, **case.options()), expected(case, x, None))
    messages = [str(w.message) for w in recwarn if "No C++ compiler was found" in str(w.message)]
    assert len(messages) == 1
    assert "Install g++" in messages[0]


def test_a_compiler_that_fails_gives_way_to_the_torch_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "g++"
    script.write_text("#!/bin/sh\necho 'no vectors here' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    case = CASES["one token"]
    x = inputs(case)
    with pytest.warns(RuntimeWarning, match="refused a generated file: no vectors here"):
        kernel = build(case.spec())
    assert_same(kernel(*x, None, **case.options()), expected(case, x, None))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_cache_folder_that_cannot_be_written_gives_way_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"  # permissions would not stop a test that runs as root
    blocked.write_text("")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(blocked))
    case = CASES["one token"]
    x = inputs(case)
    with pytest.warns(RuntimeWarning, match=r"cannot be used.*Set FHOPT_CACHE_DIR"):
        kernel = build_torch(case.spec())
    assert_same(kernel(*x, None, **case.options()), expected(case, x, None))


def test_what_is_run_from_the_cache_folder_cannot_be_changed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o002)  # by which folders are open to the group
    try:
        monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "new"))
        BUILD.load_module("made", "x = 1")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_nothing_is_run_from_a_folder_that_others_may_write_to(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fhopt.system._warned", set())
    left = BUILD.load_module("left", "x = 1").__file__
    Path(left).write_text("x = 'of somebody else'")
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        assert BUILD.load_module("left", "x = 1").x == 1


def test_the_working_directory_stays_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(CASES["one token"].spec())
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_two_processes_that_need_a_kernel_at_once_compile_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = f"from fhopt.codegen import build; from fhopt.spec import KernelSpec; build({CASES['one token'].spec()!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    compiled = [line for line in log.read_text().splitlines() if "-o" in line.split()]
    assert len(compiled) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".cpp", ".lock", ".so"]


@needs_compiler
def test_a_kernel_that_is_in_the_cache_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CASES["one token"].spec()
    build_cpp(spec)
    monkeypatch.setattr(COMPILER, "_compile", lambda *_: pytest.fail("compiled again"))
    build_cpp(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_a_finite_mask_hides_whole_attends_evenly(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (3, 300, 300))
    mask = torch.zeros(1, 1, 3, 300, dtype=dtype)
    mask[:, :, 1] = torch.finfo(dtype).min
    options = ops.latent_options(None, None)
    expected, _ = torch.ops.fhopt.latent_attention(
        query.double(), key.double(), None, value.double(), None, mask, scale=0.25, **options
    )
    kernel = build_cpp(KernelSpec((), (), 16, 16, str(dtype).removeprefix("torch."), False))
    found, _ = kernel(query, key, None, value, None, mask, scale=0.25)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # of a mean, rounded to bfloat16
    torch.testing.assert_close(found, expected.to(dtype), rtol=bound, atol=bound)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("is_bfloat16", [True, False], ids=["queries in bfloat16", "others"])
def test_keys_in_bfloat16_are_multiplied_without_further_rounding(is_bfloat16: bool, rows: int) -> None:
    """With AVX512-BF16 32 at a time, where queries are such numbers; sums are of float32 in any case."""
    query = torch.randn(2, 2 * rows, 1, 64)
    query = query.to(torch.bfloat16).float() if is_bfloat16 else query
    keys, values = (torch.randn(2, 2, 200, 64).to(torch.bfloat16) for _ in range(2))
    kernel = build_cpp(KernelSpec((), (), 64, 64, "bfloat16", False))
    found, lse = kernel(query, keys, None, values, None, None, scale=0.3)
    logits = query.view(2, 2, rows, 64).double() @ keys.double().mT * 0.3
    wanted = (logits.softmax(-1) @ values.double()).view(2, 2 * rows, 1, 64)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1).view(2, 2 * rows, 1), rtol=1e-6, atol=1e-5)
