"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fhopt.errors import FhoptError


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path beside `path`, renamed to it if the block succeeds and removed if it does not.

    A reader of `path` sees the old file, the new one or none. OSError passes through.
    """
    staging = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        yield staging
        os.replace(staging, path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make `folder` if need be, and raise FhoptError when nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FhoptError(f"cannot write to {folder}: {error.strerror}. Choose another folder.") from error


def check_folder(path: Path, names: Iterable[str]) -> None:
    """Raise FhoptError when `path` is there and holds anything but files of these names."""
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - set(names)):
        raise FhoptError(f"{path} exists and holds other things; expected a new folder or an older plan. Give another.")


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into the folder `path` so that a reader sees all of them or none. Raises FhoptError.

    A folder that exists is replaced only if it holds nothing but files of these names.
    """
    check_folder(path, files)
    with appearing_folder(path) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place if the block succeeds, and is removed if it does not.

    Raises FhoptError when something cannot be written, in the block too. What stood at `path` is gone afterwards; when
    the block or the change of places fails, it stands there as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a folder that you may write to.") from error
    former = staging.with_name(f"{staging.name}-former")
    try:
        yield staging
        staging.chmod(0o755)
        _take_place(staging, path, former)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise FhoptError(f"cannot write {path}: {reason}. Free some space or choose another folder.") from error
    finally:
        _remove(staging)
        _remove(former)


def _take_place(staging: Path, path: Path, former: Path) -> None:
    """Two renames, so that a process that is killed leaves the old folder, the new one, or none for a moment."""
    if path.exists():
        os.replace(path, former)
    try:
        os.replace(staging, path)
    except BaseException:
        if former.exists():
            os.replace(former, path)
        raise


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # Ctrl-C may have come in between
