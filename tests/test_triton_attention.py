"""Generated Triton attention: right numbers under the interpreter, and machine code for GPUs that are not here.

The interpreter and the compiler of Triton cannot share a process, and neither may be started in this one: `interpret`
and `compile_for` are run in processes of their own and hand back what they found as JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codegen import CASES, FOUR, HALVES, ODD, PLANES, UNCODED, Case, Inputs, expected, inputs, masks
from torch import Tensor

from fhopt.codegen import render
from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu.configs import Config, candidates, default_config
from fhopt.codegen.gpu.launch import TritonKernel, choose_splits
from fhopt.codegen.gpu.row_layout import MANTISSA, Piece, fields, is_crowded, pieces, places, row_size
from fhopt.codegen.gpu.signatures import attention_example
from fhopt.codegen.tiers import Tiers
from fhopt.errors import FhoptError
from fhopt.ops import LatentKernel
from fhopt.spec import SUPPORTED_BITS, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
DISPATCH = importlib.import_module("fhopt.codegen.dispatch")
SMALL = Config(block_t=16, block_m=8, num_warps=4, num_stages=2)
INT4 = KernelSpec(((4, 128, 0.3),), ((4, 128, 0.3),), 128, 128, "bfloat16", False)
WIDE: Tiers = ((8, 32, 0.02), (4, 64, 0.3), (2, 32, 0.9))
MIXED = KernelSpec(WIDE, WIDE, 128, 128, "bfloat16", False)
PLANED = KernelSpec(((6, 64, 0.08), (3, 64, 0.5)), ((5, 64, 0.15), (16, 64, 0.0)), 128, 128, "float16", True)


# --------------------------------------------------------------------------------------------------- numbers


def relative(found: Tensor, wanted: Tensor) -> float:
    """Size of the difference against the size of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def attend(case: Case, x: Inputs, mask: Tensor | None = None, **features: Any) -> tuple[Tensor, Tensor]:
    kernel: LatentKernel = build_triton(case.spec())
    return kernel(*x, mask, **({"config": SMALL} | case.options() | features))


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    """1e-5: float32 sums of codes, whose middle is subtracted at the end. Equal where there is nothing to attend to."""
    (output, lse), (wanted_output, wanted_lse) = found, wanted
    assert relative(output, wanted_output) < tolerance
    seen = wanted_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert relative(lse[seen], wanted_lse[seen]) < tolerance or float((lse - wanted_lse)[seen].abs().max()) < tolerance
    assert not output[~seen].any()


a_side = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 5).map(lambda n: 8 * n)), min_size=0, max_size=3
).map(lambda pairs: tuple((bits, width, 3.0 / 2 ** min(bits, 8)) for bits, width in pairs))


@st.composite
def a_case(draw: st.DrawFn) -> Case:
    heads = draw(st.integers(1, 9))
    divisors = st.sampled_from([n for n in (1, 2, 3, heads) if heads % n == 0 and n <= 4])
    return Case(
        draw(a_side), draw(a_side), heads, draw(divisors), draw(divisors), draw(st.integers(1, 3)),
        draw(st.integers(1, 60)), softcap=draw(st.sampled_from([0.0, 4.0])), width=draw(st.integers(1, 40)),
    )  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=a_case(), kind=st.integers(0, 4), splits=st.integers(1, 4), seed=st.integers(0, 99))
