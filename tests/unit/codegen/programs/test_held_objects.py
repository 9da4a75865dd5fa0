"""Native guards notice every change of Python dictionaries, and keep the guarded objects alive."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from needs import needs_compiler

from fhopt.codegen.programs.held_objects import HeldObjects

pytestmark = needs_compiler
COUNT = 50  # more than are prefetched


@pytest.fixture
def holders() -> list[dict[str, Any]]:
    return [{"weight": torch.zeros(1), "bias": None, "number": 10**9 + i} for i in range(COUNT)]


def held(holders: list[dict[str, Any]], empty: list[dict[Any, Any]]) -> HeldObjects:
    names = ("weight", "bias", "number", "forward")
    return HeldObjects([(holder, name, holder.get(name)) for holder in holders for name in names], empty)


def test_unchanged_dictionaries_pass(holders: list[dict[str, Any]]) -> None:
    empty: list[dict[Any, Any]] = [{}, OrderedDict()]
    objects = held(holders, empty)
    assert objects.are_held()
    holders[0]["other"] = 1
    holders[1]["weight"].add_(1)
    holders[2]["forward"] = None  # None counts as absent
    del holders[3]["bias"]
    assert objects.are_held() is True


@pytest.mark.parametrize("at", [0, 20, COUNT - 1])
@pytest.mark.parametrize(
    "change", [{"weight": torch.zeros(1)}, {"bias": 0}, {"number": 10**9}, {"forward": print}, {"weight": None}]
)
def test_another_object_is_noticed(holders: list[dict[str, Any]], at: int, change: dict[str, Any]) -> None:
    objects, before = held(holders, []), dict(holders[at])
    holders[at].update(change)
    assert not objects.are_held()
    holders[at].clear()
    assert not objects.are_held()
    holders[at].update(before)
    assert objects.are_held()


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_new_item_in_an_empty_dictionary_is_noticed(kind: type[dict[Any, Any]]) -> None:
    empty = [kind() for _ in range(COUNT)]
    objects = held([], empty)
    for some in (empty[0], empty[20], empty[-1]):
        assert objects.are_held()
        some[1] = 2
        assert not objects.are_held()
        del some[1]
    assert objects.are_held()


def test_an_empty_guard_passes() -> None:
    assert HeldObjects([], []).are_held()


def test_an_equal_but_different_object_is_noticed() -> None:
    holder = {"name": ["a"]}
    objects = HeldObjects([(holder, "name", holder["name"])], [])
    holder["name"] = ["a"]
    assert not objects.are_held()


def test_guarded_objects_live_as_long_as_the_guard() -> None:
    class Holder(dict[str, Any]):
        """A dictionary that supports weak references."""

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


def test_a_non_dictionary_raises_a_python_error() -> None:
    holder: Any = []
    objects = HeldObjects([(holder, "weight", None)], [])
    with pytest.raises(SystemError):  # set by native code, raised once the GIL is held
        objects.are_held()
