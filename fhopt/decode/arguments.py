"""Arguments of a model call, by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Path = tuple[int | str, ...]  # position or name, then index or key in a tuple, list or dictionary


def leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the arguments of a call with their paths, flattening tuples, lists and dictionaries."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, x in named:
        if type(x) in (tuple, list):
            yield from (((key, i), y) for i, y in enumerate(x))
        elif type(x) is dict:
            yield from (((key, name), y) for name, y in x.items())
        else:
            yield (key,), x


def leaf(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    """Return the argument of a call at a path from `leaves`."""
    key = path[0]
    x = args[key] if isinstance(key, int) else kwargs[key]
    return x if len(path) == 1 else x[path[1]]
