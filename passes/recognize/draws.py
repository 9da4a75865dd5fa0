"""Random values for the inputs of a graph region: masks, biases, temperatures, symbolic numbers.

A numerical check must not depend on the example values of one call, except those computed from literals only.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import Region, random_like
from fhopt.passes.graph.nodes import SIZED, fake, op_name
from fhopt.passes.recognize.layout import MOVEMENT
from fhopt.passes.recognize.node_roles import CASTS, Roles, condition_key, is_fixed

MILD, SIGNED, LARGE = "mild", "signed", "large"
DRAWS = (MILD, SIGNED, LARGE)
"""How values of a check are drawn: positive factors and masks that hide some keys; numbers of both signs, and rows that
see nothing or everything; operands 30 times larger, zeros among the side values, and rows that see nothing."""
MIXED = "mixed"  # for several masks: rows in which each key is hidden by one mask or another
INDEPENDENT = 3  # masks that the draws "0", "1", "00", "01", ... set to all False or all True; further ones repeat them
SELECTING = frozenset({"index", "gather", "take_along_dim", "written", "index_fill", "index_copy", "blank_scores"})


def random_sides(region: Region, roles: Roles, draw: str = MILD) -> dict[fx.Node, Any]:
    """Draw a value for every input of a region that is not computed from literals only.

    Equal computations get one value, however often the graph repeats them, and a negated mask gets the complement.
    Integers that select elements keep their example value; numeric booleans stay 0 and 1.
    """
    values: dict[fx.Node, Any] = {}
    order: dict[int, int] = {}
    masks: dict[int, int] = {}
    for index, side in enumerate(region.sides):
        if is_fixed(side):
            continue
        value = fake(side)
        if isinstance(value, Tensor):
            number, is_complement = condition_key(side, roles)
            seed = 100 + order.setdefault(number, len(order))
            bit = draw[masks.setdefault(number, len(masks)) % len(draw)] if draw.isdigit() and _is_mask(side) else ""
            drawn = _drawn(side, value.dtype, seed, bit or draw, _selects(side, region))
            if drawn is not None:
                values[side] = _complement(drawn) if is_complement else drawn
        elif _is_number(side, region):
            values[side] = 3 + index % 3 if isinstance(value, (int, torch.SymInt)) else 0.7 + 0.1 * index
    return values


def _complement(drawn: Tensor) -> Tensor:
    return ~drawn if drawn.dtype == torch.bool else 1 - drawn


def _drawn(side: fx.Node, dtype: torch.dtype, seed: int, draw: str, selects: bool) -> Tensor | None:
    numbers = random_like(side, seed)
    if dtype == torch.bool:
        return _mask(numbers, draw)
    if dtype.is_floating_point:
        if is_binary(side):
            return _mask(numbers, draw).double()
        if draw == MILD:
            return numbers.abs() * 0.5 + 0.5
        return numbers * (numbers.abs() > 0.3) if draw == LARGE else numbers
    if dtype.is_complex or selects:
        return None
    return (numbers * 2).round().to(dtype)


def _mask(numbers: Tensor, draw: str) -> Tensor:
    """Convert random values to a mask; after the first draw, some rows (over the last axis) are all False or True.

    A mask of one element has both values in some draw.
    """
    if draw.isdigit():
        return torch.full_like(numbers, draw == "1", dtype=torch.bool)
    if draw == MIXED and numbers.dim():  # even or odd keys, chosen for each row
        is_even = torch.arange(numbers.shape[-1], device=numbers.device) % 2 == 0
        return (numbers[..., :1] > 0) ^ is_even
    mask = numbers > -0.5
    if mask.numel() > 1 and bool(mask.all()):
        mask = numbers > numbers.min()  # an all-True mask would go undetected
    elif mask.numel() > 1 and not bool(mask.any()):
        mask = numbers >= numbers.max()
    if draw == MILD:
        return mask
    if mask.dim() < 1:
        return ~mask if draw == SIGNED else mask
    rows = mask.reshape(-1, mask.shape[-1]) if mask.numel() else mask
    rows = rows.clone()
    if draw == LARGE or len(rows) > 1:
        rows[:1] = False
    rows[1:2] = True
    return rows.reshape(mask.shape)


def mask_draws(region: Region) -> list[str]:
    """Return further draws for the masks of a region: each all True or all False, in all combinations, and MIXED."""
    count = sum(_is_mask(n) for n in region.sides if isinstance(fake(n), Tensor) and not is_fixed(n))
    constant = map("".join, itertools.product("01", repeat=min(count, INDEPENDENT)))
    return [*constant, *[MIXED] * (count > 1)] if count else []


def _is_mask(side: fx.Node) -> bool:
    """Return whether a side is boolean, or a float tensor made from booleans."""
    return fake(side).dtype == torch.bool or (fake(side).is_floating_point() and is_binary(side))


def is_binary(side: fx.Node) -> bool:
    """Return whether a float tensor is a cast of booleans."""
    node = side
    while op_name(node) in MOVEMENT | CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
        value = fake(node)
        if not isinstance(value, Tensor):
            return False
        if value.dtype == torch.bool:
            return True
    return False


def _selects(side: fx.Node, region: Region) -> bool:
    """Return whether the integers of a side select elements in the region."""
    return any(op_name(user) in MOVEMENT | SELECTING for user in side.users if user in region.nodes)


def _is_number(side: fx.Node, region: Region) -> bool:
    """Return whether a symbolic number is an operand in the region, and not a size."""
    users = [user for user in side.users if user in region.nodes]
    is_numeric = isinstance(fake(side), (int, float, torch.SymInt, torch.SymFloat))
    return is_numeric and bool(users) and not any(op_name(user) in SIZED | MOVEMENT | SELECTING for user in users)
