"""The Triton kernel of the head's search: under the interpreter against float64, and compiled for GPUs."""

from __future__ import annotations

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
import math
import torch
from fhopt.lm_head import fitting as head_fitting
from fhopt.codegen.gpu.lm_head import SCORED, bound, search_head_triton
from fhopt.lm_head.quantize import dequantize
from fhopt.lm_head.fitting import HeadOptions, fit_weight, site_for

torch.manual_seed(0)
torch.set_num_threads(1)

def made(weight, hidden=None, bias=None, bits="8"):
    if bits == "mixed":
        head_fitting.SHARES, bits = (1 / 2,), "auto"
    return fit_weight(site_for(weight), weight, bias, hidden, HeadOptions(bits=bits, iterations=1))

def skewed(count, width):
    return torch.randn(count, width) * 3 / torch.arange(1, width + 1) + 1
"""

BOUNDS = """
for bits in ("4", "8", "mixed"):
    for vocabulary, width, count in ((150, 72, 3), (37, 21, 17)):
        weight, states, bias = torch.randn(vocabulary, width), skewed(99, width), torch.randn(vocabulary)
        head = made(weight, states, bias, bits)
        hidden = torch.cat([skewed(count - 1, width), torch.zeros(1, width)])
        estimates, bounds = bound(hidden, weight, bias, head.codes)
        exact = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
        assert (bounds.double() >= exact).all(), bits
        rows, values, numbers = dequantize(head.codes)
        order = rows[rows >= 0].argsort()
        values, numbers = values[rows >= 0][order], numbers[rows >= 0][order]
        turned = hidden.double() @ head.codes.transform.double().T
        offset = (hidden.double() @ head.codes.centre.double()).unsqueeze(1)
        wanted = turned @ values.T + offset + bias
        parts = turned.split([head.codes.lead, head.codes.rank - head.codes.lead], 1)
        reach, rounded = torch.zeros_like(wanted), torch.zeros_like(wanted)
        for i, part in enumerate(parts):
            if part.shape[1]:
                reach += part.norm(dim=1, keepdim=True) * numbers[:, 2 + i]
                half = part.abs().amax(1, keepdim=True) / 254  # half a step of what h' is rounded to
                rounded += half * part.shape[1] ** 0.5 * numbers[:, 4 + i]
        assert ((estimates - wanted).abs() <= rounded + 1e-4).all(), bits
        assert (bounds <= wanted + reach + 2 * rounded + 1e-3 * reach + 1e-3).all(), bits
"""

SEARCHES = """
for dtype in (torch.float32, torch.bfloat16):
    weight, states = torch.randn(700, 40).to(dtype), skewed(99, 40)
    head, hidden = made(weight, states), skewed(4, 40).to(dtype)
    found = search_head_triton(hidden, weight, None, head.codes, head.search(keep=3, logits=True))
    exact = (hidden.double() @ weight.double().T).to(dtype).float()
    wanted = exact.sort(dim=1, descending=True, stable=True)
    assert (found.counts == SCORED).all()
    assert torch.equal(found.ids[:, :3].long(), wanted.indices[:, :3])
    torch.testing.assert_close(found.values[:, :3], wanted.values[:, :3], rtol=1e-5, atol=1e-5)
    assert ((found.logits > -math.inf).sum(1) == SCORED).all() and found.logits.dtype == dtype

weight = torch.randn(700, 40)
head = made(weight)
hidden = torch.randn(4, 40)
hidden[1, 3], hidden[2, 5], hidden[3] = math.nan, math.inf, 0
counts = search_head_triton(hidden, weight, None, head.codes, head.search()).counts
assert (counts < 0).tolist() == [False, True, True, True]
few = search_head_triton(hidden[:1], weight, None, head.codes, head.search(budget=1))
best = (hidden[:1] @ weight.T).argmax(1)
assert few.counts[0] == -1 or few.ids[0, 0] == best
everything = search_head_triton(hidden[:1], weight[:200], None, made(weight[:200]).codes, head.search(keep=200))
assert torch.equal(everything.ids.long(), (hidden[:1] @ weight[:200].T).sort(dim=1, descending=True, stable=True)[1])
twins = weight.clone()
twins[[9, 400, 30]] = 4 * twins[500]
found = search_head_triton(twins[500:501], twins, None, made(twins).codes, head.search(keep=3))
assert found.ids[0, :3].tolist() == [9, 30, 400]
"""

COMPILED = """
import dataclasses
from pathlib import Path
from fhopt.codegen.gpu import lm_head
from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.resources import CompileRequest, compile_kernels, objection

types = {"codes": "*i32", "hidden": "*i8", "about": "*fp32", "estimates": "*fp32", "bounds": "*fp32"}
types |= dict.fromkeys(("count", "slots", "vocabulary", "words", "lead", "rank"), "i32")
blocks = {"BLOCK_M": lm_head.BLOCK_M, "ROWS": lm_head.ROWS, "STEP": lm_head.STEP}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
request = CompileRequest(
    Path(lm_head.__file__).read_text(), "bounds_kernel", types | dict.fromkeys(blocks, "constexpr"), blocks,
    aligned, {"num_warps": 4, "num_stages": 3},
)
for name in ("h100", "a100-80"):
    (found,) = compile_kernels([request], GPUS[name])
    assert not objection(found, GPUS[name]) and found.tensor_cores, (name, found)
"""


def run(text: str, folder: Path, **environment: str) -> None:
    path = folder / "script.py"
    path.write_text(COMMON + text)
    settings: dict[str, Any] = os.environ | {"FHOPT_CACHE_DIR": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=settings, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("text", [BOUNDS, SEARCHES], ids=["bounds", "searches"])
def test_the_kernel_is_right_under_the_interpreter(text: str, tmp_path: Path) -> None:
    run(text, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernel_fits_real_gpus_and_uses_their_tensor_cores(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "triton"))
