"""Options of page selection, as a user writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import positions_of
from fhopt.texts import tokens as texts_tokens

MASS_SHARE = 0.5  # of the pages, that may be read where only a mass is asked for
PIECE, QUERIES = 512, 16  # tokens read at once, and how many at the end of them are probes
LAST = 256  # tokens of a sequence in which sites read less, one after the other
WORD = 4  # bytes of a row of a sketch that are read at once
LEAST_PAGES = 16  # behind which a probe says something


@dataclass(frozen=True)
class PagingOptions:
    """What `calibrate` needs beside a model and a plan.

    share: of the bytes of sealed tokens that a step reads on average. mass: of attention's weight that is to be kept,
    with at most that share; None: the share is used up. tokens: of a page. sketch: bytes of codes of a token in each
    latent head. least, limit: see `PagePlan`. texts: calibration texts, of which `sequences` sequences of `context`
    tokens are read.
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
        """Share of the pages that a query may read: more than the mean, less than all."""
        return min(4 * self.share, (1 + self.share) / 2)

    def check(self, block: int, exact: int) -> None:
        """Raise FhoptError for values that cannot work, before anything slow starts.

        block: of the plan. exact: tokens that it keeps outside of latents, sinks and window.
        """
        if not 0 < self.share <= 1 or not 0 < self.limit <= 1 or not 0 < (self.mass or 1.0) <= 1:
            raise FhoptError(
                f"pages {self.share:g}, mass {self.mass}, limit {self.limit:g}: expected shares above 0 and at most 1, "
                "such as --pages 1/8 or --mass 0.99."
            )
        if self.tokens < 1 or block % self.tokens:
            raise FhoptError(f"pages of {self.tokens} tokens: expected a divisor of the plan's block, {block}.")
        if self.sketch < WORD or self.sketch % WORD:
            raise FhoptError(f"sketches of {self.sketch} bytes: expected a multiple of {WORD}.")
        if self.context < self.needed(exact, block) or self.sequences < 1:
            raise FhoptError(
                f"{self.sequences} sequences of {self.context} tokens: expected one or more, of at least "
                f"{self.needed(exact, block)} tokens, so that there are pages to choose from. Use longer sequences."
            )

    def needed(self, exact: int, block: int) -> int:
        """Tokens of a sequence that has pages to choose from, sealed in blocks."""
        return exact + -(-LEAST_PAGES * self.tokens // block) * block + PIECE + LAST


def read_options(pages: str | None, mass: str | None, texts: tuple[str, ...]) -> PagingOptions | None:
    """From shares as a user writes them; None where neither is given. With a mass alone, half of the pages may be read.

    Raises FhoptError.
    """
    if pages is None and mass is None:
        return None
    share = MASS_SHARE if pages is None else parse_share(pages)
    return PagingOptions(share=share, mass=None if mass is None else parse_share(mass), texts=texts)


def for_model(loaded: LoadedModel, options: PagingOptions, block: int, exact: int) -> PagingOptions:
    """`options` with no longer sequences than the model has positions for; block, exact: as of `PagingOptions.check`.

    Raises FhoptError, before anything slow starts, where positions or texts do not suffice.
    """
    positions = positions_of(loaded.language_model())
    if positions is not None and positions < options.needed(exact, block):
        raise FhoptError(
            f"{loaded.name} has {positions} positions; expected {options.needed(exact, block)} or more to calibrate "
            "pages on. Leave --pages and --mass out."
        )
    found = options if positions is None else replace(options, context=min(options.context, positions))
    found.check(block, exact)
    texts_tokens.calibration_ids(loaded.tokenizer, found.texts, count=found.sequences, length=found.context)
    return found


def parse_share(text: str) -> float:
    """A share from "1/8", "0.125" or "12.5%". Raises FhoptError."""
    try:
        number = text.strip()
        share = float(Fraction(number[:-1]) / 100 if number.endswith("%") else Fraction(number))
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share <= 1:
        raise FhoptError(f"{text!r} is no share; expected one such as 1/8, 0.125 or 12.5%, above 0 and at most 1.")
    return share
