"""The certificate of a rewrite: the match, the replaced nodes with the rule for each, and the numerical check.

decoder.layers.0.self_attn: q [s0, 9, s1, 64], k [s0, 3, s1, 64], v [s0, 3, s1, 64]
  transpose_3   transpose    movement                                 model.py:41
  matmul        matmul       analytic: checked at random points       model.py:42
  ...
  rows without keys give NaN
  5 sets of random values: outputs to 1e-15, gradients to 3e-15
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplacedNode:
    """A node that the canonical form replaces, and why the replacement is valid for all inputs.

    node: its name. operation: the op it calls. rule: the rule of `recognize.validity`, with its premises.
    source: the line of the user's code.
    """

    node: str
    operation: str
    rule: str
    source: str


@dataclass(frozen=True)
class Checked:
    """The numerical check. draws: sets of random values. error, gradient_error: largest relative difference.

    gradient_error: None if no gradient flows through the attention.
    """

    draws: int
    error: float
    gradient_error: float | None = None

    def __str__(self) -> str:
        slopes = "" if self.gradient_error is None else f", gradients to {self.gradient_error:.0e}"
        return f"{self.draws} sets of random values: outputs to {self.error:.0e}{slopes}"


@dataclass(frozen=True)
class Certificate:
    """Evidence that one rewrite holds for all values.

    operands: role and symbolic shape of each operand. steps: the nodes between operands and result. rows: the output
    for a query without keys, "" if every query has keys. conditions: assumptions; none by default. checked: None for a
    call that is already canonical.
    """

    operands: tuple[tuple[str, str], ...]
    steps: tuple[ReplacedNode, ...] = ()
    rows: str = ""
    conditions: tuple[str, ...] = ()
    checked: Checked | None = None

    @property
    def summary(self) -> str:
        """One-line summary: number of replaced nodes, and the check."""
        how = f"{len(self.steps)} nodes proved; {self.checked}" if self.checked else "a call that is canonical already"
        return "; ".join((how, *self.conditions))

    @property
    def kind(self) -> tuple[object, ...]:
        """The properties that layers of one model share: everything but node names and source lines."""
        return self.operands, tuple((s.operation, s.rule) for s in self.steps), self.rows, self.conditions

    def lines(self, name: str) -> list[str]:
        """Format the certificate of the attention `name` as text."""
        operands = ", ".join(f"{role} {shape}" for role, shape in self.operands)
        widths = [max((len(getattr(s, f)) for s in self.steps), default=0) for f in ("node", "operation", "rule")]
        steps = [
            f"  {s.node:{widths[0]}}  {s.operation:{widths[1]}}  {s.rule:{widths[2]}}  {s.source}".rstrip()
            for s in self.steps
        ]
        rows = [f"  rows without keys give {self.rows}"] if self.rows else []
        ends = [
            *(f"  assumed: {c}" for c in self.conditions),
            f"  {self.checked or 'a call that is canonical already'}",
        ]
        return [f"{name}: {operands}", *steps, *rows, *ends]


def by_kind(certificates: Mapping[str, Certificate]) -> dict[str, list[str]]:
    """Group certificates that differ only in node names and source lines: first name -> all names."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, certificate in certificates.items():
        groups.setdefault(certificate.kind, []).append(name)
    return {names[0]: names for names in groups.values()}
