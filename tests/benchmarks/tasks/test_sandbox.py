"""Programs in a sandboxed subprocess: what passes, what is refused, and that all files and processes are removed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.tasks import sandbox
from benchmarks.tasks.sandbox import LINE, ProgramResult, run_program

SECONDS = 30.0  # where time is not tested: test machines are busy
REFUSED = "exit code 1: PermissionError: the sandbox refuses "


def run(code: str, seconds: float = SECONDS, megabytes: int = 1024) -> ProgramResult:
    return run_program(code, seconds, megabytes)


def test_a_program_that_ends_passes() -> None:
    code = """
        import collections, dataclasses, heapq, math, random, re, typing
        @dataclasses.dataclass
        class Point:
            x: int = 1
        assert __name__ == "__main__" and Point().x == math.gcd(2, 3)
        print("written nowhere")
    """
    assert run("\n".join(line.removeprefix(" " * 8) for line in code.splitlines())) == ProgramResult(True, "")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 + 1 == 3", "exit code 1: AssertionError"),
        ("int('x')", "exit code 1: ValueError: invalid literal for int() with base 10: 'x'"),
        ("x = (", "exit code 1: SyntaxError: '(' was never closed"),
        ("raise ValueError('x' * 999)", "exit code 1: ValueError: " + "x" * (LINE - len("ValueError: "))),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("input()", "exit code 1: EOFError: EOF when reading a line"),
        ("import torch", "exit code 1: ModuleNotFoundError: No module named 'torch'"),
        ("text = '\ud800'", "exit code 1: UnicodeEncodeError: "),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import sys; sys.exit(0)", "ended early with exit code 0"),
        ("import os; os._exit(0)", "ended early with exit code 0"),
        ("import atexit, os; atexit.register(os._exit, 4)", "exit code 4"),
    ],
)
def test_a_program_that_fails_says_why(code: str, reason: str) -> None:
    found = run(code)
    assert not found.passed and found.reason.startswith(reason) and len(found.reason) < LINE + 20


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\ntime.sleep(60)", "import os, time\nos.close(2)\ntime.sleep(60)"],
)
def test_an_endless_program_is_stopped(code: str) -> None:
    start = time.monotonic()
    assert run(code, seconds=1) == ProgramResult(False, "timed out")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("code", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append([0] * 9999)"])
def test_memory_is_limited(code: str) -> None:
    assert run(code, megabytes=256) == ProgramResult(False, "out of memory")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import socket; socket.socket()", "socket.__new__"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "socket.getaddrinfo"),
        ("import os; os.fork()", "os.fork"),
        ("import os; os.system('true')", "os.system"),
        ("import os; os.execv('/bin/true', ['true'])", "os.exec"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "os.posix_spawn"),
        ("import os; os.kill(os.getppid(), 0)", "os.kill"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import multiprocessing as m; m.get_context('spawn').Process().start()", "new processes"),
        ("import ctypes; ctypes.CDLL(None)", "ctypes.dlopen"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CORE, (0, 0))", "resource.setrlimit"),
    ],
)
def test_network_processes_and_foreign_code_are_refused(code: str, what: str) -> None:
    found = run(code)
    assert not found.passed and f"the sandbox refuses {what}" in found.reason


def test_the_network_is_absent_in_the_kernel_too() -> None:
    """On systems that allow user namespaces; checked without the audit hook."""
    code = (
        "from benchmarks.tasks.sandbox import leave_network; left = leave_network(); "
        "print(left, [line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False") or done.stdout.strip() == "True ['lo']"


@pytest.mark.parametrize(
    "code",
    [
        "open({file!r}, 'a')",
        "import os; os.open({file!r}, os.O_RDWR)",
        "import os; os.remove({file!r})",
        "import os; os.rename({file!r}, 'x')",
        "import os; os.link({file!r}, 'x')",
        "import os; os.chmod({file!r}, 0)",
        "import os; os.truncate({file!r}, 0)",
        "import os; os.rmdir({folder!r})",
        "import os; os.chdir({folder!r}); os.remove('kept')",
        "import os; os.remove('kept', dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import os; os.symlink({folder!r}, 'x'); open('x/kept', 'w')",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({folder!r}, 'new').mkdir()",
        "import sqlite3; sqlite3.connect({folder!r} + '/new')",
    ],
)
def test_files_outside_are_not_changed(code: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    found = run(code.format(file=str(kept), folder=str(tmp_path)))
    assert not found.passed and found.reason.startswith(REFUSED)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "as it was"


def test_files_in_its_own_folder_are_allowed_and_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SECRET", "of the user")
    code = """
import os, pathlib, shutil, sqlite3, tempfile
here = os.getcwd()
assert os.listdir() == [] and here.startswith(FOLDER) and set(os.environ) == {"PATH", "HOME"}
assert pathlib.Path.home() == pathlib.Path(here) and tempfile.gettempdir() == here
pathlib.Path("a").write_text("text")
os.mkdir("deep")
os.rename("a", "deep/b")
assert open("deep/b").read() == "text"
shutil.rmtree("deep")
with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
    file.write(b"bytes")
    pathlib.Path(folder, "c").write_text("text")
sqlite3.connect(":memory:").close()
print("x", file=open(os.devnull, "w"))
pathlib.Path("left").mkdir(mode=0o000)
"""
    assert run(f"FOLDER = {str(tmp_path)!r}\n{code}") == ProgramResult(True, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", ["1 / 0", "import time; open('x', 'w').write('x'); time.sleep(60)"])
def test_a_program_that_fails_leaves_no_folder(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not run(code, seconds=1).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_not_stored(stream: str) -> None:
    code = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    assert run(code, seconds=1) == ProgramResult(False, "timed out")


def test_the_last_line_of_a_long_error_is_reported() -> None:
    found = run("import sys\nsys.stderr.write('x' * (8 << 20))\nraise KeyError('last')")
    assert found == ProgramResult(False, "exit code 1: KeyError: 'last'")


def test_files_are_limited_in_size_and_number() -> None:
    assert run("open('x', 'wb').write(bytes(8 << 20))").reason == "exit code 1: OSError: [Errno 27] File too large"
    many = f"for i in range({sandbox.WRITES} + 1): open(str(i), 'w').close()"
    assert run(many).reason == f"{REFUSED}to write '{sandbox.WRITES}'"


def test_equal_programs_have_equal_results() -> None:
    found = {run("raise ValueError([*{'a', 'b', 'c', 'd', 'e', 'f'}])").reason for _ in range(3)}
    assert len(found) == 1


FORKING = """
import fcntl, os, sys, time
if os.fork():
    time.sleep(60)
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", file=file, flush=True)
time.sleep(60)
"""


def test_children_are_killed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the audit hook, which refuses forks. A surviving child would hold the lock for a minute."""
    file = tmp_path / "lock"
    monkeypatch.setattr(sandbox, "LOADER", FORKING)
    monkeypatch.setattr(sandbox, "__file__", str(file))
    assert run("", seconds=3) == ProgramResult(False, "timed out")
    assert file.read_text() == "locked\n"
    start = time.monotonic()
    with file.open() as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
    assert time.monotonic() - start < 10
