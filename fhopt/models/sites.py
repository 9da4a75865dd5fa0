"""Detection of a loaded model's attention sites, over all graphs of its forward pass."""

from __future__ import annotations

from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline


def find_sites(loaded: LoadedModel) -> passes_outcome.Outcome:
    """Capture the model and find its attention sites. Raises FhoptError if there are none."""
    outcome = explain_sites(loaded)
    if not outcome.sites:
        raise_nothing_found(loaded.name, outcome)
    return outcome


def raise_nothing_found(name: str, outcome: passes_outcome.Outcome) -> None:
    """Raise the FhoptError for a model without attention sites, with the reasons."""
    reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "there is no softmax between two contractions"
    raise FhoptError(f"no attention was found in {name}: {reasons}. See fhopt explain.")


def explain_sites(loaded: LoadedModel) -> passes_outcome.Outcome:
    """Capture the model and find its attention sites, possibly none, over all graphs of its forward pass."""
    captured = loaded.captures()
    if not captured:
        raise FhoptError(
            f"{loaded.name} has no tensor operations to capture. Pass a module that computes with tensors."
        )
    return pipeline.merge_outcomes([pipeline.find_attentions(graph.program, assume_finite=True) for graph in captured])
