"""The Triton prefill kernel: results, native code and source."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import FOUR, HALVES, PLANES, UNCODED
from needs import needs_triton
from torch import Tensor
from triton_attention_checks import assert_close
from triton_prefill_checks import CHECKS, Chunk, expected, masks, rebuilt
from triton_processes import failures

from fhopt.codegen.gpu import prefill_launch
from fhopt.codegen.gpu.configs import prefill_config, rebuild_config
from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.prefill import operand_table, padded, render_prefill
from fhopt.codegen.gpu.prefill_launch import decoder_rows
from fhopt.codegen.gpu.resources import CompileRequest, compile_kernels, objection
from fhopt.codegen.gpu.signatures import prefill_example
from fhopt.errors import FhoptError
from fhopt.plan.kernel_spec import KernelSpec

STEPS = {8: 0.02, 4: 0.3, 2: 0.9}


# --------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures("triton_prefill_checks", tmp_path_factory.mktemp("triton"), request)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_under_the_interpreter(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


# --------------------------------------------------------------------------------------------------- native code


def planned(size: int, *bits: int) -> KernelSpec:
    """A spec with latents as wide as a head of `size`, in equal parts of these bits."""
    tiers = tuple((b, size // len(bits), STEPS[b]) for b in bits)
    return KernelSpec(tiers, tiers, size, size, "bfloat16", False)


SHAPES = [planned(128, *bits) for bits in ((8,), (4,), (2,), (8, 4))] + [planned(64, 8, 4)]

WIDE = [planned(256, 8, 4), *(planned(512, *bits) for bits in ((4,), (8, 4), (8, 4, 4, 2)))]


def of_each_kind(name: str, found: list[Any], fewer: list[Any]) -> list[Any]:
    """An A100 has the configurations and instructions of an L4, and more room: it gets only the fullest ones."""
    return fewer if name == "a100-80" else found


def requests(
    spec: KernelSpec, gpu: str, rows: int = 512, rebuilds: bool = True, size: int = 0, **features: Any
) -> list[CompileRequest]:
    """Return the kernels of a spec with their default launch configurations; size: D, R unless given."""
    size = size or spec.key_width
    config = prefill_config(spec, rows, size, size, rebuilds, int(GPUS[gpu].arch))
    text, found = render_prefill(spec), []
    for kernel, arguments in prefill_example(spec, config, size, size, rebuilds, **features).items():
        if kernel == "rebuild_kernel":
            config = rebuild_config(len(operand_table(spec.key_tiers, spec.key_width, spec.dtype).channels))
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        found.append(CompileRequest(text, kernel, *arguments, options | prefill_launch.CUDA_OPTIONS))
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_defaults_fit_absent_gpus_and_use_tensor_cores(name: str) -> None:
    asked = [request for spec in of_each_kind(name, SHAPES, SHAPES[3:4]) for request in requests(spec, name)]
    assert {request.kernel for request in asked} == {"chunk_kernel", "rebuild_kernel"}
    for request, found in zip(asked, compile_kernels(asked, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (request.kernel, request.text[:60], found)
        assert found.spilled == 0 and found.shared <= GPUS[name].block_shared
        assert found.tensor_cores.get("wgmma.mma_async" if name == "h100" else "mma.sync", 0) > 0, (request, found)
    widest = of_each_kind(name, WIDE, WIDE[-1:])
    wide = [request for spec in widest for request in requests(spec, name, size=128)[1:]]  # too wide for chunk_kernel
    for request, found in zip(wide, compile_kernels(wide, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]) and found.tensor_cores, (request.kernel, request.text[:60], found)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_attention_on_rebuilt_keys_fits_with_every_feature(name: str) -> None:
    every: list[dict[str, Any]] = [{}, {"mask": "bool", "lengths": True, "exact": True}, {"mask": "bfloat16"}]
    calls = [(512, every[0]), (512, every[1]), (512, every[2]), (40, every[1])]
    asked = [
        request
        for size in of_each_kind(name, [64, 128, 256], [128])
        for rows, features in (calls[::3] if size == 64 else calls)
        for request in requests(KernelSpec((), (), size, size, "bfloat16", True), name, rows, False, **features)
    ]
    for request, found in zip(asked, compile_kernels(asked, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (request.constexprs, found)
        assert found.tensor_cores and found.loop_copies, found  # rows are prefetched


# --------------------------------------------------------------------------------------------------- source


@pytest.mark.parametrize("spec", SHAPES[:4], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_file_is_reproducible_python_that_passes_a_linter(spec: KernelSpec, dtype: str, tmp_path: Path) -> None:
    text = render_prefill(replace(spec, dtype=dtype))
    assert text == render_prefill(replace(spec, dtype=dtype))
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


def test_a_lane_of_words_is_multiplied_by_its_rows_of_the_decoder() -> None:
    text = render_prefill(planned(128, 4))
    function = text[text.index("def rebuilt_key") : text.index("def rebuilt_value")]
    products = [line.strip() for line in function.splitlines() if "rebuild(" in line]
    assert products == [
        "x = rebuild(codes(z, -3, 0x78, PACKED), table, 0, x)",
        "x = rebuild(codes(z, 1, 0x78, PACKED), table, 32, x)",
        "x = rebuild(codes(z, 5, 0x78, PACKED), table, 64, x)",
        "x = rebuild(codes(z, 9, 0x78, PACKED), table, 96, x)",
    ]
    rows, bias = decoder_rows(torch.eye(128).unsqueeze(0), ((4, 128, 0.3),), torch.float32)
    assert rows.shape == (1, 128, 128) and bias.shape == (1, 128)
    for at in (0, 32, 127):  # operand -> channel: lane at // 32 of word at % 32
        assert rows[0, at].nonzero().flatten().tolist() == [4 * (at % 32) + at // 32]
    torch.testing.assert_close(bias, torch.full((1, 128), 0.3 * 16 * (1.5 - 1 / 32)))


def test_heads_are_padded_to_matmul_sizes() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 80, 128, 160)] == [16, 16, 32, 64, 128, 128, 256]
    rows, bias = decoder_rows(torch.randn(2, 80, 24), ((8, 24, 0.1),), torch.bfloat16)
    assert rows.shape[::2] == (2, 128) and rows.dtype == torch.bfloat16 and bias.shape == (2, 128)
    assert not rows[..., 80:].any() and not bias[..., 80:].any()


def test_other_tiers_are_refused() -> None:
    with pytest.raises(FhoptError, match="have no kernel"):
        render_prefill(KernelSpec(((7, 16, 0.1),), (), 16, 16, "float32", False))


# --------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({3: None}, "key_decode is missing; expected a decoder", id="no decoder"),
        pytest.param({6: torch.zeros(2, 16, 8)}, r"value_decode has shape \(2, 16, 8\).*\[G, D, 64\]", id="width"),
        pytest.param({3: torch.zeros(3, 24, 64)}, "there are 3 key heads and 2 value heads", id="heads"),
        pytest.param({0: torch.zeros(2, 4, 5, 64)}, r"\[B, H, S, 24\].*not absorbed", id="query"),
        pytest.param({0: torch.zeros(2, 3, 5, 24)}, "H a multiple of 2", id="query heads"),
        pytest.param({1: torch.zeros(2, 1, 40, 31, dtype=torch.uint8)}, "key has shape", id="row"),
        pytest.param({2: None}, "key_scale is none", id="scale"),
    ],
)
def test_tensors_of_different_calls_are_refused(change: dict[int, Tensor | None], message: str) -> None:
    chunk = Chunk(FOUR, FOUR)
    kernel = prefill_launch.PrefillKernel(Stub("stub"), chunk.spec())
    x: Any = [change.get(i, t) for i, t in enumerate(chunk.tensors())]
    with pytest.raises(ValueError, match=message):
        kernel.attend(x[0], tuple(x[1:4]), tuple(x[4:]), None, scale=1.0)


class Stub(ModuleType):
    """A module whose kernels are never launched."""

    chunk_kernel = rebuild_kernel = None


def test_parts_are_joined_by_their_sums() -> None:
    logits, values = torch.randn(2, 3, 4, 5, 30, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    logits[:, 0, 0, 0] = logits[0, 1] = -math.inf
    parts = [
        (torch.softmax(x, -1).nan_to_num(0.0) @ v, x.logsumexp(-1))
        for x, v in zip(logits, (values, -values), strict=True)
    ]
    output, lse = prefill_launch.merge_ranges(*map(torch.stack, zip(*parts, strict=True)))
    both = torch.cat(tuple(logits), -1)
    torch.testing.assert_close(lse, both.logsumexp(-1))
    torch.testing.assert_close(output, torch.softmax(both, -1).nan_to_num(0.0) @ torch.cat((values, -values)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_a_gpu_agrees_with_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    for tiers in (FOUR, PLANES, HALVES, UNCODED, ((8, 64, 0.02), (4, 64, 0.3))):
        for queries in (20, 300):
            chunk = Chunk(tiers, tiers, queries=queries, tokens=3000, size=64, value_size=64, dtype=dtype)
            x = chunk.tensors()
            there: Any = [t if t is None else t.cuda() for t in x]
            for mask in masks(chunk):
                placed = None if mask is None else mask.cuda()
                found = rebuilt(*there, placed, None, **chunk.options())
                assert_close((found[0].cpu(), found[1].cpu()), expected(chunk, x, mask), tolerance)
