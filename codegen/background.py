"""Kernels are built beside the work that needs them, which goes on by plain torch operations until they are there.

    first call     -> the kernel's file is there: it is loaded        -> the kernel
                   -> it is not: compilers start, one a core          -> None, until it is built

Compilers are run by threads that do not keep a process from ending: where it ends first, they are stopped, what they
have finished stays in the file cache, and the next process goes on from there.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from fhopt.codegen import compiler
from fhopt.codegen.build import build, needs_compiler
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cores

PATIENCE = 5.0  # seconds that a process waits for stopped compilers when it ends
Jobs = Mapping[Hashable, Callable[[], Any]]  # by what they build
log = logging.getLogger(__name__)


class Builder:
    """Builds kernels and libraries in threads; every method may be called from any thread.

    Each has a key, a function that builds it, and one that says whether building runs a compiler.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits  # every call waits for what it asks for
        self._lock = threading.Condition()
        self._queue: SimpleQueue[tuple[Hashable, Callable[[], Any]]] = SimpleQueue()
        self._built: dict[Hashable, Any] = {}  # an exception where building failed
        self._asked: set[Hashable] = set()
        self._threads: list[threading.Thread] = []

    def kernel(self, spec: KernelSpec, others: Iterable[KernelSpec] = ()) -> LatentKernel | None:
        """Return the kernel of `spec`; None while it is being built, in the background, with `others`.

        Raises what `codegen.build` raises.
        """
        jobs: Jobs = {each: functools.partial(build, each) for each in (spec, *others)}
        kernel: LatentKernel | None = self.get(spec, jobs, lambda: needs_compiler(spec))
        return kernel

    def get(self, key: Hashable, jobs: Jobs, compiles: Callable[[], bool]) -> Any:
        """Return what the job of `key` built; None while it is being built, in the background, with all other `jobs`.

        compiles: whether that takes long; where it does not, it is built at once. Raises what the job raised.
        """
        if key not in self._built and not self.waits and key not in self._asked and not compiles():
            self._built[key] = jobs[key]()
        if key not in self._built:
            self.start(jobs)
            if not self.waits:
                return None
            self.wait([key])
        found = self._built[key]
        if isinstance(found, Exception):
            raise found
        return found

    def start(self, jobs: Jobs) -> None:
        """Start jobs that were not asked for yet."""
        with self._lock:
            new = {key: job for key, job in jobs.items() if key not in self._asked and key not in self._built}
            self._asked.update(new)
            if new:
                log.info("building %d kernels", len(new))
            for item in new.items():
                self._queue.put(item)
            for _ in range(min(len(new), cores() - sum(thread.is_alive() for thread in self._threads))):
                thread = threading.Thread(target=self._work, name="fhopt-build", daemon=True)
                self._threads.append(thread)
                thread.start()

    def prepare(self, specs: Iterable[KernelSpec]) -> None:
        """Build kernels, and wait for them and for all else that was asked for."""
        self.start({spec: functools.partial(build, spec) for spec in specs})
        self.wait()

    def wait(self, keys: Iterable[Hashable] | None = None) -> None:
        """Wait until jobs are done, all that were asked for where none are named."""
        with self._lock:
            self._lock.wait_for(lambda: (self._asked if keys is None else set(keys)) <= self._built.keys())

    def _work(self) -> None:
        while True:
            try:
                key, job = self._queue.get(timeout=0.1)
            except Empty:
                return
            try:
                built = job()
            except Exception as error:  # for whoever asks for it
                built = error
            with self._lock:
                self._built[key] = built
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
