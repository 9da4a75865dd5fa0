"""The two files of a plan: plan.json and plan.safetensors, never pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.plan.site import site_from
from fhopt.plan.site_plan import PagePlan, SidePlan, SitePlan, SketchPlan, Tier

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan


PLAN_VERSIONS = (3, 4, 5)  # that can be read: 4 has pages, 5 means; a plan is written in the first that has what it has
PLAN_FILES = ("plan.json", "plan.safetensors")


# --------------------------------------------------------------------------------------------------- files


def plan_tensors(plan: LatentPlan) -> dict[str, Tensor]:
    """Return every basis by name, each in memory of its own: safetensors refuses tensors that share some."""
    out: dict[str, Tensor] = {}
    held: set[int] = set()
    for site in plan.sites:
        named = {f"{n}.{part}": getattr(getattr(site, n), part) for n in ("key", "value") for part in _BASES}
        if site.sketch is not None:
            named |= {f"sketch.{part}": getattr(site.sketch, part) for part in _SKETCH}
        for name, value in named.items():
            tensor = value.contiguous()
            tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in held else tensor
            held.add(tensor.untyped_storage().data_ptr())
            out[f"{site.site.name}.{name}"] = tensor
    return out


_BASES, _SKETCH = ("encode", "decode"), ("channels", "mean", "deviation")


def describe_plan(plan: LatentPlan) -> dict[str, Any]:
    """Collect everything of a plan that is not a tensor, as JSON values."""
    paged: dict[str, Any] = {} if plan.pages is None else {"pages": asdict(plan.pages)}
    for name in ("fill", "lifts"):
        if plan.pages is not None and not getattr(plan.pages, name):
            del paged["pages"][name]
    means = {"mean_tokens": plan.mean_tokens} if plan.mean_tokens else {}
    plain, with_pages, with_means = PLAN_VERSIONS
    is_paged = bool(paged) or any(s.sketch for s in plan.sites)
    return (
        paged
        | means
        | {
            "version": with_means if means else with_pages if is_paged else plain,
            "sinks": plan.sinks,
            "recent": plan.recent,
            "block": plan.block,
            "window_bits": plan.window_bits,
            "sites": [
                {
                    "site": asdict(s.site),
                    "layout": s.layout,
                    "key": [[t.bits, t.width, t.step] for t in s.key.tiers],
                    "value": [[t.bits, t.width, t.step] for t in s.value.tiers],
                }
                | ({} if s.sketch is None else {"sketch": [[t.bits, t.width, t.step] for t in s.sketch.tiers]})
                for s in plan.sites
            ],
        }
    )


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turn what damaged files raise within into a FhoptError that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise FhoptError(f"{folder} is damaged ({type(error).__name__}: {error}). Fit the plan again.") from error


def read_plan(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the fields of a `LatentPlan` and its saved digest. Raises FhoptError; what damage raises is not caught."""
    from safetensors.torch import load

    try:
        text = (folder / "plan.json").read_bytes()
        blob = (folder / "plan.safetensors").read_bytes()
    except OSError as error:
        raise FhoptError(
            f"{folder} is not a plan: {error.strerror} ({Path(error.filename).name}). "
            "Expected a folder with plan.json and plan.safetensors, as `fhopt fit MODEL -o FOLDER` writes."
        ) from error
    description, tensors = json.loads(text), load(blob)
    if description["version"] not in PLAN_VERSIONS:
        raise FhoptError(
            f"{folder} has plan version {description['version']}; this fhopt reads versions "
            f"{' and '.join(map(str, PLAN_VERSIONS))}. Fit the plan again with this version."
        )
    fields = {name: description[name] for name in ("sinks", "recent", "block", "provenance", "window_bits")}
    fields["sites"] = tuple(_site_plan(item, tensors) for item in description["sites"])
    fields |= {"pages": _page_plan(description.get("pages")), "mean_tokens": int(description.get("mean_tokens", 0))}
    return fields, description["digest"]


def _site_plan(item: dict[str, Any], tensors: dict[str, Tensor]) -> SitePlan:
    site = site_from(item["site"])

    def side(which: str) -> SidePlan:
        prefix = f"{site.name}.{which}"
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item[which])
        return SidePlan(tensors[f"{prefix}.encode"], tensors[f"{prefix}.decode"], tiers)

    sketch = None
    if "sketch" in item:
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item["sketch"])
        parts = {part: tensors[f"{site.name}.sketch.{part}"] for part in _SKETCH}
        sketch = SketchPlan(**parts, tiers=tiers)
    return SitePlan(site, item["layout"], side("key"), side("value"), sketch=sketch)


def _page_plan(item: dict[str, Any] | None) -> PagePlan | None:
    if item is None:
        return None
    numbers = {name: tuple(map(float, item.get(name, ()))) for name in ("shares", "masses", "lifts")}
    return PagePlan(**(item | numbers | {"fill": tuple(tuple(map(float, heads)) for heads in item.get("fill", ()))}))
