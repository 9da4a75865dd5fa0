"""The Triton decode-step kernels on an engine's blocks: results and native code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needs_triton, sampled
from triton_block_checks import CHECKS
from triton_processes import failures

from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu.configs import default_config, scattered_config
from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.launch import Span
from fhopt.codegen.gpu.resources import CompileRequest, compile_kernels, objection
from fhopt.codegen.gpu.signatures import POINTERS, attention_example
from fhopt.plan.kernel_spec import KernelSpec

DEVICES = ("a100-80", "h100", "mi300x")


# --------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures("triton_block_checks", tmp_path_factory.mktemp("triton"), request)


@needs_triton
@pytest.mark.parametrize("check", sampled(CHECKS, 4))
def test_it_agrees_with_torch_operations(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


# --------------------------------------------------------------------------------------------------- native code


SIZE = 128  # head size
EIGHT, FOUR = ((8, SIZE, 1.0),), ((4, SIZE, 0.3),)
MIXED = ((8, 32, 0.02), (4, 64, 0.3), (2, 32, 0.9))


def spans(name: str, dtype: str) -> Iterator[CompileRequest]:
    """Return the attention kernels of a layer: latents, 8-bit and 16-bit windows, sinks."""
    backend = GPUS[name].backend
    parts = ((FOUR, Span.QUANTIZED), (MIXED, Span.QUANTIZED), (EIGHT, Span.OPEN), ((), Span.OPEN), ((), Span.FIRST))
    for tiers, kind in parts:
        spec = KernelSpec(tiers, tiers, SIZE, SIZE, dtype, False)
        config = scattered_config(default_config(spec, 8, backend))
        features: dict[str, Any] = dict(table=True, lengths=True, page=37, span=kind, packed=backend == "cuda")
        arguments = attention_example(spec, config, whole=kind == Span.FIRST, **features)["attention_kernel"]
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        yield CompileRequest(render_kernel(spec, "triton"), "attention_kernel", *arguments, options)


def steps(name: str, dtype: str) -> Iterator[CompileRequest]:
    """Return the kernels that write, encode and merge, with and without means, for 8-bit and 16-bit windows."""
    from fhopt.codegen.gpu import block_launch, encode_rows
    from fhopt.codegen.gpu import block_tables as kernels

    number, text = POINTERS[dtype], Path(kernels.__file__).read_text()
    options = encode_rows.OPTIONS if GPUS[name].backend == "hip" else encode_rows.CUDA_OPTIONS
    floats = dict.fromkeys(("x_means", "y_means", "means", "key_means", "value_means", "basis"), "*fp32")
    halves = dict.fromkeys(("scale", "x_window_scale", "y_window_scale", "window_scale"), "*fp16")
    tables = dict.fromkeys(("table", "window_table", "first_table", "lengths", "tiers"), "*i32")
    numbers = dict.fromkeys(("x", "y", "far", "near", "first", "query", "decode", "output"), number)
    sums = dict.fromkeys(("far_lse", "near_lse", "first_lse"), "*fp32")
    known = floats | halves | tables | numbers | sums | {"codes": "*u8"}
    aligned = {"x_b", "x_h", "y_b", "y_h", "size", "x_size", "y_size", "key_size", "width", "basis_j", "basis_r"}
    tile = {"BLOCK_T": encode_rows.BLOCK_T, "BLOCK_G": encode_rows.BLOCK_G, "BLOCK_D": encode_rows.BLOCK_D}
    constants: dict[str, dict[str, Any]] = {
        "write_kernel": {"PAGE": 12, "BLOCK_T": encode_rows.BLOCK_T, "BLOCK_D": SIZE},
        "encode_blocks_kernel": tile | {"PAGE": 37, "WINDOW_PAGE": 12},
        "join_kernel": {"BLOCK_M": 16, "BLOCK_D": 32, "BLOCK_E": block_launch.JOINED, "BLOCK_R": block_launch.SUMMED},
    }
    for rounded, missing in (
        (True, ("y", "y_window", "y_window_scale", "y_means")),
        (True, ()),  # one latent for keys and values
        (False, ("y", "y_window", "y_means", "x_means", "means", "key_means", "value_means")),
    ):
        for kernel, chosen in constants.items():
            names = getattr(kernels, kernel).arg_names
            absent = missing if rounded else (*missing, "window_scale", "x_window_scale", "y_window_scale")
            windows = dict.fromkeys(("window", "x_window", "y_window"), "*u8" if rounded else number)
            fixed = chosen | {x: None for x in absent if x in names}
            types = {x: (known | windows).get(x, "i32") for x in names} | dict.fromkeys(fixed, "constexpr")
            if kernel == "join_kernel":
                types["scale"] = "fp32"
                if not rounded:  # without attention sinks
                    fixed |= {"first": None, "first_lse": None}
                    types |= {"first": "constexpr", "first_lse": "constexpr"}
            attrs: dict[tuple[int, ...], Any] = {
                (i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if types[x].startswith("*") or x in aligned
            }
            yield CompileRequest(text, kernel, types, fixed, attrs, options if kernel == "encode_blocks_kernel" else {})


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_it_compiles_without_spills_for_absent_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked = [*spans(name, "bfloat16"), *steps(name, "bfloat16")]
    for request, found in zip(asked, compile_kernels(asked, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (request.kernel, request.constexprs, found)
        assert found.tensor_cores or request.kernel in ("write_kernel", "encode_blocks_kernel"), (request.kernel, found)
        if request.kernel == "attention_kernel" and name != "mi300x":
            assert found.loop_copies, found  # rows of any block are prefetched
