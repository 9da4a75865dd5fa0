"""C++ kernels on ARM: compiled for it; an emulator runs matmuls with GGUF blocks.

Needs Debian's `g++-aarch64-linux-gnu` and `qemu-user`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_blocks import HALVES, random_rows

from fhopt.codegen.compiler import FLAGS
from fhopt.codegen.cpu import (
    block_tables,
    gguf_blocks,
    lm_head,
    packing,
    pages,
    prefill,
    skinny_linear,
    wide_linear,
)
from fhopt.codegen.programs import program

gguf = pytest.importorskip("gguf")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(COMPILER) or not shutil.which(EMULATOR), reason="there is no compiler for ARM"),
]
CPUS = ("neoverse-n1", "cortex-a53")  # with and without int8 dot products
LIBRARIES: dict[str, Callable[[], str]] = {
    module.__name__.rpartition(".")[2]: module.LIBRARY.text
    for module in (block_tables, gguf_blocks, lm_head, packing, pages, prefill, skinny_linear, wide_linear, program)
}
# Loads a case, writes its matmul results and the dequantized weight.
MAIN = r"""
#include <cstdio>
#include <vector>

int main(int, char** files) {
    FILE *from = std::fopen(files[1], "rb"), *to = std::fopen(files[2], "wb");
    int64_t n[5];  // format, rows, width, columns, bytes of a row of the weight
    if (std::fread(n, 8, 5, from) != 5) return 1;
    std::vector<float> x(n[1] * n[2]), y(n[1] * n[3]), numbers(n[3] * n[2]);
    std::vector<uint8_t> weight(n[3] * n[4]);
    if (std::fread(x.data(), 4, x.size(), from) != x.size()) return 1;
    if (std::fread(weight.data(), 1, weight.size(), from) != weight.size()) return 1;
    const Skinny a{n[1], n[2], n[3], 2, FORMATS * n[0], x.data(), n[2], weight.data(), n[4], nullptr, y.data(),
                   nullptr, 0};
    block_group(&a, 1);
    unpack_blocks(n[0], weight.data(), n[4], n[3], n[2], 0, nullptr, n[3], (uint8_t*)numbers.data(), 0, 2);
    std::fwrite(y.data(), 4, y.size(), to);
    std::fwrite(numbers.data(), 4, numbers.size(), to);
    return std::fclose(to);
}
"""


def compiled(text: str, cpu: str, made: Path, flags: tuple[str, ...] = FLAGS) -> None:
    made.with_suffix(".cpp").write_text(text)
    command = [COMPILER, *flags, f"-mcpu={cpu}", "-fopenmp", str(made.with_suffix(".cpp")), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_compiles(name: str, tmp_path: Path) -> None:
    compiled(LIBRARIES[name](), "neoverse-n1", tmp_path / "library")


@pytest.mark.parametrize("cpu", CPUS)
def test_matmuls_with_blocks_agree_with_float64(cpu: str, tmp_path: Path) -> None:
    compiled(gguf_blocks.LIBRARY.text() + MAIN, cpu, tmp_path / "products", ("-O3", "-std=c++17", "-static"))
    rows, columns, width = 7, 21, 512
    for format in sorted(HALVES):
        given = random_rows(format, columns, width)
        numbers = gguf.dequantize(given, gguf.GGMLQuantizationType(format)).astype(np.float64)
        x = torch.randn(rows, width).numpy()
        blocks = gguf_blocks.interleave_rows(given, format, width).values.numpy()
        sizes = np.array([format, rows, width, columns, blocks.shape[1]], dtype=np.int64)
        (tmp_path / "case").write_bytes(sizes.tobytes() + x.tobytes() + blocks.tobytes())
        command = [EMULATOR, "-cpu", "max", "products", "case", "result"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        result = np.fromfile(tmp_path / "result", dtype=np.float32)
        products, unpacked = result[: rows * columns].reshape(rows, -1), result[rows * columns :].reshape(columns, -1)
        assert np.allclose(unpacked, numbers, rtol=2e-6)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(numbers, axis=1)
        assert (np.abs(products - x.astype(np.float64) @ numbers.T) / size).max() <= 1e-4, (format, cpu)
