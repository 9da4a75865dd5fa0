"""Forged files: draw changes of JSON and tensors, sign the result, and use what loads."""

from __future__ import annotations

import copy
import io
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from rewritten_folders import places
from rich.console import Console
from torch import Tensor

from fhopt.attention.attend import attend
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.errors import FhoptError
from fhopt.files import write_tensors
from fhopt.inspection.facts import inspect_sites
from fhopt.inspection.tables import inspection_tables, plan_table
from fhopt.plan.cache_size import cache_size
from fhopt.plan.display import plan_html
from fhopt.plan.expected_loss import calibration_warning, expected_loss
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan

LONGEST = 1000  # characters of a message
SECONDS, MEMORY = 60.0, 1 << 30  # limits for one file; a valid one takes a hundredth
HALF = "\udc80"  # half of a surrogate pair: valid in JSON, not encodable
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**9, 1 << 31, 1 << 63, -(1 << 63), 10**400, 0.0, -0.0, 0.5, -0.4, 5e-324,
    1e-40, 1e30, 1e308, math.nan, math.inf, -math.inf, "", "a", "a\nb", "\0", HALF, "x" * 100_000, [], [0], [[]], {},
    {"a": 1}, {HALF: 1},
)  # fmt: skip
FILLED = (0.0, -1.0, 5e-324, 1e-40, 1e12, 1e30, 3e38, math.nan, math.inf, -math.inf)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool,
    torch.complex64,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- changes


def changed(described: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at one place; `...` deletes it."""
    described = copy.deepcopy(described)
    holder = described
    for name in path[:-1]:
        holder = holder[name]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return described


def drawn_json(draw: Any, described: Any, *closed: str) -> Any:
    """Draw changes of one to three fields of a JSON value; fields in `closed` stay."""
    for _ in range(draw(st.integers(1, 3), label="fields")):
        paths = [path for path in places(described) if path[0] not in closed]
        depth = draw(st.sampled_from(sorted({len(path) for path in paths})), label="depth")
        path = draw(st.sampled_from([path for path in paths if len(path) == depth]), label="field")
        described = changed(described, path, draw(values(described, path), label="value"))
    return described


def values(described: Any, path: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Draw a replacement for a field: a strange value, a similar one, or none."""
    held = described
    for name in path:
        held = held[name]
    near: list[Any] = [...]
    if isinstance(held, (int, float)) and abs(held) < 1 << 64:
        near += [held + 1, held - 1, -held, 2 * held, held / 2, float(held), bool(held), str(held), 1e3 * held]
    elif isinstance(held, str):
        near += [held + "x", held.upper(), held[:-1]]
    elif isinstance(held, list):
        near += [held[1:], held + held[:1], held[::-1], {}, dict(enumerate(held)), [held]]
    elif isinstance(held, dict):
        near += [held | {"more": 1}, [*held], [*held.values()], {str(k) + "x": v for k, v in held.items()}]
    numbers = st.floats() | st.integers(-(1 << 70), 1 << 70)
    return st.sampled_from([*near, *STRANGE]) | numbers


def drawn_tensors(draw: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change, remove or repeat one of the tensors."""
    name = draw(st.sampled_from(sorted(tensors)), label="tensor")
    how = draw(st.sampled_from(["number", "all numbers", "scaled", "dtype", "shape", "absent", "more"]), label="how")
    x = tensors[name].clone()
    if how == "absent":
        return {n: t for n, t in tensors.items() if n != name}
    if how == "more":
        return tensors | {f"{name}.more": x}
    if how == "dtype":
        x = x.to(draw(st.sampled_from(DTYPES), label="dtype"))
    elif how == "shape":
        x = draw(st.sampled_from(reshaped(x)), label="shape")
    elif how == "scaled":
        x = (x * draw(st.sampled_from([-1, 0, 1000, 1e-30]), label="factor")).to(x.dtype)
    elif x.numel():
        value = draw(st.sampled_from(FILLED if x.is_floating_point() else (0, -1, 1, 1 << 40)), label="number")
        at = draw(st.integers(0, x.numel() - 1), label="at") if how == "number" else slice(None)
        x.view(-1)[at] = value
    return tensors | {name: x.contiguous()}


def reshaped(x: Tensor) -> list[Tensor]:
    """Return the tensor, or most of it, in other shapes."""
    shapes = [x.flatten(), x[None], x[..., None], torch.cat([x[None]] * 2)]
    if x.dim():
        shapes += [
            x[:0],
            x[:-1],
            x[..., :0],
            x[..., :-1],
            torch.cat([x] * 2),
            torch.cat([x] * 2, -1),
            x.transpose(0, -1),
        ]
    return shapes


def sign_statistics(file: Path, about: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file of statistics with a correct digest."""
    write_tensors(file, {name: value for name, value in about.items() if name != "digest"}, tensors)


# --------------------------------------------------------------------------------------------------- what must hold


@contextmanager
def refused_or_used() -> Iterator[None]:
    """Require that the block ends within limits of time and memory; only a one-line FhoptError may be raised."""
    began, held = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except FhoptError as error:
        check_message(str(error))
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 < MEMORY


def check_message(message: str) -> None:
    assert "\n" not in message and len(message) < LONGEST, message[:LONGEST]
    assert "; expected " in message or "xpected" in message or ". " in message, message
    message.encode()


def use(plan: LatentPlan) -> None:
    """Measure, describe and show a plan, and attend to a cache of each of its sites."""
    cache_size(plan, 1000).as_json()
    plan.ratio()
    sites = [site.site for site in plan.sites]
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    console.print(inspection_tables(inspect_sites("a model", sites, plan)))
    console.print(plan_table(plan))
    (shown.getvalue() + plan_html(plan) + repr(expected_loss(plan)) + repr(calibration_warning(plan))).encode()
    for site in plan.sites:
        assert KernelSpec.of(site, "float32").name
        if site.site.kind == "self":
            attend_to(plan, plan.sites.index(site))


def attend_to(plan: LatentPlan, number: int) -> None:
    """Attend with one query to the cache of a site; tokens are quantized if the window is short."""
    planned = plan.sites[number]
    site, layer = planned.site, LatentLayer(plan, planned)
    generator = torch.Generator().manual_seed(0)
    count = min(plan.window.first_length, 100) + 5

    def rows(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(1, heads, tokens, dim, generator=generator)

    layer.update(rows(site.kv_heads, count, site.key_dim), rows(site.kv_heads, count, site.value_dim))
    key: Any
    value: Any
    key, value = layer.update(rows(site.kv_heads, 1, site.key_dim), rows(site.kv_heads, 1, site.value_dim))
    if type(key) is Tensor:  # no token is quantized yet
        return
    query = rows(site.heads, 1, site.key_dim)
    output = attend(query, key.exact, value.exact, key.latents, None, scale=site.scale, softcap=site.softcap)
    assert output.shape == (1, site.heads, 1, site.value_dim) and bool(output.isfinite().all())
