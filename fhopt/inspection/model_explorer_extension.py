"""Adapter for .fhopt files: `model-explorer --extensions=fhopt.inspection.model_explorer_extension` imports it.

Importing it needs the extra `explorer`: Model Explorer registers every class that derives from its Adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_explorer import Adapter, AdapterMetadata

from fhopt.files import EXPLORER_GRAPH
from fhopt.inspection.model_explorer import convert


class FhoptAdapter(Adapter):  # type: ignore[misc]
    """Adapter that opens .fhopt files in Model Explorer."""

    metadata = AdapterMetadata(
        id="fhopt", name="fhopt", description="Graphs of fhopt after each pass", fileExts=[EXPLORER_GRAPH.lstrip(".")]
    )

    def convert(self, model_path: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Convert a file to graphs of Model Explorer's own data classes."""
        return convert(Path(model_path))
