"""Special files instead of every file that fhopt loads: one sentence, exit code 2, no hang, no code execution.

FIFOs, devices, links to them and to themselves, folders, huge sparse files, pickles with code, partial writes.
test_fuzz_files.py covers file contents; unit/plan/test_description.py covers single fields of a plan.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_models import call
from hand_plans import CODED, random_plan
from lm_heads import made, weights

from fhopt import files
from fhopt.calibration.checkpoint import MOMENTS, Checkpoint
from fhopt.calibration.statistics_file import load_statistics
from fhopt.errors import FhoptError
from fhopt.hf.prompt_cache import _read as read_cache
from fhopt.inspection.progress_file import read_progress
from fhopt.lm_head.head import Head
from fhopt.models.rewritten_folder import read_folder
from fhopt.parallel.device_map import placement
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts.tokens import read_text

SAVED = Path(__file__).parents[1] / "golden" / "saved"
SECONDS = 3.0
HUGE = 1 << 42  # size of a sparse file: beyond memory and every limit


class _Runs:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        try:
            file.truncate(HUGE)
        except OSError:
            pytest.skip("this file system has no files of that size")


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


# Replacements of a file; file systems without devices may contain links to them.
HOSTILE: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a link to a FIFO": linked_fifo,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal or none": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a folder": lambda path: path.mkdir(),
    "an enormous file": sparse,
    "a pickle": lambda path: path.write_bytes(pickle.dumps(_Runs(path.with_name("ran")))),
    "an empty file": lambda path: path.write_bytes(b""),
    "a partial write": lambda path: path.write_bytes(b'\x90\x00\x00\x00\x00\x00\x00\x00{"__metadata__"'),
}


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return the result of a call, or the FhoptError that it raised; fail the test if it takes longer."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"it took more than {seconds} s"
    return results[0]


# --------------------------------------------------------------------------------------------------- what is read

# (writer of an original below a folder, its files, reader)
KINDS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], Callable[[Path], Any]]] = {
    "plan": (
        lambda folder: random_plan("head", CODED).save(folder / "it"),
        ("plan.json", "plan.safetensors"),
        LatentPlan.load,
    ),
    "head": (
        lambda folder: made(weights("random", 40, 8), bits="8").save(folder / "it"),
        ("head.json", "head.safetensors"),
        Head.load,
    ),
    "rewritten folder": (
        lambda folder: Path(shutil.copytree(SAVED / "folder", folder / "it")),
        ("config.json", "fhopt.json", "model.safetensors", "plan/plan.json"),
        read_folder,
    ),
    "prompt cache": (lambda folder: folder / "it", ("",), read_cache),
    "statistics": (lambda folder: folder / "it", ("",), load_statistics),
    "checkpoint": (
        lambda folder: folder / "it.moments",
        ("",),
        lambda path: Checkpoint(path.with_suffix(""), {}, MOMENTS).load(),
    ),
    "text": (lambda folder: folder / "it.txt", ("",), lambda path: read_text(str(path))),
    "JSON lines": (lambda folder: folder / "it.jsonl", ("",), lambda path: read_text(str(path))),
    "packed JSON lines": (lambda folder: folder / "it.jsonl.gz", ("",), lambda path: read_text(str(path))),
    "device map": (lambda folder: folder / "it.json", ("",), lambda path: placement(str(path))),
}
CASES = [(kind, name) for kind, (_, names, _) in KINDS.items() for name in names]


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_special_files_are_refused_in_one_sentence(kind: str, name: str, how: str, tmp_path: Path) -> None:
    write, _, read = KINDS[kind]
    place = write(tmp_path)
    target = place / name if name else place
    target.unlink(missing_ok=True)
    HOSTILE[how](target)
    result = within(SECONDS, lambda: read(place))
    if kind == "checkpoint" and how in ("a link to nothing", "a link to itself"):
        return  # no checkpoint: the work restarts
    if kind == "text" and how in ("a pickle", "a partial write") and isinstance(result, str):
        return  # text with replaced bytes
    assert isinstance(result, FhoptError), result
    assert ("\n" not in str(result) and "xpected" in str(result)) or ". " in str(result)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("how", HOSTILE)
def test_an_invalid_progress_file_counts_as_absent(how: str, tmp_path: Path) -> None:
    HOSTILE[how](tmp_path / "progress")
    assert within(SECONDS, lambda: read_progress(tmp_path / "progress")) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = random_plan("head", CODED).save(tmp_path / "plan")
    (folder / "plan.json").chmod(0)
    with pytest.raises(FhoptError, match="Permission denied"):
        LatentPlan.load(folder)


# --------------------------------------------------------------------------------------------------- the helper


def test_reading_a_file_respects_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.read_file(tmp_path / "a", 3) == b"abc"
    with pytest.raises(FhoptError, match=r"has 3 bytes; expected at most 2\. Cut it"):
        files.read_file(tmp_path / "a", 2, "Cut it.")


def test_a_file_replaced_after_its_check_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")

    def exchange(path: Path, *rest: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return 3

    monkeypatch.setattr(files, "check_regular", exchange)
    assert "is a FIFO" in str(within(SECONDS, lambda: files.read_file(tmp_path / "a")))


def test_pickles_are_recognized_by_their_first_bytes() -> None:
    for protocol in range(2, 6):
        assert files.is_pickle(pickle.dumps([1, 2, 3], protocol)[:9])
    assert files.is_pickle(b"PK\3\4 more")
    assert not files.is_pickle(b"\x80\2\0\0\0\0\0\0{")  # safetensors with a header of 640 bytes
    assert not files.is_pickle(b"{}") and not files.is_pickle(b"")


# --------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A folder of hostile files, named after their kind."""
    for number, how in enumerate(HOSTILE):
        HOSTILE[how](tmp_path / f"{number}")
    os.mkfifo(tmp_path / "plan.json")
    yield tmp_path
    assert not (tmp_path / "ran").exists()


