"""The test zoo: tiny models with random weights that contain attention in every known spelling.

    for entry in entries(): case = entry.build(); case.module(*case.args, **case.kwargs)

An `Entry` is one forward pass of one model in one implementation: a prefill, or a decode step with a filled cache. The
expected sites are counted from the model's configuration, never from the finder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import nn


def has_transformers(*least: int) -> bool:
    """Whether transformers is at least version (major, minor)."""
    return tuple(map(int, metadata.version("transformers").split(".")[: len(least)])) >= least


@dataclass
class ZooCase:
    """A call to capture: `module(*args, **kwargs)`. Caches in kwargs are new and filled."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One forward pass of the zoo.

    build makes a new, deterministic Case each time (a run changes caches). sites: attentions that must be found.
    explained: attentions that are not rewritten, for one of the reasons that match `reason` (a regular expression).
    heads, kv_heads, head_dim: expected in every site if all sites of the entry are equal (0: not checked).
    """

    name: str  # "llama", "added_mask", ...
    family: str  # "huggingface", "torch", "hand-written", "spelling", "look-alike"
    build: Callable[[], ZooCase]
    sites: int
    implementation: str = ""  # "eager", "sdpa", "flex"; "" if there is only one
    step: str = "forward"  # "forward", "prefill", "decode", "decode static"
    explained: int = 0
    reason: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    slow: bool = False  # capturing takes more than about 5 s

    @property
    def label(self) -> str:
        """`name-implementation-step`, unique in the zoo."""
        return "-".join(part.replace(" ", "_") for part in (self.name, self.implementation, self.step) if part)
