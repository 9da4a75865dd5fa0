"""Sandbox for a Python program that a language model wrote, in a separate process.

    run_program("assert 1 + 1 == 2") -> ProgramResult(passed=True, reason="")

The process is an isolated interpreter (standard library only, hash seed 0 for reproducibility) in its own session. It
has an empty temporary folder as working directory and home, no input, no output, and no environment but PATH. Three
mechanisms limit it: the kernel (`setrlimit`: memory, CPU time, file size, processes for all users but root, no core
dumps); a network namespace without devices if the kernel allows it; and an audit hook (PEP 578) that refuses sockets
(thus asyncio), processes, signals, foreign code, and everything that writes or deletes outside the folder. Reading
files is not refused.

This guards against accidents, not against an adversary: an audit hook can be bypassed, and the secret that proves the
program reached its end is in the memory of its process.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

TAIL = 4096  # last bytes of standard error that are stored
LINE = 200  # max characters of its last line in a reason
FILE_BYTES, WRITES = 4 << 20, 256  # max file size, and max number of times a program may open a file for writing
LOADER = "import sys; f = sys.argv[1]; exec(compile(open(f, 'rb').read(), f, 'exec'), {'__name__': '__main__'})"

NEW_USER, NEW_NET = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of linux/sched.h
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38  # PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS of linux/prctl.h
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

REFUSED = (
    "socket.", "ctypes.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
    "pty.", "signal.pthread_kill", "resource.", "gc.get_", "sqlite3.enable_load", "sqlite3.load",
)  # fmt: skip
CHANGED = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
    "shutil.rmtree": ((0, 1),),
    "sqlite3.connect": ((0, None),),
}  # audit event: indices of the arguments with modified paths, and of their base folders (dir_fd)


@dataclass(frozen=True)
class ProgramResult:
    """Whether a program ran to its end, and otherwise the reason.

    reason: "" if passed, else "timed out", "out of memory", "ended early with exit code 0", "killed by SIGSEGV" or
    "exit code 1: AssertionError", with the last line of standard error.
    """

    passed: bool
    reason: str = ""


def run_program(code: str, seconds: float = 3.0, megabytes: int = 1024) -> ProgramResult:
    """Run `code` as a program; it passes if it reaches its end and its process exits with code 0.

    seconds: wall time, including interpreter startup (about 0.1 s). megabytes: address space. Kills all processes of
    its session and removes its folder afterwards. Propagates OSError if no process or folder can be created.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fhopt-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
    ):
        token = secrets.token_hex(16).encode()
        given.write(token + b"\n" + code.encode("utf-8", "surrogatepass"))
        given.seek(0)
        return _run(os.path.realpath(folder), given, token, seconds, megabytes)


def _run(folder: str, given: Any, token: bytes, seconds: float, megabytes: int) -> ProgramResult:
    reading, writing = os.pipe()
    arguments = [os.path.abspath(__file__), folder, str(writing), str(seconds), str(megabytes)]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "PYTHONHASHSEED": "0"}
    deadline = time.monotonic() + seconds
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", "-c", LOADER, *arguments], cwd=folder, env=environment, stdin=given,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writing)
        ended, errors = _watch(process, deadline)
        return _verdict(process.returncode, _read_now(reading) == token, errors) if ended else _failed("timed out")
    finally:
        os.close(reading)


def _watch(process: subprocess.Popen[bytes], deadline: float) -> tuple[bool, bytes]:
    """Return whether the process ended in time, and the end of its standard error; kills its session."""
    assert process.stderr is not None
    errors, tail, poll = process.stderr.fileno(), b"", select.poll()
    poll.register(errors, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0 and poll.poll(1000 * left):
            piece = os.read(errors, 1 << 16)
            if not piece:  # all writers have ended, or closed it
                break
            tail = (tail + piece)[-TAIL:]
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False, tail
    finally:
        _kill(process)
    return True, tail


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the session has no process left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _read_now(pipe: int) -> bytes:
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, TAIL)
    except BlockingIOError:
        return b""


