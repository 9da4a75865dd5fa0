"""Guard over the Python objects of a model, checked by native code.

A decode program is valid while the model has the same submodules, weights and hooks. By the next step, streaming the
weights has evicted these objects from the CPU caches. Python waits for each of a thousand dictionaries in sequence;
native code prefetches.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

from fhopt.codegen.cpu.calls.caches import Access, HeldEntry
from fhopt.codegen.cpu.launch import address_of
from fhopt.codegen.programs.program import functions

Entry = tuple[dict[Any, Any], Any, Any]  # a dictionary, a key in it, and its expected value


@functools.cache
def _access() -> Access:
    api = ctypes.pythonapi
    return Access(address_of(api.PyDict_GetItemWithError), address_of(api.PyDict_Size), id(None))


class HeldObjects:
    """Guard on dictionary entries, where a missing one equals None, and on dictionaries that must stay empty.

    The libraries of decode programs must be built.
    """

    def __init__(self, entries: Iterable[Entry], empty: Iterable[dict[Any, Any]]) -> None:
        compiled = functions()
        assert compiled is not None
        self.entries, self.empty = tuple(entries), tuple(empty)
        hooks = [id(x) for x in self.empty]
        held = (HeldEntry * len(self.entries))(*[HeldEntry(*map(id, entry)) for entry in self.entries])
        empty_ones = (ctypes.c_void_p * len(hooks))(*hooks)
        access = ctypes.byref(_access())
        self._run = functools.partial(compiled.are_held, access, held, len(self.entries), empty_ones, len(hooks))

    def are_held(self) -> bool:
        """Return whether all entries are unchanged, and the other dictionaries still empty."""
        return bool(self._run())
