"""Attention detection in the test zoo: what is found, what is not rewritten and why, and the numerical differences.

    python -m benchmarks.zoo.curated              benchmarks/results/zoo.json, zoo.png, and docs/results/zoo.md
    python -m benchmarks.zoo.curated --only gpt2  entries whose label contains gpt2; writes nothing
    python -m benchmarks.zoo.curated --quick      a sample of under a minute (also QUICK=1); no page

The exit status is 1 if an entry is not as expected, after naming it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from model_zoo import Entry
from model_zoo.checking import TOLERANCE, ZooResult, check, entries
from rich.progress import track
from rich.table import Table

from benchmarks.palette import FHOPT, TEXT, describe, plain
from benchmarks.recording import ROOT, ResultsFile, Row, commit, is_quick, machine, record, screen, versions
from fhopt.plan.site import AttentionSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

PAGE = ROOT / "docs" / "results" / "zoo.md"
COMMAND = "make zoo"
METRICS = {"sites_expected": "", "sites_found": "", "sites_explained": "", "max_error": "relative"}
ALL = "all"
FAMILIES = {
    "huggingface": "Models of transformers",
    "torch": "Modules of torch",
    "hand-written": "Hand-written models",
    "spelling": "Spellings of one attention",
    "look-alike": "What only looks like attention",
}
SAMPLE = 5  # in a quick run, one in this many names


@click.command()
@click.option("--only", metavar="NAME", help="Only entries whose label contains NAME; writes no files.")
@click.option("--quick", is_flag=True, help="A sample: one implementation and step, of one model in five.")
def main(only: str | None, quick: bool) -> None:
    """Find attention in every model of the zoo, and compare the rewritten graphs with the captured ones."""
    _be_quiet()
    quick = quick or is_quick()
    chosen = [entry for entry in entries() if only is None or only in entry.label]
    if not chosen:
        raise click.BadParameter(f"no entry of the zoo has {only!r} in its label.", param_hint="--only")
    results = [check(entry) for entry in track(sample(chosen) if quick else chosen, "the zoo", transient=True)]
    if only is None:
        record("zoo", rows(results), draw, summary(results))
    else:
        screen().print(summary(results))
    if only is None and not quick:
        write_page(PAGE, results)
        print(f"zoo: {PAGE.relative_to(ROOT)}")
    failed = [result for result in results if not result.ok]
    for result in failed:
        print(f"{result.entry.label}: {'; '.join(result.failures)}")
    sys.exit(1 if failed else 0)


def _be_quiet() -> None:
    """Use one thread (the models are tiny) and no network, and silence torch and transformers."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def sample(zoo: Iterable[Entry]) -> list[Entry]:
    """Take one entry of every fifth name, cycling through implementations and steps."""
    by_name: dict[str, list[Entry]] = {}
    for entry in zoo:
        if not entry.slow:
            by_name.setdefault(f"{entry.family} {entry.name}", []).append(entry)
    return [variants[index % len(variants)] for index, variants in enumerate(list(by_name.values())[::SAMPLE])]


def rows(results: Sequence[ZooResult]) -> list[Row]:
    """Return the results of each entry, then the totals."""
    each = [
        Row(result.entry.label, "find", metric, float(getattr(result, metric)), unit)
        for result in results
        for metric, unit in METRICS.items()
    ]
    worst, seconds = max((r.max_gradient_error for r in results), default=0.0), sum(r.seconds_find for r in results)
    return [
        *each,
        Row(ALL, "find", "max_gradient_error", worst, "relative"),
        Row(ALL, "find", "seconds_find", seconds, "s"),
    ]


# --------------------------------------------------------------------------------------------------- screen


def summary(results: Iterable[ZooResult]) -> Table:
    """Format a line per family."""
    families: dict[str, list[ZooResult]] = {}
    for result in results:
        families.setdefault(result.entry.family, []).append(result)
    table = Table(title="The zoo", title_justify="left")
    table.add_column("family")
    for heading in ("entries", "as expected", "sites", "explained", "error", "gradient error", "capture s", "find s"):
        table.add_column(heading, justify="right")
    for family, members in families.items():
        table.add_row(
            family, str(len(members)), str(sum(r.ok for r in members)), _found(members),
            str(sum(r.sites_explained for r in members)),
            f"{max(r.max_error for r in members):.1e}", f"{max(r.max_gradient_error for r in members):.1e}",
            f"{sum(r.seconds_capture for r in members):.1f}", f"{sum(r.seconds_find for r in members):.1f}",
        )  # fmt: skip
    return table


def _found(results: Iterable[ZooResult]) -> str:
    pairs = [(result.sites_found, result.sites_expected) for result in results]
    return f"{sum(found for found, _ in pairs)}/{sum(expected for _, expected in pairs)}"


