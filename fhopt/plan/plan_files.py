"""The two files of a plan: plan.json and plan.safetensors, never pickle.

`check_plan_files` refuses what is no plan, or a damaged one, before torch is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhopt.errors import FhoptError, one_line
from fhopt.files import JSON_BYTES, check_no_pickle, is_pickle, read_file, tensor_limit
from fhopt.plan.description import (
    PLAN_VERSIONS,
    check_description,
    content_version,
    covered,
    is_intact,
    parse_description,
)
from fhopt.plan.json_kinds import WrongField
from fhopt.plan.site import site_from
from fhopt.plan.site_plan import PagePlan, SidePlan, SitePlan, SketchPlan, Tier

if TYPE_CHECKING:
    from torch import Tensor

    from fhopt.plan.latent_plan import LatentPlan

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
    """Collect everything of a plan that changes numbers and is not a tensor, as JSON values."""
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


def describe_file(plan: LatentPlan, tensors: bytes) -> dict[str, Any]:
    """Return the content of plan.json beside a file of these `tensors`."""
    about = {"provenance": dict(plan.provenance), "digest": plan.digest()}
    return covered(describe_plan(plan) | about, tensors)


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turn what damaged files raise within into a FhoptError that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except WrongField as error:
        raise FhoptError(f"{folder} is damaged: {error}. Fit the plan again.") from error
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    except SafetensorError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> FhoptError:
    return FhoptError(f"{folder} is damaged ({type(error).__name__}: {one_line(error)}). Fit the plan again.")


def check_plan_files(folder: Path) -> None:
    """Raise FhoptError where `folder` has no plan, or a damaged one, as far as that shows without torch."""
    with damage_named(folder):
        read_files(folder)


def read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Read the checked description of a plan, and the file of its tensors. Raises FhoptError, ValueError."""
    text, blob = _read(folder)
    description = parse_description(text)
    if description.get("version") not in PLAN_VERSIONS:
        raise FhoptError(
            f"{folder} has plan version {one_line(description.get('version'), 20)}; this fhopt reads versions "
            f"{' and '.join(map(str, PLAN_VERSIONS))}. Fit the plan again with this version."
        )
    check_description(description)
    if not is_intact(description, blob):
        raise altered(folder)
    return description, blob


def altered(folder: Path) -> FhoptError:
    """Make the error for a plan whose digest or checksum is another."""
    return FhoptError(f"{folder} was altered after it was written (digest mismatch). Fit the plan again.")


def _read(folder: Path) -> tuple[bytes, bytes]:
    cure = "Expected a folder with plan.json and plan.safetensors, as `fhopt fit MODEL -o FOLDER` writes."
    try:
        if folder.is_file():
            check_no_pickle(folder, cure)
        text = read_file(folder / PLAN_FILES[0], JSON_BYTES, cure)
        blob = read_file(folder / PLAN_FILES[1], tensor_limit(), cure)
    except (OSError, ValueError) as error:
        name = Path(getattr(error, "filename", None) or folder).name
        reason = getattr(error, "strerror", None) or error
        raise FhoptError(f"{folder} is not a plan: {reason} ({name}). {cure}") from error
    for name, content in zip(PLAN_FILES, (text, blob), strict=True):
        if is_pickle(content[:9]):
            check_no_pickle(folder / name, cure)
    return text, blob


def read_plan(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the fields of a `LatentPlan` and its saved digest. Raises FhoptError; what damage raises is not caught."""
    from safetensors.torch import load

    description, blob = read_files(folder)
    tensors = _Tensors(load(blob))
    fields = {name: description[name] for name in ("sinks", "recent", "block", "provenance", "window_bits")}
    fields["sites"] = tuple(_site_plan(item, tensors) for item in description["sites"])
    if tensors.left:
        raise WrongField(f"tensor {min(tensors.left)[:60]!r} belongs to none of its sites; expected bases and sketches")
    fields |= {"pages": _page_plan(description.get("pages")), "mean_tokens": description.get("mean_tokens", 0)}
    return fields, description["digest"]


class _Tensors:
    """The tensors of a file by name. left: those that were not taken."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.left = tensors

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise WrongField(f"tensor {name!r} is missing; expected it in {PLAN_FILES[1]}")
        return self.left.pop(name)


def _site_plan(item: dict[str, Any], tensors: _Tensors) -> SitePlan:
    """Make the plan of a site, and take its tensors out of `tensors`."""
    site = site_from(item["site"])

    def side(which: str) -> SidePlan:
        prefix = f"{site.name}.{which}"
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item[which])
        return SidePlan(tensors.take(f"{prefix}.encode"), tensors.take(f"{prefix}.decode"), tiers)

    sketch = None
    if "sketch" in item:
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item["sketch"])
        parts = {part: tensors.take(f"{site.name}.sketch.{part}") for part in _SKETCH}
        sketch = SketchPlan(**parts, tiers=tiers)
    return SitePlan(site, item["layout"], side("key"), side("value"), sketch=sketch, segment=item.get("segment", 0))


def _page_plan(item: dict[str, Any] | None) -> PagePlan | None:
    if item is None:
        return None
    numbers = {name: tuple(map(float, item.get(name, ()))) for name in ("shares", "masses", "lifts")}
    return PagePlan(**(item | numbers | {"fill": tuple(tuple(map(float, heads)) for heads in item.get("fill", ()))}))
