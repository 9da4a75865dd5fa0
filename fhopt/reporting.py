"""A report as one self-contained HTML file: what was found, what the plan does, what it cost. rich draws it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from fhopt.errors import FhoptError
from fhopt.files import appearing
from fhopt.passes import Outcome
from fhopt.spec import LatentPlan
from fhopt.tables import missed_table, plan_table, sites_table, summary_table

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fhopt report</title>
<style>{stylesheet}
body {{ color: {foreground}; background-color: {background}; margin: 2rem; }}
pre {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; line-height: 1.25; overflow-x: auto; }}
</style></head><body><pre><code>{code}</code></pre></body></html>
"""


def write_report(
    path: Path, outcome: Outcome, plan: LatentPlan | None, result: Mapping[str, Any] | None = None
) -> Path:
    """Write the report to `path`, whole or not at all. Raises FhoptError when the place cannot be written."""
    console = Console(record=True, width=150, file=io.StringIO())
    if result is not None:
        console.print(summary_table(result))
        console.print(
            Panel(f"exact: {result['answer']['exact']}\nplan:  {result['answer']['plan']}", title="greedy answer")
        )
    console.print(sites_table(outcome.sites.values()))
    if plan is not None:
        console.print(plan_table(plan))
        provenance = json.dumps(dict(plan.provenance), indent=1, sort_keys=True)
        console.print(Panel(provenance, title="provenance", highlight=True))
    if outcome.missed:
        console.print(missed_table(outcome.missed))
    page = console.export_html(theme=DEFAULT_TERMINAL_THEME, code_format=_PAGE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as staging:
            staging.write_text(page, encoding="utf-8")
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a place that you may write to.") from error
    return path
