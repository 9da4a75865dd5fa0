"""The Triton packing kernel against the reference, byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_rows import ALONE, DTYPES, MIXED, bits_of, latents

from fhopt.codegen.dispatch import register_kernels
from fhopt.ops import registry
from fhopt.ops.packing import pack_reference, unpack_reference

ROOT = Path(__file__).resolve().parents[4]

INTERPRETED = """
import torch
from fhopt.codegen.gpu.packing import pack_triton, unpack_triton
from fhopt.ops import pack_reference, unpack_reference

def check(z, *plan):
    codes, scale = pack_reference(z, *plan)
    found, found_scale = pack_triton(z, *plan)
    assert torch.equal(found_scale, scale), (plan, z.dtype, found_scale, scale)
    assert torch.equal(found, codes), (plan, z.dtype)
    assert torch.equal(unpack_triton(codes, scale, *plan), unpack_reference(codes, scale, *plan)), plan

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
    """Run a program in a subprocess and return its output: Triton interprets or compiles, never both."""
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


@pytest.mark.slow
def test_triton_gives_the_bytes_of_the_reference_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_triton_compiles_for_absent_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    lines = [line.split() for line in run(COMPILED, tmp_path).splitlines()]
    assert [line[:3] for line in lines] == [[arch, "True", "True"] for arch in ("80", "90", "gfx942")]
    assert all(int(line[3]) <= 48 * 1024 for line in lines)  # shared memory of every GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_bytes_of_the_reference(dtype: torch.dtype) -> None:
    kernel = registry.use("latent_attention", "cpu", None)
    register_kernels()
    registry.use("latent_attention", "cpu", kernel)
    for plan in [*ALONE, *MIXED]:
        z = latents(plan, 2, 3, 35).to(dtype)
        codes, scale = pack_reference(z, *plan)
        found, found_scale = (x.cpu() for x in torch.ops.fhopt.pack(z.cuda(), *plan))
        apart = (bits_of(found_scale) - bits_of(scale)).abs()
        assert int(apart.max()) <= 1  # sums in another order
        assert int(apart.sum()) <= 2
        assert torch.equal(found[apart == 0], codes[apart == 0])
        back = torch.ops.fhopt.unpack(codes.cuda(), scale.cuda(), *plan).cpu()
        assert torch.equal(back, unpack_reference(codes, scale, *plan))
