"""The C++ latent-attention kernel, and the one on torch operations, against the reference."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import random
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    CASES,
    EIGHT,
    EVERY,
    FOUR,
    MIXED,
    ODD,
    PLANES,
    RING,
    RINGS,
    TRELLIS_CASES,
    UNCODED,
    Inputs,
    KernelCase,
    Make,
    assert_same,
    build_cpp,
    expected,
    inputs,
    masks,
)
from needs import covering, needs_compiler, sampled
from torch import Tensor

from fhopt.codegen.build import build_torch, without_compiler
from fhopt.codegen.compiler import compile_and_load
from fhopt.codegen.cpu.attention import LIBRARY
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.tiers import Tiers, check_spec
from fhopt.errors import FhoptError
from fhopt.hardware.this_cpu import torch_threads
from fhopt.ops.latent_attention import LatentKernel
from fhopt.ops.packing import pack_reference, unpack_reference
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SUPPORTED_BITS, TRELLIS_BITS

pytestmark = pytest.mark.usefixtures("nothing_built")

TARGETS = [pytest.param(build_cpp, id="cpp", marks=needs_compiler), pytest.param(build_torch, id="torch")]


@pytest.fixture(params=sampled(["native", "x86-64-v3"], 2), ids=["this CPU", "AVX2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compile kernels for the CPU's own instruction set or AVX2, so that codes are unpacked as bytes or as words."""
    if request.param != "native" and platform.machine() != "x86_64":
        pytest.skip("an instruction set of x86-64")
    monkeypatch.setenv("FHOPT_ISA", request.param)
    return str(request.param)


# --------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_agrees_with_the_reference_under_every_mask(name: str, make: Make) -> None:
    case = CASES[name]
    x, kernel = inputs(case), make(case.spec())
    for mask in masks(case):
        assert_same(kernel(*x, mask, **case.options()), expected(case, x, mask))


