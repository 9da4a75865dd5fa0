"""Options of page selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fhopt.errors import FhoptError
from fhopt.refine.shares import parse_share

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel

MASS_SHARE = 0.5  # of the pages, that may be read where only a mass is set
PIECE, QUERIES = 512, 16  # tokens read at once, and how many at the end of them are probes
LAST = 256  # tokens of a sequence in which sites read less, one after the other
WORD = 4  # bytes of a row of a sketch that are read at once
LEAST_PAGES = 16  # with fewer, a probe says nothing


@dataclass(frozen=True)
class PagingOptions:
    """Options of calibrating page selection, beside a model and a plan.

    share: of the bytes of quantized tokens that a decode step reads on average. mass: of attention's weight that is to
    be kept, with at most that share; None: the share is used up. tokens: of a page. sketch: bytes of quantized values
    of a token's sketch in each latent head. least, limit: see `PagePlan`. texts: calibration texts, of which
    `sequences` sequences of `context` tokens are read.
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

        block: of the plan. exact: tokens that it keeps outside of latents, attention sinks and residual window.
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
        """Return how many tokens a sequence needs to have pages to choose from, quantized in blocks."""
        return exact + -(-LEAST_PAGES * self.tokens // block) * block + PIECE + LAST


def read_options(pages: float | str | None, mass: float | str | None, texts: tuple[str, ...]) -> PagingOptions | None:
    """Make options from shares, numbers or text as a user writes them; None without any.

    A mass alone may read half of the pages. Raises FhoptError.
    """
    if pages is None and mass is None:
        return None
    share = MASS_SHARE if pages is None else read_page_share(pages)
    return PagingOptions(share=share, mass=None if mass is None else read_page_share(mass), texts=texts)


def for_model(loaded: LoadedModel, options: PagingOptions, block: int, exact: int) -> PagingOptions:
    """Limit the sequences of `options` to the positions of the model.

    block: of the plan. exact: tokens that it keeps outside of latents, attention sinks and residual window. Raises
    FhoptError, before anything slow starts, where positions or texts do not suffice.
    """
    from fhopt.models.model_facts import positions_of
    from fhopt.texts import tokens as texts_tokens

    positions = positions_of(loaded.language_model())
    if positions is not None and positions < options.needed(exact, block):
        raise FhoptError(
            f"{loaded.name} has {positions} positions; expected {options.needed(exact, block)} or more to calibrate "
            "pages on. Leave --pages and --mass out."
        )
    limited = options if positions is None else replace(options, context=min(options.context, positions))
    limited.check(block, exact)
    texts_tokens.calibration_ids(loaded.tokenizer, limited.texts, count=limited.sequences, length=limited.context)
    return limited


def read_page_share(text: float | str) -> float:
    """Read a share of pages or of weight: 0.125, "1/8", "0.125" or "12.5%". Raises FhoptError."""
    try:
        share = parse_share(text) if isinstance(text, str) else float(text)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise FhoptError(f"{text!r} is not a share; expected one such as 1/8, 0.125 or 12.5%, above 0 and at most 1.")
    return share
