"""How many tokens of a sequence are quantized, and how many stay in the residual window."""

from __future__ import annotations

# --------------------------------------------------------------------------------------------------- plans


def sealed_tokens(tokens: int, sinks: int, recent: int, block: int) -> int:
    """How many of `tokens` cached tokens stand in sealed blocks."""
    return max(0, (tokens - sinks - recent) // block) * block
