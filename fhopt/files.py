"""Atomic writes of files and folders, and files of tensors with a digest that shows damage."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".svg", ".pdf")  # what matplotlib draws


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, renamed to it if the block succeeds and removed if it does not.

    A reader of `path` sees the old file, the new one or none. OSError passes through.
    """
    staging = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        yield staging
        os.replace(staging, path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


def digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of a description, JSON values, and of tensors: names, types, shapes and every byte."""
    import torch

    description = json.loads(json.dumps(about))  # as it is read back: tuples are lists then
    h = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def write_tensors(file: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], key: str = "fhopt") -> None:
    """Write tensors and a description of JSON values to one safetensors file, whole or not at all.

    The description stands under `key` in the file's metadata, with the digest of everything. OSError and
    SafetensorError pass through.
    """
    from safetensors.torch import save_file

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**about, "digest": digest(about, dense)}, sort_keys=True)
    with appearing(file) as staging:
        save_file(dense, staging, {key: text})


def read_tensors(file: Path, key: str = "fhopt") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description, empty where there is none, and the tensors of a file; `check_digest` checks both.

    OSError, SafetensorError, ValueError and RecursionError pass through.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get(key, "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return about if isinstance(about, dict) else {}, tensors


def check_digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError when description or tensors are not what `write_tensors` wrote."""
    description = {name: value for name, value in about.items() if name != "digest"}
    if about.get("digest") != digest(description, tensors):
        raise ValueError("its content is not what was written")


def check_writable(folder: Path) -> None:
    """Create `folder` where it does not exist. Raises FhoptError when nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FhoptError(f"cannot write to {folder}: {error.strerror}. Choose another folder.") from error


def check_picture(path: Path) -> None:
    """Raise FhoptError when matplotlib can draw nothing to `path`, before anything slow starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FhoptError("matplotlib is not installed; a picture needs it. Install it with: pip install 'fhopt[plot]'")
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise FhoptError(f"{path} is not a picture; expected a file that ends in {', '.join(PICTURES)}.")
    check_writable(path.parent)


def check_folder(path: Path, names: Iterable[str]) -> None:
    """Raise FhoptError when `path` exists and holds anything but files of these names."""
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - set(names)):
        raise FhoptError(f"{path} exists and holds other things; expected a new folder or an older plan. Give another.")


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` to the folder `path` so that a reader sees all of them or none. Raises FhoptError.

    A folder that exists is replaced only if it holds nothing but files of these names.
    """
    check_folder(path, files)
    with appearing_folder(path) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that replaces it if the block succeeds, and is removed if it does not.

    A folder that existed at `path` stays as it was when the block or the replacement fails. Raises FhoptError when
    something cannot be written, in the block too.
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
        _replace_folder(staging, path, former)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise FhoptError(f"cannot write {path}: {reason}. Free some space or choose another folder.") from error
    finally:
        _remove(staging)
        _remove(former)


def _replace_folder(staging: Path, path: Path, former: Path) -> None:
    """Replace a folder by two renames: a process that is killed between them leaves none, else the old or the new."""
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
