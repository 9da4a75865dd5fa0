"""Jobs run one after the other, each in a separate process with time and memory limits.

A process is a fork of this one, which has done the slow imports: it starts at once, and its changes to torch's state
end with it. A job that crashes or times out gives a reason instead of its result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

MEMORY = 5 << 30  # bytes of private memory that a job may allocate


class Ended(Exception):
    """A job gave no result; the message says how its process ended."""


def run_apart(job: Callable[[], Any], seconds: float, memory: int = MEMORY) -> Any:
    """Return `job()`, a result that can be pickled, computed in a fork of this process. Raises Ended."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs, memory))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise Ended(f"not done after {seconds:.0f} s")
        return ours.recv()
    except EOFError:
        process.join()
        raise Ended(_how(process.exitcode)) from None
    finally:
        process.kill()
        process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with {code}"


def _work(job: Callable[[], Any], pipe: Connection, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(torch.get_num_threads())  # replaces the forked thread pool; autograd's thread may abort on it
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        result = job()
    pipe.send(result)
