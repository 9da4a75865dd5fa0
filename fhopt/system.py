"""Operating-system services: the cache folder, CPUs and memory of this process, native 16-bit matmuls, Triton.

Files go to the folder named by FHOPT_CACHE_DIR, else XDG_CACHE_HOME/fhopt or ~/.cache/fhopt. Generated code in it is
executed, so no other user may write to it or replace it. Each parent is therefore opened starting from the root,
without following links, and must belong to this user or root; a parent that others may write to must be sticky, like
/tmp. Only this user and root can change a path that passes these checks, so it stays valid.

Files are written atomically (to another name, then renamed) and under a lock, so that concurrent processes create a
file once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import grp
import hashlib
import importlib.util
import os
import platform
import pwd
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fhopt.files import appearing

if TYPE_CHECKING:
    import torch

CACHE_VARIABLE = "FHOPT_CACHE_DIR"


_warned: set[str] = set()


# Functions by which torch reports whether oneDNN has native instructions for a 16-bit dtype on this CPU.
_ASKED = {"torch.bfloat16": "_is_mkldnn_bf16_supported", "torch.float16": "_is_mkldnn_fp16_supported"}


@functools.cache
def multiplies_by_loops(dtype: torch.dtype) -> bool:
    """Return whether torch's matmul of a 16-bit dtype is a loop, for lack of native instructions on this CPU.

    Float32 matmuls are then 8 times faster (Zen 3, 1,024 rows). False on other architectures than x86-64, where torch
    has implementations without oneDNN; these were not measured.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    import torch

    supported = getattr(torch.ops.mkldnn, _ASKED.get(str(dtype), ""), None)
    return supported is not None and torch.backends.mkldnn.is_available() and not supported()


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def cores() -> int:
    """Count the logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reported(field: str) -> str:
    """Return a field of the first CPU in /proc/cpuinfo; "" if missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    named = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(named, "")


def peak_megabytes() -> float:
    """Return the peak memory of this process, in MB of 10^6 bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_bytes() -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and how many of them are free.

    On Linux those of the system, or of the control group (version 2) if its limit is lower. Elsewhere all of the
    machine's memory counts as free.
    """
    known = _numbers(Path("/proc/meminfo"))
    if "MemTotal:" not in known:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = 1024 * known["MemTotal:"], 1024 * known.get("MemAvailable:", known["MemTotal:"])
    limit, used = (_number(_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None or limit >= total:
        return total, free
    cached = _numbers(_GROUP / "memory.stat").get("inactive_file", 0)  # reclaimed as soon as memory is needed
    return limit, max(0, min(free, limit - used + cached))


_GROUP = Path("/sys/fs/cgroup")


def _number(path: Path) -> int | None:
    """Parse the number in a kernel file; None if the file is missing or holds no number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """Parse the lines `name number` of a kernel file; {} if it is missing."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def cache_folder() -> Path:
    """Return the folder of generated files: FHOPT_CACHE_DIR, or `fhopt` in XDG_CACHE_HOME, else ~/.cache."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fhopt"


def cache_fault() -> str:
    """Return why the folder of generated files cannot be used; "" if it can. Creates it."""
    try:
        folder = cache_folder()
        make_private(folder)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except RuntimeError as error:  # there is no home folder
        return str(error)
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"


def generated_bytes() -> int:
    """Return the total bytes of all generated files; 0 if there are none."""
    total = 0
    for folder, _, names in os.walk(cache_folder()):
        for name in names:
            with contextlib.suppress(OSError):  # another process may remove a file concurrently
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def cached_file(name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of the cached file `name`; if missing, `make(path)` creates it under a lock."""
    try:
        return _found_or_made(cache_folder(), name, make)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        other = _temporary_folder()
        warn_once(
            "cache",
            f"The kernel cache is unusable ({error}): this process stores kernels in {other}, and the next "
            f"one compiles them again. Set {CACHE_VARIABLE} to a folder that only you can write to.",
        )
    return _locked(os.open(other, os.O_RDONLY | os.O_DIRECTORY), other / name, make)


def make_private(folder: Path) -> None:
    """Create `folder`, if missing, with access only for this user.

    Raises PermissionError if others may write to it, or replace it.
    """
    for parent in (*reversed(folder.absolute().parents), folder):
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o700)
    os.close(_open_private(folder))


def _open_private(folder: Path) -> int:
    """Open a folder through the descriptors of its parents, checking each. Raises OSError."""
    real = Path(os.path.realpath(folder, strict=True))
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    held = os.open(real.anchor, flags)
    try:
        for number, name in enumerate(real.parts):
            if number:
                inner = os.open(name, flags, dir_fd=held)
                os.close(held)
                held = inner
            place = Path(*real.parts[: number + 1])
            _check_owner(os.fstat(held), place, is_parent=place != real)
    except BaseException:
        os.close(held)
        raise
    return held


def _check_owner(about: os.stat_result, path: Path, is_parent: bool) -> None:
    """Raise PermissionError if others own a folder or may write to it; a sticky parent may be writable."""
    if about.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    is_open = about.st_mode & stat.S_IWOTH or (
        about.st_mode & stat.S_IWGRP and not (is_parent and _is_own(about.st_gid))
    )
    if is_open and not (is_parent and about.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "others may write to it", str(path))


def _is_own(group: int) -> bool:
    """Return whether a group has this user's name and no other member, as on systems with user private groups."""
    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with appearing(path) as target:
        target.write_text(text)


def text_digest(*parts: str) -> str:
    """Compute a digest of texts for file names, 8 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def warn_once(about: str, message: str) -> None:
    """Warn about a subject once per process."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _found_or_made(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the file `name` of a folder private to this user; creates both if missing."""
    make_private(folder)
    real = Path(os.path.realpath(folder))
    return _locked(_open_private(real), real / name, make)


def _locked(folder: int, path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, created under a lock if missing. folder: descriptor of its folder, closed on return."""
    try:
        if _is_sound(folder, path.name):
            return path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path.with_suffix(".lock").name, flags, 0o600, dir_fd=folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_sound(folder, path.name):  # another process may have created it meanwhile
                path.unlink(missing_ok=True)
                make(path)
                os.chmod(path, path.stat().st_mode & 0o755)
        finally:
            os.close(lock)
    finally:
        os.close(folder)
    return path


def _is_sound(folder: int, name: str) -> bool:
    """Return whether a file is regular, not a link, owned by this user or root, and not writable by others."""
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    is_closed = not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(about.st_mode) and about.st_uid in (os.geteuid(), 0) and is_closed


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fhopt-")  # removed when the process ends


def _temporary_folder() -> Path:
    return Path(_temporary_directory().name)
