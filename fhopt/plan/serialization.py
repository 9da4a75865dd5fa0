"""Saving, loading and hashing of plans.

A plan is one safetensors file (tensors) and one JSON file (everything else); see fhopt/plan/description.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.files import write_folder
from fhopt.plan.description import content_version, covered, numbers_of
from fhopt.plan.json_kinds import WrongField
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.plan_files import PLAN_FILES, altered, damage_named, read_files
from fhopt.plan.site import site_from
from fhopt.plan.site_plan import BitGroup, PagePlan, SidePlan, SitePlan, SketchPlan


def save_plan(plan: LatentPlan, folder: str | os.PathLike[str]) -> Path:
    """Write a plan to a folder, atomically; `LatentPlan.save`. Raises FhoptError."""
    path = Path(folder)
    tensors = save(plan_tensors(plan))
    about = {"provenance": dict(plan.provenance), "digest": plan_digest(plan)}
    description = covered(describe_plan(plan) | about, tensors)
    files = {
        "plan.safetensors": tensors,
        "plan.json": (json.dumps(description, indent=1, sort_keys=True) + "\n").encode(),
    }
    write_folder(path, files)
    return path


def load_plan(folder: str | os.PathLike[str]) -> LatentPlan:
    """Load a plan from a folder; `LatentPlan.load`. Raises FhoptError."""
    path = Path(folder)
    with damage_named(path):
        fields, digest = read_plan(path)
        try:
            plan = LatentPlan(**fields)
        except FhoptError as error:
            problem = str(error).rstrip(".")
            raise FhoptError(f"{path} is damaged: {problem}. Save the plan again, or fit it again.") from error
        intact = plan_digest(plan) == digest
    if not intact:
        raise altered(path)
    return plan


def plan_digest(plan: LatentPlan) -> str:
    """Hash everything in a plan that affects results (not the provenance); `LatentPlan.digest`."""
    h = hashlib.sha256(numbers_of(describe_plan(plan)))
    for name, tensor in sorted(plan_tensors(plan).items()):
        h.update(name.encode())
        h.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


# --------------------------------------------------------------------------------------------------- writing


def plan_tensors(plan: LatentPlan) -> dict[str, Tensor]:
    """Return every basis by name, each with its own storage: safetensors rejects shared storage."""
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
    """Describe everything in a plan that affects results and is not a tensor, as JSON values."""
    paged: dict[str, Any] = {} if plan.pages is None else {"pages": asdict(plan.pages)}
    for name in ("fill", "lifts"):
        if plan.pages is not None and not getattr(plan.pages, name):
            del paged["pages"][name]
    means = {"mean_tokens": plan.mean_tokens} if plan.mean_tokens else {}
    described = (
        paged
        | means
        | {
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
                | ({"segment": s.segment} if s.segment else {})
                for s in plan.sites
            ],
        }
    )
    return described | {"version": content_version(described)}


# --------------------------------------------------------------------------------------------------- reading


def read_plan(folder: Path) -> tuple[dict[str, Any], str]:
    """Load the fields of a `LatentPlan` and its saved digest. Raises FhoptError; other exceptions indicate damage."""
    description, blob = read_files(folder)
    tensors = _Tensors(load(blob))
    fields = {name: description[name] for name in ("sinks", "recent", "block", "provenance", "window_bits")}
    fields["sites"] = tuple(_site_plan(item, tensors) for item in description["sites"])
    if tensors.left:
        raise WrongField(f"tensor {min(tensors.left)[:60]!r} belongs to no site; expected bases and sketches")
    fields |= {"pages": _page_plan(description.get("pages")), "mean_tokens": description.get("mean_tokens", 0)}
    return fields, description["digest"]


class _Tensors:
    """The tensors of a file by name. left: those not taken yet."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.left = tensors

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise WrongField(f"tensor {name!r} is missing; expected it in {PLAN_FILES[1]}")
        return self.left.pop(name)


def _site_plan(item: dict[str, Any], tensors: _Tensors) -> SitePlan:
    """Build the plan of a site, taking its tensors from `tensors`."""
    site = site_from(item["site"])

    def side(which: str) -> SidePlan:
        prefix = f"{site.name}.{which}"
        tiers = tuple(BitGroup(int(b), int(w), float(s)) for b, w, s in item[which])
        return SidePlan(tensors.take(f"{prefix}.encode"), tensors.take(f"{prefix}.decode"), tiers)

    sketch = None
    if "sketch" in item:
        tiers = tuple(BitGroup(int(b), int(w), float(s)) for b, w, s in item["sketch"])
        parts = {part: tensors.take(f"{site.name}.sketch.{part}") for part in _SKETCH}
        sketch = SketchPlan(**parts, tiers=tiers)
    return SitePlan(site, item["layout"], side("key"), side("value"), sketch=sketch, segment=item.get("segment", 0))


def _page_plan(item: dict[str, Any] | None) -> PagePlan | None:
    if item is None:
        return None
    numbers = {name: tuple(map(float, item.get(name, ()))) for name in ("shares", "masses", "lifts")}
    return PagePlan(**(item | numbers | {"fill": tuple(tuple(map(float, heads)) for heads in item.get("fill", ()))}))
