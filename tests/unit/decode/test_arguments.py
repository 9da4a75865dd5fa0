"""Arguments of a model call, by path."""

from __future__ import annotations

from typing import Any

from fhopt.decode.arguments import leaf, leaves


def test_leaves_are_found_again_by_their_paths() -> None:
    args: tuple[Any, ...] = (1, [2, 3])
    kwargs: dict[str, Any] = {"a": (4, "x"), "b": {"c": 5}, "d": None}
    found = dict(leaves(args, kwargs))
    assert list(found) == [(0,), (1, 0), (1, 1), ("a", 0), ("a", 1), ("b", "c"), ("d",)]
    assert all(leaf(args, kwargs, path) is x for path, x in found.items())
