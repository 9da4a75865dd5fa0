"""One Triton kernel that encodes keys and values into rows, against `encode` followed by `pack`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from needs import needs_triton

ROOT = Path(__file__).resolve().parents[4]
pytestmark = needs_triton

COMMON = """
import torch
from fhopt.ops import algebra, packing
from fhopt.codegen.gpu.encode_rows import encode_reference, encode_triton

torch.manual_seed(0)
MIXED = ([3, 16, 5, 8, 4, 2, 1, 6], [8, 72, 24, 16, 80, 8, 8, 16], [0.6, 0.0, 0.15, 0.02, 0.3, 1.0, 1.5, 0.08])
LARGE = ([3, 16, 5, 8], [8, 72, 24, 16], [0.6, 0.0, 0.15, 0.02])

def storage(plan, *shape):
    "Rows that hold something already."
    size = sum(b * w for b, w in zip(plan[0], plan[1])) // 8
    return torch.full((*shape, size), 165, dtype=torch.uint8), torch.full(shape, 7.0, dtype=torch.float16)

def both(x, basis, plan, rows, **where):
    "Storage as the kernel leaves it, and as the reference does."
    found, expected = storage(plan, *rows), storage(plan, *rows)
    encode_triton(x, basis, *plan, *found, **where)
    encode_reference(x, basis, *plan, *expected, **where)
    return found, expected

def same(*arguments, **where):
    found, expected = both(*arguments, **where)
    for a, b in zip(found, expected):
        assert torch.equal(a, b), (arguments[2], where, (a != b).sum())
    return expected

def whole(*shape):
    return torch.randint(-8, 9, shape).float()

def powers(*shape):
    return 2.0 ** torch.randint(-2, 3, shape) * torch.randint(-1, 2, shape)
"""


EXACT = """
for b in (1, 2, 3, 4, 5, 6, 8, 16):
    same(whole(1, 2, 5, 16), powers(1, 24, 32), ([b], [24], [3 / 2**b]), (1, 1, 6))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    same(whole(2, 4, 19, 24).to(dtype), powers(2, 232, 48), MIXED, (2, 2, 40), at=5)
x, basis = whole(2, 4, 7, 40), powers(4, 120, 40)  # J = G; a head in two parts
same(x.transpose(0, 1).contiguous().transpose(0, 1), basis, LARGE, (2, 4, 9))
same(x[..., ::2], basis[..., ::2], LARGE, (2, 4, 9))
same(x[:, :, :0], basis, LARGE, (2, 4, 9))
same(x * 0, basis, LARGE, (2, 4, 9))
same(whole(2, 1, 7, 8) * torch.tensor([1e-30, 1e30]).reshape(2, 1, 1, 1), powers(1, 120, 8), LARGE, (2, 1, 9))
codes, scale = storage(LARGE, 2, 9, 4)
views = codes.transpose(1, 2), scale.transpose(1, 2)  # a storage in another order
encode_triton(x, basis, *LARGE, *views)
expected = same(x, basis, LARGE, (2, 4, 9))
assert torch.equal(views[0], expected[0]) and torch.equal(views[1], expected[1])
"""


ROUNDED = """
def latents(plan, *shape):
    return torch.randn(*shape, sum(plan[1])) * 10.0 ** torch.empty(*shape, 1).uniform_(-4, 3)

for plan in (MIXED, LARGE, ([16, 16], [16, 8], [0.0, 0.0])):
    z = latents(plan, 2, 1, 21)
    codes, scale = same(z, torch.eye(z.shape[-1]).unsqueeze(0), plan, (2, 1, 21))
    expected = packing.pack_reference(z, *plan)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
"""


PLACES = """
x, basis = whole(2, 2, 6, 16), powers(1, 120, 32)
places = torch.tensor([3, -1, 0, 39, 17, 18])
codes, scale = same(x, basis, LARGE, (2, 1, 40), places=places)
left = [i for i in range(40) if i not in places]
assert (codes[:, :, left] == 165).all() and (scale[:, :, left] == 7).all()
assert (scale[:, :, places[places >= 0]] != 7).all()

table = torch.tensor([[4, 0, 2], [1, -1, 5]], dtype=torch.int32)
x = whole(2, 2, 9, 16)
codes, scale = same(x, basis, LARGE, (6, 1, 4), at=2, table=table)  # rows 2 to 10: pages 4, 0, 2 and 1, none, 5
written = (scale != 7).squeeze(1)
rows = {4: [2, 3], 0: [0, 1, 2, 3], 2: [0, 1, 2], 1: [2, 3], 5: [0, 1, 2], 3: []}
assert {page: written[page].nonzero().flatten().tolist() for page in range(6)} == rows
same(x[:, :, :4], basis, LARGE, (6, 1, 4), places=torch.tensor([11, -1, 0, 5]), table=table)
"""


NEAR = """
def numbers(codes, plan):
    "Codes as integers, float16 as they are."
    return packing.unscaled(codes, plan[0], plan[1], [1.0] * len(plan[0]))

different = 0
for dtype in (torch.float32, torch.bfloat16):
    x, basis = torch.randn(2, 4, 21, 24).to(dtype), torch.randn(2, 232, 48) / 7
    (codes, scale), (_, known) = both(x, basis, MIXED, (2, 2, 21))
    apart = scale.view(torch.int16).int() - known.view(torch.int16).int()
    assert apart.abs().max() <= 1
    z = algebra.encode(x.double(), basis.double())
    at = 0
    for bits, width, step in zip(*MIXED):
        part, found = z[..., at : at + width], numbers(codes, MIXED)[..., at : at + width]
        at += width
        if bits == 16:
            assert (found - part).abs().max() <= 2e-3 * part.abs().max()
            continue
        u = part / scale.double().unsqueeze(-1) / step
        wanted = u.floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        wrong = found != wanted
        different += int(wrong.sum())
        assert ((u - u.round())[wrong].abs() < 1e-4).all() and ((found - wanted)[wrong].abs() == 1).all()
