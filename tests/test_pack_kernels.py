"""Compiled `fhopt::pack` and `fhopt::unpack`: the bytes of the reference, from C++ and from Triton."""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt.codegen import install
from fhopt.codegen.cpu.packing import library, pack, render, tier_table, unpack
from fhopt.ops import pack_reference, unpack_reference, use_kernel, use_pack_kernels
from fhopt.spec import SUPPORTED_BITS

ROOT = Path(__file__).resolve().parent.parent
PACK = importlib.import_module("fhopt.codegen.cpu.packing")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Tiers = tuple[list[int], list[int], list[float]]  # bits, widths, steps


def tiers(*pairs: tuple[int, int]) -> Tiers:
    """Tiers of (bits, width), with steps that fill the range of the codes."""
    return [b for b, _ in pairs], [w for _, w in pairs], [5.3 / 2 ** min(b, 8) for b, _ in pairs]


ALONE = [tiers((bits, width)) for bits in SUPPORTED_BITS for width in (8, 24, 136)]
MIXED = [
    tiers((8, 64), (4, 64), (2, 64)),
    tiers((6, 16), (5, 24), (3, 40), (1, 8)),
    tiers((3, 8), (16, 8), (1, 24), (5, 8), (4, 24)),  # float16 from byte 3 on
    tiers((16, 16), (16, 8)),
    tiers(*((bits, 8) for bits in reversed(SUPPORTED_BITS))),
    tiers((5, 520), (16, 24), (2, 1144)),  # more than one chunk of words, and more than one round of sums
]


def named(x: Tiers) -> str:
    return " ".join(f"{w}x{b}" for b, w in zip(x[0], x[1], strict=True))


every_tiers = pytest.mark.parametrize("plan", [*ALONE, *MIXED], ids=named)
mixed_tiers = pytest.mark.parametrize("plan", MIXED, ids=named)


def latents(plan: Tiers, *shape: int) -> Tensor:
    """Random latents [*shape, R] of several sizes, some far outside of the range of the codes."""
    sizes = 10.0 ** torch.empty(*shape, 1).uniform_(-4, 3)
    return torch.randn(*shape, sum(plan[1])) * sizes * (1 + 9 * (torch.rand(*shape, sum(plan[1])) < 0.02))


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).int()


