"""GPU resources of a kernel: limits, occupancy, compiler reports."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gpu_kernels import H100, SMALL
from needs import needs_triton

from fhopt.codegen.gpu import resources as gpu_resources
from fhopt.codegen.gpu.gpus import GPUS, find_gpu
from fhopt.codegen.gpu.resources import CompileRequest, Resources, compile_kernels, objection, occupancy
from fhopt.errors import FhoptError
from fhopt.hardware.devices import DEVICES

pytestmark = pytest.mark.usefixtures("own_cache")

KERNELS = '''
import triton
import triton.language as tl


@triton.jit
def product(x, y, out, steps, N: tl.constexpr):
    """The sum over steps of products of tiles [N, N]."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(x + step * N * N + at), tl.load(y + step * N * N + at), total)
    tl.store(out + at, total)


@triton.jit
def wrong(x, y, out, steps, N: tl.constexpr):
    """The compiler refuses it: shapes do not agree."""
    tl.store(out + tl.arange(0, N), tl.arange(0, 2 * N) + tl.arange(0, N))
'''


def product(size: int = 64, kernel: str = "product", text: str = KERNELS, **options: int) -> CompileRequest:
    types = {"x": "*fp16", "y": "*fp16", "out": "*fp32", "steps": "i32", "N": "constexpr"}
    aligned: dict[tuple[int, ...], Any] = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    return CompileRequest(text, kernel, types, {"N": size}, aligned, {"num_warps": 4, "num_stages": 3} | options)


# --------------------------------------------------------------------------------------------------- limits


def test_every_gpu_of_the_cost_model_has_limits() -> None:
    assert set(GPUS) == {name for name, device in DEVICES.items() if device.kind == "gpu"}


def test_an_unknown_gpu_gets_the_names() -> None:
    with pytest.raises(FhoptError, match=r"'v100'; expected one of h100, h200, a100-80"):
        find_gpu("v100")


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "blocks", "limit"),
    [
        ("h100", 4, 128, 0, 4, "registers"),  # 16 warps of 4,096 registers
        ("h100", 4, 32, 0, 16, "registers"),  # the maximum of 64 warps
        ("h100", 4, 16, 0, 16, "warps"),
        ("h100", 1, 16, 0, 32, "blocks"),
        ("h100", 4, 129, 0, 3, "registers"),  # 136 registers allocated: 15 warps, of which 12 fill blocks of 4
        ("h100", 4, 32, 100 * 1024, 2, "shared memory"),  # 228 KB; a block takes 1 KB more
        ("h100", 4, 32, 113 * 1024 + 1, 1, "shared memory"),
        ("4090", 8, 32, 0, 6, "warps"),
        ("4090", 4, 32, 49 * 1024, 2, "shared memory"),
        ("mi300x", 4, 128, 0, 4, "registers"),  # 512 registers per lane of each SIMD
        ("mi300x", 4, 64, 32 * 1024, 2, "shared memory"),
    ],
)
def test_occupancy_agrees_with_the_vendors(
    name: str, warps: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    held = occupancy(Resources(num_warps=warps, registers=registers, shared=shared), GPUS[name])
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * warps
    assert held.share == held.warps / GPUS[name].warps


def test_tensor_memory_limits_blocks_of_blackwell() -> None:
    held = occupancy(dataclasses.replace(SMALL, registers=32, tensor_columns=256), GPUS["b200"])
    assert (held.blocks, held.limit) == (2, "tensor memory")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spilled": 8}, "spills 8 bytes per thread"),
        ({"shared": 227 * 1024 + 1}, "needs 232,449 bytes of shared memory; a block may have 232,448"),
        ({"tensor_columns": 640}, "needs 640 columns of tensor memory; there are 512"),
        ({"num_warps": 32, "registers": 72}, "needs 73,728 registers; there are 65,536"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
)
def test_objections_to_a_kernel_are_reported(change: dict[str, Any], reason: str) -> None:
    assert not objection(SMALL, H100)
    wanting = dataclasses.replace(SMALL, **change)
    assert objection(wanting, H100) == reason


# --------------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
@needs_triton
def test_kernels_are_compiled_for_absent_gpus() -> None:
    found = {name: compile_kernels([product()], GPUS[name])[0] for name in ("a100-80", "h100", "mi300x")}
    for name, resources in found.items():
        assert not objection(resources, GPUS[name]), resources
        assert resources.num_warps == 4 and 16 < resources.registers < 256
        assert resources.loop_instructions > 10
    assert set(found["a100-80"].tensor_cores) == {"mma.sync"}
    assert set(found["h100"].tensor_cores) == {"wgmma.mma_async"}
    assert set(found["mi300x"].tensor_cores) == {"v_mfma"}
    for name in ("a100-80", "h100"):  # 64 x 64 float16 by 128 threads: 4 loads of 16 bytes each of x and y
        assert found[name].loop_reads == found[name].loop_copies == {"16": 8}
        assert found[name].copied_share == 1.0
    assert found["mi300x"].loop_reads == {"16": 4} and not found["mi300x"].loop_copies  # 256 threads
    assert found["a100-80"].shared >= 2 * 2 * 64 * 64 * 2  # two tiles of two stages


@pytest.mark.slow
@needs_triton
def test_a_compile_error_is_a_result_like_others() -> None:
    bad, missing, good = compile_kernels([product(kernel="wrong"), product(kernel="absent"), product(32)], H100)
    assert "CompilationError" in bad.error or "ValueError" in bad.error, bad
    assert objection(bad, H100).startswith("does not compile: ")
    assert "absent" in missing.error
    assert not objection(good, H100)


@pytest.mark.slow
@needs_triton
def test_a_kernel_that_crashes_the_compiler_is_a_result_and_is_not_cached(own_cache: Path) -> None:
    deadly = product(text=KERNELS + "\nimport os, sys\nsys.stderr.write('that was it')\nos._exit(3)\n")
    first, dead, last = compile_kernels([product(), deadly, product(32)], H100)
    assert dead.error == "the compiler crashed: that was it"
    assert not objection(first, H100) and not objection(last, H100)
    assert len(list(own_cache.glob("*.json"))) == 2


@pytest.mark.slow
@needs_triton
def test_results_are_cached_by_source_arguments_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [product(), dataclasses.replace(product(32), texts=("ttir", "ptx"))]
    before = compile_kernels(requests, H100)
    assert "tt.dot" in before[1].texts["ttir"] and ".target sm_90" in before[1].texts["ptx"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to compile")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert compile_kernels(requests, H100) == before
    assert compile_kernels(requests[:1], GPUS["h200"]) == before[:1]  # the same architecture
    for other in (product(num_stages=2), product(16), product(text=KERNELS + "\n")):
        with pytest.raises(AssertionError, match="nothing is left"):
            compile_kernels([other], H100)
    with pytest.raises(AssertionError, match="nothing is left"):
        compile_kernels(requests, GPUS["a100-80"])
    monkeypatch.setattr(gpu_resources, "triton_version", lambda: "another")
    with pytest.raises(AssertionError, match="nothing is left"):
        compile_kernels(requests, H100)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    gpu_resources.triton_version.cache_clear()
    with pytest.raises(FhoptError, match=r"Triton is not installed; .* Install it with: pip install 'triton>=3\.6'"):
        compile_kernels([product()], H100)
    gpu_resources.triton_version.cache_clear()


@pytest.mark.slow
@needs_triton
def test_a_request_for_more_shared_memory_than_exists_is_noticed() -> None:
    large, small = compile_kernels([product(128, num_stages=8), product(128, num_stages=2)], H100)
    assert not large.error and large.shared > H100.block_shared
    assert objection(large, H100) == f"needs {large.shared:,} bytes of shared memory; a block may have 232,448"
    assert not objection(small, H100)
