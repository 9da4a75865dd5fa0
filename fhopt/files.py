"""File access: bounded reads of regular files, atomic writes of files and folders, digests of tensors.

A path from a user may name anything: a FIFO, on which a read blocks forever, a link to an endless device, or a pickle,
which runs code. `opened` opens only regular files, `read_file` limits the size, and `check_no_pickle` recognizes
pickles by their first bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".svg", ".pdf")  # formats of matplotlib
GRAPHS = (".dot", ".svg", ".graphml", ".json")
EXPLORER_GRAPH = ".fhopt"  # for Google's Model Explorer
JSON_BYTES = 1 << 26  # max size of a JSON file of a model or a plan
TENSOR_BYTES = 1 << 38  # max size of a tensor file, which also must fit into memory
HEADER_BYTES = 100_000_000  # of a safetensors file, as safetensors limits it
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- reading


def check_regular(path: Path, limit: int | None = None, cure: str = "Give the file itself.") -> int:
    """Return the size of a file in bytes, following links. Raises FhoptError unless it is regular and within `limit`.

    Propagates OSError if there is no such file.
    """
    return _checked(os.stat(path), path, limit, cure)


@contextmanager
def opened(path: Path, limit: int | None = None, cure: str = "Give the file itself.") -> Iterator[BinaryIO]:
    """Open a regular file of at most `limit` bytes for reading, without blocking on another process.

    It is checked before opening, since opening a device may have effects, and again after, since another file may have
    replaced it. Raises FhoptError; propagates OSError.
    """
    check_regular(path, limit, cure)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _checked(os.fstat(descriptor), path, limit, cure)
        yield file


def read_file(path: Path, limit: int = JSON_BYTES, cure: str = "Give the file itself.") -> bytes:
    """Read a regular file of at most `limit` bytes. Raises FhoptError; propagates OSError."""
    with opened(path, limit, cure) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:
        raise FhoptError(f"{path} grew while fhopt read it; expected a file that no process writes to. {cure}")
    return content


def tensor_limit() -> int:
    """Return the max bytes of a tensor file that is loaded whole: at most the memory of this machine."""
    with contextlib.suppress(OSError, ValueError):
        return min(TENSOR_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return TENSOR_BYTES


def _checked(about: os.stat_result, path: Path, limit: int | None, cure: str) -> int:
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(about.st_mode)), "not a regular file")
        raise FhoptError(f"{path} is {kind}; expected a regular file. {cure}")
    if limit is not None and about.st_size > limit:
        raise _too_long(path, about.st_size, limit, cure)
    return about.st_size


def _too_long(path: Path, size: int, limit: int, cure: str) -> FhoptError:
    return FhoptError(f"{path} has {size:,} bytes; expected at most {limit:,}. {cure}")


def is_pickle(start: bytes) -> bool:
    """Return whether the first 9 bytes of a file are those of a pickle or of a torch.save archive.

    A safetensors file begins with the length of its header in 8 bytes, followed by "{".
    """
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:9] != b"{")


def check_no_pickle(path: Path, cure: str) -> None:
    """Raise FhoptError if a regular file is a pickle, since loading it can run code. Propagates OSError."""
    with opened(path) as file:
        start = file.read(9)
    if is_pickle(start):
        raise FhoptError(
            f"{path} is a pickle, or an archive with one, as torch.save writes; expected JSON and "
            f"safetensors, because loading a pickle can run code. {cure}"
        )


# --------------------------------------------------------------------------------------------------- writing


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` if the block succeeds and removed if it fails.

    A reader of `path` sees the old file, the new one or none. Propagates OSError.
    """
    staging = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        yield staging
        os.replace(staging, path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- tensors


def digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of a JSON description and of tensors: names, dtypes, shapes and every byte."""
    import torch

    description = json.loads(json.dumps(about))  # as loaded again: tuples become lists
    h = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def write_tensors(file: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], key: str = "fhopt") -> None:
    """Write tensors and a description of JSON values to one safetensors file, atomically.

    The description is under `key` in the file's metadata, with a digest of everything. Propagates OSError and
    SafetensorError.
    """
    from safetensors.torch import save_file

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**about, "digest": digest(about, dense)}, sort_keys=True)
    with appearing(file) as staging:
        save_file(dense, staging, {key: text})


def read_tensors(file: Path, key: str = "fhopt") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load the description ({} if there is none) and the tensors of a file; `check_digest` verifies both.

    Raises FhoptError for a pickle, or a file that is not regular or exceeds memory. Propagates OSError,
    SafetensorError, ValueError and RecursionError.
    """
    from safetensors import safe_open

    check_tensor_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get(key, "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return about if isinstance(about, dict) else {}, tensors


def check_tensor_file(file: Path, cure: str = "Write it again.") -> None:
    """Raise FhoptError unless a file is regular, fits into memory, and is not a pickle. Propagates OSError."""
    check_regular(file, tensor_limit(), cure)
    check_no_pickle(file, cure)


def read_description(file: Path) -> dict[str, Any]:
    """Load only the description, as `read_tensors` does, without torch; {} if there is none.

    Raises FhoptError if the file is not regular, and ValueError, LookupError or TypeError if it is not a whole
    safetensors file. Propagates OSError and RecursionError.
    """
    header = read_header(file)
    metadata = header.get("__metadata__", {})
    about = json.loads(metadata.get("fhopt", "{}")) if isinstance(metadata, dict) else {}
    return about if isinstance(about, dict) else {}


def read_header(file: Path) -> dict[str, Any]:
    """Load the header of a safetensors file: dtype, shape and offsets of each tensor by name, and `__metadata__`.

    Raises like `read_description`.
    """
    check_tensor_file(file)
    with opened(file) as content:
        size = os.fstat(content.fileno()).st_size
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise ValueError(f"it is {size:,} bytes long, and its header should be {length:,}")
        header = json.loads(content.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(
            f"it has {size - 8 - length:,} bytes of tensors, and its header names {max(ends, default=0):,}"
        )
    return header


def check_digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if description or tensors are not what `write_tensors` wrote."""
    description = {name: value for name, value in about.items() if name != "digest"}
    if about.get("digest") != digest(description, tensors):
        raise ValueError("its digest does not match its content")


# --------------------------------------------------------------------------------------------------- folders


def check_writable(folder: Path) -> None:
    """Create `folder` if it does not exist. Raises FhoptError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FhoptError(f"cannot write to {folder}: {error.strerror}. Choose another folder.") from error


def check_picture(path: Path) -> None:
    """Raise FhoptError if matplotlib cannot draw to `path`, before anything slow starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FhoptError(
            "matplotlib is not installed; plots require the extra plot. Install it with: pip install 'fhopt[plot]'"
        )
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise FhoptError(
            f"{path} is not an image file name; expected one that ends in {', '.join(PICTURES)}. Rename it."
        )
    check_writable(path.parent)


def check_graph(path: Path, formats: Sequence[str] = GRAPHS) -> None:
    """Raise FhoptError for a graph file whose format is not in `formats`."""
    if path.suffix.lower() not in formats or path.is_dir():
        raise FhoptError(f"{path} is not a graph file name; expected one that ends in {', '.join(formats)}. Rename it.")


def check_folder(path: Path, names: Iterable[str]) -> None:
    """Raise FhoptError if `path` exists and contains anything but files of these names."""
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - set(names)):
        raise FhoptError(
            f"{path} exists and is not a plan; expected a new folder or an older plan. Choose another folder."
        )


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` to the folder `path`, atomically. Raises FhoptError.

    An existing folder is replaced only if it contains nothing but files of these names.
    """
    check_folder(path, files)
    with appearing_folder(path) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` that replaces it if the block succeeds, and is removed if it fails.

    An existing folder stays unchanged if the block or the replacement fails. Raises FhoptError if something cannot be
    written, also for errors in the block.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a writable folder.") from error
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
    """Replace a folder by two renames: killed in between, it leaves no folder, otherwise the old or the new one."""
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
        shutil.rmtree(folder, ignore_errors=True)  # Ctrl-C may have interrupted the first call
