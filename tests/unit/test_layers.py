"""Who may import whom: the table of docs/explanation/architecture.md, held against every import, late ones too.

Imports under TYPE_CHECKING do not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").is_file())
PAGE = ROOT / "docs" / "explanation" / "architecture.md"  # has the table
GROUND = {"errors", "version", "progress", "files", "system", "import_hook", "texts"}  # all may import these
GROUND_IMPORTS = {name: GROUND - {"texts"} for name in GROUND} | {"texts": GROUND}


@cache
def allowed() -> dict[str, set[str]]:
    """Package -> packages that it may import, as the page says it."""
    section = PAGE.read_text().partition("## Who may import whom")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z_; ]+) \| (.+) \|$", section, re.M)
    table = {name: cell for names, cell in rows for name in names.split("; ") if cell != "may import"}
    found: dict[str, set[str]] = {}
    for name, cell in table.items():
        named = set(re.findall(r"[a-z_]+", re.sub(r"\(.*?\)", "", cell))) & table.keys()
        if cell.startswith("anything"):
            found[name] = table.keys() - named
        else:
            above = re.match(r"what ([a-z]+) may", cell)
            found[name] = named | (found[above[1]] if above else set())
    return found


def modules() -> dict[str, Path]:
    """Dotted name and file of every module of fhopt."""
    found = {}
    for top, prefix in (("fhopt", ""), ("passes", "fhopt."), ("codegen", "fhopt.")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "fhopt" and parts[1:2] in (("passes",), ("codegen",)):  # links to the folders above
                continue
            found[prefix + ".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST, name: str, is_package: bool) -> Iterator[str]:
    """Every name that the module imports from fhopt, dotted, wherever in its code the import stands."""
    skipped = {id(n) for node in ast.walk(tree) if is_for_types(node) for s in node.body for n in ast.walk(s)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{whole}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of fhopt that it imports."""
    known = modules()
    table: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = imported(ast.parse(path.read_text()), name, path.name == "__init__.py")
        found = {t if t in known else t.rpartition(".")[0] for t in targets if t.split(".")[0] == "fhopt"}
        table[name] = found & known.keys() - {name}
    return table


def package(module: str) -> str:
    """`cache` for fhopt.cache.store, `errors` for fhopt.errors, "" for fhopt itself."""
    return module.partition(".")[2].partition(".")[0]


def forbidden(table: dict[str, set[str]]) -> list[str]:
    """Imports that the table of layers does not allow, one sentence each."""
    lines = []
    for module, targets in table.items():
        mine = package(module)
        may = GROUND_IMPORTS.get(mine, GROUND | allowed().get(mine, set()) | {mine})
        for target in sorted(targets):
            if module != "fhopt" and package(target) not in may:
                lines.append(f"{module} imports {target}; {mine} may import {', '.join(sorted(may))}")
    return lines


def circles(table: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other."""
    graph = nx.DiGraph([(a, b) for a, targets in table.items() for b in targets])
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_every_package_has_its_row() -> None:
    packages = {package(m) for m in modules()} - GROUND - {""}
    assert packages == allowed().keys()


def test_packages_import_only_what_stands_below_them() -> None:
    assert forbidden(imports()) == []


def test_no_modules_import_each_other() -> None:
    assert circles(imports()) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("fhopt.plan.site", "fhopt.ops.masks"),
        ("fhopt.passes.pipeline", "fhopt.codegen.build"),
        ("fhopt.codegen.build", "fhopt.passes.pipeline"),
        ("fhopt.hf.apply", "fhopt.fitting.fit_plan"),
        ("fhopt.errors", "fhopt.texts.tokens"),
        ("fhopt.backend.compile", "fhopt.cli.app"),
    ],
)
def test_a_forbidden_import_is_reported(module: str, target: str) -> None:
    table = imports() | {module: imports()[module] | {target}}
    assert [line.partition(";")[0] for line in forbidden(table)] == [f"{module} imports {target}"]


def test_a_circle_is_reported() -> None:
    table = imports()
    low, high = next((b, a) for a, targets in table.items() for b in sorted(targets) if b != "fhopt")
    assert any({low, high} <= set(group) for group in circles(table | {low: table[low] | {high}}))


def test_late_imports_count_and_imports_for_types_do_not() -> None:
    text = (
        "if TYPE_CHECKING:\n    from fhopt.cli import app\n"
        "def f():\n    from fhopt.hf.load import load\n    importlib.import_module('fhopt.cache')\n"
        "    from . import site"
    )
    found = set(imported(ast.parse(text), "fhopt.plan.window", False))
    assert found == {"fhopt.hf.load.load", "fhopt.cache", "fhopt.plan.site"}


def test_the_table_is_read_as_it_is_meant() -> None:
    assert allowed()["plan"] == set() and allowed()["cache"] == {"plan", "ops", "attention"}
    assert allowed()["passes"] == allowed()["codegen"] == {"plan", "ops"}
    assert allowed()["refine"] == allowed()["calibration"] | {"calibration", "evaluation", "cache"}
    assert allowed()["planning"] == allowed()["refine"] | {"refine"}
    assert allowed()["backend"] == allowed().keys() - {"export", "lm_head", "serving", "inspection", "cli"}
    assert allowed()["cli"] == allowed().keys()
