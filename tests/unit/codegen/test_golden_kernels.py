"""Rendered kernels, byte for byte: one of each family is committed in tests/golden; C++ kernels are not rendered.

After an intended change, regenerate them and review the diff before the commit:

    python -m pytest tests/unit/codegen/test_golden_kernels.py --regenerate-golden
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest

from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu import prefill
from fhopt.plan.kernel_spec import KernelSpec

GOLDEN = Path(__file__).parents[2] / "golden"
# Bit groups of one and of two bit planes, float16, and a softcap.
SPEC = KernelSpec(
    key_tiers=((8, 16, 0.02), (4, 32, 0.25)),
    value_tiers=((3, 32, 0.5), (16, 16, 0.0)),
    key_width=48,
    value_width=48,
    dtype="bfloat16",
    softcap=True,
)
KERNELS: dict[str, Callable[[], str]] = {
    "eager_attention.py": lambda: render_kernel(SPEC, "torch"),
    "gpu_attention.py": lambda: render_kernel(SPEC, "triton"),
    "gpu_prefill.py": lambda: prefill.render_prefill(SPEC),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_generated_kernel_equals_the_committed_one(name: str, request: pytest.FixtureRequest) -> None:
    file, text = GOLDEN / name, KERNELS[name]()
    if request.config.getoption("--regenerate-golden"):
        file.write_text(text, encoding="utf-8")
    golden = file.read_text(encoding="utf-8") if file.exists() else ""
    assert text == golden, difference(name, golden, text)


def difference(name: str, golden: str, text: str) -> str:
    """Describe the first line in which two texts differ, and how to accept the change."""
    pairs = zip_longest(golden.splitlines(), text.splitlines())
    number, (before, after) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return (
        f"tests/golden/{name} is not what is rendered now, first in line {number}:\n  - {before}\n  + {after}\n"
        "If the change is meant: python -m pytest tests/unit/codegen/test_golden_kernels.py --regenerate-golden"
    )


def test_a_difference_is_named_by_its_first_line() -> None:
    words = difference("x.cpp", "a\nb\nc\n", "a\nd\n")
    assert "tests/golden/x.cpp" in words and "line 2:\n  - b\n  + d\n" in words and "--regenerate-golden" in words


def test_every_golden_file_is_rendered_and_small(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--regenerate-golden"):
        pytest.skip("files are being written")
    sizes = {file.name: file.stat().st_size for file in GOLDEN.iterdir() if file.is_file()}
    assert sizes.keys() == KERNELS.keys() and max(sizes.values()) < 30_000
