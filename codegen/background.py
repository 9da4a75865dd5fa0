"""Compilation of kernel libraries by threads, before calls need them; a call waits for those that it needs.

    first call     -> the library is in the file cache: load it       -> its kernel
                   -> it is not: a compiler runs, lines report it     -> its kernel, once it is built

There are few libraries, and they serve every plan: they are built once per machine. Plain torch operations would take
up to 50 times as long as a kernel, and compete with the compilers. Compilers are run by daemon threads: if the process
ends first, they are stopped, finished libraries stay in the file cache, and the next process builds the rest.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from fhopt.codegen import compiler
from fhopt.codegen.build import build_kernel
from fhopt.codegen.cpu.attention import LIBRARY
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cores

PATIENCE = 5.0  # seconds to wait at exit for stopped compilers
QUIET = 1.0  # seconds to wait for a library before a line reports it
log = logging.getLogger(__name__)


class Builder:
    """Builds libraries in threads; every method may be called from any thread.

    Each library has a name, a function that builds it, and a function that says whether building runs a compiler.
    """

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}  # an exception if building failed
        self.forget_threads()

    def forget_threads(self) -> None:
        """Drop threads and jobs in a forked process, which has only the thread that forked."""
        self._lock = threading.Condition()
        self._queue: deque[tuple[str, Callable[[], Any]]] = deque()
        self._requested = set(self._built)
        self._threads: list[threading.Thread] = []  # that will check the queue again
        self._reported: set[str] = set()  # by a line on stderr, and not all built
        self._began = 0.0  # of the wait that reported the first of them

    def kernel(self, spec: KernelSpec) -> LatentKernel:
        """Return the kernel of `spec`. Raises what `codegen.build` raises."""
        self.load_attention()
        return build_kernel(spec)

    def load_attention(self) -> None:
        """Build the kernel library, unless it is built. Raises what `codegen.build` raises."""
        self.get(LIBRARY.name, LIBRARY.load, LIBRARY.compiles)

    def get(self, name: str, job: Callable[[], Any], compiles: Callable[[], bool]) -> Any:
        """Return the result of the job with that name, once it has run.

        compiles: whether the job runs a compiler; if not, this thread runs it. Raises what the job raised.
        """
        if name not in self._built and name not in self._requested and not compiles():
            self._built[name] = job()
        if name not in self._built:
            self.start(name, job)
            self.wait([name])
        found = self._built[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def start(self, name: str, job: Callable[[], Any]) -> None:
        """Start a job unless it was requested before."""
        with self._lock:
            if name in self._requested or name in self._built:
                return
            if len(self._threads) < cores():
                thread = threading.Thread(target=self._work, name="fhopt-build", daemon=True)
                thread.start()  # it waits for the lock
                self._threads.append(thread)
            log.info("building %s", name)
            self._requested.add(name)
            self._queue.append((name, job))

    def start_attention(self) -> None:
        """Start to build the kernel library."""
        self.start(LIBRARY.name, LIBRARY.load)

    def wait(self, names: Collection[str] | None = None) -> None:
        """Wait for jobs, for all requested ones if none are named; lines on stderr report a long wait."""

        def missing() -> set[str]:
            return set(self._requested if names is None else names) - self._built.keys()

        began = time.monotonic()
        with self._lock:
            if self._lock.wait_for(lambda: not missing(), QUIET):
                return
            self._report_start(began)
            self._lock.wait_for(lambda: not missing())

    def _report_start(self, began: float) -> None:
        """Report all libraries that are being built, those of later waits too, unless a line has."""
        building = self._requested - self._built.keys() - self._reported
        if building:
            _report(f"fhopt compiles kernels for this CPU, once per machine: {', '.join(sorted(building))}")
            self._began = self._began if self._reported else began
            self._reported |= building

    def _report_end(self) -> None:
        """Report that all reported libraries are built."""
        if self._reported and self._reported <= self._built.keys():
            kernels = ", ".join(sorted(self._reported))
            _report(f"fhopt compiled kernels in {time.monotonic() - self._began:.0f} s: {kernels}")
            self._reported = set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.remove(threading.current_thread())
                    return
                name, job = self._queue.popleft()
            try:
                built = job()
            except BaseException as error:  # re-raised by `get`
                built = error
            with self._lock:
                self._built[name] = built
                self._report_end()
                self._lock.notify_all()

    def stop(self) -> None:
        """Stop compilers, and wait briefly for the removal of their partial files."""
        with self._lock:
            self._queue.clear()
            threads = list(self._threads)
        compiler.stop()
        for thread in threads:
            thread.join(PATIENCE)


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


builder = Builder()
atexit.register(builder.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=builder.forget_threads)
