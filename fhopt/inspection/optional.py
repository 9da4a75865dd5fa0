"""Imports of optional packages; the error says how to install a missing one."""

from __future__ import annotations

import importlib
from typing import Any

from fhopt.errors import FhoptError


def need(module: str, what: str, extra: str = "report") -> Any:
    """Import a module. Raises FhoptError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FhoptError(
            f"{module} is not installed ({error}); {what} requires it. Install it with: pip install 'fhopt[{extra}]'"
        ) from error
