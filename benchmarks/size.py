"""Line counts of the repository by package, and lists of what makes it hard to read.

    python -m benchmarks.size                        the working tree
    python -m benchmarks.size --commit REV           another commit
    python -m benchmarks.size --against REV          before and after: REV and the working tree

The lists: import cycles between modules (imports under TYPE_CHECKING count) and between packages, late imports that
would close a cycle, long files and functions, public names with several definitions, and limits named MOST_ or LEAST_
instead of MAX_ or MIN_. Generated files (GENERATED) only count as lines.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
from rich.table import Table

from benchmarks.recording import screen
from benchmarks.source_imports import PRODUCT, Import, late_cycles, module_cycles, package_cycles, read_imports

ROOT = Path(__file__).parents[1]
LANGUAGES = {".py": "Python", ".py.in": "Python", ".cpp": "C++", ".h": "C++"}  # by file extension
FOLDERS = (*PRODUCT, "tests", "benchmarks", "docs", "examples")
GENERATED = ("tests/golden/",)
MAX_FILE, WARN_FILE, MAX_FUNCTION = 450, 400, 60  # lines
OLD_LIMIT = re.compile(r"_?(MOST|LEAST)(_|$)")
OLD_LIMIT_CPP = re.compile(r"\bconstexpr\b.*?\b((?:MOST|LEAST)(?:_\w+)?) *=")


# --------------------------------------------------------------------------------------------------- sources


def working_tree() -> dict[str, str]:
    """Return the text of every source file of the working tree by its path, new files included."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").decode().split("\0")
    files = [path for path in listed if is_source(path) and (ROOT / path).is_file()]
    return {path: (ROOT / path).read_text() for path in files}


def of_commit(revision: str) -> dict[str, str]:
    """Return the text of every source file of a commit by its path. Raises ClickException for an unknown commit."""
    try:
        archive = _git("archive", "--format=tar", revision)
    except subprocess.CalledProcessError as error:
        raise click.ClickException(
            f"commit {revision} is not in this clone. Name another one, or fetch the whole history of a shallow clone: "
            "git fetch --unshallow."
        ) from error
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and is_source(member.name) and (file := tar.extractfile(member)) is not None:
                texts[member.name] = file.read().decode()
    return texts


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, cwd=ROOT).stdout


def is_source(path: str) -> bool:
    """Return whether a file is counted."""
    return path.partition("/")[0] in FOLDERS and language(path) != ""


def language(path: str) -> str:
    """Return the language of a file by its name; "" for a file that is not counted."""
    name = path.rpartition("/")[2]
    return LANGUAGES.get(name[name.find(".") :] if "." in name else "", "")


# --------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Definition:
    """A class, function or constant. where: path:line. lines: from `def` or `class` to the end."""

    name: str
    where: str
    lines: int = 1


