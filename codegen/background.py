"""Kernels are built beside the work that needs them, which goes on by plain torch operations until they are there.

    first call     -> the kernel's file is there: it is loaded        -> the kernel
                   -> it is not: compilers start, one a core          -> None, until it is built

Compilers run at low priority and in threads that do not keep a process from ending: where it ends first, they are
stopped, what they have finished stays in the file cache, and the next process goes on from there.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue

from fhopt.codegen import compiler
from fhopt.codegen.build import build, needs_compiler
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cores

PATIENCE = 5.0  # seconds that a process waits for stopped compilers when it ends
log = logging.getLogger(__name__)


class Builder:
    """Builds kernels in threads; every method may be called from any thread."""

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits  # every call waits for its kernel
        self._lock = threading.Condition()
        self._queue: SimpleQueue[KernelSpec] = SimpleQueue()
        self._built: dict[KernelSpec, LatentKernel | Exception] = {}
        self._asked: set[KernelSpec] = set()
        self._threads: list[threading.Thread] = []

    def kernel(self, spec: KernelSpec, others: Iterable[KernelSpec] = ()) -> LatentKernel | None:
        """Return the kernel of `spec`; None while it is being built, in the background, with `others`.

        Raises what `codegen.build` raises.
        """
        if spec not in self._built and not self.waits and spec not in self._asked and not needs_compiler(spec):
            self._built[spec] = build(spec)
        if spec not in self._built:
            self.start([spec, *others])
            if not self.waits:
                return None
            self.wait([spec])
        found = self._built[spec]
        if isinstance(found, Exception):
            raise found
        return found

    def start(self, specs: Iterable[KernelSpec]) -> None:
        """Start to build kernels that are not built yet."""
        with self._lock:
            new = [spec for spec in dict.fromkeys(specs) if spec not in self._asked and spec not in self._built]
            self._asked.update(new)
            if new:
                log.info("building %d kernels", len(new))
            for spec in new:
                self._queue.put(spec)
            for _ in range(min(len(new), cores() - sum(thread.is_alive() for thread in self._threads))):
                thread = threading.Thread(target=self._work, name="fhopt-build", daemon=True)
                self._threads.append(thread)
                thread.start()

    def wait(self, specs: Iterable[KernelSpec] | None = None) -> None:
        """Wait until kernels are built, all that were asked for where none are named."""
        with self._lock:
            self._lock.wait_for(lambda: (self._asked if specs is None else set(specs)) <= self._built.keys())

    def _work(self) -> None:
        while True:
            try:
                spec = self._queue.get(timeout=0.1)
            except Empty:
                return
            try:
                built: LatentKernel | Exception = build(spec)
            except Exception as error:  # for whoever asks for the kernel
                built = error
            with self._lock:
                self._built[spec] = built
                self._lock.notify_all()

    def stop(self) -> None:
        """Stop compilers, and wait a moment for what they leave to be removed."""
        with self._lock:
            while not self._queue.empty():
                self._queue.get()
        compiler.stop()
        for thread in self._threads:
            thread.join(PATIENCE)


builder = Builder()
atexit.register(builder.stop)
