"""The Triton latent-attention kernel: results, native code and source."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, expected, inputs, masks
from triton_attention_checks import CHECKS, relative
from triton_machine_code import AMD, INT4, MIXED, NVIDIA, PLANED, bytes_of
from triton_processes import failures, run

from fhopt.codegen.build import build_triton, render_kernel
from fhopt.codegen.gpu.row_layout import MANTISSA, fields, pieces, row_size
from fhopt.errors import FhoptError
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec

# --------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("triton")
    return failures("triton_attention_checks", tmp_path_factory.mktemp("triton"), request)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_under_the_interpreter(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


# --------------------------------------------------------------------------------------------------- native code


SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, "gfx942": 65536}  # shared memory bytes per block


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    program = f"import triton_machine_code as t; t.compile_for({NVIDIA + AMD}, [t.INT4, t.PLANED], 8)"
    found: list[dict[str, Any]] = run(program, tmp_path_factory.mktemp("triton"))
    return found


@pytest.mark.slow
def test_defaults_compile_for_absent_gpus(compiled: list[dict[str, Any]]) -> None:
    assert {(entry["arch"], entry["kernel"]) for entry in compiled} == {
        (arch, kernel) for arch in SHARED for kernel in ("attention_kernel", "merge_kernel")
    }
    for entry in compiled:
        assert entry["spills"] == 0, entry
        assert entry["shared"] <= SHARED[entry["arch"]], entry
        assert (entry["products"] > 0) == (entry["kernel"] == "attention_kernel"), entry


@pytest.mark.slow
def test_every_feature_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run("from triton_machine_code import compile_features; compile_features()", tmp_path) == 4


@pytest.mark.slow
def test_the_loop_loads_latent_bytes_and_scales_only(compiled: list[dict[str, Any]]) -> None:
    """Padded words are masked: they count in shapes, but are not loaded."""
    entries = [entry for entry in compiled if entry["kernel"] == "attention_kernel"]
    for spec, found in ((INT4, entries[: len(SHARED)]), (PLANED, entries[len(SHARED) :])):
        runs = [*pieces(spec.key_tiers, 128), *pieces(spec.value_tiers, 128)]
        row = sum(piece.size * piece.word // 8 for piece in runs)
        used = sum(len(bytes_of(piece)) for piece in runs)
        assert used == row_size(spec.key_tiers, 128) + row_size(spec.value_tiers, 128)
        for entry in found:
            scales = 2 * 2  # float16, of keys and values
            assert sum(n * size for n, size in entry["loaded"]) == entry["block_t"] * (row + scales), entry


@pytest.mark.slow
def test_packed_codes_are_decoded_correctly(compiled: list[dict[str, Any]]) -> None:
    """Run the inline PTX here on random words, and compare with their contents; no other test runs it without a GPU."""
    words = torch.randint(0, 2**16, (64, 2))
    both = words[:, 0] | words[:, 1] << 16
    for spec, entry in ((INT4, compiled[0]), (PLANED, compiled[2 * len(SHARED)])):
        mantissa, dtype = MANTISSA[spec.dtype], getattr(torch, spec.dtype)
        wanted = set()
        for piece in (*pieces(spec.key_tiers, 128), *pieces(spec.value_tiers, 128)):
            for field in fields(piece, spec.dtype) if piece.is_coded else ():
                wanted.add((field.shift - mantissa + field.bits, field.bits))
        seen = set()
        for way, n, mask, ones in entry["packed"]:
            shifted = (both << n if way == "shl" else both >> n) & 0xFFFFFFFF
            register = shifted & mask | ones
            numbers = torch.stack((register & 0xFFFF, register >> 16), 1).to(torch.uint16).view(dtype).double()
            shift, bits = (n if way == "shr" else -n), bin(mask & 0xFFFF).count("1")
            codes = words >> (shift + mantissa - bits) & 2**bits - 1
            assert torch.equal(numbers, 1 + codes.double() / 2**bits)
            seen.add((shift, bits))
        assert seen == wanted


# --------------------------------------------------------------------------------------------------- source


@pytest.mark.parametrize("spec", [INT4, MIXED, PLANED], ids=lambda spec: spec.name)
def test_the_file_is_reproducible_python_that_passes_a_linter(spec: KernelSpec, tmp_path: Path) -> None:
    text = render_kernel(spec, "triton")
    assert text == render_kernel(spec, "triton")
    compile(text, spec.name, "exec")
    path = tmp_path / "kernel.py"
    path.write_text(text)
    options = ["--isolated", "--no-cache", "--line-length", "120"]
    ruff = [sys.executable, "-m", "ruff"]
    done = subprocess.run([*ruff, "check", *options, "--select", "E,F,W,I,B,UP", path], capture_output=True, text=True)
    if "No module named ruff" in done.stderr:
        pytest.skip("there is no ruff")
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*ruff, "format", "--diff", *options, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_plane_is_multiplied_lane_by_lane() -> None:
    text = render_kernel(INT4, "triton")
    loop = text[text.index("# scores") : text.index("if SOFTCAP:")]
    products = [line.strip() for line in loop.splitlines() if "score(" in line]
    assert products == [
        "coded = score(codes(x, -3, 0x78, PACKED), q0_0, coded)",
        "coded = score(codes(x, 1, 0x78, PACKED), q0_1, coded)",
        "coded = score(codes(x, 5, 0x78, PACKED), q0_2, coded)",
        "coded = score(codes(x, 9, 0x78, PACKED), q0_3, coded)",
    ]
    assert loop.count("load") == 1  # of words


def test_other_tiers_are_refused() -> None:
    with pytest.raises(FhoptError, match="have no kernel"):
        render_kernel(KernelSpec(((7, 16, 0.1),), (), 16, 16, "float32", False), "triton")


# --------------------------------------------------------------------------------------------------- calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_a_gpu_agrees_with_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    for name, plain in CASES.items():
        case = replace(plain, dtype=dtype, tokens=plain.tokens + 500)
        x = inputs(case)
        there = tuple(t if t is None else t.cuda() for t in x)
        kernel: LatentKernel = build_triton(case.spec())
        for mask in masks(case):
            for splits in (1, None):
                found = kernel(*there, None if mask is None else mask.cuda(), splits=splits, **case.options())
                output, lse = expected(case, x, mask)
                seen = lse > -math.inf
                assert relative(found[0].cpu(), output) < tolerance, name
                assert float((found[1].cpu() - lse)[seen].abs().max()) < 4 * tolerance * float(lse[seen].abs().max()), (
                    name
                )