def assert_packed(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """The same bytes; where torch adds squares in another order than on x86, scales within one float16."""
    (codes, scale), (wanted_codes, wanted_scale) = found, wanted
    assert (codes.dtype, codes.shape) == (torch.uint8, wanted_codes.shape)
    assert (scale.dtype, scale.shape) == (torch.float16, wanted_scale.shape)
    apart = (bits_of(scale) - bits_of(wanted_scale)).abs()
    assert int(apart.max() if apart.numel() else 0) <= (0 if platform.machine() == "x86_64" else 1)
    assert torch.equal(codes[apart == 0], wanted_codes[apart == 0])


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def fresh(module_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of this module in one temporary folder; nothing installed or said before the test counts."""
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(module_cache))
    monkeypatch.setattr("fhopt.system._warned", set())
    before = {device: use_pack_kernels(device, None) for device in ("cpu", "cuda")}
    library.cache_clear()
    yield
    library.cache_clear()
    for device, kernels in before.items():
        use_pack_kernels(device, kernels)


@pytest.fixture
def compiled() -> None:
    """The kernel, not the reference, is what the test tries."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("there is no C++ compiler")
    assert library() is not None


# --------------------------------------------------------------------------------------------------- numbers


@every_tiers
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_are_those_of_the_reference(plan: Tiers, dtype: torch.dtype, compiled: None) -> None:
    z = latents(plan, 2, 3, 11).to(dtype)
    assert_packed(pack(z, *plan), pack_reference(z, *plan))


@every_tiers
def test_unpacked_rows_are_those_of_the_reference(plan: Tiers, compiled: None) -> None:
    codes = torch.randint(0, 256, (2, 3, 11, sum(b * w for b, w in zip(plan[0], plan[1], strict=True)) // 8)).byte()
    scale = (10.0 ** torch.empty(2, 3, 11).uniform_(-7, 4)).half()  # subnormals among them
    found, wanted = unpack(codes, scale, *plan), unpack_reference(codes, scale, *plan)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)  # random float16 are NaN at times


def test_many_scales_all_agree(compiled: None) -> None:
    plan = tiers((4, 24), (2, 40))
    z = latents(plan, 30000)
    assert_packed(pack(z, *plan), pack_reference(z, *plan))


@mixed_tiers
def test_rows_of_odd_sizes_keep_their_meaning(plan: Tiers, compiled: None) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1e-7, 6e-5, 65504.0, 1e6, 1e30, 3e38])
    z = torch.randn(sizes.numel(), sum(plan[1])).clamp(-1, 1) * sizes.unsqueeze(1)
    assert_packed(pack(z, *plan), pack_reference(z, *plan))
    assert pack(-torch.zeros_like(z), *plan)[0].equal(pack_reference(-torch.zeros_like(z), *plan)[0])


@mixed_tiers
def test_a_row_with_nan_or_inf_spoils_no_other(plan: Tiers, compiled: None) -> None:
    z = latents(plan, 5)
    wanted = pack_reference(z, *plan)
    z[1, 3], z[3, 2] = math.nan, -math.inf
    codes, scale = pack(z, *plan)
    others = torch.tensor([0, 2, 4])
    assert_packed((codes[others], scale[others]), (wanted[0][others], wanted[1][others]))
    assert torch.equal(scale.isnan(), pack_reference(z, *plan)[1].isnan())


# --------------------------------------------------------------------------------------------------- shapes


@mixed_tiers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_latents_are_read_where_they_are(plan: Tiers, dtype: torch.dtype, compiled: None) -> None:
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
        assert_packed(pack(view, *plan), pack_reference(dense, *plan))
        assert torch.equal(pack(view, *plan)[0], pack(dense, *plan)[0]), name


@mixed_tiers
def test_codes_are_read_out_of_a_longer_cache(plan: Tiers, compiled: None) -> None:
    codes, scale = pack_reference(latents(plan, 2, 9, 3), *plan)
    codes, scale = codes.transpose(1, 2)[:, :, 1:8], scale.transpose(1, 2)[:, :, 1:8]
    assert torch.equal(unpack(codes, scale, *plan), unpack_reference(codes.contiguous(), scale.contiguous(), *plan))
    assert torch.equal(unpack(codes.mT.contiguous().mT, scale, *plan), unpack_reference(codes, scale, *plan))
    deep, deeper = codes[None, None], scale[None, None]
    assert torch.equal(unpack(deep, deeper, *plan), unpack_reference(deep, deeper, *plan))


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3, 0), (0, 3, 2), (1, 2, 3, 4, 5), (1, 2, 3, 0, 5)])
def test_any_number_of_leading_dimensions_will_do(shape: tuple[int, ...], compiled: None) -> None:
    plan = MIXED[2]
    z = latents(plan, *shape)
    codes, scale = pack_reference(z, *plan)
    assert_packed(pack(z, *plan), (codes, scale))
    assert torch.equal(unpack(codes, scale, *plan), unpack_reference(codes, scale, *plan))


def test_any_number_of_threads_gives_the_same_bytes(compiled: None) -> None:
    plan = MIXED[1]
    z = latents(plan, 2, 3, 900)  # enough for 9 threads
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # set back for every test by the fixture `clean_state`
        codes, scale = pack(z, *plan)
        found.append((codes, scale, unpack(codes, scale, *plan)))
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
    codes, scale = pack(z, *plan)
    assert_packed((codes, scale), pack_reference(z, *plan))
    assert torch.equal(unpack(codes, scale, *plan), unpack_reference(codes, scale, *plan))