class TreeSize:
    """The counts and lists of a tree. sources: texts by path."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sorted(sources.items()))
        written = {path: text for path, text in self.sources.items() if not path.startswith(GENERATED)}
        self.written = {path: text.count("\n") for path, text in written.items()}  # lines of hand-written files
        self.trees = {path: ast.parse(text) for path, text in written.items() if path.endswith(".py")}

    @cached_property
    def lines(self) -> dict[tuple[str, str], int]:
        """Lines by package and language."""
        total: Counter[tuple[str, str]] = Counter()
        for path, text in self.sources.items():
            total[package(path), language(path)] += text.count("\n")
        return dict(total)

    @cached_property
    def imports(self) -> list[Import]:
        """Imports between modules of fhopt."""
        return read_imports(self.sources)

    def long_files(self, limit: int) -> list[Definition]:
        """Return the files of more than `limit` lines, the longest first."""
        long = [Definition(path, path, lines) for path, lines in self.written.items() if lines > limit]
        return sorted(long, key=lambda one: -one.lines)

    @cached_property
    def long_functions(self) -> list[Definition]:
        """Functions and methods of more than MAX_FUNCTION lines, the longest first."""
        found = [
            _definition(node, path)
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        return sorted([one for one in found if one.lines > MAX_FUNCTION], key=lambda one: -one.lines)

    @cached_property
    def repeated_classes(self) -> dict[str, list[Definition]]:
        """Names of public classes that several modules of the repository define."""
        return self._repeated((ast.ClassDef,), FOLDERS)

    @cached_property
    def repeated_functions(self) -> dict[str, list[Definition]]:
        """Names of public functions that several modules of fhopt define."""
        return self._repeated((ast.FunctionDef, ast.AsyncFunctionDef), PRODUCT)

    def _repeated(self, kinds: tuple[type[ast.stmt], ...], folders: Collection[str]) -> dict[str, list[Definition]]:
        found: dict[str, dict[str, Definition]] = defaultdict(dict)
        for path, tree in self.trees.items():
            for node in tree.body if path.partition("/")[0] in folders else ():
                if isinstance(node, kinds) and not (one := _definition(node, path)).name.startswith("_"):
                    found[one.name].setdefault(path, one)  # overloads share one name in a module
        return {name: list(paths.values()) for name, paths in sorted(found.items()) if len(paths) > 1}

    @cached_property
    def old_limits(self) -> list[Definition]:
        """Constants named MOST_ or LEAST_, in Python and C++."""
        python = [
            Definition(name, f"{path}:{node.lineno}")
            for path, tree in self.trees.items()
            for node in tree.body
            for name in _assigned(node)
            if OLD_LIMIT.match(name)
        ]
        cpp = [
            Definition(found[1], f"{path}:{number}")
            for path in self.written
            if language(path) == "C++"
            for number, line in enumerate(self.sources[path].splitlines(), 1)
            if (found := OLD_LIMIT_CPP.search(line))
        ]
        return python + cpp

    def counts(self) -> dict[str, int]:
        """Return the number of entries of every list."""
        late = sum(one.is_late for one in self.imports)
        return {
            "modules in import cycles": sum(map(len, module_cycles(self.imports))),
            "packages in import cycles": sum(map(len, package_cycles(self.imports))),
            "late imports": late,
            "late imports that close a cycle": len(late_cycles(self.imports)),
            f"files over {WARN_FILE} lines": len(self.long_files(WARN_FILE)),
            f"files over {MAX_FILE} lines": len(self.long_files(MAX_FILE)),
            f"functions over {MAX_FUNCTION} lines": len(self.long_functions),
            "class names with several definitions": len(self.repeated_classes),
            "  in fhopt, passes and codegen": len(self._repeated((ast.ClassDef,), PRODUCT)),
            "function names with several definitions": len(self.repeated_functions),
            "MOST_ and LEAST_ names": len(self.old_limits),
        }


def package(path: str) -> str:
    """Return the row of a file: `fhopt/plan`, `tests/unit`, `benchmarks`, and `fhopt` for a file at its root."""
    return "/".join(path.split("/")[:-1][:2])


def _definition(node: ast.AST, path: str) -> Definition:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return Definition(node.name, f"{path}:{node.lineno}", (node.end_lineno or node.lineno) - node.lineno + 1)


def _assigned(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


# --------------------------------------------------------------------------------------------------- report


def lines_table(now: TreeSize, before: TreeSize | None = None) -> Table:
    """Tabulate lines by package, and totals; with `before`, also the earlier values."""
    columns = [
        f"{name}{part}" for name in ("Python", "C++") for part in (("", " before", " change") if before else ("",))
    ]
    table = Table("package", *columns, title="Lines", title_justify="left")
    names = sorted({name for size in (now, before) if size for name, _ in size.lines})
    groups = [(name, {name}) for name in names]
    product = {name for name in names if name.partition("/")[0] in PRODUCT}
    for name, rows in [*groups, ("fhopt, passes, codegen", product), ("all", set(names))]:
        cells = []
        for kind in ("Python", "C++"):
            count, old = (sum(size.lines.get((row, kind), 0) for row in rows) if size else 0 for size in (now, before))
            cells += [f"{count:,}", *([f"{old:,}", f"{count - old:+,}"] if before else [])]
        table.add_row(name, *cells)
    return table


def counts_table(now: TreeSize, before: TreeSize | None = None) -> Table:
    """Tabulate the number of entries of every list; with `before`, also the earlier values."""
    table = Table("", "count", *(["before"] if before else []), title="Structure", title_justify="left")
    old = before.counts() if before else {}
    for name, count in now.counts().items():
        table.add_row(name, str(count), *([str(old[name])] if before else []))
    return table


def listing(size: TreeSize) -> Iterator[str]:
    """Yield the entries of every nonempty list, a line each, below its title."""
    late = [f"{one.module}:{one.line} -> {one.target}" for one in late_cycles(size.imports)]
    lists = {
        "Import cycles between modules": [", ".join(group) for group in module_cycles(size.imports)],
        "Import cycles between packages": [", ".join(group) for group in package_cycles(size.imports)],
        "Late imports that close a cycle": late,
        f"Files over {WARN_FILE} lines": [f"{one.lines} {one.where}" for one in size.long_files(WARN_FILE)],
        f"Functions over {MAX_FUNCTION} lines": [f"{one.lines} {one.where} {one.name}" for one in size.long_functions],
        "Class names with several definitions": _named(size.repeated_classes),
        "Function names with several definitions": _named(size.repeated_functions),
        "MOST_ and LEAST_ names": [f"{one.where} {one.name}" for one in size.old_limits],
    }
    for title, entries in lists.items():
        if entries:
            yield f"\n{title}"
            yield from (f"  {entry}" for entry in entries)


def _named(repeated: Mapping[str, Collection[Definition]]) -> list[str]:
    return [f"{name}: {', '.join(one.where for one in places)}" for name, places in repeated.items()]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--commit", metavar="REV", help="Count this commit instead of the working tree.")
@click.option("--against", metavar="REV", help="Also count this commit, as the state before.")
@click.option("--no-lists", is_flag=True, help="Print the tables only.")
def main(commit: str | None, against: str | None, no_lists: bool) -> None:
    """Count lines by package, and list import cycles, long files and functions, and repeated names."""
    now = TreeSize(working_tree() if commit is None else of_commit(commit))
    before = None if against is None else TreeSize(of_commit(against))
    screen().print(lines_table(now, before), counts_table(now, before))
    if not no_lists:
        click.echo("\n".join(listing(now)))


if __name__ == "__main__":
    main()
