"""Parsing of `torch.compile(model, backend="flashhead", options={...})`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhopt.backend import online_fit
from fhopt.errors import FhoptError, unknown_name
from fhopt.plan.latent_plan import LatentPlan, as_plan
from fhopt.plan.plan_files import PLAN_FILES

OPTIONS = frozenset(
    {"plan", "ratio", "max_loss", "calibration_tokens", "weights", "skinny_products", "strict", "assume_finite"}
)


@dataclass(frozen=True)
class Settings:
    """Checked options of fhopt. target: of an online fit; None: no online fit.

    assume_finite: assume that scores do not overflow; True with a plan, which is approximate anyway.
    """

    plan: LatentPlan | None = None
    target: online_fit.FitTarget | None = None
    trusting: bool = False
    products: bool = True
    strict: bool = False
    assume_finite: bool = False

    @staticmethod
    def parse(options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """Split and check options: (settings, options of inductor). Raises FhoptError."""
        ours = {k: v for k, v in options.items() if k in OPTIONS and v is not None}
        theirs = {k: v for k, v in options.items() if k not in OPTIONS}
        _check_names(theirs)
        if ours.get("weights", "check") not in ("check", "trust"):
            raise FhoptError(f"option weights is {ours['weights']!r}; expected 'check' or 'trust'.")
        for name in ("skinny_products", "strict", "assume_finite"):
            if not isinstance(ours.get(name, False), bool):
                raise FhoptError(f"option {name} is {ours[name]!r}; expected True or False. Set it to one of them.")
        plan, target = _plan(ours.get("plan")), online_fit.FitTarget.parse(ours)
        _check_combination(ours, is_exact=target.ratio == 1)
        if plan is not None:
            plan.check_no_means("a graph that is rewritten by a plan")
        is_fitted = plan is None and target.ratio != 1
        trusting, products = ours.get("weights") == "trust", ours.get("skinny_products", True)
        assume_finite = is_fitted or plan is not None or ours.get("assume_finite", False)
        fitted = target if is_fitted else None
        return Settings(plan, fitted, trusting, products, ours.get("strict", False), assume_finite), theirs


def _check_names(theirs: Mapping[str, Any]) -> None:
    """Raise FhoptError for options that inductor does not have."""
    if not theirs:
        return
    from torch._inductor import config

    known = config.get_config_copy().keys()
    for name in theirs:
        if name.replace("-", "_") not in known:
            raise unknown_name(name, OPTIONS, "an option of fhopt or of inductor", known)


def _check_combination(ours: Mapping[str, Any], is_exact: bool) -> None:
    """Raise FhoptError for combinations in which one option would be ignored."""
    if "plan" in ours:
        clash = [name for name in online_fit.FIT_OPTIONS if name in ours]
        if clash:
            raise FhoptError(f"options plan and {clash[0]} are mutually exclusive. Drop one of them.")
        return
    for name in ("weights", "strict"):
        if name in ours:
            raise FhoptError(
                f"option {name} requires a plan; expected options={{'plan': plan, ...}}. Add a plan, or drop {name}."
            )
    clash = [name for name in ("max_loss", "calibration_tokens") if name in ours and is_exact]
    if clash:
        raise FhoptError(f"options ratio=1 and {clash[0]} are mutually exclusive. Drop one of them.")


def _plan(option: Any) -> LatentPlan | None:
    if isinstance(option, (str, os.PathLike)):
        return _loaded(os.path.realpath(option))
    return None if option is None else as_plan(option, "option plan")


loaded_plans: dict[str, tuple[LatentPlan, list[int]]] = {}  # as first loaded, so that all graphs of a process agree


def _loaded(path: str) -> LatentPlan:
    if path not in loaded_plans:
        plan = LatentPlan.load(path)
        loaded_plans[path] = plan, _stamps(path)
    plan, stamps = loaded_plans[path]
    if _stamps(path) != stamps:
        warnings.warn(
            f"{path} has changed since it was loaded; compiled graphs still use the old plan. Call "
            "torch.compiler.reset() to compile with the new one.",
            RuntimeWarning,
            stacklevel=2,
        )
    return plan


def _stamps(path: str) -> list[int]:
    return [file.stat().st_mtime_ns for name in PLAN_FILES if (file := Path(path) / name).exists()]
