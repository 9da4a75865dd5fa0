"""Exceptions raised by fhopt."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FhoptError(Exception):
    """An error that the user can correct. The message states what was found, what was expected, and the fix.

    The command line prints it as one line and exits with code 2; from Python it is an ordinary exception.
    """


def one_line(text: object, limit: int = 300) -> str:
    """Return the start of a text as one printable line, for a message: files may contain any characters."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words[:limit])


def unknown_name(name: str, known: Iterable[str], what: str, further: Iterable[str] = ()) -> FhoptError:
    """Make the error for a misspelled name, with the nearest one, or all known ones if none is near.

    what: kind of name. further: names that are near enough to suggest, but too many to list.
    """
    names = sorted(known)
    near = get_close_matches(name, [*names, *further], n=1)
    expected = f"{near[0]!r}" if near else f"one of {', '.join(names)}"
    return FhoptError(f"{name!r} is not {what}; expected {expected}. Check the spelling.")


class Miss(Exception):
    """Raised if a pass does not rewrite a node.

    Attributes:
        reason: what was expected and what was found, one sentence.
        node: the node at which matching stopped (`torch.fx.Node`), or None.
        reached: what had been recognized before, "" if the pass has no steps.

    """

    def __init__(self, reason: str, node: Any = None, reached: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.reached = reached


class PassError(RuntimeError):
    """Raised if a pass breaks its contract: names the pass and the node; `__cause__` is the original error."""


class Stale(Exception):
    """Raised if a compiled graph is called with other weights than its plan was fitted for, and must run exactly.

    Attributes:
        is_settled: no other graph of the plan matches these weights.

    """

    is_settled = False
