"""Loading models, capturing their graphs, finding their attention sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel as LoadedModel
    from fhopt.models.loader import load_model as load_model
    from fhopt.models.sites import explain_sites as explain_sites
    from fhopt.models.sites import find_sites as find_sites

_WHERE = {
    "LoadedModel": "fhopt.models.loaded_model",
    "load_model": "fhopt.models.loader",
    "find_sites": "fhopt.models.sites",
    "explain_sites": "fhopt.models.sites",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = ["LoadedModel", "explain_sites", "find_sites", "load_model"]
