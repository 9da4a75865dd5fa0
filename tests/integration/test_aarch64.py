"""The prebuilt kernels for ARM: cross-compiled, loaded and run in an emulator of CPUs that their targets are for.

Needs Debian's `g++-aarch64-linux-gnu` and `qemu-user`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_blocks import HALVES, random_rows

from fhopt.codegen.build_prebuilt import LIBRARIES, build_prebuilt, targets_named
from fhopt.codegen.compiler import FLAGS
from fhopt.codegen.cpu import gguf_blocks
from fhopt.codegen.cpu.calls.headers import headers

gguf = pytest.importorskip("gguf")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # Debian's libraries for ARM
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(COMPILER) or not shutil.which(EMULATOR), reason="there is no compiler for ARM"),
]
CPUS = {"aarch64-dotprod": "neoverse-n1", "aarch64": "cortex-a53"}  # by target; the latter has no int8 dot products
# Loads a library and a case, writes its matmul results and the dequantized weight.
MAIN = r"""
#include <cstdio>
#include <vector>
#include <dlfcn.h>

int main(int count, char** files) {
    void* library = dlopen(files[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    if (count < 4) return 0;
    auto* product = (void (*)(const Skinny*, int64_t))dlsym(library, "block_group");
    auto* unpack = (void (*)(int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const int64_t*, int64_t,
                             uint8_t*, int64_t, int64_t))dlsym(library, "unpack_blocks");
    std::FILE *from = std::fopen(files[2], "rb"), *to = std::fopen(files[3], "wb");
    int64_t n[5];  // format, rows, width, columns, bytes of a row of the weight
    if (std::fread(n, 8, 5, from) != 5) return 1;
    std::vector<float> x(n[1] * n[2]), y(n[1] * n[3]), numbers(n[3] * n[2]);
    std::vector<uint8_t> weight(n[3] * n[4]);
    if (std::fread(x.data(), 4, x.size(), from) != x.size()) return 1;
    if (std::fread(weight.data(), 1, weight.size(), from) != weight.size()) return 1;
    const Skinny a{n[1], n[2], n[3], 2, FORMATS * n[0], x.data(), n[2], weight.data(), n[4], nullptr, y.data(),
                   nullptr, 0};
    product(&a, 1);
    unpack(n[0], weight.data(), n[4], n[3], n[2], 0, nullptr, n[3], (uint8_t*)numbers.data(), 0, 2);
    std::fwrite(y.data(), 4, y.size(), to);
    std::fwrite(numbers.data(), 4, numbers.size(), to);
    return std::fclose(to);
}
"""


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the libraries of both targets, and the program `run`."""
    folder = tmp_path_factory.mktemp("prebuilt")
    build_prebuilt(folder, targets_named(list(CPUS)))
    (folder / "run.cpp").write_text(headers()["skinny_call.h"].replace("#pragma once\n", "") + MAIN)
    command = [COMPILER, *(flag for flag in FLAGS if flag != "-shared"), "run.cpp", "-o", "run", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def emulated(target: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program on an emulated CPU that the target is for."""
    command = [EMULATOR, "-L", SYSTEM, "-cpu", CPUS[target], folder / "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("target", CPUS)
def test_every_library_loads(target: str, prebuilt: Path) -> None:
    files = sorted((prebuilt / target).glob("*.so"))
    assert [file.stem.rpartition("-")[0] for file in files] == sorted(library.name for library in LIBRARIES)
    for file in files:
        done = emulated(target, prebuilt, file)
        if file.stem.startswith("ops-"):  # needs torch for ARM
            assert "libtorch_cpu.so: cannot open shared object file" in done.stderr
        else:
            assert done.returncode == 0, (file.name, done.stderr)


@pytest.mark.parametrize("target", CPUS)
def test_matmuls_with_blocks_agree_with_float64(target: str, prebuilt: Path, tmp_path: Path) -> None:
    (library,) = (prebuilt / target).glob("blocks-*.so")
    rows, columns, width = 7, 21, 512
    for format in sorted(HALVES):
        given = random_rows(format, columns, width)
        numbers = gguf.dequantize(given, gguf.GGMLQuantizationType(format)).astype(np.float64)
        x = torch.randn(rows, width).numpy()
        blocks = gguf_blocks.interleave_rows(given, format, width).values.numpy()
        sizes = np.array([format, rows, width, columns, blocks.shape[1]], dtype=np.int64)
        (tmp_path / "case").write_bytes(sizes.tobytes() + x.tobytes() + blocks.tobytes())
        done = emulated(target, prebuilt, library, tmp_path / "case", tmp_path / "result")
        assert done.returncode == 0, done.stderr
        result = np.fromfile(tmp_path / "result", dtype=np.float32)
        products, unpacked = result[: rows * columns].reshape(rows, -1), result[rows * columns :].reshape(columns, -1)
        assert np.allclose(unpacked, numbers, rtol=2e-6)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(numbers, axis=1)
        assert (np.abs(products - x.astype(np.float64) @ numbers.T) / size).max() <= 1e-4, (format, target)
