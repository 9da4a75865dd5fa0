"""The C++ packing kernel against the reference, byte by byte."""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import ALONE, DTYPES, MIXED, Tiers, bits_of, latents, tiers
from torch import Tensor

from fhopt.codegen.background import Builder
from fhopt.codegen.compiler import has_compiler
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.cpu.packing import LIBRARY, pack_cpu, tier_table, unpack_cpu
from fhopt.codegen.dispatch import register_kernels
from fhopt.ops import registry
from fhopt.ops.packing import pack_reference, unpack_reference
from fhopt.plan.site_plan import SUPPORTED_BITS, TRELLIS_BITS

PACK = importlib.import_module("fhopt.codegen.cpu.packing")
LOAD = cpu_library._load


def named(x: Tiers) -> str:
    return " ".join(f"{w}x{b}" for b, w in zip(x[0], x[1], strict=True))


every_tiers = pytest.mark.parametrize("plan", [*ALONE, *MIXED], ids=named)
mixed_tiers = pytest.mark.parametrize("plan", MIXED, ids=named)


def assert_packed(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Require equal bytes; off x86, torch sums squares in another order, so scales may differ by one float16 step."""
    (codes, scale), (wanted_codes, wanted_scale) = found, wanted
    assert (codes.dtype, codes.shape) == (torch.uint8, wanted_codes.shape)
    assert (scale.dtype, scale.shape) == (torch.float16, wanted_scale.shape)
    apart = (bits_of(scale) - bits_of(wanted_scale)).abs()
    assert int(apart.max() if apart.numel() else 0) <= (0 if platform.machine() == "x86_64" else 1)
    assert torch.equal(codes[apart == 0], wanted_codes[apart == 0])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninstall kernels and forget warnings before each test."""
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr("fhopt.codegen.cpu.packing.builder", Builder())
    before = {(op, on): registry.use(op, on, None) for op in ("pack", "unpack") for on in ("cpu", "cuda")}
    LOAD.cache_clear()
    yield
    LOAD.cache_clear()
    for (op, device), kernel in before.items():
        registry.use(op, device, kernel)


@pytest.fixture
def compiled() -> None:
    """Require the compiled kernel, so that the test does not run the reference."""
    if not has_compiler():
        pytest.skip("there is no C++ compiler")
    assert LIBRARY.load() is not None


# --------------------------------------------------------------------------------------------------- results


RINGS: list[Tiers] = [
    *(([bits], [width], [-0.025]) for bits in TRELLIS_BITS for width in (8, 24, 136)),
    ([6, 4, 3, 16, 2, 1], [8, 24, 24, 8, 40, 32], [0.15, -0.027, -0.0264, 1.0, -0.0252, -0.0219]),
    ([3, 2, 1], [520, 64, 1144], [-0.026, 0.99, -0.022]),
]


@pytest.mark.parametrize("plan", RINGS, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trellis_codes_are_those_of_the_reference(plan: Tiers, dtype: torch.dtype, compiled: None) -> None:
    z = latents(plan, 2, 3, 5).to(dtype)
    z[0, 0, 0, 3], z[1, 1, 1, 5] = torch.nan, torch.inf
    codes, scale = pack_cpu(z, *plan)
    assert_packed((codes, scale), pack_reference(z, *plan))
    found, wanted = unpack_cpu(codes, scale, *plan), unpack_reference(codes, scale, *plan)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@every_tiers
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_are_those_of_the_reference(plan: Tiers, dtype: torch.dtype, compiled: None) -> None:
    z = latents(plan, 2, 3, 11).to(dtype)
    assert_packed(pack_cpu(z, *plan), pack_reference(z, *plan))


@every_tiers
def test_unpacked_rows_are_those_of_the_reference(plan: Tiers, compiled: None) -> None:
    codes = torch.randint(0, 256, (2, 3, 11, sum(b * w for b, w in zip(plan[0], plan[1], strict=True)) // 8)).byte()
    scale = (10.0 ** torch.empty(2, 3, 11).uniform_(-7, 4)).half()  # including subnormals
    found, wanted = unpack_cpu(codes, scale, *plan), unpack_reference(codes, scale, *plan)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)  # random float16 bits are sometimes NaN


def test_many_scales_all_agree(compiled: None) -> None:
    plan = tiers((4, 24), (2, 40))
    z = latents(plan, 30000)
    assert_packed(pack_cpu(z, *plan), pack_reference(z, *plan))


@mixed_tiers
def test_rows_of_odd_sizes_are_unpacked_correctly(plan: Tiers, compiled: None) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1e-7, 6e-5, 65504.0, 1e6, 1e30, 3e38])
    z = torch.randn(sizes.numel(), sum(plan[1])).clamp(-1, 1) * sizes.unsqueeze(1)
    assert_packed(pack_cpu(z, *plan), pack_reference(z, *plan))
    assert pack_cpu(-torch.zeros_like(z), *plan)[0].equal(pack_reference(-torch.zeros_like(z), *plan)[0])


@mixed_tiers
def test_a_row_with_nan_or_inf_affects_no_other(plan: Tiers, compiled: None) -> None:
    z = latents(plan, 5)
    wanted = pack_reference(z, *plan)
    z[1, 3], z[3, 2] = math.nan, -math.inf
    codes, scale = pack_cpu(z, *plan)
    others = torch.tensor([0, 2, 4])
    assert_packed((codes[others], scale[others]), (wanted[0][others], wanted[1][others]))
    assert torch.equal(scale.isnan(), pack_reference(z, *plan)[1].isnan())


# --------------------------------------------------------------------------------------------------- shapes


@mixed_tiers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_latents_are_used_in_place(plan: Tiers, dtype: torch.dtype, compiled: None) -> None:
    width = sum(plan[1])
    z = latents(plan, 2, 5, 3).to(dtype)  # [B, T, J, R]
    wide = torch.cat((z, z, z), -1)
    views = {
        "heads before tokens": z.transpose(1, 2),
        "channels of wider rows": wide[..., 3 : 3 + width],
        "every other token": z[:, ::2],
        "the last dimension not dense": z.mT.contiguous().mT,
        "the same row many times": z[:, :1].expand(2, 7, 3, width),
        "five dimensions": z.unflatten(1, (5, 1)).transpose(1, 3),
    }
    for name, view in views.items():
        dense = view.clone(memory_format=torch.contiguous_format)
        assert_packed(pack_cpu(view, *plan), pack_reference(dense, *plan))
        assert torch.equal(pack_cpu(view, *plan)[0], pack_cpu(dense, *plan)[0]), name


@mixed_tiers
def test_codes_are_unpacked_from_a_longer_cache(plan: Tiers, compiled: None) -> None:
    codes, scale = pack_reference(latents(plan, 2, 9, 3), *plan)
    codes, scale = codes.transpose(1, 2)[:, :, 1:8], scale.transpose(1, 2)[:, :, 1:8]
    assert torch.equal(unpack_cpu(codes, scale, *plan), unpack_reference(codes.contiguous(), scale.contiguous(), *plan))
    assert torch.equal(unpack_cpu(codes.mT.contiguous().mT, scale, *plan), unpack_reference(codes, scale, *plan))
    deep, deeper = codes[None, None], scale[None, None]
    assert torch.equal(unpack_cpu(deep, deeper, *plan), unpack_reference(deep, deeper, *plan))


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3, 0), (0, 3, 2), (1, 2, 3, 4, 5), (1, 2, 3, 0, 5)])
def test_any_number_of_leading_dimensions_is_supported(shape: tuple[int, ...], compiled: None) -> None:
    plan = MIXED[2]
    z = latents(plan, *shape)
    codes, scale = pack_reference(z, *plan)
    assert_packed(pack_cpu(z, *plan), (codes, scale))
    assert torch.equal(unpack_cpu(codes, scale, *plan), unpack_reference(codes, scale, *plan))


