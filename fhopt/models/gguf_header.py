"""Size of a GGUF file by its header, to report a truncated file before its tokenizer and weights are parsed.

Layout: "GGUF", version, number of tensors, number of metadata entries; the entries; name, shape, type and offset of
each tensor; padding; data.
"""

from __future__ import annotations

import importlib
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fhopt.errors import FhoptError
from fhopt.files import opened

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by value type
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_VERSION = 0xFFFF  # larger: a big-endian file, read as little-endian


def check_gguf_size(path: Path) -> None:
    """Raise FhoptError if a GGUF file is shorter than its header says. Propagates OSError."""
    size = path.stat().st_size
    try:
        with opened(path) as file:
            described = _described_bytes(file)
    except struct.error as error:
        raise FhoptError(
            f"{path} is truncated: it ends in its header, after {size:,} bytes. Fetch it again."
        ) from error
    except (KeyError, ValueError, RecursionError, OverflowError):  # a type or version that gguf may know
        return
    if size < described:
        raise FhoptError(f"{path} is truncated: it has {size:,} bytes; expected {described:,}. Fetch it again.")


def _described_bytes(file: BinaryIO) -> int:
    """Return the size of the file that the header describes. Raises struct.error if the header is truncated."""
    _, version, tensors, entries = _unpack(file, "4sIQQ")
    if version > _MAX_VERSION:
        raise ValueError("big-endian")
    alignment = 32
    for _ in range(entries):
        name, kind = file.read(*_unpack(file, "Q")), *_unpack(file, "I")
        if name == b"general.alignment":
            (alignment,) = _unpack(file, "I")
        else:
            _skip(file, kind)
    blocks = importlib.import_module("gguf").GGML_QUANT_SIZES
    ends = [_tensor_end(file, blocks) for _ in range(tensors)]
    return -(-file.tell() // alignment) * alignment + max(ends, default=0)


def _tensor_end(file: BinaryIO, blocks: Mapping[int, tuple[int, int]]) -> int:
    """Read the description of a tensor and return where its data end, from the start of all data.

    blocks: elements and bytes of a block, by tensor type.
    """
    file.seek(_unpack(file, "Q")[0], os.SEEK_CUR)  # name
    (dimensions,) = _unpack(file, "I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions")
    shape = _unpack(file, f"{dimensions}Q")
    kind, offset = _unpack(file, "IQ")
    elements, block_bytes = blocks[kind]
    return int(offset + math.prod(shape) // elements * block_bytes)


def _skip(file: BinaryIO, kind: int) -> None:
    """Move past a metadata value."""
    if kind == _STRING:
        file.seek(_unpack(file, "Q")[0], os.SEEK_CUR)
    elif kind == _ARRAY:
        element, count = _unpack(file, "IQ")
        if element in _SCALAR_BYTES:
            file.seek(count * _SCALAR_BYTES[element], os.SEEK_CUR)
            return
        for _ in range(count):
            _skip(file, element)
    else:
        file.seek(_SCALAR_BYTES[kind], os.SEEK_CUR)


def _unpack(file: BinaryIO, format: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))
