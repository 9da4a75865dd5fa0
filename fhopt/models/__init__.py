"""Loading of models, capture of their graphs, search for their attention sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.models.example_inputs import example_arguments as example_arguments
    from fhopt.models.loaded_model import LoadedModel as LoadedModel
    from fhopt.models.loader import DEMO_NAME as DEMO_NAME
    from fhopt.models.loader import load_model as load_model
    from fhopt.models.model_name import folder_of as folder_of
    from fhopt.models.sites import explain_sites as explain_sites
    from fhopt.models.sites import find_sites as find_sites

_WHERE = {
    "DEMO_NAME": "fhopt.models.loader",
    "LoadedModel": "fhopt.models.loaded_model",
    "example_arguments": "fhopt.models.example_inputs",
    "explain_sites": "fhopt.models.sites",
    "find_sites": "fhopt.models.sites",
    "folder_of": "fhopt.models.model_name",
    "load_model": "fhopt.models.loader",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = ["DEMO_NAME", "LoadedModel", "example_arguments", "explain_sites", "find_sites", "folder_of", "load_model"]
