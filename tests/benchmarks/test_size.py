"""Line counts of the repository, and lists of what makes it hard to read (benchmarks/size.py), on small trees."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from benchmarks import size
from benchmarks.size import TreeSize
from benchmarks.source_imports import Import, late_cycles, module_cycles, package_cycles, read_imports


def shown(table: Table) -> list[list[str]]:
    """Return the cells of a table, row by row."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def committed(folder: Path, files: dict[str, str]) -> str:
    """Write files, commit them, and return the commit."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "Add files"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------- imports


def test_imports_are_found_everywhere() -> None:
    text = (
        "from typing import TYPE_CHECKING\n"
        "from fhopt.plan import site\n"
        "if TYPE_CHECKING:\n    from fhopt.cli.app import App\n"
        "else:\n    import fhopt.files\n"
        "class A:\n    def f(self):\n        from fhopt.passes.pipeline import run\n"
        "def g():\n    importlib.import_module('fhopt.errors')\n"
        "from . import window\n"
    )
    names = ("plan/site", "plan/window", "plan/__init__", "cli/app", "files", "errors")
    tree = {f"fhopt/{name}.py": "" for name in names} | {"passes/pipeline.py": "", "fhopt/plan/sizes.py": text}
    found = {(one.target, one.line, one.is_late, one.for_types) for one in read_imports(tree)}
    assert found == {
        ("fhopt.plan.site", 2, False, False),
        ("fhopt.cli.app", 4, False, True),
        ("fhopt.files", 6, False, False),
        ("fhopt.passes.pipeline", 9, True, False),
        ("fhopt.errors", 11, True, False),
        ("fhopt.plan.window", 12, False, False),
    }


def test_imports_for_types_close_cycles_and_late_ones_are_listed_separately() -> None:
    tree = {
        "fhopt/a/one.py": "from fhopt.a import two",
        "fhopt/a/two.py": "from fhopt.b.three import x",
        "fhopt/b/three.py": "if TYPE_CHECKING:\n    from fhopt.a.one import y",
        "fhopt/c/four.py": "from fhopt.c.five import z",
        "fhopt/c/five.py": "def f():\n    from fhopt.c import four",
    }
    imports = read_imports(tree)
    assert module_cycles(imports) == [["fhopt.a.one", "fhopt.a.two", "fhopt.b.three"]]
    assert package_cycles(imports) == [["a", "b"]]
    assert late_cycles(imports) == [Import("fhopt.c.five", "fhopt.c.four", 2, is_late=True)]


def test_a_late_import_closes_a_cycle_of_packages() -> None:
    tree = {"fhopt/a/one.py": "import fhopt.b.two", "fhopt/b/two.py": "def f():\n    from fhopt.a.one import x"}
    imports = read_imports(tree)
    assert module_cycles(imports) == [] and package_cycles(imports) == [["a", "b"]]


# --------------------------------------------------------------------------------------------------- lists


def test_lines_are_counted_by_package_and_language() -> None:
    tree = {
        "fhopt/errors.py": "1\n2\n",
        "fhopt/plan/site.py": "1\n",
        "codegen/gpu/sources/kernel.py.in": "not Python {\n",
        "codegen/cpu/sources/a.cpp": "1\n2\n3\n",
        "tests/golden/attention/a.h": "1\n",
    }
    now, before = TreeSize(tree), TreeSize({"fhopt/errors.py": "1\n2\n3\n", "docs/conf.py": "1\n"})
    assert shown(size.lines_table(now))[:3] == [
        ["codegen/cpu", "0", "3"],
        ["codegen/gpu", "1", "0"],
        ["fhopt", "2", "0"],
    ]
    rows = {row[0]: row[1:] for row in shown(size.lines_table(now, before))}
    assert rows["fhopt"] == ["2", "3", "-1", "0", "0", "+0"] and rows["docs"] == ["0", "1", "-1", "0", "0", "+0"]
    assert rows["fhopt, passes, codegen"] == ["4", "3", "+1", "3", "0", "+3"]
    assert rows["all"] == ["4", "4", "+0", "4", "0", "+4"]


def test_long_files_and_functions_are_listed_the_longest_first() -> None:
    long = "def long():\n" + "    pass\n" * 60
    tree = {
        "fhopt/a.py": long + "class A:\n    async def longer(self):\n" + "        pass\n" * 61,
        "fhopt/b.cpp": "\n" * 401,
        "fhopt/c.py": "\n" * 451,
        "fhopt/d.py": "\n" * 400 + "def short():\n" + "    pass\n" * 59,
        "tests/golden/e.cpp": "\n" * 999,
    }
    found = TreeSize(tree)
    assert [(one.where, one.lines) for one in found.long_functions] == [("fhopt/a.py:63", 62), ("fhopt/a.py:1", 61)]
    assert [one.lines for one in found.long_files(size.WARN_FILE)] == [460, 451, 401]
    assert [one.where for one in found.long_files(size.MAX_FILE)] == ["fhopt/d.py", "fhopt/c.py"]


def test_names_defined_in_several_modules_are_listed() -> None:
    tree = {
        "fhopt/a.py": "class Walk: pass\nclass _Own: pass\ndef fit(): pass\ndef fit(): pass\nclass B:\n def f(): pass",
        "codegen/b.py": "class _Own: pass\ndef fit(): pass\ndef f(): pass\ndef once(): pass",
        "tests/c.py": "class Walk: pass\ndef once(): pass",
    }
    found = TreeSize(tree)
    assert {n: [p.where for p in ps] for n, ps in found.repeated_classes.items()} == {
        "Walk": ["fhopt/a.py:1", "tests/c.py:1"]
    }
    assert {n: [p.where for p in ps] for n, ps in found.repeated_functions.items()} == {
        "fit": ["codegen/b.py:2", "fhopt/a.py:3"]
    }
    assert found.counts()["  in fhopt, passes and codegen"] == 0


def test_outdated_names_of_limits_are_listed() -> None:
    tree = {
        "fhopt/a.py": "MOST_ROWS, MAX_ROWS = 1, 2\n_LEAST: int = 1\nALMOST = MOSTLY = 3\n",
        "codegen/cpu/a.h": "constexpr int PARTS = 1, MOST = 2;\nint x = MOST;\n",
    }
    found = [(one.where, one.name) for one in TreeSize(tree).old_limits]
    assert found == [("fhopt/a.py:1", "MOST_ROWS"), ("fhopt/a.py:2", "_LEAST"), ("codegen/cpu/a.h:1", "MOST")]


# --------------------------------------------------------------------------------------------------- the command


def test_a_commit_is_compared_with_the_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "ROOT", tmp_path)
    first = committed(tmp_path, {"fhopt/a.py": "x = 1\n", ".gitignore": "ignored.py\n", "docs/page.md": "text\n"})
    (tmp_path / "fhopt" / "a.py").write_text("from fhopt import b\nMOST = 2\n")
    (tmp_path / "fhopt" / "b.py").write_text("if TYPE_CHECKING:\n    from fhopt import a\n")
    (tmp_path / "fhopt" / "ignored.py").write_text("x = 1\n")
    (tmp_path / "fhopt" / "passes").symlink_to("../passes")
    assert size.working_tree().keys() == {"fhopt/a.py", "fhopt/b.py"}
    assert size.of_commit(first) == {"fhopt/a.py": "x = 1\n"}
    done = CliRunner().invoke(size.main, ["--against", first], catch_exceptions=False)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines()]
    assert ["all", "4", "1", "+3", "0", "0", "+0"] in cells and ["MOST_ and LEAST_ names", "1", "0"] in cells
    assert "\nImport cycles between modules\n  fhopt.a, fhopt.b\n" in done.stdout
    only = CliRunner().invoke(size.main, ["--commit", first, "--no-lists"], catch_exceptions=False).stdout
    assert "MOST_ and LEAST_ names                  │ 0 " in only and only.count("cycle") == 3


def test_a_commit_missing_from_a_shallow_clone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "ROOT", tmp_path)
    committed(tmp_path, {"fhopt/a.py": "x = 1\n"})
    with pytest.raises(click.ClickException, match=r"commit 0504013 is not in this clone\. .* git fetch --unshallow"):
        size.of_commit("0504013")