COMMANDS = (
    ("inspect", "{it}"),
    ("view", "{it}", "--no-open"),
    ("view", str(SAVED / "folder"), "--plan", "{it}", "--no-open"),
    ("kernels", "{it}", "--device", "cpu", "-o", "{out}"),
    ("fit", "--statistics", "{it}", "-o", "{out}"),
    ("fit", str(SAVED / "folder"), "--data", "{it}", "-o", "{out}"),
    ("plans", "add", "{it}"),
    ("export", "{it}", "--target", "mlir"),
    ("verify", "{it}"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:3])[:30])
def test_a_command_refuses_special_files(command: tuple[str, ...], hostile: Path) -> None:
    for number in range(len(HOSTILE)):
        arguments = [part.format(it=hostile / f"{number}", out=hostile / "out") for part in command]
        result = within(SECONDS, lambda arguments=arguments: call(*arguments))  # type: ignore[misc]
        assert result.exit_code == 2, (arguments, result.output)
        assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output


REFUSALS = (
    ("inspect", "{folder}"),
    ("inspect", "nowhere"),
    ("inspect", "no_such_package:f"),
    ("view", "{fifo}", "--no-open"),
    ("kernels", "{folder}", "--device", "h100", "-o", "{out}"),
    ("fit", str(SAVED / "folder"), "--ratio", "0", "-o", "{out}"),
    ("fit", "-o", "{out}"),
    ("fit", "--statistics", "{fifo}", "-o", "{out}"),
    ("eval", "nowhere"),
    ("cost", str(SAVED / "folder"), "--device", "x"),
    ("heal", "nowhere", "--plan", "{folder}", "-o", "{out}"),
    ("head", "nowhere", "-o", "{out}"),
    ("demo", "--ratio", "nan"),
    ("export", str(SAVED / "folder"), "--target", "bogus"),
    ("plans", "path", "nowhere"),
    ("plans", "add", "nowhere"),
    ("doctor", "nowhere"),
)


@pytest.mark.slow
@pytest.mark.parametrize("command", REFUSALS, ids=lambda command: " ".join(command[:2])[:30])
def test_a_refusal_takes_less_than_three_seconds(command: tuple[str, ...], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    told = [part.format(folder=tmp_path, fifo=tmp_path / "plan.json", out=tmp_path / "out") for part in command]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "fhopt.cli", *told], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < SECONDS
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done.stderr