@settings(max_examples=60, deadline=None)
@given(plan=a_plan, seed=st.integers(0, 1000))
def test_a_number_in_range_comes_back_within_half_a_step(plan: Tiers, seed: int) -> None:
    torch.manual_seed(seed)
    z = torch.randn(7, sum(plan[1]))
    codes, scale = pack(z, *plan)
    back = unpack(codes, scale, *plan)
    columns = zip(*plan, z.split(plan[1], -1), back.split(plan[1], -1), strict=True)
    for bits, _, step, before, after in columns:
        if bits == 16:
            assert torch.equal(after, before.half().float())
            continue
        size = step * scale.float().unsqueeze(1)
        inside = before.abs() < size * 2 ** (bits - 1)
        assert bool(((after - before).abs() <= size * 0.5001)[inside].all())  # the quotient is rounded
        assert bool((after.sign() == before.sign()).all())


# --------------------------------------------------------------------------------------------------- who is served


class Asked(Exception):
    """The kernel was wanted."""


def fail() -> None:
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
    monkeypatch.setattr(PACK, "library", fail)
    for a, b in zip(pack(z, *plan), pack_reference(z, *plan), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Asked):
        pack(torch.randn(2, 16), *tiers((4, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_other_types_run_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = pack_reference(latents(MIXED[2], 5), *MIXED[2])
    monkeypatch.setattr(PACK, "library", fail)
    wanted = unpack_reference(codes, scale, *MIXED[2])
    assert torch.equal(unpack(codes, scale.to(dtype), *MIXED[2]), wanted)
    with pytest.raises(Asked):
        unpack(codes, scale, *MIXED[2])


@pytest.mark.parametrize("plan", [tiers((4, 24)), ([4, 4], [8], [0.1, 0.1]), ([], [], [])])
def test_tiers_that_do_not_fit_are_refused_as_the_reference_does(plan: Tiers, compiled: None) -> None:
    z = torch.randn(2, 16)
    with pytest.raises((RuntimeError, ValueError)) as wanted:
        pack_reference(z, *plan)
    with pytest.raises(wanted.type):
        pack(z, *plan)


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("PATH", "")
    plan = MIXED[2]
    z = latents(plan, 4)
    wanted, wanted_scale = pack_reference(z, *plan)
    for _ in range(2):
        codes, scale = pack(z, *plan)
        assert torch.equal(codes, wanted)
        assert torch.equal(scale, wanted_scale)
        assert torch.equal(unpack(codes, scale, *plan), unpack_reference(codes, scale, *plan))
    assert [w.category for w in recwarn] == [RuntimeWarning]
    assert "No C++ compiler was found" in str(recwarn[0].message)


def test_installed_kernels_serve_the_ops(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    kernel = use_kernel("cpu", None)
    install()
    use_kernel("cpu", kernel)
    plan = MIXED[0]
    z = latents(plan, 1, 2, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fhopt.pack.default, (z, *plan), test_utils=checks)
    codes, scale = torch.ops.fhopt.pack(z, *plan)
    torch.library.opcheck(torch.ops.fhopt.unpack.default, (codes, scale, *plan), test_utils=checks)
    monkeypatch.setattr(PACK, "library", fail)
    with pytest.raises(Asked):
        torch.ops.fhopt.pack(z, *plan)
    with pytest.raises(Asked):
        torch.ops.fhopt.unpack(codes, scale, *plan)
    assert use_pack_kernels("cpu", None) == (pack, unpack)
    assert_packed(torch.ops.fhopt.pack(z, *plan), pack_reference(z, *plan))


def test_the_file_is_the_same_every_time_and_says_how_codes_are_stored() -> None:
    assert render() == render()
    assert "A tier is stored as bit planes" in render()
    assert "$" not in render()
    assert tier_table((4,), (8,), (0.1,)) is tier_table((4,), (8,), (0.1,))


# --------------------------------------------------------------------------------------------------- Triton

INTERPRETED = """
import torch
from fhopt.codegen.gpu.packing import pack, unpack
from fhopt.ops import pack_reference, unpack_reference

def check(z, *plan):
    codes, scale = pack_reference(z, *plan)
    found, found_scale = pack(z, *plan)
    assert torch.equal(found_scale, scale), (plan, z.dtype, found_scale, scale)
    assert torch.equal(found, codes), (plan, z.dtype)
    assert torch.equal(unpack(codes, scale, *plan), unpack_reference(codes, scale, *plan)), plan

torch.manual_seed(0)
every = [1, 2, 3, 4, 5, 6, 8, 16]
for bits in every:
    check(torch.randn(5, 24), [bits], [24], [3 / 2**bits])
plan = ([3, 16, 5, 8], [8, 72, 24, 16], [0.6, 0.0, 0.15, 0.02])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check(torch.randn(2, 2, 9, 120).to(dtype), *plan)
sizes = torch.tensor([0.0, 1e-30, 1e6, 1e30]).unsqueeze(1)
check(torch.randn(4, 120) * sizes, *plan)
check(torch.randn(2, 5, 3, 120).transpose(1, 2), *plan)
check(torch.randn(3, 200)[:, 7:127], *plan)
check(torch.randn(3, 240)[:, ::2], *plan)
check(torch.randn(2, 0, 120), *plan)
check(torch.randn(120), *plan)
check(torch.randn(3, 16).double(), [4], [16], [0.3])
"""

COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fhopt.codegen.gpu.packing import BLOCK_G, BLOCK_T, pack_kernel, unpack_kernel

class Driver:  # enough for `warmup`
    def __init__(self, target): self.target = target
    def get_current_target(self): return self.target
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

z, codes, scale = torch.empty(64, 192), torch.empty(64, 96, dtype=torch.uint8), torch.empty(64, dtype=torch.half)
table = torch.empty(3, 5, dtype=torch.int32)
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    triton.runtime.driver.set_active(Driver(target))
    for kernel in (pack_kernel, unpack_kernel):
        kernel.device_caches.clear()
    size = (BLOCK_T, BLOCK_G)
    made = [
        pack_kernel.warmup(z.bfloat16(), codes, scale, table, 64, 3, 192, 192, 96, *size, grid=(4,)),
        unpack_kernel.warmup(codes, scale, z, table, 64, 3, 96, 192, *size, grid=(4,)),
    ]
    print(target.arch, *("cubin" in x.asm or "hsaco" in x.asm for x in made), max(x.metadata.shared for x in made))
"""


def run(program: str, folder: Path, **variables: str) -> str:
    """Output of a program in a process of its own: Triton interprets or compiles, never both."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_gives_the_bytes_of_the_reference_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


def test_triton_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    lines = [line.split() for line in run(COMPILED, tmp_path).splitlines()]
    assert [line[:3] for line in lines] == [[arch, "True", "True"] for arch in ("80", "90", "gfx942")]
    assert all(int(line[3]) <= 48 * 1024 for line in lines)  # shared memory that every GPU has


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_bytes_of_the_reference(dtype: torch.dtype) -> None:
    kernel = use_kernel("cpu", None)
    install()
    use_kernel("cpu", kernel)
    for plan in [*ALONE, *MIXED]:
        z = latents(plan, 2, 3, 35).to(dtype)
        codes, scale = pack_reference(z, *plan)
        found, found_scale = (x.cpu() for x in torch.ops.fhopt.pack(z.cuda(), *plan))
        apart = (bits_of(found_scale) - bits_of(scale)).abs()
        assert int(apart.max()) <= 1  # sums have another order there
        assert int(apart.sum()) <= 2
        assert torch.equal(found[apart == 0], codes[apart == 0])
        back = torch.ops.fhopt.unpack(codes.cuda(), scale.cuda(), *plan).cpu()
        assert torch.equal(back, unpack_reference(codes, scale, *plan))
