"""Progress of long computations: the callback type, and a callback that does nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, units done, total units)


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""
