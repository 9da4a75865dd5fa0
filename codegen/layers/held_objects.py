"""Guard over the Python objects of layers, checked by native code.

A layer program is valid while the layer has the same submodules, weights and hooks. By the next step, streaming the
weights has evicted these objects from the CPU caches. Python waits for each of a thousand dictionaries in sequence;
native code prefetches.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

from fhopt.codegen.layers.program import functions

Entry = tuple[dict[str, Any], str, Any]  # a dictionary, a name in it, and its expected value


class _Access(ctypes.Structure):
    """The C++ struct `Access`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("item", "size", "none")]


@functools.cache
def _access() -> _Access:
    api = ctypes.pythonapi
    item, size = (ctypes.cast(f, ctypes.c_void_p).value for f in (api.PyDict_GetItemWithError, api.PyDict_Size))
    return _Access(item, size, id(None))


class HeldObjects:
    """Guard on dictionary entries, where a missing one equals None, and on dictionaries that must stay empty.

    The libraries of layer programs must be built.
    """

    def __init__(self, entries: Iterable[Entry], empty: Iterable[dict[Any, Any]]) -> None:
        compiled = functions()
        assert compiled is not None
        self.entries, self.empty = tuple(entries), tuple(empty)
        objects, hooks = [id(x) for entry in self.entries for x in entry], [id(x) for x in self.empty]
        held, empty_ones = (ctypes.c_void_p * len(objects))(*objects), (ctypes.c_void_p * len(hooks))(*hooks)
        access = ctypes.byref(_access())
        self._run = functools.partial(compiled.are_held, access, held, len(self.entries), empty_ones, len(hooks))

    def are_held(self) -> bool:
        """Return whether all entries are unchanged, and the other dictionaries still empty."""
        return bool(self._run())