def any_spec_agrees_with_the_reference(case: Case, kind: int, splits: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = inputs(case)
    one = tuple(t if t is None else t[:1] for t in x)
    mask = masks(case)[kind]
    mask = mask[:1] if mask is not None and mask.dim() == 4 else mask
    assert_close(attend(case, one, mask, splits=splits), expected(case, one, mask))  # type: ignore[arg-type]


def ragged_lengths_end_where_they_say() -> None:
    case = Case(FOUR, PLANES, 3, 1, 1, 2, 40)
    x = inputs(case)
    for lengths in (torch.tensor([40, 17]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor(33)):
        seen = torch.arange(40) < lengths.reshape(-1, 1, 1, 1)
        for splits in (1, 3):
            assert_close(attend(case, x, lengths=lengths, splits=splits), expected(case, x, seen))


def no_token_at_all_gives_zeros() -> None:
    for tokens in (0, 1):
        case = Case(FOUR, ODD, 2, 1, 1, 1, tokens)
        x = inputs(replace(case, tokens=1))
        x = tuple(t if t is None or i == 0 else t[:, :, :tokens] for i, t in enumerate(x))  # type: ignore[assignment]
        wanted = (
            expected(case, x, None)
            if tokens
            else (torch.zeros(2, 2, 1, case.value_width), torch.full((2, 2, 1), -math.inf))
        )
        for splits in (1, 2):
            assert_close(attend(case, x, splits=splits), wanted)


def a_row_that_sees_nothing_gives_zeros() -> None:
    case = Case(FOUR, FOUR, 2, 1, 1, 2, 40)
    x = inputs(case)
    mask = torch.ones(2, 1, 2, 40, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 0, 0, :20] = False
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        for splits in (1, 3):
            assert_close(attend(case, x, form, splits=splits), expected(case, x, mask))


def the_lowest_mask_lets_a_row_attend_evenly() -> None:
    case = Case(UNCODED, UNCODED, 1, 1, 1, 1, 20, width=16)
    x = inputs(case)
    low = torch.full((1, 1, 1, 20), torch.finfo(torch.float32).min)
    output, _ = attend(case, x, low)
    assert relative(output, x[3].mean(2, keepdim=True)) < 1e-5


def causal_window_and_slopes_follow_positions() -> None:
    case = Case(FOUR, HALVES, 4, 2, 2, 3, 50)
    x = inputs(case)
    positions, slopes = torch.tensor([47, 20]), torch.tensor([0.5, 0.25, 0.125, 1.0])
    at = positions.view(2, 1, 1, 1) + torch.arange(3).view(1, 1, 3, 1)
    token = torch.arange(50).view(1, 1, 1, 50)
    bias = slopes.view(1, 4, 1, 1) * (token - at)
    nothing = torch.full((), -math.inf)
    kinds: dict[str, tuple[dict[str, Any], Tensor]] = {
        "causal": ({"causal": True}, torch.where(token <= at, torch.zeros(()), nothing)),
        "window": ({"causal": True, "window": 12}, torch.where((token <= at) & (at - token < 12), 0.0, nothing)),
        "slopes": ({"causal": True, "slopes": slopes}, torch.where(token <= at, bias, nothing)),
    }
    for features, mask in kinds.values():
        for splits in (1, 3):
            found = attend(case, x, positions=positions, splits=splits, **features)
            assert_close(found, expected(case, x, mask.float()))


def sinks_take_weight_and_give_nothing() -> None:
    case = Case(FOUR, FOUR, 4, 2, 2, 1, 40)
    x, sinks = inputs(case), torch.tensor([0.5, -1.0, 3.0, 0.0])
    output, lse = expected(case, x, None)
    total = torch.logaddexp(lse, sinks.double().view(1, 4, 1))
    wanted = output * torch.exp(lse - total).unsqueeze(-1), total
    for splits, block_m in ((1, 8), (3, 8), (2, 32)):
        assert_close(attend(case, x, sinks=sinks, splits=splits, config=replace(SMALL, block_m=block_m)), wanted)


def pages_lie_anywhere_in_a_pool() -> None:
    case = Case(FOUR, ODD, 4, 2, 1, 2, 64)
    x = inputs(case)
    table = torch.randperm(9)[:8].view(2, 4).to(torch.int32)
    pooled = tuple(t if i == 0 or t is None else pool(t, table, 16) for i, t in enumerate(x))
    seen = torch.arange(64) < torch.tensor([64, 37]).view(2, 1, 1, 1)
    for splits in (1, 2):
        found = attend(case, pooled, table=table, lengths=torch.tensor([64, 37]), splits=splits)  # type: ignore[arg-type]
        assert_close(found, expected(case, x, seen))


def pool(x: Tensor, table: Tensor, page: int) -> Tensor:
    """[B,J,T,...] -> [9,J,page,...]: page i of sequence b at table[b, i]; what belongs to nobody is not a number."""
    out = x.new_full((9, x.shape[1], page, *x.shape[3:]), 255 if x.dtype == torch.uint8 else math.nan)
    for b in range(table.shape[0]):
        for i, at in enumerate(table[b].tolist()):
            out[at] = x[b, :, page * i : page * i + page]
    return out


def a_head_reads_the_pages_it_chose() -> None:
    case = Case(FOUR, FOUR, 4, 2, 2, 1, 90)
    x = inputs(case)
    pages = torch.tensor([[[0, 2, -1], [5, 1, 4]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    short = torch.tensor([[[0, 3, 11], [1, 2, -1]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    large = torch.tensor([[[0, 3, -1], [1, 2, -1]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    for page_tokens, lists in ((8, short), (24, large), (16, pages)):
        chosen = (torch.arange(90).view(90, 1) // page_tokens == lists.unsqueeze(2)).any(-1)  # [B, J, T]
        seen = chosen.repeat_interleave(2, 1).unsqueeze(2)
        for splits in (1, 2):
            assert_close(attend(case, x, pages=lists, page_tokens=page_tokens, splits=splits), expected(case, x, seen))
    shared = pages[:, 1:]  # one list for all heads
    of_all = chosen[:, 1:].expand(2, 4, 90).unsqueeze(2)
    assert_close(attend(case, x, pages=shared, page_tokens=16), expected(case, x, of_all))
    table = torch.randperm(9)[:6].to(torch.int32).expand(2, 6)
    padded = [t if t is None or i == 0 else torch.cat((t, t[:, :, :6]), 2) for i, t in enumerate(x)]
    same = [t if i == 0 or t is None else t[:1].expand_as(t) for i, t in enumerate(padded)]
    pooled = [t if i == 0 or t is None else pool(t, table, 16) for i, t in enumerate(same)]
    found = attend(case, pooled, pages=pages, table=table, lengths=torch.tensor(90))  # type: ignore[arg-type]
    alike = [t if i == 0 or t is None else t[:1].expand_as(t) for i, t in enumerate(x)]
    assert_close(found, expected(case, alike, seen))  # type: ignore[arg-type]


def rows_of_a_longer_cache_are_read_where_they_are() -> None:
    case = Case(ODD, FOUR, 4, 2, 2, 1, 30)
    long = inputs(replace(case, tokens=50))
    for cut in (slice(7, 37), slice(1, 31)):
        x = tuple(t if t is None or i == 0 else t[:, :, cut] for i, t in enumerate(long))
        assert_close(attend(case, x), expected(case, x, None))  # type: ignore[arg-type]
    other = tuple(
        t if t is None or i == 0 else t[:, :, :30].transpose(1, 2).contiguous().transpose(1, 2)
        for i, t in enumerate(long)
    )
    assert_close(attend(case, other), expected(case, other, None))  # type: ignore[arg-type]


def half_precision_multiplies_in_its_own_type() -> None:
    right_bfloat16()
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        for tiers in (((8, 16, 0.02), (4, 64, 0.3)), ((6, 64, 0.08), (16, 16, 0.0)), UNCODED):
            case = Case(tiers, tiers, 4, 1, 1, 1, 40, dtype=dtype)
            x = inputs(case)
            found = attend(case, x, splits=2)
            assert found[0].dtype == dtype
            assert_close(found, expected(case, x, None), tolerance)


def right_bfloat16() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 and cuts float32 off: make both right."""
    import numpy as np
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    bfloat16 = interpreter.tl.bfloat16

    def widened(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if a.dtype.scalar != bfloat16:
            return dot(self, a, b, total, *rest)
        return interpreter.TensorHandle(np.matmul(widened(a), widened(b)) + total.data, total.dtype.scalar)

    def convert_float(x: Any, source: Any, target: Any, *rest: Any) -> Any:
        if target != bfloat16 or source != interpreter.tl.float32:
            return convert(x, source, target, *rest)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        any_spec_agrees_with_the_reference,
        ragged_lengths_end_where_they_say,
        no_token_at_all_gives_zeros,
        a_row_that_sees_nothing_gives_zeros,
        the_lowest_mask_lets_a_row_attend_evenly,
        causal_window_and_slopes_follow_positions,
        sinks_take_weight_and_give_nothing,
        pages_lie_anywhere_in_a_pool,
        a_head_reads_the_pages_it_chose,
        rows_of_a_longer_cache_are_read_where_they_are,
        half_precision_multiplies_in_its_own_type,
    )
}


def interpret() -> None:
    """Run every check and print what failed."""
    torch.set_num_threads(1)
    failed = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))


def run(program: str, folder: Path, **variables: str) -> Any:
    """What a function of this file printed, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT / "tests"),
        "FHOPT_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-c", f"import test_triton_attention as t; t.{program}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("triton")
    return run("interpret()", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("check", CHECKS)
def test_under_the_interpreter(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


# --------------------------------------------------------------------------------------------------- machine code


def compile_for(targets: list[tuple[str, int | str, int]], specs: list[KernelSpec], rows: int) -> None:
    """Print what real compilation of the default configuration gives, one entry a target, spec and kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fhopt.codegen.build import load_module

    found = []
    for spec in specs:
        module = load_module(spec.name, render(spec, "triton"))
        for target in targets:
            config = default_config(spec, rows, target[0])
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            for name, (types, constants, aligned) in attention_example(
                spec, config, packed=target[0] == "cuda"
            ).items():
                source = ASTSource(getattr(module, name), types, constants, aligned)
                made = triton.compile(source, target=GPUTarget(*target), options=options)
                text = made.asm["ptx" if target[0] == "cuda" else "amdgcn"]
                spills = spilled(made.asm["cubin"]) if target[0] == "cuda" else amd_spills(text)
                kinds = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
                found.append(
                    {
                        "arch": target[1], "kernel": name, "spills": spills, "shared": made.metadata.shared,
                        "products": sum(text.count(kind) for kind in kinds), "packed": packed(text),
                        "loaded": loaded(made.asm["ttir"]), "block_t": config.block_t,
                    }
                )  # fmt: skip
    print(json.dumps(found))


def spilled(cubin: bytes) -> int:
    """Bytes of stack that machine code for NVIDIA uses: there is nothing but spills on it."""
    import triton

    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])  # type: ignore[index]


def amd_spills(text: str) -> int:
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))


def packed(ptx: str) -> list[tuple[str, int, int, int]]:
    """What the inline PTX does: direction and size of the shift, mask, ones."""
    pattern = r"\.reg \.b32 t; (sh[lr])\.b32 t, %r\d+, (\d+); lop3\.b32 %r\d+, t, (\d+), (\d+), 0xEA;"
    return [(way, int(n), int(mask), int(ones)) for way, n, mask, ones in re.findall(pattern, ptx)]


def loaded(ttir: str) -> list[tuple[int, int]]:
    """(number, bytes each) of what the loop of a kernel loads: the tensors of the `tt.load` in `scf.for`."""
    loop = ttir.partition("scf.for")[2]
    sizes = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4}
    shapes = re.findall(r"tt\.load .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)>>", loop.partition("scf.yield")[0])
    return [(math.prod(map(int, shape.split("x")[:-1])), sizes[kind]) for shape, kind in shapes]


def compile_features() -> None:
    """Compile with everything that a call may ask for, in the combinations that change the code most."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fhopt.codegen.build import load_module

    every: list[dict[str, Any]] = [
        {
            "mask": "bool",
            "slopes": True,
            "sinks": True,
            "lengths": True,
            "positions": True,
            "causal": True,
            "whole": True,
        },
        {"mask": "float32", "table": True, "pages": True, "page": 64, "sinks": True, "lengths": True},
        {"table": True, "page": 64, "positions": True, "window": 100, "lengths": True, "causal": True},
        {"pages": True, "page": 32, "lengths": True},
        {"pages": True, "page": 8, "lengths": True, "mask": "bool"},
    ]
    spec = replace(INT4, softcap=True)
    module = load_module(spec.name, render(spec, "triton"))
    for features in every:
        for block_m in (8, 32):
            config = replace(default_config(spec, 8), block_m=block_m)
            page = features.get("page", 64)
            config = replace(config, block_t=math.gcd(config.block_t, page) if page % 16 == 0 else config.block_t)
            source = ASTSource(
                module.attention_kernel, *attention_example(spec, config, **features)["attention_kernel"]
            )
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps})
    print(json.dumps(len(every)))


NVIDIA = [("cuda", 80, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32)]
AMD = [("hip", "gfx942", 64)]
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, "gfx942": 65536}  # bytes a block may have


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    return run(f"compile_for({NVIDIA + AMD}, [t.INT4, t.PLANED], 8)", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_defaults_compile_for_gpus_that_are_not_here(compiled: list[dict[str, Any]]) -> None:
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
    assert run("compile_features()", tmp_path) == 5


@pytest.mark.slow
def test_the_loop_loads_latent_bytes_and_scales_only(compiled: list[dict[str, Any]]) -> None:
    """Padded words are masked: they are in the shapes, and are no bytes of memory."""
    entries = [entry for entry in compiled if entry["kernel"] == "attention_kernel"]
    for spec, found in ((INT4, entries[: len(SHARED)]), (PLANED, entries[len(SHARED) :])):
        runs = [*pieces(spec.key_tiers, 128), *pieces(spec.value_tiers, 128)]
        row = sum(piece.size * piece.word // 8 for piece in runs)
        used = sum(len(bytes_of(piece)) for piece in runs)
        assert used == row_size(spec.key_tiers, 128) + row_size(spec.value_tiers, 128)
        for entry in found:
            scales = 2 * 2  # float16, keys and values
            assert sum(n * size for n, size in entry["loaded"]) == entry["block_t"] * (row + scales), entry


@pytest.mark.slow
def test_packed_codes_are_the_codes(compiled: list[dict[str, Any]]) -> None:
    """The inline PTX, run here on random words, against what the words hold; nothing else executes it without a GPU."""
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


# --------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("spec", [INT4, MIXED, PLANED], ids=lambda spec: spec.name)
def test_the_file_is_python_that_a_linter_passes_and_always_the_same(spec: KernelSpec, tmp_path: Path) -> None:
    text = render(spec, "triton")
    assert text == render(spec, "triton")
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
    text = render(INT4, "triton")
    loop = text[text.index("# scores") : text.index("if SOFTCAP:")]
    products = [line.strip() for line in loop.splitlines() if "score(" in line]
    assert products == [
        "coded = score(codes(x, -3, 0x78, PACKED), q0_0, coded)",
        "coded = score(codes(x, 1, 0x78, PACKED), q0_1, coded)",
        "coded = score(codes(x, 5, 0x78, PACKED), q0_2, coded)",
        "coded = score(codes(x, 9, 0x78, PACKED), q0_3, coded)",
    ]
    assert loop.count("load") == 1  # of words


def bytes_of(piece: Piece) -> range:
    begin = piece.start * piece.word // 8
    return range(begin, begin + piece.used * (2 if piece.bits == 16 else piece.word // 8))


def test_the_pieces_of_a_row_cover_every_byte_and_every_channel_once() -> None:
    for bits in SUPPORTED_BITS:
        for width in (8, 24, 64, 136, 1000):
            tiers: Tiers = ((3, 8, 0.5), (bits, width, 0.1))
            found = pieces(tiers, width + 8)
            taken = [byte for piece in found for byte in bytes_of(piece)]
            assert sorted(taken) == list(range(row_size(tiers, width + 8)))
            spec = KernelSpec((), tiers, 8, width + 8, "float32", False)
            lands = [p.place + p.lanes * i + lane for p in found for i in range(p.used) for lane in range(p.lanes)]
            assert sorted(lands) == list(range(places(spec)))
            assert all(16 <= p.size <= 128 and p.size & (p.size - 1) == 0 and p.used > 0 for p in found)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_planes_of_whole_16_bytes_need_no_padding(bits: int) -> None:
    for count in range(1, 40):
        tiers: Tiers = ((8, 16, 0.1), (bits, 128 * count // bits, 0.1))
        spec = KernelSpec(tiers, tiers, row_width(tiers), row_width(tiers), "bfloat16", False)
        found = pieces(tiers, row_width(tiers))
        assert all(piece.used == piece.size for piece in found) and not is_crowded(spec)
        assert sum(piece.word == 8 for piece in found) <= 2  # the first tier, and what is left of the second


def row_width(tiers: Tiers) -> int:
    return sum(width for _, width, _ in tiers)


def test_rows_with_padding_or_two_planes_are_crowded() -> None:
    assert is_crowded(PLANED)
    assert is_crowded(replace(INT4, value_tiers=((4, 120, 0.3), (2, 8, 0.5))))
    assert is_crowded(MIXED)  # 32 channels of 2 bits are 8 bytes
    assert not is_crowded(INT4)


def test_other_tiers_are_refused() -> None:
    with pytest.raises(FhoptError, match="cannot become a kernel"):
        render(KernelSpec(((7, 16, 0.1),), (), 16, 16, "float32", False), "triton")


def test_candidates_begin_with_the_default_and_none_comes_twice() -> None:
    for rows in (1, 8, 20, 500):
        found = candidates(INT4, rows)
        assert found[0] == default_config(INT4, rows)
        assert len(set(found)) == len(found) > 5
        assert all(config.block_m & (config.block_m - 1) == 0 for config in found)


# --------------------------------------------------------------------------------------------------- calls


def test_splits_fill_the_device_in_whole_rounds_and_are_never_short() -> None:
    places = 132 * 8
    assert choose_splits(64, 32768, places) == 16  # 17 would leave 32 programs to a second round
    assert choose_splits(700, 32768, places) == 3  # 2,100 programs in two rounds, not 700 in one
    assert choose_splits(100 * places, 32768, places) == 1
    assert choose_splits(1, 10**7, places) > 120
    assert choose_splits(1, 300, places) == choose_splits(1, 0, places) == 1


def test_the_tuned_configuration_is_used_and_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked, tuned = [], Config(128, 16, 8, 4)

    def tuned_config(spec: KernelSpec, rows: int, name: str) -> Config | None:
        asked.append((rows, name))
        return tuned if rows <= 4 else None

    monkeypatch.setattr("fhopt.codegen.gpu.launch.tuned_config", tuned_config)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    kernel = TritonKernel(Stub("stub"), INT4)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert kernel._config(3, first) == kernel._config(4, first) == kernel._config(4, second) == tuned
    assert kernel._config(5, first) == default_config(INT4, 5)
    assert asked == [(4, "card 0"), (4, "card 1"), (8, "card 0")]
    assert kernel._config(3, torch.device("cpu")) == default_config(INT4, 3)
    assert len(asked) == 3


class Launched:
    """A kernel that does nothing, and spilled when it was compiled."""

    n_spills = 8

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Launched]:
        return lambda *_, **__: self


def test_a_kernel_that_spills_is_told_of_once_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhopt.codegen.gpu.launch._warned", set())
    module = Stub("stub")
    module.attention_kernel = module.merge_kernel = Launched()  # type: ignore[assignment]
    odd, even = Case(ODD, FOUR, 4, 1, 1, 1, 20), Case(((8, 16, 0.1),), ((4, 32, 0.3),), 4, 1, 1, 1, 20)

    def call(case: Case) -> None:
        kernel: LatentKernel = TritonKernel(module, case.spec())
        kernel(*inputs(case), None, **case.options())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(even)  # rows as they are fitted for a GPU: another plan would not help
    with pytest.warns(RuntimeWarning, match=r"keeps 32 bytes a thread in memory.* fhopt fit MODEL --device"):
        call(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(odd)


class Stub(ModuleType):
    """A module with kernels that are never launched."""

    attention_kernel = merge_kernel = None


FIRST_PAGE = torch.zeros(2, 1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "features", "message"),
    [
        pytest.param({"key": lambda x: x[..., :-1]}, {}, "key has shape", id="row"),
        pytest.param({"key": lambda x: x.float()}, {}, "codes are torch.uint8", id="type"),
        pytest.param({"value_scale": lambda x: None}, {}, "value_scale is none", id="scale"),
        pytest.param({"query": lambda x: x[..., :-1]}, {}, "build their kernel", id="query"),
        pytest.param({}, {"softcap": 3.0}, "build their kernel", id="softcap"),
        pytest.param({}, {"causal": True}, "need positions", id="positions"),
        pytest.param({}, {"sinks": torch.zeros(3)}, "every query head", id="sinks"),
        pytest.param({}, {"pages": torch.zeros(2, 1, 1, dtype=torch.int32)}, "multiple of 8", id="no page"),
        pytest.param(
            {}, {"pages": torch.zeros(2, 1, 1, dtype=torch.int32), "page_tokens": 20}, "multiple of 8", id="page"
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Callable[[Tensor], Tensor | None]], features: dict[str, Any], message: str
) -> None:
    pytest.importorskip("triton")
    case = Case(FOUR, FOUR, 4, 1, 1, 1, 20)
    names = ("query", "key", "key_scale", "value", "value_scale")
    x = [
        change[name](t) if t is not None and name in change else t for name, t in zip(names, inputs(case), strict=True)
    ]
    kernel: LatentKernel = TritonKernel(Stub("stub"), case.spec())
    with pytest.raises(ValueError, match=message):
        kernel(*x, None, **({"scale": 1.0} | features))


def test_calls_on_a_gpu_get_the_kernel_in_the_type_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KernelSpec] = []
    monkeypatch.setattr(DISPATCH, "build_triton", asked.append)
    tiers = ((4,), (64,), (0.3,), (8,), (16,), (0.1,))
    query, key, value = (torch.empty(1, 1, 1, n, device="meta", dtype=torch.bfloat16) for n in (64, 32, 16))
    DISPATCH._kernel(query, key, value, tiers, False)
    assert asked == [KernelSpec(((4, 64, 0.3),), ((8, 16, 0.1),), 64, 16, "bfloat16", False)]


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
