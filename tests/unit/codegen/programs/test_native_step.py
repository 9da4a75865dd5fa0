"""A decode step by addresses: attention on a handmade cache, against its parts in torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lowered_functions import CapturedFunction
from needs import needs_compiler
from torch import Tensor

from fhopt.attention.attend import attend_parts
from fhopt.attention.cache_view import SideRows
from fhopt.attention.operands import AttentionOperands, PartMasks
from fhopt.codegen.cpu import graph_kernels
from fhopt.codegen.programs.native_step import CacheSide, DecodeSteps, LayerCall, Spent
from fhopt.codegen.programs.program import SegmentCall
from fhopt.decode.cache_steps import _calls
from fhopt.ops import algebra, packing
from fhopt.ops.cache_operands import CacheOperands

pytestmark = needs_compiler
B, H, G, D, R, SINKS, WINDOW, ROOM, PACKED = 2, 4, 2, 16, 24, 3, 5, 8, 40
GROUPS = algebra.BitGroups([8, 4], [8, 16], [2 / 64, 0.4])


def segment(function: Callable[..., Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> SegmentCall:
    """Return a call of a function's segment, bound to tensors."""
    program = CapturedFunction(function, inputs).lowered()
    externals = (ctypes.c_int64 * program.externals)(*[x.data_ptr() for x in (*inputs, *outputs)])
    return SegmentCall(program, externals)


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("packed", [PACKED, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_attends_and_appends_its_token(dtype: torch.dtype, packed: int, with_means: bool) -> None:
    inputs = [torch.randn(B, n, 1, D).to(dtype) for n in (H, G, G)]
    new = [torch.empty_like(x) for x in inputs]
    attended, output = torch.empty(B, 1, H, D, dtype=dtype), torch.empty(B, 1, H, D, dtype=dtype)
    sides: list[SideRows] = []
    rooms: list[tuple[Tensor, Tensor]] = []
    exact: list[Tensor] = []
    for _ in range(2):
        rows, scale = torch.ops.fhopt.pack(torch.randn(B, 1, packed, R), *GROUPS)
        window = packing.round_rows(torch.randn(B, G, WINDOW, D))
        mean = torch.randn(B, G, 1, D) if with_means else None
        sides.append(SideRows(GROUPS, rows, scale, (torch.randn(G, D, R) / 4).to(dtype), window, mean))
        room = torch.zeros(B, G, ROOM, D, dtype=torch.uint8), torch.zeros(B, G, ROOM, dtype=torch.float16)
        for part, held in zip(room, window, strict=True):
            part[:, :, :WINDOW] = held
        rooms.append(room)
        exact.append(torch.randn(B, G, SINKS + 1, D).to(dtype))
    options = dict(scale=0.25, softcap=0.0)
    k, v = sides
    assert k.window is not None and v.window is not None
    kernels = graph_kernels.cache_kernels(
        CacheOperands(
            new[0], exact[0], exact[1], k.rows, k.scale, k.decode, v.rows, v.scale, v.decode, *k.window, *v.window
        ),
        algebra.group_options(GROUPS, GROUPS) | options,
    )
    assert kernels is not None
    places = [
        CacheSide(tokens, opened, room[0], room[1], WINDOW, side.decode, side.mean)
        for tokens, opened, room, side in zip(new[1:], exact, rooms, sides, strict=True)
    ]
    before = segment(lambda *xs: [2 * x for x in xs], inputs, new)
    after = segment(lambda x: x + 1, [attended], [output])
    calls = _calls(kernels, new[0], sides[0], sides[1], (rooms[0], rooms[1]), exact, options)
    pair = places[0], places[1]
    step = LayerCall((before, after), 2, new[0], attended, pair, calls, 0.25)
    spent = Spent()
    for number in range(2):
        expected = attend_parts(_operands(inputs, exact, sides, rooms, WINDOW + number, options))
        DecodeSteps([step]).run(spent if number else None)
        close = 3e-3 if dtype == torch.float32 else 2e-2  # in 16-bit dtypes, low-bit codes are multiplied in int8
        torch.testing.assert_close(output.float() - 1, expected.transpose(1, 2), rtol=close, atol=close)
        for x, side, room in zip(inputs[1:], sides, rooms, strict=True):
            codes, scale = packing.round_rows(2 * x.float() if side.mean is None else 2 * x.float() - side.mean)
            at = WINDOW + number
            assert torch.equal(room[0][:, :, at : at + 1], codes) and torch.equal(room[1][:, :, at : at + 1], scale)
    assert spent.layers == 1 and spent.linear == 0 < spent.attention < spent.total  # segments without weights


def _operands(
    inputs: list[Tensor],
    exact: list[Tensor],
    sides: list[SideRows],
    rooms: list[tuple[Tensor, Tensor]],
    count: int,
    options: Any,
) -> AttentionOperands:
    """Return the same attention's operands as float32 tensors."""
    query, *tokens = [2 * x.float() for x in inputs]
    opened = [torch.cat([x[:, :, :SINKS].float(), t], 2) for x, t in zip(exact, tokens, strict=True)]
    keys, values = [
        SideRows(s.bit_groups, s.rows, s.scale, s.decode.float(), (codes[:, :, :count], scale[:, :, :count]), s.mean)
        for s, (codes, scale) in zip(sides, rooms, strict=True)
    ]
    return AttentionOperands(query, opened[0], opened[1], keys, values, PartMasks(), **options)
