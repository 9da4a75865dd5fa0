"""Options of `fhopt bench`: contexts, batches, tokens and rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fhopt.errors import FhoptError

CONTEXTS = (512, 2048, 8192)  # the default, limited by the model's positions


@dataclass(frozen=True)
class ThroughputOptions:
    """Options of a throughput measurement.

    contexts: final tokens per sequence, of which the last `decode` are generated; None: CONTEXTS. batches: batch sizes.
    rounds: the medians of these are reported. seed: of the random tokens.
    """

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    decode: int = 64
    rounds: int = 3
    seed: int = 0

    def check(self) -> None:
        """Raise FhoptError for invalid values."""
        for what, number in (("tokens to generate", self.decode), ("rounds", self.rounds)):
            if number < 1:
                raise FhoptError(f"{number} {what} is invalid; expected 1 or more.")
        if not 0 <= self.seed < 2**63:
            raise FhoptError(f"seed {self.seed} is invalid; expected 0 to 2^63 - 1.")
        if self.contexts is not None:
            self._check_room(min(self.contexts))

    def within(self, positions: int | None) -> ThroughputOptions:
        """Return these options with contexts that fit into `positions`; None: unknown.

        Truncates default contexts. Raises FhoptError if a requested context is longer.
        """
        if self.contexts is not None and positions is not None and max(self.contexts) > positions:
            raise FhoptError(
                f"a context of {max(self.contexts)} tokens is too long; expected at most {positions}, the "
                "model's limit. Use shorter --contexts."
            )
        contexts = CONTEXTS if self.contexts is None else self.contexts
        kept = tuple(dict.fromkeys(min(c, positions or c) for c in contexts))
        self._check_room(min(kept))
        return replace(self, contexts=kept)

    def _check_room(self, context: int) -> None:
        if context <= self.decode:
            raise FhoptError(
                f"a context of {context} tokens has no room for a prompt and {self.decode} tokens to "
                "generate. Use longer --contexts, or a smaller --decode."
            )
