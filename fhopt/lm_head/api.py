"""What `fhopt.lm_head` offers: fit, apply, unapply, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fhopt.lm_head.head import Head

if TYPE_CHECKING:
    from fhopt.lm_head.fitting import HeadOptions
    from fhopt.lm_head.module import Report


def fit(loaded: Any, options: HeadOptions | None = None, progress: Any = None) -> Head:
    """Find the head of a `LoadedModel` and code it; see `fhopt.head_fitting.fit`."""
    from fhopt.lm_head import fitting

    return fitting.fit(loaded, options or fitting.HeadOptions(), progress)


def apply(model: torch.nn.Module, head: Head, **options: Any) -> torch.nn.Module:
    """Let `model` compute its logits by `head`; see `fhopt.head_module.apply`."""
    from fhopt.lm_head import install

    return install.apply(model, head, **options)


def unapply(model: torch.nn.Module) -> torch.nn.Module:
    """Take `apply` back; a model without it is left as it is. Returns the model."""
    from fhopt.lm_head import install

    return install.unapply(model)


def report(model: torch.nn.Module) -> Report:
    """What the applied head has done so far; see `fhopt.head_module.Report`. Raises FhoptError without one."""
    from fhopt.lm_head import install

    return install.report(model)
