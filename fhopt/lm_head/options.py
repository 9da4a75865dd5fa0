"""Options of fitting a retrieval head: checked before anything slow starts, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fhopt.errors import FhoptError

FILES = ("head.json", "head.safetensors")  # of a head on disk
BITS = ("auto", "4", "8")


@dataclass(frozen=True)
class HeadOptions:
    """Options of `fit`.

    texts, sequences, context: source of the hidden states. clusters: None: one per 64 rows. bits: 4, 8, or auto for the
    mix that loads the fewest bytes. iterations: of k-means.
    """

    texts: Sequence[str] = ("topics",)
    sequences: int = 8
    context: int = 512
    clusters: int | None = None
    bits: str = "auto"
    iterations: int = 8
    seed: int = 0

    def check(self) -> None:
        """Raise FhoptError for options out of range."""
        if self.bits not in BITS:
            raise FhoptError(f"bits {self.bits!r} is invalid; expected one of {', '.join(BITS)}.")
        for name in ("sequences", "context", "iterations"):
            if getattr(self, name) < 1:
                raise FhoptError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.clusters is not None and self.clusters < 1:
            raise FhoptError(f"clusters is {self.clusters}; expected at least 1.")
