"""Progress of long computations: how a callback is called, and one that does nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, units done, units in all)


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""