def _verdict(code: int, reached_end: bool, errors: bytes) -> ProgramResult:
    if code == 0:
        return ProgramResult(True) if reached_end else _failed("ended early with exit code 0")
    lines = errors.decode("utf-8", "replace").strip().splitlines() or [""]
    last = lines[-1][:LINE]
    if code == -signal.SIGXCPU:
        return _failed("timed out")
    if code < 0:
        names = {s.value: s.name for s in signal.Signals}
        return _failed(f"killed by {names.get(-code, f'signal {-code}')}")
    if last.split(":")[0] == "MemoryError":
        return _failed("out of memory")
    return _failed(f"exit code {code}: {last}".removesuffix(": "))


def _failed(reason: str) -> ProgramResult:
    return ProgramResult(False, reason)


def _child(folder: str, report: int, seconds: float, megabytes: int) -> None:
    """In the new process: load the secret and the program, drop privileges, and run it."""
    with open(0, "rb", closefd=False) as given:
        token, _, code = given.read().partition(b"\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for name in set(os.environ) - {"PATH", "HOME"}:
        del os.environ[name]
    leave_network()
    _limit(seconds, megabytes)
    _refuse_processes()
    sys.argv[:] = ["program.py"]
    program = sys.modules["__main__"] = ModuleType("__main__")
    write = os.write  # saved in case the program modifies os
    sys.addaudithook(_hook(folder))
    try:
        exec(compile(code.decode("utf-8", "surrogatepass"), "program.py", "exec", dont_inherit=True), program.__dict__)  # noqa: S102
    except MemoryError:
        program.__dict__.clear()  # a traceback needs memory
        write(2, b"\nMemoryError\n")
        os._exit(1)
    write(report, token)


def leave_network() -> bool:
    """Move this process to a network namespace without devices; returns False if the kernel refuses.

    Also makes the kernel kill the process when its parent thread ends, and forbids gaining privileges on exec.
    """
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        left = library.unshare(NEW_USER | NEW_NET) == 0
        library.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # after unshare, which resets it
        library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    except (OSError, AttributeError):  # not Linux
        return False
    return left


def _limit(seconds: float, megabytes: int) -> None:
    """Set the kernel limits. The limit on processes and threads does not apply to root."""
    cpu = math.ceil(seconds) + 1
    limits = {
        resource.RLIMIT_AS: (megabytes << 20,) * 2,
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, then SIGKILL, if the parent no longer watches the wall time
        resource.RLIMIT_FSIZE: (FILE_BYTES,) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
    }
    for limit, (soft, hard) in limits.items():
        most = resource.getrlimit(limit)[1]
        bounds = (soft, hard) if most == resource.RLIM_INFINITY else (min(soft, most), min(hard, most))
        resource.setrlimit(limit, bounds)


def _refuse_processes() -> None:
    """Block the one way to start a process that raises no audit event; multiprocessing uses it."""
    import _posixsubprocess

    def refuse(*_: Any) -> int:
        raise PermissionError("the sandbox refuses new processes")

    _posixsubprocess.fork_exec = refuse


def _hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Create the audit hook for a program whose folder, without symbolic links, is `folder`."""
    writes = 0

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & WRITING or path in (os.devnull, os.devnull.encode()):
                return
            writes += 1
            if writes > WRITES or not _is_inside(folder, path):
                raise PermissionError(f"the sandbox refuses to write {path!r}")
        elif event in CHANGED:
            for at, base in CHANGED[event]:
                given = arguments[base] if base is not None and base < len(arguments) else None
                if arguments[at] != ":memory:" and not _is_inside(folder, arguments[at], given):
                    raise PermissionError(f"the sandbox refuses {event} {arguments[at]!r}")
        elif event.startswith(REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")

    return check


def _is_inside(folder: str, path: Any, base: int | None = None) -> bool:
    """Return whether `path` (or an open file; relative to the open folder `base`) is `folder` or inside it."""
    name = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path)
    if base not in (None, -1):
        name = os.path.join(f"/proc/self/fd/{base}", name)
    return f"{os.path.realpath(name)}/".startswith(f"{folder}/")


if __name__ == "__main__":
    _child(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
