"""The page of the wide zoo: one table of counts, then the classes with any other result than found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.zoo.wide_check import WideRow

STATUSES = {
    "found": "all found",
    "explained": "some not rewritten, with a reason",
    "silent": "missed silently",
    "wrong": "wrong results",
    "crashed": "crashed",
    "not captured": "not traced by torch.compile",
    "no attention": "no softmax attention",
    "not built": "not built",
}
ORDER = ("decoders", "text", "vision", "audio", "others")


def families(rows: Iterable[WideRow]) -> dict[str, list[WideRow]]:
    """Return rows by family and implementation, decoders first."""
    known: dict[str, list[WideRow]] = {}
    for row in rows:
        known.setdefault(f"{row.family}, {row.impl}", []).append(row)
    first = {name: index for index, name in enumerate(ORDER)}
    return dict(sorted(known.items(), key=lambda item: first.get(item[0].split(",")[0], len(first))))


def _cells(members: Sequence[WideRow]) -> list[str]:
    expected = sum(row.expected for row in members)
    found = sum(min(row.found, row.expected) for row in members)
    share = f"{100 * found / expected:.1f}%" if expected else "-"
    counts = [str(sum(row.status == status for row in members)) for status in STATUSES]
    worst = max((row.max_error for row in members if row.status != "wrong"), default=0.0)
    return [str(len(members)), str(expected), str(found), share, str(sum(r.explained for r in members)), *counts,
            f"{worst:.0e}"]  # fmt: skip


HEADINGS = ("classes", "attentions", "found", "share", "explained", *STATUSES.values(), "max relative error")


def table(rows: Sequence[WideRow]) -> Table:
    """Format a line per family and implementation, for the screen."""
    out = Table(title="The wide zoo", title_justify="left")
    out.add_column("family")
    for heading in HEADINGS:
        out.add_column(heading, justify="right")
    for name, members in families(rows).items():
        out.add_row(name, *_cells(members))
    return out


def page(rows: Sequence[WideRow], versions: Mapping[str, str], commit: str, untried: int = 0) -> str:
    """Return the Markdown page. untried: number of classes without a row."""
    known, _, state = commit.partition("-")
    lines = [
        "# The wide zoo: every class of transformers",
        "",
        f"Made by `make zoo-wide` with torch {versions['torch']} and transformers {versions.get('transformers', '-')}, "
        f"commit {known[:12]}{f' ({state})' if state else ''}. Do not edit: run the command again.",
        "",
        "Every model class is built from its default configuration with rewritten sizes (two layers, or one of each "
        "kind; H=4, D=16) and random weights, and called once. The attentions of a class are counted from what it "
        "computes: the softmax of a product of two activations, and a product of that with values. Each is then found "
        "by fhopt and rewritten exactly, or not rewritten, with a reason. Outputs of both graphs are compared, "
        "relative to the largest element of each tensor. Weights are random: this says nothing about plan quality.",
        "",
        "| family | " + " | ".join(HEADINGS) + " |",
        "|---|" + "---|" * len(HEADINGS),
        *(f"| {name} | " + " | ".join(_cells(members)) + " |" for name, members in families(rows).items()),
        "",
        "Classes without softmax attention are state-space, convolutional and similar models. Classes that were not "
        "built reject small sizes, or need inputs that the benchmark does not try; they say nothing about fhopt.",
        *(
            [f"{untried} further classes have not been tried yet: `make zoo-wide` goes on with them."]
            if untried
            else []
        ),
    ]
    for status, title in STATUSES.items():
        members = [row for row in rows if row.status == status]
        if members and status not in ("found", "no attention"):
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *reasons(members)]
    return "\n".join(lines) + "\n"


def reasons(rows: Iterable[Any]) -> list[str]:
    """Format a line per reason, with the classes that have it."""
    known: dict[str, list[str]] = {}
    for row in rows:
        reason = "; ".join(re.sub(r"\d+", "N", why) for why in row.why[:2]) or "-"
        known.setdefault(reason, []).append(row.case)
    lines = ["| reason | classes |", "|---|---|"]
    for reason, names in sorted(known.items(), key=lambda item: -len(item[1])):
        text = re.sub(r"([|\\<>*_`\[\]])", r"\\\1", reason[:240])
        lines.append(f"| {text} | {', '.join(dict.fromkeys(names))} |")
    return lines
