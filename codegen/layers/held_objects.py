"""Objects of Python that layers are made of, and whether they still are what they were, as machine code looks at them.

A program stands for a layer as long as the layer has the parts, the weights and the hooks that it had. Weights have
driven all of them out of the caches when the next step asks. Python waits for each of a thousand dictionaries, one
after the other; machine code fetches the next ones meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

from fhopt.codegen.cpu.calls.caches import Access, HeldEntry
from fhopt.codegen.cpu.launch import address_of
from fhopt.codegen.layers.program import functions

Entry = tuple[dict[str, Any], str, Any]  # a dictionary, a name in it, and what stands there


@functools.cache
def _access() -> Access:
    api = ctypes.pythonapi
    return Access(address_of(api.PyDict_GetItemWithError), address_of(api.PyDict_Size), id(None))


class HeldObjects:
    """Dictionaries, names in them and what stands there, nothing being as good as None; and dictionaries without items.

    The libraries of layers must be built.
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
        """Return whether everything stands where it stood, and the others still have no items."""
        return bool(self._run())
