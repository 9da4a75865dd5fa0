"""The byte layout of a row's channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from triton_machine_code import INT4, MIXED, PLANED, bytes_of

from fhopt.codegen.gpu.row_layout import is_crowded, pieces, places, row_size
from fhopt.codegen.tiers import Tiers
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SUPPORTED_BITS


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
        assert sum(piece.word == 8 for piece in found) <= 2  # the first bit group, and the rest of the second


def row_width(tiers: Tiers) -> int:
    return sum(width for _, width, _ in tiers)


def test_rows_with_padding_or_two_planes_are_crowded() -> None:
    assert is_crowded(PLANED)
    assert is_crowded(replace(INT4, value_tiers=((4, 120, 0.3), (2, 8, 0.5))))
    assert is_crowded(MIXED)  # 32 channels of 2 bits are 8 bytes
    assert not is_crowded(INT4)
