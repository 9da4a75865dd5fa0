"""Disk cache of models converted from GGUF files, so that later commands load them in seconds.

    <cache folder>/models/<name>-<dtype>-<digest>/     a Hugging Face folder, written by `save_pretrained`

Writes are atomic. An entry belongs to one file (path, size, time, both ends), one dtype, and one pair of versions of
transformers and gguf. The least recently used models are evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.files import appearing_folder
from fhopt.system import cache_folder, make_private, warn_once

LIMIT_VARIABLE = "FHOPT_MODELS_GB"
DEFAULT_LIMIT = 20.0  # GB of 10^9 bytes
_ENDS = 1 << 20  # bytes at each end of a file that its digest covers
_LEFT_BEHIND = 24 * 3600.0  # seconds after which the folder of an interrupted conversion may be removed


@dataclass(frozen=True)
class Converted:
    """A converted model. nbytes: of its folder. used: time of its last load, seconds since 1970."""

    name: str
    path: Path
    nbytes: int
    used: float


def models_folder() -> Path:
    """Return the folder of converted models, in the cache folder."""
    return cache_folder() / "models"


def limit_bytes() -> int:
    """Return the size limit of the cache in bytes: FHOPT_MODELS_GB, else 20 GB. Raises FhoptError."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise FhoptError(
            f"{LIMIT_VARIABLE}={text!r} is invalid; expected a number of gigabytes. Set it to 0 to store no "
            "converted models."
        )
    return round(1e9 * limit)


def converted_models() -> list[Converted]:
    """List the converted models, most recently used first."""
    folder = models_folder()
    paths = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []
    known = [Converted(p.name, p, _size(p), p.stat().st_mtime) for p in paths]
    return sorted(known, key=lambda c: c.used, reverse=True)


def find_converted(file: Path, dtype: torch.dtype) -> Path | None:
    """Return the folder of a file's conversion to `dtype`; None if there is none."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        path = models_folder() / _name(file, dtype)
        if path.is_dir():
            make_private(path)  # other users could have put weights there
            os.utime(path)
            return path
    return None


def keep(file: Path, dtype: torch.dtype, model: Any, tokenizer: Any) -> None:
    """Store the conversion of a file if limit and disk space allow; else warn, once.

    Raises FhoptError for an invalid limit.
    """
    limit = limit_bytes()
    needed = sum(t.numel() * t.element_size() for t in model.parameters())  # counts tied weights once
    if limit == 0:
        return
    try:
        folder = models_folder()
        make_private(folder)
        free = shutil.disk_usage(folder).free
        if needed > limit or 2 * needed > free:
            raise OSError(
                f"it needs {needed / 1e9:.1f} GB, {LIMIT_VARIABLE} allows {limit / 1e9:.0f} GB, and half of "
                f"the {free / 1e9:.1f} GB of free disk space may be used"
            )
        _make_room(limit - needed)
        with appearing_folder(folder / _name(file, dtype)) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except (OSError, RuntimeError, FhoptError) as error:
        warn_once(
            "converted models",
            f"The converted model of {file} could not be stored ({error}); the next command converts it "
            f"again. Set {LIMIT_VARIABLE}=0 to store none.",
        )


def remove(path: Path) -> None:
    """Remove a converted model."""
    shutil.rmtree(path, ignore_errors=True)


def prune_converted(limit: int | None = None) -> list[Converted]:
    """Evict models beyond `limit` bytes, least recently used first, and interrupted conversions; return the evicted."""
    removed = _make_room(limit_bytes() if limit is None else limit)
    folder = models_folder()
    for path in folder.glob(".*") if folder.is_dir() else ():
        if time.time() - path.lstat().st_mtime > _LEFT_BEHIND:
            remove(path)
    return removed


def _make_room(limit: int) -> list[Converted]:
    known = converted_models()
    total, removed = sum(c.nbytes for c in known), []
    while known and total > max(0, limit):
        removed.append(known.pop())
        total -= removed[-1].nbytes
        remove(removed[-1].path)
    return removed


def _name(file: Path, dtype: torch.dtype) -> str:
    """Return the name of a conversion. Raises OSError for an unreadable file."""
    about = file.stat()
    with file.open("rb") as content:
        head = content.read(_ENDS)
        content.seek(max(0, about.st_size - _ENDS))
        tail = content.read(_ENDS)
    versions = [_version(package) for package in ("transformers", "gguf")]
    facts = [os.path.realpath(file), about.st_size, about.st_mtime_ns, *versions]
    digest = hashlib.sha256(repr(facts).encode() + head + tail).hexdigest()[:16]
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", Path(os.path.realpath(file)).stem).strip("-.")[:60] or "model"
    return f"{stem}-{str(dtype).removeprefix('torch.')}-{digest}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
