"""The file cache, the CPUs of this process, and whether Triton is installed.

Files go to the folder named by FHOPT_CACHE_DIR, else XDG_CACHE_HOME/fhopt or ~/.cache/fhopt, which no other user may
write to: generated code in it is run. They are written atomically (to another name, then renamed) and under a lock, so
that processes that need the same file at once make it once.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from fhopt.files import appearing

CACHE_VARIABLE = "FHOPT_CACHE_DIR"


_warned: set[str] = set()


@functools.cache
def has_triton() -> bool:
    """Return True where Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def cores() -> int:
    """Count the logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_megabytes() -> float:
    """Return the most memory that this process has held at once, in MB of 10^6 bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def cache_folder() -> Path:
    """Return the folder of generated files: FHOPT_CACHE_DIR, or `fhopt` below XDG_CACHE_HOME, else ~/.cache."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fhopt"


def cached_file(name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of the file `name` of the cache, made by `make(path)` under a lock when it is not there yet."""
    try:
        return _found_or_made(cache_folder() / name, make)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        other = _temporary_folder()
        warn_once(
            "cache",
            f"The kernel cache cannot be used ({error}); the kernels of this process go to {other} and are built "
            f"again next time. Set {CACHE_VARIABLE} to a folder that you, and nobody else, may write to.",
        )
    return _found_or_made(other / name, make)


def make_private(folder: Path) -> None:
    """Make `folder`, where it is not there, for this user alone. Raises PermissionError when others may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others may write to it", str(folder))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with appearing(path) as target:
        target.write_text(text)


def text_digest(*parts: str) -> str:
    """Compute a digest of texts for file names, 8 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def warn_once(about: str, message: str) -> None:
    """Warn about a subject once in a process."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _found_or_made(path: Path, make: Callable[[Path], None]) -> Path:
    make_private(path.parent)
    if path.exists():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # another process may have made it while this one waited
            make(path)
    return path


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fhopt-")  # removed when the process ends


def _temporary_folder() -> Path:
    return Path(_temporary_directory().name)
