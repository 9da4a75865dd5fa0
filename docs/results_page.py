"""Generate the pages of measured results from benchmarks/results/*.json.

    python docs/results_page.py        writes docs/results.md, docs/results/*.md and docs/results/*.csv

Nothing is measured here, and every number on the pages is in a file. Sections: results_sections.py; tables:
results_tables.py and quality_tables.py.
"""

from __future__ import annotations

from pathlib import Path

from quality_tables import as_csv
from results_sections import PAGES, ResultsPage, Section
from results_tables import RESULTS, ROOT, Results, by_case

DOCS = ROOT / "docs"
INVENTORIES = {
    "detection": ("zoo", "zoo_wide", "zoo_plans", "zoo_programs")
}  # pages that benchmarks write, below a page
NOTE = "<!-- Made by docs/results_page.py from benchmarks/results. Do not edit. -->"
INDEX = f"""{NOTE}

# Measured results

Every number on these pages was written by a benchmark of the repository into `benchmarks/results`; `make docs`
generates the pages from those files. Each section names the command that measures again on your machine. For a summary,
read [the measurements](measurements.md) first; for what they do not show, [the limits](limits.md).
"""


def pages(folder: Path = RESULTS) -> dict[str, str]:
    """Return the generated files by their path in docs/."""
    results = {path.stem: Results.read(path) for path in sorted(folder.glob("*.json"))}
    known = {name for page in PAGES.values() for name in page.sections}
    others = {name: Section(name, "make help", "", by_case) for name in results if name not in known}
    shown = dict(PAGES) | ({"others": ResultsPage("Others", "Further results.", others)} if others else {})
    out = {f"results/{name}.md": page_text(name, page, results, folder) for name, page in shown.items()}
    per_text = {name: found for name, found in results.items() if name.partition("-")[0] == "quality"}
    out |= {f"results/{name}.csv": as_csv(found) for name, found in per_text.items()}
    return {"results.md": index(shown)} | out


def index(shown: dict[str, ResultsPage]) -> str:
    """Return the page that lists the others."""
    lines = [f"- [{page.title}](results/{name}.md): {page.about}" for name, page in shown.items()]
    tree = ["```{toctree}", ":hidden:", "", *(f"results/{name}" for name in shown), "```"]
    return "\n".join([INDEX, *lines, "", *tree]) + "\n"


def page_text(name: str, page: ResultsPage, results: dict[str, Results], folder: Path) -> str:
    """Format one page: its sections in order, those without results left out."""
    parts = [NOTE, f"# {page.title}", page.about]
    parts += [section(page.sections[file], results[file], folder) for file in page.sections if file in results]
    if inventories := INVENTORIES.get(name):
        parts.append("\n".join(["```{toctree}", ":hidden:", "", *inventories, "```"]))
    return "\n\n".join(parts) + "\n"


def section(shown: Section, results: Results, folder: Path) -> str:
    """Format a section: title, conditions, command, table, picture, and what it was measured on."""
    parts = [f"## {shown.title}", shown.about, f"Command: `{shown.command}`", shown.table(results)]
    if (folder / f"{results.name}.png").exists():
        parts.append(f"![{shown.title}](../../benchmarks/results/{results.name}.png)")
    return "\n\n".join([*filter(None, parts), made_on(results)])


def made_on(results: Results) -> str:
    """Return machine, versions and commit in one sentence."""
    on, versions = results.machine, results.versions
    device = on.get("gpu") or f"{on['cpu']} ({on['cpu_capability']}), {on['cores']} cores, {on['threads']} threads"
    known = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    commit, _, dirty = results.commit.partition("-")
    state = " with changes" if dirty else ""
    file = f"[{results.name}.json](../../benchmarks/results/{results.name}.json)"
    return f"*Measured on {device}; {known}; commit {commit[:12]}{state}. All values: {file}.*"


def outdated(made: dict[str, str]) -> list[Path]:
    """Return the files in docs/results that this program wrote once and does not write any more."""
    files = [*DOCS.glob("results/*.md"), *DOCS.glob("results/*.csv")]
    return [
        f for f in files if f.relative_to(DOCS).as_posix() not in made and (f.suffix == ".csv" or NOTE in f.read_text())
    ]


def main() -> None:
    """Write the pages, and delete those without results."""
    made = pages()
    for path in outdated(made):
        path.unlink()
    for name, text in made.items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
