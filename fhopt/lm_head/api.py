"""Public functions of `fhopt.lm_head`; each imports its module when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fhopt.lm_head.head import Head

if TYPE_CHECKING:
    from fhopt.lm_head.module import HeadReport
    from fhopt.lm_head.options import HeadOptions


def fit(loaded: Any, options: HeadOptions | None = None, progress: Any = None) -> Head:
    """Find the head of a `LoadedModel` and quantize it; see `fhopt.lm_head.fitting.fit`."""
    from fhopt.lm_head import fitting

    return fitting.fit(loaded, options or fitting.HeadOptions(), progress)


def apply(model: torch.nn.Module, head: Head, **options: Any) -> torch.nn.Module:
    """Make `model` compute its logits with `head`; see `fhopt.lm_head.install.apply`."""
    from fhopt.lm_head import install

    return install.apply(model, head, **options)


def unapply(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `apply`, if it was called. Returns the model."""
    from fhopt.lm_head import install

    return install.unapply(model)


def report(model: torch.nn.Module) -> HeadReport:
    """Return counts and bytes of the applied head so far. Raises FhoptError if none is applied."""
    from fhopt.lm_head import install

    return install.report(model)
