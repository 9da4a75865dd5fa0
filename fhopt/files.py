"""Files: regular ones of a limited size are read, files and folders appear whole, tensors have a digest.

What a user names may be anything: a FIFO, on which a read waits for ever, a link to a device without an end, a pickle,
which runs code. `opened` opens regular files only, `read_file` reads no more than a limit, and `check_no_pickle`
recognizes pickles by their first bytes.
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

PICTURES = (".png", ".svg", ".pdf")  # what matplotlib draws
GRAPHS = (".dot", ".svg", ".graphml", ".json")
EXPLORER_GRAPH = ".fhopt"  # for Google's Model Explorer
JSON_BYTES = 1 << 26  # no JSON file of a model or a plan is longer
TENSOR_BYTES = 1 << 38  # no file of tensors is longer, nor than the memory of the machine
HEADER_BYTES = 100_000_000  # of a safetensors file, as safetensors limits it
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- reading


def check_regular(path: Path, limit: int | None = None, cure: str = "Give the file itself.") -> int:
    """Return the size of a file in bytes, behind links. Raises FhoptError unless it is regular and within `limit`.

    OSError passes through where there is no such file.
    """
    return _checked(os.stat(path), path, limit, cure)


@contextmanager
def opened(path: Path, limit: int | None = None, cure: str = "Give the file itself.") -> Iterator[BinaryIO]:
    """Open a regular file of at most `limit` bytes for reading, without ever waiting for another process.

    It is checked before it is opened, since opening a device may do something, and again after, since another file may
    have come in its place. Raises FhoptError; OSError passes through.
    """
    check_regular(path, limit, cure)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _checked(os.fstat(descriptor), path, limit, cure)
        yield file


def read_file(path: Path, limit: int = JSON_BYTES, cure: str = "Give the file itself.") -> bytes:
    """Read a regular file of at most `limit` bytes. Raises FhoptError; OSError passes through."""
    with opened(path, limit, cure) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:
        raise FhoptError(f"{path} has grown while it was read; expected a file that nobody writes to. {cure}")
    return content


def tensor_limit() -> int:
    """Return how many bytes a file of tensors may have to be read whole: no more than this machine has memory."""
    with contextlib.suppress(OSError, ValueError):
        return min(TENSOR_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return TENSOR_BYTES


def _checked(about: os.stat_result, path: Path, limit: int | None, cure: str) -> int:
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(about.st_mode)), "no regular file")
        raise FhoptError(f"{path} is {kind}; expected a regular file. {cure}")
    if limit is not None and about.st_size > limit:
        raise _too_long(path, about.st_size, limit, cure)
    return about.st_size


def _too_long(path: Path, size: int, limit: int, cure: str) -> FhoptError:
    return FhoptError(f"{path} has {size:,} bytes; expected at most {limit:,}. {cure}")


def is_pickle(start: bytes) -> bool:
    """Return True where the first 9 bytes of a file are those of a pickle, or of an archive that torch.save writes.

    A safetensors file begins with the length of its header, 8 bytes, and has "{" after them.
    """
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:9] != b"{")


def check_no_pickle(path: Path, cure: str) -> None:
    """Raise FhoptError where a regular file is a pickle: reading one can run code. OSError passes through."""
    with opened(path) as file:
        start = file.read(9)
    if is_pickle(start):
        raise FhoptError(
            f"{path} is a pickle, or an archive with one, as torch.save writes: it can run code when it is read, and "
            f"fhopt never does. Expected JSON and safetensors. {cure}"
        )


# --------------------------------------------------------------------------------------------------- writing


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


# --------------------------------------------------------------------------------------------------- tensors


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

    Raises FhoptError where it is not a regular file, longer than memory, or a pickle. OSError, SafetensorError,
    ValueError and RecursionError pass through.
    """
    from safetensors import safe_open

    check_tensor_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get(key, "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return about if isinstance(about, dict) else {}, tensors


def check_tensor_file(file: Path, cure: str = "Write it again.") -> None:
    """Raise FhoptError unless a file is regular, no longer than memory, and no pickle. OSError passes through."""
    check_regular(file, tensor_limit(), cure)
    check_no_pickle(file, cure)


def read_description(file: Path) -> dict[str, Any]:
    """Read the description alone, as `read_tensors` does, without torch; empty where there is none.

    Raises FhoptError where it is not a regular file, and ValueError, LookupError or TypeError where it is not a whole
    safetensors file. OSError and RecursionError pass through.
    """
    header = read_header(file)
    metadata = header.get("__metadata__", {})
    about = json.loads(metadata.get("fhopt", "{}")) if isinstance(metadata, dict) else {}
    return about if isinstance(about, dict) else {}


def read_header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: dtype, shape and place of each tensor by name, and `__metadata__`.

    Raises as `read_description`.
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
    """Raise ValueError when description or tensors are not what `write_tensors` wrote."""
    description = {name: value for name, value in about.items() if name != "digest"}
    if about.get("digest") != digest(description, tensors):
        raise ValueError("its content is not what was written")


# --------------------------------------------------------------------------------------------------- folders


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


def check_graph(path: Path, formats: Sequence[str] = GRAPHS) -> None:
    """Raise FhoptError for a file of a graph whose format is not in `formats`."""
    if path.suffix.lower() not in formats or path.is_dir():
        raise FhoptError(f"{path} is not a graph file; expected a name that ends in {', '.join(formats)}.")


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
