"""Libraries of kernels are built beside the work that needs them, which goes on by plain torch operations until then.

    first call     -> the library is there: it is loaded              -> what was asked for
                   -> it is not: a compiler starts                    -> None, until it is built

There are few, and they serve every plan: they are built once on a machine. Compilers are run by threads that do not
keep a process from ending: where it ends first, they are stopped, what they have finished stays in the file cache, and
the next process goes on from there.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fhopt.codegen import compiler
from fhopt.codegen.build import build, load_library, needs_compiler
from fhopt.codegen.cpu.attention import NAME
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cores

PATIENCE = 5.0  # seconds that a process waits for stopped compilers when it ends
log = logging.getLogger(__name__)


class Builder:
    """Builds libraries in threads; every method may be called from any thread.

    Each has a name, a function that builds it, and one that says whether building runs a compiler.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits  # every call waits for what it asks for
        self._built: dict[str, Any] = {}  # an exception where building failed
        self.forget_threads()

    def forget_threads(self) -> None:
        """Begin without threads and jobs, as a process does that was forked: it has only the thread that forked."""
        self._lock = threading.Condition()
        self._queue: deque[tuple[str, Callable[[], Any]]] = deque()
        self._asked = set(self._built)
        self._threads: list[threading.Thread] = []  # that will look into the queue again

    def kernel(self, spec: KernelSpec) -> LatentKernel | None:
        """Return the kernel of `spec`; None while the library of kernels is being built, in the background.

        Raises what `codegen.build` raises.
        """
        return build(spec) if self.has_attention() else None

    def has_attention(self) -> bool:
        """Return whether the library of kernels is there, or cannot be; False while it is being built."""
        return bool(self.get(NAME, _build_attention, needs_compiler))

    def get(self, name: str, job: Callable[[], Any], compiles: Callable[[], bool]) -> Any:
        """Return what the job of that name built; None while it is being built, in the background.

        compiles: whether that takes long; where it does not, it is built at once. Raises what the job raised.
        """
        if name not in self._built and not self.waits and name not in self._asked and not compiles():
            self._built[name] = job()
        if name not in self._built:
            self.start(name, job)
            if not self.waits:
                return None
            self.wait([name])
        found = self._built[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def start(self, name: str, job: Callable[[], Any]) -> None:
        """Start a job that was not asked for yet."""
        with self._lock:
            if name in self._asked or name in self._built:
                return
            if len(self._threads) < cores():
                thread = threading.Thread(target=self._work, name="fhopt-build", daemon=True)
                thread.start()  # it waits for the lock
                self._threads.append(thread)
            log.info("building %s", name)
            self._asked.add(name)
            self._queue.append((name, job))

    def start_attention(self) -> None:
        """Start to build the library of kernels."""
        self.start(NAME, _build_attention)

    def wait(self, names: Iterable[str] | None = None) -> None:
        """Wait until jobs are done, all that were asked for where none are named."""
        with self._lock:
            self._lock.wait_for(lambda: (self._asked if names is None else set(names)) <= self._built.keys())

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.remove(threading.current_thread())
                    return
                name, job = self._queue.popleft()
            try:
                built = job()
            except BaseException as error:  # for whoever asks for it
                built = error
            with self._lock:
                self._built[name] = built
                self._lock.notify_all()

    def stop(self) -> None:
        """Stop compilers, and wait a moment for what they leave to be removed."""
        with self._lock:
            self._queue.clear()
            threads = list(self._threads)
        compiler.stop()
        for thread in threads:
            thread.join(PATIENCE)


def _build_attention() -> bool:
    load_library()
    return True


builder = Builder()
atexit.register(builder.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=builder.forget_threads)
