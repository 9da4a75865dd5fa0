"""How fhopt says no: an error the user can cure, a site that does not fit a pass, weights that are not the plan's."""

from __future__ import annotations

from typing import Any


class FhoptError(Exception):
    """A mistake that the user can cure. The message says what was found, what was expected, and the cure.

    The command line prints it as one line and ends with exit code 2; from Python it is an ordinary exception.
    """


class Miss(Exception):
    """A pass looked at a node and left it alone.

    Attributes:
        reason: what was expected and what was found, one sentence.
        node: the node at which matching stopped (`torch.fx.Node`), or None.
        reached: what had been recognised by then, "" when the pass has no steps.
    """

    def __init__(self, reason: str, node: Any = None, reached: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.reached = reached


class PassError(RuntimeError):
    """A pass broke its contract: names the pass and the node; the cause is kept in `__cause__`."""


class Stale(Exception):
    """What was fitted does not belong to the weights that a compiled graph is called with: it must run exactly.

    is_settled: it was looked for another graph that is right for them, and there is none.
    """

    is_settled = False
