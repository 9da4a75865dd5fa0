"""Options of `torch.compile(model, backend="flashhead", options={...})`, read and checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhopt.backend import online_fit
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan, as_plan
from fhopt.plan.plan_files import PLAN_FILES

OPTIONS = frozenset(
    {"plan", "ratio", "max_loss", "calibration_tokens", "weights", "skinny_products", "strict", "assume_finite"}
)


@dataclass(frozen=True)
class Settings:
    """The checked options of fhopt. target: of a plan that is fitted online; None: no plan is fitted.

    assume_finite: scores do not overflow; so with a plan, which is approximate.
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
        ours = {k: v for k, v in options.items() if k in OPTIONS}
        theirs = {k: v for k, v in options.items() if k not in OPTIONS}
        if ours.get("weights", "check") not in ("check", "trust"):
            raise FhoptError(f"option weights is {ours['weights']!r}; expected 'check' or 'trust'.")
        plan = _plan(ours.get("plan"))
        if plan is not None and (clash := [k for k in ("ratio", "max_loss", "calibration_tokens") if k in ours]):
            raise FhoptError(f"options plan and {clash[0]} exclude each other; expected one of them. Leave one out.")
        if plan is not None:
            plan.check_no_means("a graph that is rewritten by a plan")
        is_exact = plan is not None or ours.get("ratio") == 1
        target = None if is_exact else online_fit.FitTarget.parse(ours)
        trusting, products = ours.get("weights") == "trust", bool(ours.get("skinny_products", True))
        assume_finite = bool(ours.get("assume_finite")) or not is_exact or plan is not None
        return Settings(plan, target, trusting, products, bool(ours.get("strict")), assume_finite), theirs


def _plan(option: Any) -> LatentPlan | None:
    if isinstance(option, (str, os.PathLike)):
        return _loaded(os.path.realpath(option))
    return None if option is None else as_plan(option, "option plan")


loaded_plans: dict[str, tuple[LatentPlan, list[int]]] = {}  # as first read, so that all graphs of a process agree


def _loaded(path: str) -> LatentPlan:
    if path not in loaded_plans:
        plan = LatentPlan.load(path)
        loaded_plans[path] = plan, _stamps(path)
    plan, stamps = loaded_plans[path]
    if _stamps(path) != stamps:
        warnings.warn(
            f"{path} has changed since it was read; graphs use the plan as it was. Call torch.compiler.reset() to "
            "compile with the new one.",
            RuntimeWarning,
            stacklevel=2,
        )
    return plan


def _stamps(path: str) -> list[int]:
    return [file.stat().st_mtime_ns for name in PLAN_FILES if (file := Path(path) / name).exists()]