def test_any_number_of_threads_gives_the_same_bytes(compiled: None) -> None:
    plan = MIXED[1]
    z = latents(plan, 2, 3, 900)  # enough for 9 threads
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture `clean_state` resets it
        codes, scale = pack_cpu(z, *plan)
        found.append((codes, scale, unpack_cpu(codes, scale, *plan)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --------------------------------------------------------------------------------------------------- properties


a_plan = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 20).map(lambda n: 8 * n), st.floats(0.01, 2)),
    min_size=1,
    max_size=5,
).map(lambda pairs: tuple(list(column) for column in zip(*pairs, strict=True)))


@settings(max_examples=60, deadline=None)
@given(plan=a_plan, seed=st.integers(0, 1000), size=st.floats(-5, 4), dtype=st.sampled_from(DTYPES))
def test_any_plan_gives_the_bytes_of_the_reference(plan: Tiers, seed: int, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    z = (torch.randn(7, sum(plan[1])) * 10**size).to(dtype)
    codes, scale = pack_cpu(z, *plan)
    assert_packed((codes, scale), pack_reference(z, *plan))
    assert torch.equal(unpack_cpu(codes, scale, *plan), unpack_reference(codes, scale, *plan))


@settings(max_examples=60, deadline=None)
@given(plan=a_plan, seed=st.integers(0, 1000))
def test_a_value_in_range_is_restored_within_half_a_step(plan: Tiers, seed: int) -> None:
    torch.manual_seed(seed)
    z = torch.randn(7, sum(plan[1]))
    codes, scale = pack_cpu(z, *plan)
    back = unpack_cpu(codes, scale, *plan)
    columns = zip(*plan, z.split(plan[1], -1), back.split(plan[1], -1), strict=True)
    for bits, _, step, before, after in columns:
        if bits == 16:
            assert torch.equal(after, before.half().float())
            continue
        size = step * scale.float().unsqueeze(1)
        inside = before.abs() < size * 2 ** (bits - 1)
        assert bool(((after - before).abs() <= size * 0.5001)[inside].all())  # the quotient is rounded
        assert bool((after.sign() == before.sign()).all())


# --------------------------------------------------------------------------------------------------- dispatch


class Asked(Exception):
    """Raised when a call requests the kernel."""


def fail(*_: object) -> None:
    raise Asked


@pytest.mark.parametrize(
    ("z", "plan"),
    [
        pytest.param(torch.randn(2, 16, dtype=torch.float64), tiers((4, 16)), id="float64"),
        pytest.param(torch.randint(-9, 9, (2, 16)), tiers((4, 16)), id="int64"),
        pytest.param(torch.randn(2, 16, requires_grad=True), tiers((4, 16)), id="gradient"),
        pytest.param(torch.randn(2, 12), tiers((4, 12)), id="width 12"),
        pytest.param(torch.randn(2, 16), tiers((7, 16)), id="7 bits"),
    ],
)
def test_other_calls_run_the_reference(z: Tensor, plan: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_load", fail)
    for a, b in zip(pack_cpu(z, *plan), pack_reference(z, *plan), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Asked):
        pack_cpu(torch.randn(2, 16), *tiers((4, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_other_types_run_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = pack_reference(latents(MIXED[2], 5), *MIXED[2])
    monkeypatch.setattr(cpu_library, "_load", fail)
    wanted = unpack_reference(codes, scale, *MIXED[2])
    assert torch.equal(unpack_cpu(codes, scale.to(dtype), *MIXED[2]), wanted)
    with pytest.raises(Asked):
        unpack_cpu(codes, scale, *MIXED[2])


@pytest.mark.parametrize("plan", [tiers((4, 24)), ([4, 4], [8], [0.1, 0.1]), ([], [], [])])
def test_invalid_tiers_are_refused_like_in_the_reference(plan: Tiers, compiled: None) -> None:
    z = torch.randn(2, 16)
    with pytest.raises((RuntimeError, ValueError)) as wanted:
        pack_reference(z, *plan)
    with pytest.raises(wanted.type):
        pack_cpu(z, *plan)


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("PATH", "")
    plan = MIXED[2]
    z = latents(plan, 4)
    wanted, wanted_scale = pack_reference(z, *plan)
    for _ in range(2):
        codes, scale = pack_cpu(z, *plan)
        assert torch.equal(codes, wanted)
        assert torch.equal(scale, wanted_scale)
        assert torch.equal(unpack_cpu(codes, scale, *plan), unpack_reference(codes, scale, *plan))
    assert [w.category for w in recwarn] == [RuntimeWarning]
    assert "No C++ compiler was found" in str(recwarn[0].message)


def test_installed_kernels_serve_the_ops(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    kernel = registry.use("latent_attention", "cpu", None)
    register_kernels()
    registry.use("latent_attention", "cpu", kernel)
    plan = MIXED[0]
    z = latents(plan, 1, 2, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fhopt.pack.default, (z, *plan), test_utils=checks)
    codes, scale = torch.ops.fhopt.pack(z, *plan)
    torch.library.opcheck(torch.ops.fhopt.unpack.default, (codes, scale, *plan), test_utils=checks)
    monkeypatch.setattr(PACK, "_built", fail)
    with pytest.raises(Asked):
        torch.ops.fhopt.pack(z, *plan)
    with pytest.raises(Asked):
        torch.ops.fhopt.unpack(codes, scale, *plan)
    assert (registry.use("pack", "cpu", None), registry.use("unpack", "cpu", None)) == (pack_cpu, unpack_cpu)
    assert_packed(torch.ops.fhopt.pack(z, *plan), pack_reference(z, *plan))


def test_the_table_of_bit_groups_is_made_once() -> None:
    assert tier_table((4,), (8,), (0.1,)) is tier_table((4,), (8,), (0.1,))