@needs_compiler
@pytest.mark.parametrize("name", TRELLIS_CASES)
@pytest.mark.parametrize("target", sampled(["native", "x86-64-v3", "x86-64-v2", "x86-64"], 4))
def test_trellis_codes_are_looked_up_as_by_the_reference(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look codes up as bytes, as words, by eights, and one by one."""
    if target != "native" and platform.machine() != "x86_64":
        pytest.skip("an instruction set of x86-64")
    monkeypatch.setenv("FHOPT_ISA", target)
    case = TRELLIS_CASES[name]
    x, kernel = inputs(case), build_cpp(case.spec())
    for mask in masks(case):
        assert_same(kernel(*x, mask, **case.options()), expected(case, x, mask))


def test_without_a_compiler_the_reference_decodes_trellis_codes() -> None:
    case = TRELLIS_CASES["trellis codes beside others"]
    x = inputs(case)
    assert_same(without_compiler(case.spec())(*x, None, **case.options()), expected(case, x, None))
    with pytest.raises(FhoptError, match="torch operations does not support trellis codes"):
        build_torch(case.spec())


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_trellis_codes_of_more_bits_are_refused(bits: int) -> None:
    with pytest.raises(FhoptError, match=r"have trellis codes; expected bits of \(1, 2, 3, 4\)"):
        check_spec(KernelSpec(((bits, 64, -0.1),), FOUR, 64, 64, "float32", False))


@needs_compiler
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("tiers", [PLANES, MIXED, FOUR, RINGS], ids=["planes", "mixed", "four", "rings"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("isa")
def test_int8_rounding_error_is_small_compared_with_the_quantization_error(
    tiers: Tiers, dtype: torch.dtype, queries: int
) -> None:
    case = KernelCase(tiers, tiers, 9, 1, 1, queries, 400, dtype=dtype)
    query = torch.randn(2, 9, queries, case.key_width).to(dtype)
    latents = [torch.randn(2, 1, case.tokens, case.key_width) for _ in range(2)]
    bits, widths, steps = (list(x) for x in zip(*tiers, strict=True))
    (key, key_scale), (value, value_scale) = (pack_reference(z, bits, widths, steps) for z in latents)
    x = (query, key, key_scale, value, value_scale)
    found, _ = build_cpp(case.spec())(*x, None, **case.options())
    wanted, _ = expected(case, x, None)
    uncoded = replace(case, key_tiers=UNCODED, value_tiers=UNCODED)
    exact, _ = expected(uncoded, (query, latents[0], None, latents[1], None), None)
    rounded_away, quantized_away = (found.double() - wanted).norm(), (wanted - exact).norm()
    assert rounded_away < 0.15 * quantized_away  # 1.01 times the total noise


WIDE: Tiers = ((16, 8, 0.0), (8, 16, 0.01), (6, 72, 0.04), (5, 24, 0.09), (3, 56, 0.3), (2, 16, 0.6))


@needs_compiler
@covering(
    2,
    tokens=[1, 37, 600],
    heads={"alike": (3, 3), "more of keys": (3, 1), "more of values": (1, 3)},
    counts=[(2, 1), (3, 1), (1, 2), (1, 3)],
    tiers={"mixed": (MIXED, FOUR), "wide": (WIDE, WIDE[1:]), "rings": (RINGS, RINGS), "eight": (EIGHT, PLANES)},
)
@pytest.mark.usefixtures("isa")
def test_few_16_bit_queries_give_the_same_results_as_among_many(
    tiers: tuple[Tiers, Tiers], counts: tuple[int, int], heads: tuple[int, int], tokens: int
) -> None:
    (keys, values), (rows, queries) = tiers, counts
    few = KernelCase(keys, values, 3 * rows, *heads, queries, tokens, dtype=torch.bfloat16)
    many = replace(few, heads=2 * few.heads)
    query, *cache = inputs(few)
    twice = _twice(query, rows)
    for mask in masks(few):
        wide = mask if mask is None or mask.dim() == 1 or mask.shape[1] == 1 else _twice(mask, rows)
        among_many = build_cpp(many.spec())(twice, *cache, wide, **many.options())
        alone = build_cpp(few.spec())(query, *cache, mask, **few.options())
        first = [x.unflatten(1, (3, 2 * rows))[:, :, :rows].flatten(1, 2) for x in among_many]
        torch.testing.assert_close(alone[0], first[0], rtol=2**-7, atol=1e-5)  # one unit in the last place of bfloat16
        torch.testing.assert_close(alone[1], first[1], rtol=1e-6, atol=2e-5)


def _twice(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(1, (3, rows)).repeat(1, 1, 2, 1, 1).flatten(1, 2)


@needs_compiler
@pytest.mark.usefixtures("isa")
def test_many_small_weights_are_not_rounded_away_together() -> None:
    tokens, tiers, dtype = 128, FOUR, torch.float16
    case = KernelCase(tiers, tiers, 4, 1, 1, 1, tokens, dtype=dtype)
    bits, widths, steps = (list(x) for x in zip(*tiers, strict=True))
    key = torch.zeros(2, 1, tokens, 64)
    key[:, :, 5, :8] = 1.0  # one token with 400 times the weight of the others
    value = 0.2 * torch.randn(2, 1, tokens, 64) + torch.randn(2, 1, 1, 64)  # the others share a mean
    (key, key_scale), (value, value_scale) = (pack_reference(z, bits, widths, steps) for z in (key, value))
    query = torch.zeros(2, 4, 1, 64)
    unpacked = unpack_reference(key, key_scale, bits, widths, steps)
    query[..., :8] = 4 * math.log(400) / (unpacked[:, :, 5:6, :8] - unpacked[:, :, 6:7, :8]).sum(-1, keepdim=True)
    x = (query.to(dtype), key, key_scale, value, value_scale)
    found, _ = build_cpp(case.spec())(*x, None, **case.options())
    wanted, _ = expected(case, x, None)
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("make", TARGETS)
def test_without_tokens_kernels_give_zero_and_minus_infinity(make: Make) -> None:
    case = KernelCase(ODD, ODD, 4, 2, 2, 1, 5)
    query, *rest = inputs(case)
    empty = [None if x is None else x[:, :, :0] for x in rest]
    output, lse = make(case.spec())(query, *empty, None, **case.options())
    assert not output.any() and bool((lse == -math.inf).all())


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("tokens", [1, 15, 17])
def test_codes_of_every_width_are_decoded_correctly(make: Make, tokens: int) -> None:
    case = KernelCase(ODD, EVERY, tokens, tokens, tokens, 1, tokens)
    query, key, key_scale, value, value_scale = inputs(case)
    assert value_scale is not None
    only_own = torch.eye(tokens, dtype=torch.bool).view(1, tokens, 1, tokens)  # head t attends only to token t
    output, _ = make(case.spec())(query, key, key_scale, value, value_scale, only_own, **case.options())
    bits, widths, steps = zip(*EVERY, strict=True)
    unpacked = unpack_reference(value, value_scale, bits, widths, steps)
    wanted = unpacked.diagonal(dim1=1, dim2=2).mT.unsqueeze(2)  # [B, H, 1, R_V]
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)  # one multiplication by the step, one by the scale


@pytest.mark.parametrize("make", TARGETS)
def test_float16_channels_of_a_single_row_may_start_at_an_odd_byte(make: Make) -> None:
    case = KernelCase(ODD, ODD, 3, 1, 1, 1, 1)
    query, *rest = (None if x is None else x[:1] for x in inputs(case))
    assert query is not None
    x: Inputs = (query, *rest)  # type: ignore[assignment]
    assert_same(make(case.spec())(*x, None, **case.options()), expected(case, x, None))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bits", sampled(SUPPORTED_BITS[::-1], 2))
@pytest.mark.usefixtures("isa")
def test_bytes_and_floats_of_one_tier_agree_with_the_reference(bits: int) -> None:
    """Keys of one width, values of another; in every second bit group, the values are wider."""
    step = 2 / 2**bits
    narrow, wide = ((bits, 8, step),), ((bits, 256, step),)
    if SUPPORTED_BITS.index(bits) % 2:
        case = KernelCase(narrow, wide, 6, 3, 1, 1, 17)
    else:
        case = KernelCase(wide, narrow, 9, 1, 9, 1, 130)
    assert_bytes_and_floats_agree(case)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("seed", sampled(range(6), 2))
@pytest.mark.usefixtures("isa")
def test_bytes_and_floats_of_random_tiers_agree_with_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    halves: Tiers = ((16, 8 * draw.randint(1, 2), 0.0),) if seed % 3 == 0 else ()
    key_heads, value_heads = draw.choice([(1, 1), (3, 3), (9, 9), (1, 3), (3, 1)])
    case = KernelCase(
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


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("seed", sampled(range(8), 2))
@pytest.mark.usefixtures("isa")
def test_random_rings_of_trellis_codes_agree_with_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    key_heads, value_heads = draw.choice([(1, 1), (3, 3), (9, 9), (1, 3)])
    tokens, queries = draw.choice([1, 15, 16, 63, 129, 1000]), draw.choice([1, 1, 5])
    assert_bytes_and_floats_agree(
        KernelCase(random_rings(draw), random_rings(draw), 9, key_heads, value_heads, queries, tokens)
    )


def random_rings(draw: random.Random) -> Tiers:
    """Bit groups of any width, most of them with trellis codes."""
    codes = [(b, 8 * draw.randint(1, 12), -0.03 if b in TRELLIS_BITS else 0.1) for b in (5, 4, 3, 2, 1)]
    return tuple(draw.sample([*codes, (2, 8, 0.9)], draw.randint(1, 6)))


def random_tiers(draw: random.Random) -> Tiers:
    kinds = sorted(draw.sample([b for b in SUPPORTED_BITS if b < 16], draw.randint(1, 7)), reverse=True)
    return tuple((bits, 8 * draw.randint(1, 4), 3 / 2**bits) for bits in kinds)


def assert_bytes_and_floats_agree(case: KernelCase) -> None:
    """Compare the byte and float paths in C++ (the same path without AVX2) with the reference."""
    x, spec = inputs(case), case.spec()
    floats: LatentKernel = LibraryKernel(compile_and_load(LIBRARY.name, LIBRARY.text(), ("-DFHOPT_FLOAT",)), spec)
    for mask in masks(case):
        wanted = expected(case, x, mask)
        assert_same(floats(*x, mask, **case.options()), wanted)
        assert_same(build_cpp(spec)(*x, mask, **case.options()), wanted)


@needs_compiler
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 19, 48])
@pytest.mark.parametrize(("keys", "values"), [(PLANES, ODD), (RING, RINGS)], ids=["planes", "rings"])
def test_kernels_load_nothing_outside_the_rows(keys: Tiers, values: Tiers, tokens: int) -> None:
    for heads, dtype, tolerance in ((9, torch.float32, 1e-5), (3, torch.bfloat16, 0.05)):
        case = KernelCase(keys, values, heads, 1, 1, 1, tokens, dtype=dtype)
        query, *stored = (x[:1] for x in inputs(case) if x is not None)
        found = build_cpp(case.spec())(query, *[at_end_of_page(x) for x in stored], None, **case.options())
        assert_same(found, expected(case, (query, *stored), None), tolerance)  # type: ignore[arg-type]


def at_end_of_page(x: Tensor) -> Tensor:
    """Return a copy of `x` that ends at a page boundary; loads from the next page fault."""
    size = (x.nbytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=x.nbytes, offset=size - x.nbytes)
    return copy.view(x.dtype).view(x.shape).copy_(x)


@needs_compiler
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_many_of_the_largest_codes_do_not_overflow(bits: int) -> None:
    """32-bit integers hold the products of 256 8-bit codes; with more channels, partial sums are converted to float."""
    tiers = ((bits, 1024, 1.0),)
    case = KernelCase(tiers, tiers, 2, 1, 1, 1, 300)
    query, key, key_scale, value, value_scale = inputs(case)
    largest = torch.full_like(key, 255), torch.full_like(value, 255)
    same = torch.full_like(query, 1e-4)
    x: Inputs = (same, largest[0], key_scale, largest[1], value_scale)
    assert_same(build_cpp(case.spec())(*x, None, **case.options()), expected(case, x, None))


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize(
    "case",
    [
        KernelCase(MIXED, MIXED, 9, 1, 1, 1, 3001),
        KernelCase(MIXED, FOUR, 9, 3, 3, 1, 20000),
        KernelCase(PLANES, MIXED, 6, 3, 1, 70, 333),  # more parts than threads
        KernelCase(UNCODED, UNCODED, 8, 2, 2, 5, 1500),
    ],
    ids=["one head", "long", "many queries", "uncoded"],
)
def test_threads_over_ranges_of_tokens_agree_with_the_reference(case: KernelCase, threads: int) -> None:
    x, kernel = inputs(case), build_cpp(case.spec())
    with torch_threads(threads):
        for mask in masks(case):
            assert_same(kernel(*x, mask, **case.options()), expected(case, x, mask))


PAGED = {
    "codes": KernelCase(FOUR, MIXED, 6, 1, 3, 1, 1000),
    "float16 channels beside codes": KernelCase(ODD, PLANES, 6, 3, 3, 1, 777, softcap=4.0),
    "uncoded, several queries": KernelCase(UNCODED, UNCODED, 8, 2, 2, 5, 300, width=16),
    "uncoded, 16 bits": KernelCase(UNCODED, UNCODED, 8, 4, 4, 1, 999, width=32, dtype=torch.bfloat16),
}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("page_tokens", [8, 16, 24, 48, 64, 256])
@pytest.mark.parametrize("name", PAGED)
def test_only_tokens_of_listed_pages_are_attended_to(name: str, page_tokens: int, threads: int) -> None:
    case = PAGED[name]
    with torch_threads(threads):
        assert_only_listed_pages_are_attended_to(case, page_tokens)


def assert_only_listed_pages_are_attended_to(case: KernelCase, page_tokens: int) -> None:
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
    """Lists [2, heads, N] of a third of the pages, of different lengths; one is empty, one has a short page."""
    count = -(-tokens // page_tokens)
    lists = torch.full((2, heads, count // 3 + 2), -1, dtype=torch.int32)
    for index, row in enumerate(lists.flatten(0, 1)):
        chosen = torch.randperm(count)[: max(1, count // 3 - index % 2)]
        row[: len(chosen)] = chosen.sort().values
    lists[0, 0, :2] = torch.tensor([0, count - 1])
    lists[0, 0, 2:] = -1
    lists[1, -1] = -1
    return lists


def page_mask(pages: Tensor, page_tokens: int, case: KernelCase) -> Tensor:
    """[B, H, 1, T], true for tokens in listed pages."""
    page_of = torch.arange(case.tokens) // page_tokens
    listed = (pages.unsqueeze(-1) == page_of).any(2)  # [B, U, T]
    return listed.repeat_interleave(case.heads // pages.shape[1], 1).unsqueeze(2)


@needs_compiler
@pytest.mark.usefixtures("isa")
def test_nan_stays_in_its_own_sequence() -> None:
    """The list may end within a chunk of 16 tokens, whose other tokens must not be loaded."""
    case = KernelCase(((4, 32, 0.33),), ((4, 32, 0.33),), 2, 1, 1, 1, 40)
    query, key, key_scale, value, value_scale = inputs(case)
    assert value_scale is not None
    pages = torch.tensor([[[0, 1]], [[0, -1]]], dtype=torch.int32)
    kernel, options = build_cpp(case.spec()), case.options() | dict(pages=pages, page_tokens=8)
    expected_ = kernel(query, key, key_scale, value, value_scale, None, **options)
    value_scale[0, 0, 9] = math.nan
    with torch_threads(1):
        found = kernel(query, key, key_scale, value, value_scale, None, **options)
    assert not torch.equal(found[0][0], expected_[0][0]) and torch.equal(found[0][1], expected_[0][1])


@needs_compiler
@pytest.mark.parametrize("name", [*PAGED, "few queries of 16 bits"])
def test_listing_all_pages_is_bit_identical_to_no_list(name: str) -> None:
    case = PAGED.get(name, KernelCase(WIDE, MIXED, 9, 3, 3, 1, 1000, dtype=torch.bfloat16))
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
def test_views_into_larger_tensors_are_used_in_place(make: Make) -> None:
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
