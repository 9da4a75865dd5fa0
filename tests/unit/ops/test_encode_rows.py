"""Encoding rows: calls without kernel support, and refused calls."""

from __future__ import annotations

import pytest
import torch
from needs import needs_triton

pytestmark = needs_triton


def test_calls_without_kernel_support_run_the_reference() -> None:
    from fhopt.codegen.gpu.encode_rows import encode_reference, encode_triton

    plan = ([4], [16], [0.3])
    x, basis = torch.randn(1, 2, 3, 8), torch.randn(1, 16, 16, dtype=torch.float64)
    found, expected = ((torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4).half()) for _ in range(2))
    encode_triton(x, basis, *plan, *found, at=1)
    encode_reference(x, basis, *plan, *expected, at=1)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[0].any()


X, BASIS = torch.zeros(2, 4, 3, 8), torch.zeros(2, 16, 16)
CODES, SCALE = torch.zeros(2, 2, 5, 8, dtype=torch.uint8), torch.zeros(2, 2, 5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": BASIS[:, :, :8]}, r"basis has shape \(2, 16, 8\); expected \[J, R, 4/J \* 8\]"),
        ({"basis": torch.zeros(3, 16, 16)}, "J a divisor of 4"),
        ({"codes": CODES.int()}, "codes are torch.int32"),
        ({"scale": SCALE.float()}, "scale torch.float32"),
        ({"scale": SCALE[:, :, :4]}, r"scale torch.float16 \(2, 2, 4\)"),
        (
            {"codes": CODES[:1], "scale": SCALE[:1]},
            r"for 2 sequences and 2 latent heads, \[2, 2, rows, bytes\]",
        ),
        ({"codes": CODES[..., :7]}, "7 bytes per row and basis has 16 channels; expected 8 and 16"),
        ({"places": torch.zeros(2, dtype=torch.int64)}, r"places are torch.int64 \(2,\); expected torch.int64 \(3,\)"),
        ({"table": torch.zeros(2, 1, dtype=torch.int64)}, r"table is torch.int64 \(2, 1\); expected torch.int32"),
    ],
)
def test_tensors_of_different_calls_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    from fhopt.codegen.gpu.encode_rows import encode_triton

    arguments = {"x": X, "basis": BASIS, "codes": CODES, "scale": SCALE} | change
    with pytest.raises(ValueError, match=message):
        encode_triton(bits=[4], widths=[16], steps=[0.3], **arguments)  # type: ignore[arg-type]
