"""C++ libraries for CPUs: each is one file of `sources`, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fhopt.codegen.compiler import CompileError, compile_and_load, compiles, warn_without_compiler
from fhopt.codegen.cpu.source_text import read_cpp

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # hashed by identity, in every call of a kernel
class CppLibrary:
    """A C++ file and how it is compiled.

    name: of the compiled file, and of the job that compiles it in the background. bind: declares the types of its
    functions, and returns what `load` returns. otherwise: what calls do without the library, for the log; "" warns
    instead, as this is slow. flags, links: further ones, for the compiler and the linker.
    """

    name: str
    file: str
    bind: Callable[[ctypes.CDLL], Any]
    otherwise: str = ""
    flags: Callable[[], tuple[str, ...]] = tuple
    links: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the C++ file with its headers."""
        return read_cpp(self.file)

    def compiles(self) -> bool:
        """Return whether `load` runs a compiler, which takes seconds: once per machine."""
        return compiles(self.name, self.text(), self.flags())

    def load(self) -> Any:
        """Compile and load it, once per process; return the result of `bind`, or None if it cannot be compiled."""
        return _load(self)


@functools.cache
def _load(library: CppLibrary) -> Any:
    try:
        loaded = compile_and_load(library.name, library.text(), library.flags(), library.links)
    except CompileError as error:
        if library.otherwise:
            log.info("%s %s", error, library.otherwise)
        else:
            warn_without_compiler(error)
        return None
    return library.bind(loaded)
