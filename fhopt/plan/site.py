"""Attention sites: roles, shapes, rotary embedding, mask, kind, source line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fhopt.plan.window import MIN_SLIDING, RECENT_PART

# What a mask is (fhopt/passes/recognize/masks.py), and how keys and values reach a cache
MASKS = (
    "none", "causal", "sliding", "chunked", "block", "causal block", "padding", "alibi", "relative", "additive", "bool",
)  # fmt: skip
CACHE_KINDS = ("none", "cat", "in-place", "bare")  # bare: filled elsewhere

# --------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Rope:
    """A rotary embedding, measured by running the graph from the projection to the core.

    `pairing` is "half" (i and i + n/2 of a block of n channels form one complex number) or "interleaved" (2i, 2i + 1).
    `rotary_dim` channels from `offset` on rotate, cut into `blocks` blocks of n (axial rotation: one block an axis).
    `angles` holds the measured angle per position step of each frequency, in radians, F values; where `positions` is
    "grid" (2-D rotation), the first step that turns it.
    """

    pairing: str
    rotary_dim: int
    angles: tuple[float, ...]
    offset: int = 0
    blocks: int = 1
    positions: str = "sequence"

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The channels (real, imaginary) of each frequency, F pairs."""
        size = self.rotary_dim // self.blocks
        starts = range(self.offset, self.offset + self.rotary_dim, size)
        if self.pairing == "half":
            return tuple((s + i, s + i + size // 2) for s in starts for i in range(size // 2))
        return tuple((s + 2 * i, s + 2 * i + 1) for s in starts for i in range(size // 2))


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model: projections, shapes, rotation, mask.

    `name` is the longest common module path of the projections, so that the graphs of prefill and decode agree on it.
    `projections` maps "q", "k", "v", "o" to the qualified parameter names that were found (possibly several: LoRA).
    """

    name: str
    projections: Mapping[str, tuple[str, ...]]
    kind: str  # "self" or "cross"
    heads: int  # H
    kv_heads: int  # G
    key_dim: int  # D of queries and keys
    value_dim: int  # D of values
    scale: float
    rope: Rope | None
    key_norm: bool  # the key is not affine in the projection (QK-norm)
    mask: str  # one of MASKS
    softcap: float  # 0.0: none
    cache: str  # one of CACHE_KINDS
    source: str  # file:line of the core
    window: int = 0  # keys that a query sees with a "sliding" mask
    sinks: bool = False  # sink logits: learned columns of the softmax without a value

    def _repr_html_(self) -> str:
        from fhopt.plan.display import site_html

        return site_html(self)

    def exact_tokens(self, sinks: int, recent: int) -> tuple[int, int]:
        """Return how many (first, newest) tokens stay exact: none of those that a decoder reads of its encoder.

        Where a window slides, no more than a residual window has there.
        """
        if self.kind != "self":
            return 0, 0
        return sinks, min(recent, self.sliding // RECENT_PART) if self.sliding else recent

    @property
    def rotates(self) -> bool:
        """Return whether keys rotate with the position of their token, in a way that is known."""
        return self.kind == "self" and self.rope is not None and self.rope.positions == "sequence"

    @property
    def slides(self) -> bool:
        """Return whether a query sees the newest `window` tokens only."""
        return self.mask in ("sliding", "chunked") and self.window > 0

    @property
    def sliding(self) -> int:
        """Tokens of a sliding window that a plan may compress; 0 where there is none, or a shorter one."""
        return self.window if self.slides and self.window >= MIN_SLIDING else 0

    @property
    def cached_weights(self) -> tuple[str, ...]:
        """Parameters that keys and values are projected by: what the bases of a plan belong to."""
        return tuple(dict.fromkeys([*self.projections.get("k", ()), *self.projections.get("v", ())]))

    @property
    def exact_numbers_per_token(self) -> int:
        """Numbers that an ordinary cache keeps per token at this site: keys and values of all kv heads."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def site_from(item: Mapping[str, Any]) -> AttentionSite:
    """Return the site that `dataclasses.asdict` described, as read back from JSON. Raises TypeError, LookupError."""
    rope = item["rope"] and Rope(**{**item["rope"], "angles": tuple(item["rope"]["angles"])})
    projections = {role: tuple(names) for role, names in item["projections"].items()}
    return AttentionSite(**{**item, "rope": rope or None, "projections": projections})
