"""The file of a calibration, from which plans of any size are fitted in seconds: `fhopt calibrate`.

One safetensors file (`fhopt.files.write_tensors`) with a digest of everything in it. Matrices of float64 are kept as
float32, but for moments of a site that may get the layout `input`, whose rank is found by eigenvalues of 1e-12:

    SITE.key.moment, SITE.key.metric, ...     second moments and metrics   fhopt/fitting/statistics.py
    SITE.LAYOUT.0.encode, .decode, .variance  bases of keys (0), values (1) or both (0, `input`)
    SITE.LAYOUT.key.BITS, ...                 costs of their channels      fhopt/fitting/costs.py

Bases are kept though they follow from the statistics: costs are those of their channels, and an eigenvalue solver may
order and turn channels otherwise on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fhopt.calibration.checkpoint import named_costs, named_moments
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import Calibration
from fhopt.calibration.statistics_header import STATISTICS_VERSION, WITH_SEGMENTS, check_statistics, damaged_statistics
from fhopt.errors import FhoptError
from fhopt.files import check_digest, read_tensors, write_tensors
from fhopt.fitting.bases import Basis
from fhopt.fitting.costs import empty_costs
from fhopt.fitting.statistics import empty_statistics
from fhopt.plan.cache_size import layers_of, sliding_windows
from fhopt.plan.site import site_from

PARTS = ("encode", "decode", "variance")
UNKEPT = ("checkpoint", "kernel_shapes", "code")  # options that are of a run, not of what it measured


def save_statistics(calibration: Calibration, file: Path) -> None:
    """Write a calibration to `file`, whole or not at all. Raises FhoptError when it cannot be written."""
    options = {name: value for name, value in asdict(calibration.options).items() if name not in UNKEPT}
    about = {
        "version": WITH_SEGMENTS if calibration.options.segment else STATISTICS_VERSION,
        "sites": [asdict(site) for site in calibration.sites.values()],
        "layouts": {name: {w: len(sides) for w, sides in t.items()} for name, t in calibration.bases.items()},
        "levels": sorted({bits for costs in calibration.costs.values() for bits in costs.sums}),
        "options": options,
        "prints": calibration.prints,
        "provenance": calibration.provenance,
    }
    plain = {name: s for name, s in calibration.statistics.items() if s.cross is None}
    exact = {name: s for name, s in calibration.statistics.items() if s.cross is not None}
    matrices = named_moments(plain)
    for name, layouts in calibration.bases.items():
        for which, sides in layouts.items():
            for i, basis in enumerate(sides):
                matrices |= {f"{name}.{which}.{i}.{part}": getattr(basis, part) for part in PARTS}
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in matrices.items()}
    tensors |= named_moments(exact) | named_costs(calibration.costs)
    try:
        write_tensors(file, about, tensors)
    except (OSError, SafetensorError) as error:
        raise FhoptError(f"cannot write {file}: {error}. Free some space or choose another file.") from error


def load_statistics(file: Path) -> Calibration:
    """Read a calibration that `save_statistics` wrote. Raises FhoptError where it is none, or damaged."""
    check_statistics(file)
    try:
        about, tensors = read_tensors(file)
        check_digest(about, tensors)
        return _calibration(about, tensors)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise damaged_statistics(file, error) from error


def _calibration(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    sites = [site_from(item) for item in about["sites"]]
    segment = about["options"].get("segment") or 0  # files of earlier versions have none
    statistics = empty_statistics(sites, segment, sliding_windows(sites, layers_of(about["provenance"])))
    layouts = {site.name: about["layouts"][site.name] for site in sites}  # keys of JSON objects are sorted
    bases = {name: _bases(name, which, tensors) for name, which in layouts.items()}
    costs = empty_costs(bases, about["levels"]) if about["levels"] else {}
    for name, total in (named_moments(statistics) | named_costs(costs)).items():
        total.copy_(tensors[name])
    known = {field.name for field in fields(FitOptions)}
    chosen: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items() if k in known
    }
    options = FitOptions(**chosen | {"segment": segment})
    return Calibration(statistics, bases, costs, about["provenance"], options, about["prints"])


def _bases(name: str, layouts: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Basis, ...]]:
    def basis(which: str, side: int) -> Basis:
        return Basis(*(tensors[f"{name}.{which}.{side}.{part}"].double() for part in PARTS))

    # a JSON object loses the order of layouts when its keys are sorted: the first must fit the least budget
    ordered = sorted(layouts, key=lambda which: (which != "input", which != "band"))
    return {which: tuple(basis(which, i) for i in range(layouts[which])) for which in ordered}
