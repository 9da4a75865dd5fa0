"""The score function between q k^T and the softmax, measured by running it: scale, softcap, mask or bias, sinks.

    scores = cap(scale * factors * q k^T) + bias          [ + columns of sinks ]

The path from the product to the softmax is run on values. A zero product gives the bias in any spelling (added, filled,
selected, written by index, ALiBi, relative-position tables, tril buffers, windows); the change per unit of product is
the scale; saturation is a softcap. All other inputs (masks, bias tables, temperatures) are random during the
measurement: none is assumed to have the value of one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, signature
from fhopt.passes.graph.nodes import fake, op_name
from fhopt.passes.recognize.draws import random_sides
from fhopt.passes.recognize.layout import MOVEMENT, axis_values, coordinates, moved
from fhopt.passes.recognize.node_roles import Roles, is_fixed

MASKED = -1e4  # scores overwritten by at most this are masked
ABSORBING = -1e30  # adding a score to this changes nothing, in float32 and float64
MULTIPLICATION = frozenset({"mul", "multiply"})
DIVISION = frozenset({"div", "truediv", "divide", "true_divide"})


@dataclass
class Scores:
    """The score function of one attention.

    region: from the product to the softmax's input. factors: tensors (and whether they divide) that scale the product
    and do not vary over keys. form: the meaning of `mask`: "" (no mask), "add" (added), "keep" (bool, True may attend),
    "fill" (bool, True may not), "computed" (by running the region on zeros). start: the first key column on the
    softmax's axis; columns without keys are sinks.
    """

    region: Region
    scale: float = 1.0
    softcap: float = 0.0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    mask: fx.Node | None = None
    form: str = ""
    sinks: int = 0
    start: int = 0  # the first column of the keys
    levels: bool = False  # masked scores hold finite values
    absorbing: bool = False  # and they are so low that adding a score changes nothing
    blocks: bool = False  # masked scores are overwritten, so that no gradient flows into them


def read_scores(product: fx.Node, end: fx.Node, axis: int, key_axis: int, roles: Roles, base: Evaluator) -> Scores:
    """Measure the score function between the product and `end`. Raises Miss if it has another form.

    axis: the softmax's, in `end`. key_axis: the axis of the keys in the product.
    """
    region = Region(base, [product], end)
    if not region.nodes:
        return Scores(region)
    key = ("scores", signature(region, roles.describe), axis, key_axis)
    if key in roles.known:
        return _as_known(roles.known[key], region)
    result = roles.known[key] = _measured(region, product, axis, key_axis, roles, random_sides(region, roles))
    return result


def _as_known(scores: Scores, region: Region) -> Scores:
    """Transfer the score function of a region to another region of the same structure."""
    counterpart = dict(zip(scores.region.sides, region.sides, strict=True))
    factors = tuple((counterpart[node], divides) for node, divides in scores.factors)
    return replace(scores, region=region, factors=factors, mask=scores.mask and counterpart[scores.mask])


def _measured(
    region: Region, product: fx.Node, axis: int, key_axis: int, roles: Roles, sides: Mapping[fx.Node, Any]
) -> Scores:
    result = Scores(region)
    shape = example_shape(product)
    keys = moved(region.base, {product: coordinates(shape, key_axis)}, region.nodes, region.end)
    numbers = random_like(product, 7)
    placed = moved(region.base, {product: numbers}, region.nodes, region.end)
    if keys is None or placed is None:
        raise Miss(f"the path of the scores through {_names(region)} is not recognized", region.end)
    columns = (axis_values(keys, axis) >= 0).nonzero().flatten()
    result.sinks, result.start = keys.shape[axis] - columns.numel(), int(columns[0]) if columns.numel() else 0
    zero = _run(region, {product: torch.zeros_like(numbers), **sides})
    if result.sinks:
        _check_sinks(region, product, numbers, zero, axis, columns, sides)

    def change(factor: float) -> Tensor:
        moved_by = _run(region, {product: factor * numbers, **sides}) - zero
        return moved_by.index_select(axis, columns)[open_places]

    allowed = zero.index_select(axis, columns)
    pushed = _run(region, {product: 1e30 * numbers, **sides}).index_select(axis, columns)
    replaced = pushed == allowed
    unknown = _run(region, {product: numbers + torch.nan, **sides}).index_select(axis, columns)
    result.blocks = bool((replaced & ~unknown.isnan()).any())
    result.levels, result.absorbing = _levels(allowed[replaced], region)
    open_places = allowed.isfinite() & (allowed > MASKED) & ~replaced
    if not bool(open_places.any()):
        raise Miss("every score is masked; expected some that are not", region.end)
    unit = placed.index_select(axis, columns)
    result.factors = _factors(region, roles)
    if result.factors:
        unit = unit * _gain(result, shape, key_axis, sides)
    _fit(result, change, unit[open_places], region)
    if result.sinks:
        result.form = "computed" if region.sides or bool((allowed != 0).any()) else ""
    else:
        constants = {n: region.base.example(n) for n in region.sides if n not in sides and isinstance(fake(n), Tensor)}
        _name_mask(result, zero, {**constants, **sides}, example_shape(product))
    return result


def _levels(overwritten: Tensor, region: Region) -> tuple[bool, bool]:
    """Return whether scores are overwritten by finite values, and whether these absorb any score. Raises Miss."""
    finite = overwritten[overwritten.isfinite()]
    if finite.numel() and float(finite.max()) > MASKED:
        raise Miss(
            f"scores are overwritten by values up to {float(finite.max()):.3g}; expected at most {MASKED:.0e}, a mask",
            region.end,
        )
    return bool(finite.numel()), not finite.numel() or float(finite.max()) <= ABSORBING


def _run(region: Region, values: Mapping[fx.Node, Any]) -> Tensor:
    try:
        return region.run(values)
    except Exception as error:  # user code may raise anything
        raise Miss(
            f"the computation of the scores could not be run ({type(error).__name__}: {error})", region.end
        ) from error


def _check_sinks(
    region: Region, product: fx.Node, numbers: Tensor, zero: Tensor, axis: int, columns: Tensor,
    sides: Mapping[fx.Node, Any],
) -> None:  # fmt: skip
    if columns.numel() and int(columns[-1] - columns[0]) != columns.numel() - 1:
        raise Miss("sink columns lie between the keys; expected them before or after the keys", region.end)
    other = _run(region, {product: numbers, **sides})
    rest = torch.tensor([i for i in range(zero.shape[axis]) if i not in set(columns.tolist())])
    if not torch.equal(zero.index_select(axis, rest), other.index_select(axis, rest)):
        raise Miss("sink columns of the softmax depend on the scores; expected columns that do not", region.end)


def _factors(region: Region, roles: Roles) -> tuple[tuple[fx.Node, bool], ...]:
    """Return the tensors and symbolic numbers by which a node of the region multiplies or divides."""
    inside = {*region.nodes, *region.inputs}
    results = []
    for node in region.nodes:
        name = op_name(node)
        others = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in inside]
        if name not in MULTIPLICATION | DIVISION or len(others) != 1:
            continue
        if not is_fixed(others[0]):
            results.append((others[0], name in DIVISION))
    return tuple(results)


def _gain(scores: Scores, shape: tuple[int, ...], key_axis: int, sides: Mapping[fx.Node, Any]) -> Tensor:
    """Return the product of the factors over the scores; they must not vary over keys or follow an axis change."""
    region = scores.region
    last = max(node for factor, _ in scores.factors for node in factor.users if node in region.nodes)
    if any(isinstance(fake(n), Tensor) and example_shape(n) != shape for n in region.nodes if not last < n):
        raise Miss("a tensor scales the scores after their axes were changed; expected it before", region.end)
    gain = torch.ones([1] * len(shape), dtype=torch.float64)
    for node, divides in scores.factors:
        value = sides.get(node, region.base.example(node))
        factor = torch.as_tensor(value, dtype=torch.float64)
        gain = gain / factor if divides else gain * factor
    if gain.shape[key_axis - len(shape)] != 1:
        if bool((gain == gain.narrow(key_axis, 0, 1)).all()):
            return gain
        scores.factors = ()  # a numeric mask: its effect must count only once
        return torch.ones([1] * len(shape), dtype=torch.float64)
    return gain


def _fit(scores: Scores, change: object, unit: Tensor, region: Region) -> None:
    """Fit scale and softcap to the change of the scores with the product. Raises Miss."""
    assert callable(change)
    delta = change(1.0)
    scale = float((delta @ unit) / (unit @ unit).clamp_min(1e-300))
    size = float(delta.abs().max())
    if size > 0 and float((delta - scale * unit).abs().max()) <= 1e-7 * size + 1e-9:
        scores.scale = scale
        return
    small = change(1e-4)
    scale = float((small @ unit) / (unit @ unit).clamp_min(1e-300)) * 1e4
    cap = float(change(1e9).abs().max())
    if scale > 0 and 0 < cap < 1e6:
        capped = cap * torch.tanh(scale * unit / cap)
        if float((delta - capped).abs().max()) <= 1e-6 * size:
            scores.scale, scores.softcap = scale, cap
            return
    raise Miss(
        f"the scores are computed by {_names(region)}; expected scale * q k + mask, or a tanh softcap", region.end
    )


def _name_mask(scores: Scores, zero: Tensor, sides: Mapping[fx.Node, Any], shape: tuple[int, ...]) -> None:
    """Set the mask to the side input that equals the bias, if there is one; else the region computes the bias."""
    if not bool((zero != 0).any()):
        return
    scores.form = "computed"
    if len(shape) != 4 or any(isinstance(fake(n), Tensor) and example_shape(n) != shape for n in scores.region.nodes):
        return
    for node, value in sides.items():
        if not isinstance(value, Tensor):
            continue
        is_mask = value.dtype == torch.bool or value.dtype.is_floating_point
        if not is_mask or not 2 <= value.dim() <= 4 or not _fits(value, zero):
            continue
        full = value.expand(zero.shape)
        if value.dtype != torch.bool:  # added, and not cast afterwards
            forms = {} if scores.region.overflow_limit < math.inf else {"add": full.double()}
        else:
            nothing = torch.zeros_like(zero)
            forms = {
                "keep": nothing.masked_fill(~full, -torch.inf),
                "fill": nothing.masked_fill(full, -torch.inf),
            }  # a finite fill value is not replaced by -inf: rows without keys differ
        for form, expected in forms.items():
            if torch.equal(expected, zero):
                scores.mask, scores.form = node, form
                return


def _fits(value: Tensor, whole: Tensor) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(value.shape), reversed(whole.shape), strict=False))


def _names(region: Region) -> str:
    """Return the names of the operations of a region, except data movement."""
    names = dict.fromkeys(op_name(n) for n in region.nodes if op_name(n) not in MOVEMENT)
    return ", ".join(list(names)[:8]) or "nothing"