def _explained(results: Iterable[ZooResult]) -> str:
    """Count softmaxes that are not rewritten: a zoo entry states the least number that must have a reason."""
    pairs = [(result.sites_explained, result.entry.explained) for result in results]
    given, least = (sum(numbers) for numbers in zip(*pairs, strict=True))
    return f"{given} others not rewritten, each with a reason (required: at least {least})"


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot the largest difference of outputs and caches from the captured graph's, sorted."""
    axes = figure.subplots()
    errors = sorted(row.value for row in results.of("max_error"))
    axes.plot([max(value, MIN_ERROR) for value in errors], color=FHOPT, linewidth=2)
    axes.axhline(TOLERANCE, color=TEXT, linestyle=":", linewidth=1)
    axes.text(0, TOLERANCE * 1.2, f"tolerance of the tests, {TOLERANCE:.0e}", color=TEXT, fontsize=8, va="bottom")
    ylabel = f"largest relative difference ({MIN_ERROR:.0e}: bit-identical)"
    axes.set(yscale="log", xlabel="forward passes, sorted by difference", ylabel=ylabel, xlim=0)
    plain(axes)
    about = f"{len(errors)} forward passes of tiny random models, float32, outputs and caches"
    describe(figure, f"Rewritten graphs match the originals to {max(errors):.1e}", about, results)


MIN_ERROR = 1e-9  # smaller differences are drawn as this one


# --------------------------------------------------------------------------------------------------- page


def write_page(path: Path, results: Sequence[ZooResult]) -> None:
    """Write the Markdown page: a table per family, a line per model."""
    used, on = versions(), machine()
    known, _, state = commit().partition("-")
    measured = f"{known[:12]} ({state})" if state else known[:12]
    lines = [
        "# The zoo: attention found in each model",
        "",
        f"Made by `{COMMAND}` with torch {used['torch']} and transformers {used.get('transformers', '-')}, on "
        f"{on['cpu'] or on['architecture']}, commit {measured}. Do not edit: run the command again.",
        "",
        f"{len(results)} forward passes, {sum(r.ok for r in results)} as expected: {_found(results)} attentions found, "
        f"{_explained(results)}. After the rewrite, outputs and changed caches differ by at most "
        f"{_worst(r.max_error for r in results)} of the largest element, gradients by at most "
        f"{_worst(r.max_gradient_error for r in results)}. Sites are counted over all passes of a line; H, G and D are "
        "query heads, key heads and head size. Weights are random, models have two layers.",
    ]
    for family, title in FAMILIES.items():
        members = [result for result in results if result.entry.family == family]
        if members:
            lines += ["", f"## {title}", "", *_family_table(members)]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.part")
    staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
    staging.replace(path)


def _worst(errors: Iterable[float]) -> str:
    return f"{max(errors, default=0.0):.1e}"


def _family_table(results: Iterable[ZooResult]) -> list[str]:
    """Format a line per name, over all its implementations and steps."""
    by_name: dict[str, list[ZooResult]] = {}
    for result in results:
        by_name.setdefault(result.entry.name, []).append(result)
    lines = [
        "| model | implementations and steps | found | rewritten | not rewritten, and why |",
        "|---|---|---|---|---|",
    ]
    for name, members in by_name.items():
        passes = _runs([result.entry for result in members])
        mark = "" if all(result.ok for result in members) else " **not as expected**"
        cells = [name, passes, _found(members) + mark, _rewritten(members), _left_alone(members)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _runs(zoo: Sequence[Entry]) -> str:
    """Format `eager, sdpa: prefill, decode`, with steps listed separately if they differ between implementations."""
    steps: dict[str, list[str]] = {}
    for entry in zoo:
        steps.setdefault(entry.implementation, []).append(entry.step)
    together: dict[str, list[str]] = {}
    for implementation, of in steps.items():
        together.setdefault(", ".join(of), []).append(implementation)
    return "; ".join(f"{', '.join(names)}: {of}" if any(names) else of for of, names in together.items())


def _rewritten(results: Iterable[ZooResult]) -> str:
    """Describe the sites, each property once."""
    sites = [site for result in results for site in result.sites]
    facts: list[Callable[[AttentionSite], str]] = [_shape, _rotation, _mask, _extras, lambda site: _cache(site.cache)]
    said = (dict.fromkeys(fact(site) for site in sites) for fact in facts)
    return "; ".join(filter(None, (" or ".join(filter(None, values)) for values in said)))


def _shape(site: AttentionSite) -> str:
    width = f"{site.key_dim}" if site.key_dim == site.value_dim else f"{site.key_dim}/{site.value_dim}"
    return f"H={site.heads} G={site.kv_heads} D={width}" + (" cross" if site.kind == "cross" else "")


def _rotation(site: AttentionSite) -> str:
    return f"rope {site.rope.pairing} {site.rope.rotary_dim}" if site.rope else ""


def _mask(site: AttentionSite) -> str:
    if site.mask == "none":
        return ""
    return f"{site.mask} mask" + (f" of {site.window}" if site.window else "")


def _extras(site: AttentionSite) -> str:
    extras = {
        "key norm": site.key_norm,
        f"softcap {site.softcap:g}": site.softcap,
        "sink logits": site.sinks,
    }
    return ", ".join(name for name, is_there in extras.items() if is_there)


def _cache(cache: str) -> str:
    return "" if cache == "none" else f"{cache} cache"


def _left_alone(results: Iterable[ZooResult]) -> str:
    """Format the reasons, each once, with its number of sites."""
    counts: dict[str, int] = {}
    for result in results:
        for missed in result.missed:
            reason = re.sub(r"\b\d+\b", "N", missed.reason).strip()
            counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{count}x {reason}" for reason, count in counts.items())


if __name__ == "__main__":
    main()
