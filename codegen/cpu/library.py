"""C++ libraries for CPUs: each is one file of `sources`, prebuilt (prebuilt.py) or compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fhopt.codegen.compiler import CompileError, compile_and_load, compiles, warn_without_compiler
from fhopt.codegen.cpu.source_text import read_cpp
from fhopt.codegen.prebuilt import CpuTarget, load_prebuilt, prebuilt_target

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # hashed by identity, in every call of a kernel
class CppLibrary:
    """A C++ file and how it is compiled.

    name: of the compiled file, and of the job that compiles it in the background. bind: declares the types of its
    functions, and returns what `load` returns. otherwise: what calls do without the library, for the log; "" warns
    instead, as this is slow. flags, links: further ones, for the compiler and the linker. local_flags: those that
    depend on this machine, such as paths; they raise CompileError without a compiler. Prebuilt libraries lack them.
    """

    name: str
    file: str
    bind: Callable[[ctypes.CDLL], Any]
    otherwise: str = ""
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    local_flags: Callable[[], tuple[str, ...]] = tuple

    def text(self) -> str:
        """Return the C++ file with its headers."""
        return read_cpp(self.file)

    def compiles(self) -> bool:
        """Return whether `load` runs a compiler, which takes seconds: once per machine."""
        if self.prebuilt_for() is not None:
            return False
        try:
            return compiles(self.name, self.text(), (*self.flags, *self.local_flags()))
        except CompileError:  # no compiler
            return False

    def prebuilt_for(self) -> CpuTarget | None:
        """Return the class of CPUs that the library is prebuilt for; None if `load` compiles it."""
        return prebuilt_target(self.name, self.text(), self.flags)

    def load(self) -> Any:
        """Load it, once per process, and compile it if it is not prebuilt; None if that fails.

        Returns the result of `bind`.
        """
        return _load(self)


@functools.cache
def _load(library: CppLibrary) -> Any:
    try:
        loaded = load_prebuilt(library.name, library.text(), library.flags)
        if loaded is None:
            flags = (*library.flags, *library.local_flags())
            loaded = compile_and_load(library.name, library.text(), flags, library.links)
    except CompileError as error:
        if library.otherwise:
            log.info("%s %s", error, library.otherwise)
        else:
            warn_without_compiler(error)
        return None
    return library.bind(loaded)