assert different < 20
"""


STORED = """
from fhopt.codegen.dispatch import encode_rows_by_triton
from fhopt.ops import encode_rows as encoding
from fhopt.ops import registry
from fhopt.cache.quantized_rows import PackedLatents, StaticPackedLatents
from fhopt.cache.store import place_bases
from fhopt.plan import BitGroup, SidePlan

calls = []

def kernel(*arguments):
    calls.append(arguments[0].shape)
    return encode_rows_by_triton(*arguments)

def parts(make, write, tokens):
    rows = make()
    rows.bases = place_bases(plan, tokens[0])
    for x in tokens:
        write(rows, x)
    return rows.parts

def grow(rows, x):
    held = rows.parts[0].shape[2] if rows.parts else 0
    rows.append(x, 0 if not held else first, 16)

def place(rows, x):
    if not rows.parts:
        rows.start(x)
    rows.write(x, torch.tensor([3, 9, 0, 12, 7, 12, 12, 1, 5])[: x.shape[2]])  # the last row is for no token

for dtype in (torch.float32, torch.bfloat16):
    for encoder in (powers(2, 120, 32), powers(1, 120, 64)):
        plan = SidePlan(encoder, powers(4, 16, 120), tuple(BitGroup(*t) for t in zip(*LARGE)))
        first, tokens = 16, [whole(2, 4, 16, 16).to(dtype), whole(2, 4, 9, 16).to(dtype)]
        for make, write, written in (
            (lambda: PackedLatents(plan), grow, tokens), (lambda: StaticPackedLatents(plan, 12), place, tokens[1:])
        ):
            expected = parts(make, write, written)
            assert not calls
            assert registry.use("encode_rows", "cpu", kernel) is None
            found = parts(make, write, written)
            assert calls and registry.use("encode_rows", "cpu", None) is kernel
            calls.clear()
            for a, b in zip(found, expected, strict=True):
                a, b = (part[:, :, :25] if make().__class__ is PackedLatents else part[:, :, :12] for part in (a, b))
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and a.any()

registry.use("encode_rows", "cpu", kernel)
x, basis = whole(1, 1, 4096, 16), powers(1, 120, 16)
assert encoding.encodes_at_once(x[:, :, :64], basis) and encoding.encodes_at_once(x, basis)
encoding.LARGEST = 2 * 4096 * 120 * 16 - 1
assert encoding.encodes_at_once(x[:, :, :64], basis) and not encoding.encodes_at_once(x, basis)  # a whole prompt
checks = torch.library.opcheck(
    torch.ops.fhopt.encode_rows.default, (x[:, :, :5], basis, *LARGE), test_utils=("test_schema", "test_faketensor")
)
assert set(checks.values()) == {"SUCCESS"} and calls
"""


PROGRAMS = {
    "where sums are exact the bytes are those of the reference": EXACT,
    "the same latent gives the same bytes": ROUNDED,
    "rows go to their places and pages and nowhere else": PLACES,
    "a code differs only at the edge of a step": NEAR,
    "a cache holds the same bytes whether one kernel made them or two ops": STORED,  # last: it installs the kernel
}
RUN_EACH = """
import json, sys, traceback
failed = {}
for name, program in json.load(sys.stdin).items():
    try:
        exec(program, {})
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run all programs under Triton's interpreter in one subprocess; return the errors of those that failed."""
    environment = dict(os.environ) | {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
    }
    programs = json.dumps({name: COMMON + program for name, program in PROGRAMS.items()})
    command = [sys.executable, "-c", RUN_EACH]
    done = subprocess.run(command, input=programs, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_under_the_interpreter(name: str, failed: dict[str, str]) -> None:
    assert name not in failed, failed[name]


@pytest.mark.slow
def test_it_compiles_without_spills_for_absent_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.codegen.gpu import encode_rows
    from fhopt.codegen.gpu.gpus import GPUS
    from fhopt.codegen.gpu.resources import CompileRequest, compile_kernels, objection

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = encode_rows.encode_rows_kernel.arg_names
    sizes = {"BLOCK_T": encode_rows.BLOCK_T, "BLOCK_G": encode_rows.BLOCK_G, "BLOCK_D": encode_rows.BLOCK_D}
    aligned = {"size", "x_b", "x_h", "x_t", "basis_j", "basis_r"}

    def request(page: int, options: dict[str, int]) -> CompileRequest:
        constants = sizes | {"PAGE": page} | ({} if page else {"table": None, "places": None})
        types = dict.fromkeys(names, "i32") | {"x": "*bf16", "basis": "*fp32", "codes": "*u8", "scale": "*fp16"}
        types |= {"tiers": "*i32", "places": "*i64", "table": "*i32"} | dict.fromkeys(constants, "constexpr")
        known = [i for i, name in enumerate(names) if types[name].startswith("*") or name in aligned]
        attrs: dict[tuple[int, ...], Any] = {(i,): [["tt.divisibility", 16]] for i in known}
        return CompileRequest(
            Path(encode_rows.__file__).read_text(), "encode_rows_kernel", types, constants, attrs, options
        )

    for name in ("a100-80", "h100", "mi300x"):
        options = encode_rows.OPTIONS if name == "mi300x" else encode_rows.CUDA_OPTIONS
        for found in compile_kernels([request(page, options) for page in (0, 64)], GPUS[name]):
            assert not objection(found, GPUS[name]), (name, found)
            assert found.loop_reads.get("16", 0) > 0, (name, found.loop_reads)  # 16-byte loads of the basis or of x
