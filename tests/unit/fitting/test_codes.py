"""Which bit groups use trellis codes."""

from __future__ import annotations

import pytest

from fhopt.fitting import codes


@pytest.mark.parametrize(
    ("code", "bits", "width", "expected"),
    [
        ("trellis", 2, 16, True), ("trellis", 2, 8, False), ("trellis", 1, 24, False), ("trellis", 4, 8, True),
        ("trellis", 5, 64, False), ("trellis", 16, 64, False), ("uniform", 2, 64, False),
    ],
)  # fmt: skip
def test_wide_groups_of_few_bits_use_them(code: str, bits: int, width: int, expected: bool) -> None:
    assert codes.gets_trellis(code, bits, width) is expected


@pytest.mark.parametrize(
    ("code", "ratio", "is_read", "expected"),
    [
        ("auto", 8, True, "trellis"), ("auto", 5, True, "trellis"), ("auto", 4.9, True, "uniform"),
        ("auto", 8, False, "uniform"), ("trellis", 2, False, "trellis"), ("uniform", 12, True, "uniform"),
    ],
)  # fmt: skip
def test_auto_uses_trellis_if_it_pays_and_runs(code: str, ratio: float, is_read: bool, expected: str) -> None:
    assert codes.chosen(code, ratio, is_read) == expected


def test_it_reduces_the_loss_as_measured_and_changes_nothing_without() -> None:
    for bits in (0, 1, 2, 3, 4, 5, 8, 16):
        assert codes.relative_error(codes.UNIFORM, bits) == 1
        assert (codes.relative_error(codes.TRELLIS, bits) < 1) is (bits in (1, 2, 3, 4))


def test_its_bit_group_is_marked() -> None:
    tier = codes.trellis_tier(2, 40)
    assert tier.is_trellis and (tier.bits, tier.width) == (2, 40)
