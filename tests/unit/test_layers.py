"""The dependency rules of docs/explanation/architecture.md, checked against every import.

Late imports and those under TYPE_CHECKING count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.source_imports import (
    PRODUCT,
    Import,
    late_cycles,
    module_cycles,
    module_paths,
    package_cycles,
    package_of,
    read_imports,
)

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").is_file())
LINKS = (ROOT / "fhopt" / "passes", ROOT / "fhopt" / "codegen")  # to the folders at the root
PAGE = ROOT / "docs" / "explanation" / "architecture.md"  # has the table
GROUND = {"errors", "version", "progress", "files", "system", "import_hook", "texts"}  # importable from everywhere
GROUND_IMPORTS = {name: GROUND - {"texts"} for name in GROUND} | {"texts": GROUND}


@cache
def allowed() -> dict[str, set[str]]:
    """Parse the page's table: package -> packages that it may import."""
    section = PAGE.read_text().partition("## Dependency rules")[2].partition("\n## ")[0]
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


@cache
def sources() -> dict[str, str]:
    """Return the source of every fhopt module by its path."""
    paths = [path for top in PRODUCT for path in (ROOT / top).rglob("*.py")]
    own = [path for path in paths if not any(link in path.parents for link in LINKS)]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in own}


@cache
def imports() -> tuple[Import, ...]:
    """Return every import between fhopt modules."""
    return tuple(read_imports(sources()))


def forbidden(found: Iterable[Import]) -> list[str]:
    """Return imports that the table does not allow, one sentence each."""
    lines = set()
    for one in found:
        mine = package_of(one.module)
        may = GROUND_IMPORTS.get(mine, GROUND | allowed().get(mine, set()) | {mine})
        if one.module != "fhopt" and package_of(one.target) not in may:
            lines.add(f"{one.module} imports {one.target}; {mine} may import {', '.join(sorted(may))}")
    return sorted(lines)


def test_every_package_has_its_row() -> None:
    assert {package_of(module) for module in module_paths(sources())} - GROUND - {""} == allowed().keys()


def test_packages_import_only_what_is_below_them() -> None:
    assert forbidden(imports()) == []


def test_no_modules_import_each_other() -> None:
    assert module_cycles(imports()) == [] and package_cycles(imports()) == []


def test_only_methods_that_users_call_on_plans_and_sites_import_modules_above() -> None:
    assert {(one.module, one.target) for one in late_cycles(imports())} == {
        ("fhopt.plan.latent_plan", "fhopt.plan.cache_size"),  # ratio, cache_bytes
        ("fhopt.plan.latent_plan", "fhopt.plan.serialization"),  # save, load, digest
        ("fhopt.plan.latent_plan", "fhopt.plan.display"),  # the table in a notebook
        ("fhopt.plan.site", "fhopt.plan.display"),
        ("fhopt.plan.site_plan", "fhopt.plan.display"),
    }


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
    found = [line.partition(";")[0] for line in forbidden([*imports(), Import(module, target, 1)])]
    assert found == [f"{module} imports {target}"]


def test_a_cycle_is_reported() -> None:
    one = next(one for one in imports() if one.module != "fhopt" and not one.is_late)
    back = Import(one.target, one.module, 1, for_types=True)
    assert any({one.module, one.target} <= set(group) for group in module_cycles([*imports(), back]))


def test_the_table_is_parsed_as_intended() -> None:
    assert allowed()["plan"] == set() and allowed()["cache"] == {"plan", "ops", "attention"}
    assert allowed()["passes"] == allowed()["codegen"] == {"plan", "ops"}
    assert allowed()["refine"] == allowed()["calibration"] | {"calibration", "evaluation", "cache"}
    assert allowed()["planning"] == allowed()["refine"] | {"refine"}
    assert allowed()["backend"] == allowed().keys() - {"export", "lm_head", "serving", "inspection", "cli"}
    assert allowed()["cli"] == allowed().keys()


def test_operators_are_defined_in_ops_and_calls_of_compiled_kernels_in_codegen() -> None:
    defines = re.compile(r"\b_LIB\.define\(|library\.(define|custom_op)\(")
    elsewhere = {path for path, text in sources().items() if defines.search(text) and not path.startswith("fhopt/ops/")}
    assert elsewhere == {"codegen/cpu/graph_kernels.py"}
