"""Generated Triton kernels for many queries: right numbers under the interpreter, machine code for GPUs elsewhere.

`interpret` runs in a process of its own and hands back what failed as JSON (see test_triton_attention.py).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codegen import FOUR, HALVES, ODD, PLANES, UNCODED, side
from test_triton_attention import assert_close, right_bfloat16
from torch import Tensor

from fhopt.chunks import rebuilt_attention_reference
from fhopt.codegen.gpu import configs, prefill_launch
from fhopt.codegen.gpu.configs import Config, prefill_config, rebuild_config
from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.prefill import padded, render, table
from fhopt.codegen.gpu.prefill_launch import build_prefill, decoder_rows
from fhopt.codegen.gpu.resources import Request, compile_kernels, objection
from fhopt.codegen.gpu.signatures import prefill_example
from fhopt.codegen.tiers import Tiers
from fhopt.errors import FhoptError
from fhopt.spec import SUPPORTED_BITS, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
SMALL = Config(block_t=16, block_m=16, num_warps=4, num_stages=1)
STEPS = {8: 0.02, 4: 0.3, 2: 0.9}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


# --------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Chunk:
    """One kernel and the shapes it is tried on."""

    key_tiers: Tiers
    value_tiers: Tiers
    heads: int = 4  # H
    groups: int = 2  # G
    key_heads: int = 1  # J of the keys
    value_heads: int = 1
    queries: int = 5
    tokens: int = 40
    size: int = 24  # D
    value_size: int = 16  # E
    softcap: float = 0.0
    width: int = 24  # R of uncoded sides
    dtype: torch.dtype = torch.float32

    def tensors(self) -> list[Any]:
        """query, then rows, scale and decoder of keys and of values."""
        found: list[Any] = [torch.randn(2, self.heads, self.queries, self.size).to(self.dtype)]
        for tiers, heads, size in (
            (self.key_tiers, self.key_heads, self.size),
            (self.value_tiers, self.value_heads, self.value_size),
        ):
            width = sum(w for _, w, _ in tiers) or self.width
            rows, scale = side(tiers, heads, self.tokens, width)
            decode = torch.randn(self.groups, size, width) / width**0.5
            found += [rows if tiers else rows.to(self.dtype), scale, decode.to(self.dtype)]
        return found

    def options(self) -> dict[str, Any]:
        pairs = (("key", self.key_tiers), ("value", self.value_tiers))
        tiers = {
            f"{name}_{what}": [tier[i] for tier in found]
            for name, found in pairs
            for i, what in enumerate(("bits", "widths", "steps"))
        }
        return tiers | {"scale": 0.25, "softcap": self.softcap}

    def spec(self) -> KernelSpec:
        dtype = str(self.dtype).removeprefix("torch.")
        key, value = (sum(w for _, w, _ in tiers) or self.width for tiers in (self.key_tiers, self.value_tiers))
        return KernelSpec(self.key_tiers, self.value_tiers, key, value, dtype, self.softcap != 0.0)


Found = tuple[Tensor, Tensor]
reference: Any = rebuilt_attention_reference
rebuilt: Any = prefill_launch.rebuilt_attention


def expected(chunk: Chunk, x: list[Any], mask: Tensor | None, lengths: Tensor | None = None) -> Found:
    """The reference in float64."""
    return reference(x[0].double(), *x[1:], mask, lengths, **chunk.options())


def within(
    chunk: Chunk, x: list[Any], mask: Tensor | None = None, lengths: Tensor | None = None, **features: Any
) -> Found:
    """Rebuilt by each program."""
    options = {"scale": 0.25, "softcap": chunk.softcap, "config": SMALL} | features
    kernel: Any = build_prefill(chunk.spec())
    return kernel.attend(x[0], tuple(x[1:4]), tuple(x[4:]), mask, lengths, **options)


def apart(
    chunk: Chunk, x: list[Any], mask: Tensor | None = None, lengths: Tensor | None = None, length: int = 16
) -> Found:
    """Rebuilt first, `length` tokens at a time."""
    before = configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH
    configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH = 0, length, 0
    try:
        return rebuilt(*x, mask, lengths, **chunk.options())
    finally:
        configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH = before


def masks(chunk: Chunk) -> list[Any]:
    """None, bool with rows that see nothing, additive of full shape, bool for all queries alike, additive [T]."""
    shape = 2, 1, chunk.queries, chunk.tokens
    whole = torch.rand(shape) > 0.4
    whole[0, 0, -1] = False
    bias = torch.randn(2, chunk.heads, *shape[2:])
    bias[1, :, 0] = -torch.inf
    padding = torch.arange(chunk.tokens).expand(2, 1, 1, chunk.tokens) >= torch.tensor([0, 9]).view(2, 1, 1, 1)
    return [None, whole, bias, padding, torch.randn(chunk.tokens)]


a_side = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 5).map(lambda n: 8 * n)), min_size=0, max_size=3
).map(lambda pairs: tuple((bits, width, 3.0 / 2 ** min(bits, 8)) for bits, width in pairs))


@st.composite
def a_chunk(draw: st.DrawFn) -> Chunk:
    groups = draw(st.sampled_from([1, 2, 4, 6]))
    shared = st.sampled_from([n for n in (1, 2, 3, 6) if groups % n == 0])
    return Chunk(
        draw(a_side), draw(a_side), groups * draw(st.integers(1, 3)), groups, draw(shared), draw(shared),
        draw(st.integers(1, 9)), draw(st.integers(1, 50)), draw(st.integers(8, 24)), draw(st.integers(8, 24)),
        draw(st.sampled_from([0.0, 4.0])), draw(st.integers(1, 40)),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chunk=a_chunk(), kind=st.integers(0, 4), splits=st.integers(1, 3), seed=st.integers(0, 99),
    lengths=st.sampled_from([None, (7, 50), (0, 33)]), way=st.sampled_from(["within", "apart"]),
)  # fmt: skip
def any_spec_agrees_with_the_reference(
    chunk: Chunk, kind: int, splits: int, seed: int, lengths: tuple[int, int] | None, way: str
) -> None:
    torch.manual_seed(seed)
    x, mask = chunk.tensors(), masks(chunk)[kind]
    ends = None if lengths is None else torch.tensor(lengths)
    found = within(chunk, x, mask, ends, splits=splits) if way == "within" else apart(chunk, x, mask, ends)
    assert_close(found, expected(chunk, x, mask, ends))


def ragged_lengths_end_where_they_say() -> None:
    chunk = Chunk(FOUR, HALVES)
    x = chunk.tensors()
    for lengths in (torch.tensor([40, 17]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor(33)):
        wanted = expected(chunk, x, None, lengths)
        for splits in (1, 3):
            assert_close(within(chunk, x, None, lengths, splits=splits), wanted)
        assert_close(apart(chunk, x, None, lengths), wanted)


def no_token_at_all_gives_zeros() -> None:
    chunk = Chunk(FOUR, ODD, tokens=0)
    x = Chunk(FOUR, ODD, tokens=1).tensors()
    x = [t[:, :, :0] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(x)]
    for splits in (1, 2):
        output, lse = within(chunk, x, splits=splits)
        assert output.shape == (2, 4, 5, 16) and not output.any() and (lse == -math.inf).all()
    output, lse = rebuilt(*x, None, None, **chunk.options())
    assert output.shape == (2, 4, 5, 16) and not output.any() and (lse == -math.inf).all()


def rows_that_see_nothing_give_zeros() -> None:
    chunk = Chunk(FOUR, FOUR)
    x = chunk.tensors()
    mask = torch.ones(2, 1, 5, 40, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 0, 0, :20] = False
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        for way in (within, apart):
            found = way(chunk, x, form)
            assert (found[1][0, :, 1] == -math.inf).all() and not found[0][0, :, 1].any()
            assert_close(found, expected(chunk, x, mask))


def the_lowest_mask_lets_a_row_attend_evenly() -> None:
    chunk = Chunk(UNCODED, UNCODED)
    x = chunk.tensors()
    low = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    output, _ = within(chunk, x, low)
    values = torch.einsum("bjtr,ger->bge", x[4], x[6]) / 40
    torch.testing.assert_close(output, values.repeat_interleave(2, 1).unsqueeze(2).expand_as(output))


def rows_that_are_keys_and_values_need_no_decoder() -> None:
    chunk = replace(Chunk(UNCODED, UNCODED, key_heads=2, value_heads=2), width=24, value_size=24)
    x = chunk.tensors()
    x[3] = x[6] = None
    for mask in masks(chunk):
        for splits in (1, 2):
            assert_close(within(chunk, x, mask, splits=splits), expected(chunk, x, mask))
        found = rebuilt(*x, mask, None, **chunk.options())
        assert_close(found, expected(chunk, x, mask))


def rows_of_a_longer_cache_are_read_where_they_are() -> None:
    chunk = Chunk(ODD, FOUR, tokens=30)
    long = replace(chunk, tokens=50).tensors()
    for cut in (slice(7, 37), slice(1, 31)):
        x = [t[:, :, cut] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(long)]
        for way in (within, apart):
            assert_close(way(chunk, x), expected(chunk, x, None))
    x = [t[:, :, :30] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(long)]
    x[0] = x[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(within(chunk, x), expected(chunk, x, None))


def wide_decoders_are_not_held() -> None:
    tiers: Tiers = ((4, 128, 0.3), (2, 512, 0.9))
    chunk = Chunk(tiers, FOUR, tokens=20)
    x = chunk.tensors()
    sides: Any = tuple(x[1:4]), tuple(x[4:])
    assert build_prefill(chunk.spec()).decoder_bytes(sides) == 4 * (640 * 32 + 64 * 16) > prefill_launch.WITHIN_BYTES
    kernels: Any = prefill_launch.PrefillKernel
    calls, rebuild = list[int](), kernels.rebuild

    def noted(self: Any, side: int, *args: Any) -> Any:
        calls.append(side)
        return rebuild(self, side, *args)

    kernels.rebuild = noted
    try:
        assert_close(rebuilt(*x, None, None, **chunk.options()), expected(chunk, x, None))
    finally:
        kernels.rebuild = rebuild
    assert calls == [0, 1]


def many_rows_are_cut_into_tiles_and_rebuilt_apart() -> None:
    chunk = Chunk(HALVES, FOUR, queries=40, tokens=20)  # 80 rows of a kv head
    x = chunk.tensors()
    kernels: Any = prefill_launch.PrefillKernel
    calls, attend = list[KernelSpec](), kernels.attend

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self.spec)
        return attend(self, *args, **options)

    kernels.attend = noted
    try:
        for queries, coded in ((40, False), (30, True)):
            part = [x[0][:, :, :queries], *x[1:]]
            found = rebuilt(*part, None, None, **chunk.options())
            assert_close(found, expected(chunk, part, None))
            assert bool(calls.pop().key_tiers) == coded and not calls
    finally:
        kernels.attend = attend


def half_precision_multiplies_in_its_own_type() -> None:
    right_bfloat16()
    for dtype, tolerance in ((torch.bfloat16, 2**-6), (torch.float16, 2**-9)):  # keys, values and weights are rounded
        for tiers in (((8, 16, 0.02), (4, 64, 0.3)), ((6, 64, 0.08), (16, 16, 0.0)), UNCODED):
            chunk = Chunk(tiers, tiers, dtype=dtype)
            x = chunk.tensors()
            for found in (within(chunk, x), apart(chunk, x, length=32)):
                assert found[0].dtype == dtype and found[1].dtype == torch.float32
                assert_close(found, expected(chunk, x, None), tolerance)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        any_spec_agrees_with_the_reference,
        ragged_lengths_end_where_they_say,
        no_token_at_all_gives_zeros,
        rows_that_see_nothing_give_zeros,
        the_lowest_mask_lets_a_row_attend_evenly,
        rows_that_are_keys_and_values_need_no_decoder,
        rows_of_a_longer_cache_are_read_where_they_are,
        many_rows_are_cut_into_tiles_and_rebuilt_apart,
        wide_decoders_are_not_held,
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


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("triton"))
    environment = dict(os.environ) | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests"), "FHOPT_CACHE_DIR": folder,
        "TRITON_CACHE_DIR": folder, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "import test_triton_chunk as t; t.interpret()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_under_the_interpreter(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


# --------------------------------------------------------------------------------------------------- machine code


def planned(size: int, *bits: int) -> KernelSpec:
    """A spec of latents as wide as a head of `size`, in equal parts of these bits."""
    tiers = tuple((b, size // len(bits), STEPS[b]) for b in bits)
    return KernelSpec(tiers, tiers, size, size, "bfloat16", False)


SHAPES = [planned(128, *bits) for bits in ((8,), (4,), (2,), (8, 4))] + [planned(64, 8, 4)]


WIDE = [planned(256, 8, 4), *(planned(512, *bits) for bits in ((4,), (8, 4), (8, 4, 4, 2)))]


def of_each_kind(name: str, found: list[Any], fewer: list[Any]) -> list[Any]:
    """An A100 has the configurations and the instructions of an L4, and more room: it gets the fullest ones."""
    return fewer if name == "a100-80" else found


def requests(
    spec: KernelSpec, gpu: str, rows: int = 512, rebuilds: bool = True, size: int = 0, **features: Any
) -> list[Request]:
    """The kernels of a spec, as they are launched with their default configurations; size: D, R unless given."""
    size = size or spec.key_width
    config = prefill_config(spec, rows, size, size, rebuilds, int(GPUS[gpu].arch))
    text, found = render(spec), []
    for kernel, arguments in prefill_example(spec, config, size, size, rebuilds, **features).items():
        if kernel == "rebuild_kernel":
            config = rebuild_config(len(table(spec.key_tiers, spec.key_width, spec.dtype).channels))
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        found.append(Request(text, kernel, *arguments, options | prefill_launch.CUDA_OPTIONS))
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_defaults_fit_gpus_that_are_not_here_and_use_tensor_cores(name: str) -> None:
    asked = [request for spec in of_each_kind(name, SHAPES, SHAPES[3:4]) for request in requests(spec, name)]
    assert {request.kernel for request in asked} == {"chunk_kernel", "rebuild_kernel"}
    for request, found in zip(asked, compile_kernels(asked, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (request.kernel, request.text[:60], found)
        assert found.spilled == 0 and found.shared <= GPUS[name].block_shared
        assert found.tensor_cores.get("wgmma.mma_async" if name == "h100" else "mma.sync", 0) > 0, (request, found)
    widest = of_each_kind(name, WIDE, WIDE[-1:])
    wide = [request for spec in widest for request in requests(spec, name, size=128)[1:]]  # too wide for the other
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
        assert found.tensor_cores and found.loop_copies, found  # rows are copied ahead of their use


# --------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("spec", SHAPES[:4], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_file_is_python_that_a_linter_passes_and_always_the_same(
    spec: KernelSpec, dtype: str, tmp_path: Path
) -> None:
    text = render(replace(spec, dtype=dtype))
    assert text == render(replace(spec, dtype=dtype))
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
    text = render(planned(128, 4))
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


def test_heads_are_padded_to_what_products_want() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 80, 128, 160)] == [16, 16, 32, 64, 128, 128, 256]
    rows, bias = decoder_rows(torch.randn(2, 80, 24), ((8, 24, 0.1),), torch.bfloat16)
    assert rows.shape[::2] == (2, 128) and rows.dtype == torch.bfloat16 and bias.shape == (2, 128)
    assert not rows[..., 80:].any() and not bias[..., 80:].any()


def test_other_tiers_are_refused() -> None:
    with pytest.raises(FhoptError, match="cannot become a kernel"):
        render(KernelSpec(((7, 16, 0.1),), (), 16, 16, "float32", False))


# --------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({3: None}, "key_decode is none; codes need a decoder", id="no decoder"),
        pytest.param({6: torch.zeros(2, 16, 8)}, r"value_decode has shape \(2, 16, 8\).*\[G, D, 64\]", id="width"),
        pytest.param({3: torch.zeros(3, 24, 64)}, "there are 3 heads of keys and 2 of values", id="heads"),
        pytest.param({0: torch.zeros(2, 4, 5, 64)}, r"\[B, H, S, 24\].*not absorbed", id="query"),
        pytest.param({0: torch.zeros(2, 3, 5, 24)}, "H a multiple of 2", id="query heads"),
        pytest.param({1: torch.zeros(2, 1, 40, 31, dtype=torch.uint8)}, "key has shape", id="row"),
        pytest.param({2: None}, "key_scale is none", id="scale"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change: dict[int, Tensor | None], message: str) -> None:
    chunk = Chunk(FOUR, FOUR)
    kernel = prefill_launch.PrefillKernel(Stub("stub"), chunk.spec())
    x: Any = [change.get(i, t) for i, t in enumerate(chunk.tensors())]
    with pytest.raises(ValueError, match=message):
        kernel.attend(x[0], tuple(x[1:4]), tuple(x[4:]), None, scale=1.0)


class Stub(ModuleType):
    """A module with kernels that are never launched."""

    chunk_kernel = rebuild_kernel = None


def test_parts_are_joined_by_their_sums() -> None:
    logits, values = torch.randn(2, 3, 4, 5, 30, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    logits[:, 0, 0, 0] = logits[0, 1] = -math.inf
    parts = [
        (torch.softmax(x, -1).nan_to_num(0.0) @ v, x.logsumexp(-1))
        for x, v in zip(logits, (values, -values), strict=True)
    ]
    output, lse = prefill_launch.joined(*map(torch.stack, zip(*parts, strict=True)))
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
