"""Options of healing and of a loss target, checked before anything slow starts, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fhopt.errors import FhoptError
from fhopt.refine.shares import parse_share

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan

MIN_SEQUENCES = 4  # with fewer, the result does not transfer to other text
RATIOS = tuple(2.0 * 2 ** (i / 6) for i in range(19))  # 2x to 16x, in steps of 12%


@dataclass(frozen=True)
class HealOptions:
    """Options of healing, without the model and plan.

    texts: interleaved; their first halves are solved for, their second halves measured. tokens: to solve for, in
    sequences of `context` tokens, one forward pass each. ridge: regularization towards the plan's decoder, relative to
    the mean square of its inputs. held_out: sequences of `context` tokens for measuring quality before and after.
    checkpoint: file from which an interrupted healing resumes.
    """

    texts: tuple[str, ...] = ("topics",)
    tokens: int = 50_000
    context: int = 1024
    ridge: float = 0.2
    held_out: int = 2
    checkpoint: Path | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences that the tokens make."""
        return self.tokens // self.context

    def check(self) -> None:
        """Raise FhoptError for invalid values, before anything slow starts."""
        if self.context < 2 or self.held_out < 1:
            raise FhoptError(
                f"context={self.context}, held_out={self.held_out} is invalid; expected a context of at least "
                "2 and held_out of at least 1."
            )
        if self.sequences < MIN_SEQUENCES:
            raise FhoptError(
                f"{self.tokens} tokens make {max(0, self.sequences)} sequences of {self.context}; expected at "
                f"least {MIN_SEQUENCES}. Raise --tokens, or lower --context."
            )
        if not 0 < self.ridge < math.inf:
            raise FhoptError(
                f"ridge {self.ridge:g} is invalid; expected a finite number above 0, such as {HealOptions.ridge:g}."
            )

    def check_plan(self, plan: LatentPlan) -> None:
        """Raise FhoptError if no token of a context of this length would be cached as a latent."""
        first = plan.sinks + plan.recent
        if self.context <= first and all(p.site.kind == "self" for p in plan.sites):
            raise FhoptError(
                f"a context of {self.context} tokens is covered by the plan's sinks and residual window; "
                f"expected more than {first}. Raise --context."
            )


@dataclass(frozen=True)
class Gate:
    """Loss target of a plan, and the held-out text for measuring it.

    max_loss: increase of perplexity, as a share (0.01 = 1%). texts: their second halves are used; empty: the
    calibration texts. sequences: of `context` tokens, over all texts. ratios: ascending; the search returns the largest
    that passes.
    """

    max_loss: float
    texts: tuple[str, ...] = ()
    sequences: int = 4
    context: int = 2048
    ratios: tuple[float, ...] = RATIOS

    def check(self) -> None:
        """Raise FhoptError for limits that no plan or every plan passes."""
        if not 0 < self.max_loss < 1:
            raise FhoptError(
                f"max_loss {self.max_loss:.3g} is invalid; expected a share above 0 and below 1, such as 1% or 0.01."
            )


def read_loss(loss: float | str) -> float:
    """Parse a loss such as 0.01, `1%` or `0.01` as a share. Raises FhoptError."""
    try:
        return parse_share(loss) if isinstance(loss, str) else float(loss)
    except (TypeError, ValueError):
        raise FhoptError(f"max_loss {loss!r} is invalid; expected a share such as 1% or 0.01.") from None
