"""Options of page selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fhopt.errors import FhoptError
from fhopt.refine.shares import parse_share

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel

MASS_SHARE = 0.5  # share of the pages if only a mass is set
PIECE, QUERIES = 512, 16  # tokens per forward pass, and the last ones of them that are probe queries
LAST = 256  # tokens of a sequence on which the cost of each site is measured
WORD = 4  # bytes of a sketch row loaded at once
MIN_PAGES = 16  # with fewer, a probe is meaningless


@dataclass(frozen=True)
class PagingOptions:
    """Options of calibrating page selection, without the model and plan.

    share: average share of the bytes of quantized tokens that a decode step loads. mass: share of the attention weight
    to cover, with at most `share`; None: use all of `share`. tokens: per page. sketch: bytes of quantized values per
    token and latent head in a sketch. least, limit: see `PagePlan`. texts: calibration texts, of which `sequences`
    sequences of `context` tokens are used.
    """

    share: float = 1 / 8
    mass: float | None = None
    tokens: int = 8
    sketch: int = 12
    least: int = 512
    limit: float = 1.0
    texts: tuple[str, ...] = ("topics",)
    sequences: int = 2
    context: int = 4096

    @property
    def room(self) -> float:
        """Max share of pages for one query: more than the mean, less than all."""
        return min(4 * self.share, (1 + self.share) / 2)

    def check(self, block: int, exact: int) -> None:
        """Raise FhoptError for invalid values, before anything slow starts.

        block: of the plan. exact: its tokens that are not latents, attention sinks and recent window.
        """
        if not 0 < self.share <= 1 or not 0 < self.limit <= 1 or not 0 < (self.mass or 1.0) <= 1:
            raise FhoptError(
                f"pages {self.share:g}, mass {self.mass}, limit {self.limit:g} is invalid; expected shares "
                "above 0 and at most 1, such as --pages 1/8 or --mass 0.99."
            )
        if self.tokens < 1 or block % self.tokens:
            raise FhoptError(
                f"a page size of {self.tokens} tokens is invalid; expected a divisor of the plan's block, {block}."
            )
        if self.sketch < WORD or self.sketch % WORD:
            raise FhoptError(f"a sketch size of {self.sketch} bytes is invalid; expected a multiple of {WORD}.")
        if self.context < self.needed(exact, block) or self.sequences < 1:
            raise FhoptError(
                f"{self.sequences} sequences of {self.context} tokens are too short for page selection; "
                f"expected at least one sequence of {self.needed(exact, block)} tokens. Use longer sequences."
            )

    def needed(self, exact: int, block: int) -> int:
        """Return the tokens that a sequence needs for MIN_PAGES pages, quantized in blocks."""
        return exact + -(-MIN_PAGES * self.tokens // block) * block + PIECE + LAST


def read_options(pages: float | str | None, mass: float | str | None, texts: tuple[str, ...]) -> PagingOptions | None:
    """Build options from shares, as numbers or text; None if neither is set.

    With only a mass, up to half of the pages may be selected. Raises FhoptError.
    """
    if pages is None and mass is None:
        return None
    share = MASS_SHARE if pages is None else read_page_share(pages)
    return PagingOptions(share=share, mass=None if mass is None else read_page_share(mass), texts=texts)


def for_model(loaded: LoadedModel, options: PagingOptions, block: int, exact: int) -> PagingOptions:
    """Limit the sequences of `options` to the positions of the model.

    block: of the plan. exact: its tokens that are not latents, attention sinks and recent window. Raises FhoptError,
    before anything slow starts, if positions or texts do not suffice.
    """
    from fhopt.models.model_facts import positions_of
    from fhopt.texts import tokens as texts_tokens

    positions = positions_of(loaded.language_model())
    if positions is not None and positions < options.needed(exact, block):
        raise FhoptError(
            f"{loaded.name} has {positions} positions; expected at least {options.needed(exact, block)} to "
            "calibrate page selection. Drop --pages and --mass."
        )
    limited = options if positions is None else replace(options, context=min(options.context, positions))
    limited.check(block, exact)
    texts_tokens.calibration_ids(loaded.tokenizer, limited.texts, count=limited.sequences, length=limited.context)
    return limited


def read_page_share(text: float | str) -> float:
    """Parse a share of pages or of weight: 0.125, "1/8", "0.125" or "12.5%". Raises FhoptError."""
    try:
        share = parse_share(text) if isinstance(text, str) else float(text)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise FhoptError(
            f"{text!r} is not a share; expected a value above 0 and at most 1, such as 1/8, 0.125 or 12.5%."
        )
    return share
