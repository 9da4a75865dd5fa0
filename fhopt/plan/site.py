"""Attention sites: roles, shapes, rotary embedding, mask, kind, source line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fhopt.plan.window import MIN_SLIDING, RECENT_PART

# Mask types (fhopt/passes/recognize/masks.py), and how keys and values get into a cache
MASKS = (
    "none", "causal", "sliding", "chunked", "block", "causal block", "padding", "alibi", "relative", "additive", "bool",
)  # fmt: skip
CACHE_KINDS = ("none", "cat", "in-place", "bare")  # bare: filled elsewhere

# --------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Rope:
    """A rotary embedding, measured by running the graph from the projection to the core.

    `pairing` is "half" (i and i + n/2 of a block of n channels form one complex number) or "interleaved" (2i, 2i + 1).
    `rotary_dim` channels from `offset` on rotate, in `blocks` blocks of n (axial rotation: one block per axis).
    `angles` holds the measured angle per position of each frequency, in radians, F values; if `positions` is "grid"
    (2-D rotation), the angle of the first step that rotates it.
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

    `name` is the longest common module path of the projections, which is the same in the graphs of prefill and decode.
    `projections` maps "q", "k", "v", "o" to qualified parameter names (several with LoRA).
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
    window: int = 0  # keys that a query sees under a "sliding" mask
    sinks: bool = False  # sink logits: learned columns of the softmax without a value

    def _repr_html_(self) -> str:
        from fhopt.plan.display import site_html

        return site_html(self)

    def exact_tokens(self, sinks: int, recent: int) -> tuple[int, int]:
        """Return how many (first, newest) tokens stay exact: none in cross attention.

        With a sliding window, the newest are limited to its maximum residual window.
        """
        if self.kind != "self":
            return 0, 0
        return sinks, min(recent, self.sliding // RECENT_PART) if self.sliding else recent

    @property
    def rotates(self) -> bool:
        """Whether keys are rotated by position, in a known way."""
        return self.kind == "self" and self.rope is not None and self.rope.positions == "sequence"

    @property
    def slides(self) -> bool:
        """Whether a query sees only the newest `window` tokens."""
        return self.mask in ("sliding", "chunked") and self.window > 0

    @property
    def sliding(self) -> int:
        """Tokens of a sliding window that a plan may compress; 0 without one, or if it is too short."""
        return self.window if self.slides and self.window >= MIN_SLIDING else 0

    @property
    def cached_weights(self) -> tuple[str, ...]:
        """Parameters of the key and value projections, which a plan's bases belong to."""
        return tuple(dict.fromkeys([*self.projections.get("k", ()), *self.projections.get("v", ())]))

    @property
    def exact_numbers_per_token(self) -> int:
        """Elements per token in a full-precision cache of this site: keys and values of all kv heads."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def site_from(item: Mapping[str, Any]) -> AttentionSite:
    """Rebuild a site from its `dataclasses.asdict`, loaded from JSON. Raises TypeError, LookupError."""
    rope = item["rope"] and Rope(**{**item["rope"], "angles": tuple(item["rope"]["angles"])})
    projections = {role: tuple(names) for role, names in item["projections"].items()}
    return AttentionSite(**{**item, "rope": rope or None, "projections": projections})
