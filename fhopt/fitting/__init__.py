"""The mathematics of fitting: statistics, bases, allocation of bits, plans. No model, no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.fitting.allocation import Budget as Budget
    from fhopt.fitting.bases import Candidates as Candidates
    from fhopt.fitting.choices import check_options as check_options
    from fhopt.fitting.fit_plan import exact_plan as exact_plan
    from fhopt.fitting.fit_plan import fit as fit
    from fhopt.plan.fingerprint import check_model as check_model
    from fhopt.plan.fingerprint import fingerprint as fingerprint

_WHERE = {
    "exact_plan": "fhopt.fitting.fit_plan",
    "fit": "fhopt.fitting.fit_plan",
    "Budget": "fhopt.fitting.allocation",
    "Candidates": "fhopt.fitting.bases",
    "check_options": "fhopt.fitting.choices",
    "check_model": "fhopt.plan.fingerprint",
    "fingerprint": "fhopt.plan.fingerprint",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = ["Budget", "Candidates", "check_model", "check_options", "exact_plan", "fingerprint", "fit"]
