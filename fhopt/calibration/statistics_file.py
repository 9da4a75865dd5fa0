"""Calibration files, from which `fhopt fit` fits plans of any size in seconds: `fhopt calibrate`.

One safetensors file (`fhopt.files.write_tensors`) with a digest of its contents. Float64 matrices are stored as
float32, except moments of a site that may get the layout `input`, whose rank depends on eigenvalues of 1e-12:

    SITE.key.moment, SITE.key.metric, ...     second moments and metrics   fhopt/fitting/statistics.py
    SITE.LAYOUT.0.encode, .decode, .variance  bases of keys (0), values (1) or both (0, `input`)
    SITE.LAYOUT.key.BITS, ...                 costs of their channels      fhopt/fitting/costs.py

Bases are stored although they follow from the statistics: the costs belong to their channels, and an eigensolver may
order and rotate channels differently on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fhopt.calibration.checkpoint import named_costs, named_moments
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import Calibration
from fhopt.calibration.statistics_header import (
    STATISTICS_VERSION,
    WITH_SEGMENTS,
    check_fields,
    check_statistics,
    damaged_statistics,
)
from fhopt.errors import FhoptError
from fhopt.files import check_digest, read_tensors, write_tensors
from fhopt.fitting.bases import Basis
from fhopt.fitting.costs import empty_costs
from fhopt.fitting.statistics import empty_statistics, latent_groups
from fhopt.plan.cache_size import layers_of, sliding_windows
from fhopt.plan.json_kinds import WrongField
from fhopt.plan.site import AttentionSite, site_from

PARTS = ("encode", "decode", "variance")
MAX_COUNT = 1 << 53  # tokens
MAX_SUM = 1e30  # of a sum or a basis element: products of two are finite in float64
UNKEPT = ("checkpoint", "kernel_shapes", "code")  # options of a run that do not affect the measurements


def save_statistics(calibration: Calibration, file: Path) -> None:
    """Write a calibration to `file`, atomically. Raises FhoptError if it cannot be written."""
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
    """Load a calibration that `save_statistics` wrote. Raises FhoptError if the file is damaged or not one."""
    check_statistics(file)
    try:
        about, tensors = read_tensors(file)
        check_digest(about, tensors)
        check_fields(about)
        return _calibration(about, tensors)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise damaged_statistics(file, error) from error


def _calibration(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    sites = [site_from(item) for item in about["sites"]]
    segment = about["options"].get("segment") or 0  # missing in files of earlier versions
    sliding = sliding_windows(sites, layers_of(about["provenance"]))
    with torch.device("meta"):  # shapes only: a site with forged sizes must not allocate memory
        shapes = named_moments(empty_statistics(sites, segment, sliding))
    _check_sums(tensors, shapes)
    statistics = empty_statistics(sites, segment, sliding)
    layouts = {site.name: about["layouts"][site.name] for site in sites}  # in site order: JSON keys are sorted
    bases = {site.name: _bases(site, layouts[site.name], tensors) for site in sites}
    costs = empty_costs(bases, about["levels"]) if about["levels"] else {}
    _check_sums(tensors, named_costs(costs))
    for name, total in (named_moments(statistics) | named_costs(costs)).items():
        total.copy_(tensors[name])
    known = {field.name for field in fields(FitOptions)}
    chosen: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items() if k in known
    }
    options = FitOptions(**chosen | {"segment": segment})
    return Calibration(statistics, bases, costs, about["provenance"], options, about["prints"])


def _check_sums(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WrongField for a sum that is missing, or whose shape, dtype or values do not match its counterpart."""
    for name, total in expected.items():
        _check_tensor(tensors, name, tuple(total.shape), total.is_floating_point())
        found = tensors[name]
        if not total.is_floating_point() and not 0 <= int(found) <= MAX_COUNT:
            raise WrongField(f"tensor {name} is {int(found)}; expected a count from 0 to {MAX_COUNT:,}")
        if name.endswith((".moment", ".metric")) and float(found.diagonal(dim1=-2, dim2=-1).min()) < 0:
            raise WrongField(f"tensor {name} has a negative diagonal; expected sums of squares of at least 0")


def _check_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], is_float: bool = True) -> None:
    """Raise WrongField for a tensor that is missing, has another shape or dtype, or has too large values."""
    found = tensors.get(name)
    if found is None:
        raise WrongField(f"tensor {name} is missing; expected shape {shape}")
    kinds = (torch.float32, torch.float64) if is_float else (torch.int64,)
    if tuple(found.shape) != shape or found.dtype not in kinds:
        raise WrongField(
            f"tensor {name} is {found.dtype} of shape {tuple(found.shape)}; expected {' or '.join(map(str, kinds))} of "
            f"{shape}"
        )
    if is_float and not float(found.abs().max()) <= MAX_SUM:
        raise WrongField(
            f"tensor {name} has non-finite values or values above {MAX_SUM:g}; expected finite values up to it"
        )


def _bases(
    site: AttentionSite, layouts: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Basis, ...]]:
    def basis(which: str, side: int) -> Basis:
        prefix = f"{site.name}.{which}.{side}"
        groups, channels = _latent_shape(site, which, side)
        variance = tensors.get(f"{prefix}.variance")
        width = variance.shape[-1] if variance is not None and variance.dim() == 2 else channels
        if not 1 <= width <= channels:
            raise WrongField(f"tensor {prefix}.variance has {width} channels; expected 1 to {channels}")
        shapes = (groups, width, channels), (groups, channels, width), (groups, width)
        for part, shape in zip(PARTS, shapes, strict=True):
            _check_tensor(tensors, f"{prefix}.{part}", shape)
        parts = Basis(*(tensors[f"{prefix}.{part}"].double() for part in PARTS))
        if float(parts.variance.min()) < 0:
            raise WrongField(f"tensor {prefix}.variance has negative values; expected variances of at least 0")
        return parts

    # sorted JSON keys lose the order of layouts; the first must fit the smallest budget
    ordered = sorted(layouts, key=lambda which: (which != "input", which != "band"))
    return {which: tuple(basis(which, i) for i in range(layouts[which])) for which in ordered}


def _latent_shape(site: AttentionSite, layout: str, side: int) -> tuple[int, int]:
    """Return (latent heads, input channels of each) of a basis: of keys (side 0), of values, or of both (input)."""
    if layout == "input":
        return 1, site.kv_heads * (site.key_dim + site.value_dim)
    dim = site.value_dim if side else site.key_dim
    groups = site.kv_heads if layout in ("head", "identity") else latent_groups(site)
    return groups, site.kv_heads // groups * dim
