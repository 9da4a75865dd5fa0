"""Machine code sees whatever was changed in dictionaries of Python, and what it looks at lives as long as it looks."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from needs import needs_compiler

from fhopt.codegen.layers.held_objects import HeldObjects

pytestmark = needs_compiler
COUNT = 50  # more than are fetched ahead


@pytest.fixture
def holders() -> list[dict[str, Any]]:
    return [{"weight": torch.zeros(1), "bias": None, "number": 10**9 + i} for i in range(COUNT)]


def held(holders: list[dict[str, Any]], empty: list[dict[Any, Any]]) -> HeldObjects:
    names = ("weight", "bias", "number", "forward")
    return HeldObjects([(holder, name, holder.get(name)) for holder in holders for name in names], empty)


def test_what_is_as_it_was(holders: list[dict[str, Any]]) -> None:
    empty: list[dict[Any, Any]] = [{}, OrderedDict()]
    objects = held(holders, empty)
    assert objects.are_held()
    holders[0]["other"] = 1
    holders[1]["weight"].add_(1)
    holders[2]["forward"] = None  # as good as nothing
    del holders[3]["bias"]
    assert objects.are_held() is True


@pytest.mark.parametrize("at", [0, 20, COUNT - 1])
@pytest.mark.parametrize(
    "change", [{"weight": torch.zeros(1)}, {"bias": 0}, {"number": 10**9}, {"forward": print}, {"weight": None}]
)
def test_another_object_is_seen(holders: list[dict[str, Any]], at: int, change: dict[str, Any]) -> None:
    objects, before = held(holders, []), dict(holders[at])
    holders[at].update(change)
    assert not objects.are_held()
    holders[at].clear()
    assert not objects.are_held()
    holders[at].update(before)
    assert objects.are_held()


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_an_item_where_there_was_none_is_seen(kind: type[dict[Any, Any]]) -> None:
    empty = [kind() for _ in range(COUNT)]
    objects = held([], empty)
    for some in (empty[0], empty[20], empty[-1]):
        assert objects.are_held()
        some[1] = 2
        assert not objects.are_held()
        del some[1]
    assert objects.are_held()


def test_nothing_to_look_at_is_held() -> None:
    assert HeldObjects([], []).are_held()


def test_an_equal_object_is_another_one() -> None:
    holder = {"name": ["a"]}
    objects = HeldObjects([(holder, "name", holder["name"])], [])
    holder["name"] = ["a"]
    assert not objects.are_held()


def test_its_objects_live_as_long_as_they_are_looked_at() -> None:
    class Holder(dict[str, Any]):
        """A dictionary of which there are weak references."""

    holder, hooks = Holder(weight=torch.zeros(1)), Holder()
    seen = [weakref.ref(x) for x in (holder, hooks, holder["weight"])]
    objects = HeldObjects([(holder, "weight", holder["weight"])], [hooks])
    holder["weight"] = torch.zeros(1)
    del holder, hooks
    gc.collect()
    assert not objects.are_held() and all(ref() is not None for ref in seen)
    del objects
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_what_is_no_dictionary_is_an_error_of_python() -> None:
    holder: Any = []
    objects = HeldObjects([(holder, "weight", None)], [])
    with pytest.raises(SystemError):  # which machine code leaves, and whoever holds Python's lock finds
        objects.are_held()
