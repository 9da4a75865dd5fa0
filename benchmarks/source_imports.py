"""The imports between fhopt's modules, parsed from their source, and the cycles that they close.

Sources are texts by path, loaded by `size.py` from the working tree or from a commit. A module of passes/ or codegen/
has its installed name: fhopt.passes.pipeline.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import networkx as nx

PRODUCT = {"fhopt": "fhopt", "passes": "fhopt.passes", "codegen": "fhopt.codegen"}  # folder: package
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Import:
    """An import of one module by another. is_late: within a function; for_types: under TYPE_CHECKING."""

    module: str
    target: str
    line: int
    is_late: bool = False
    for_types: bool = False


def module_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return the path of every module of fhopt by its dotted name."""
    found = {}
    for path in sorted(paths):
        top, _, rest = path.partition("/")
        if top in PRODUCT and rest.endswith(".py"):
            name = rest.removesuffix(".py").replace("/", ".")
            found[f"{PRODUCT[top]}.{name}".removesuffix(".__init__")] = path
    return found


def read_imports(sources: Mapping[str, str]) -> list[Import]:
    """Return every import of one fhopt module by another, at any level of the source."""
    paths = module_paths(sources)
    found = []
    for module, path in paths.items():
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for one in _imports(ast.parse(sources[path]), package):
            target = one.target if one.target in paths else one.target.rpartition(".")[0]
            if target in paths and target != module:
                found.append(replace(one, module=module, target=target))
    return list(dict.fromkeys(found))


def _imports(node: ast.AST, package: str, is_late: bool = False, for_types: bool = False) -> Iterator[Import]:
    """Yield the imports below a node. package: of the module, for resolving relative imports."""
    for target in _targets(node, package):
        yield Import("", target, getattr(node, "lineno", 0), is_late, for_types)
    is_late = is_late or isinstance(node, FUNCTIONS)
    types = {id(n) for n in node.body} if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else ()
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, is_late, for_types or id(child) in types)


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a node imports; for `from a import b`, a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def package_of(module: str) -> str:
    """Return the package of a module: `cache` for fhopt.cache.store, `errors` for fhopt.errors, "" for fhopt itself."""
    return module.partition(".")[2].partition(".")[0]


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of names that import each other, each sorted, the largest first."""
    graph = nx.DiGraph([(a, b) for a, b in edges if a != b])
    groups = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def module_cycles(imports: Iterable[Import]) -> list[list[str]]:
    """Return the cycles between modules by imports at module level, those under TYPE_CHECKING included."""
    return cycles((one.module, one.target) for one in imports if not one.is_late)


def package_cycles(imports: Iterable[Import]) -> list[list[str]]:
    """Return the cycles between packages by all imports, late ones included."""
    return cycles((package_of(one.module), package_of(one.target)) for one in imports)


def late_cycles(imports: Iterable[Import]) -> list[Import]:
    """Return late imports whose target imports the module at module level, directly or indirectly."""
    known = list(imports)
    graph = nx.DiGraph([(one.module, one.target) for one in known if not one.is_late])
    late = [one for one in known if one.is_late and one.module in graph and one.target in graph]
    return [one for one in late if nx.has_path(graph, one.target, one.module)]
