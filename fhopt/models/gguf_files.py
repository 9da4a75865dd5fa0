"""Loading of GGUF files: weights dequantized to one dtype, configuration, tokenizer.

transformers does the loading. This module makes it parse metadata once instead of three times, with fast parsing of
long lists; dequantize tensors a few rows at a time, since gguf makes several copies of a whole tensor; and drop the
source data from the model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fhopt.errors import FhoptError
from fhopt.models.gguf_header import check_gguf_size
from fhopt.models.transformers_import import QuietProgress, transformers

_ROWS_BYTES = 1 << 24  # of quantized blocks that are dequantized at once


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a GGUF file's model, with weights in `dtype`, and its tokenizer. Raises FhoptError."""
    hf = transformers()
    check_packages()
    check_gguf_size(path)
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(hf, "GgufConfig"):  # otherwise newer versions leave weights quantized if they have kernels
        options["quantization_config"] = hf.GgufConfig(dequantize=True)
    with not_read(path), QuietProgress(), frugal():
        tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = hf.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return _plain(model), tokenizer


def check_packages() -> None:
    """Raise FhoptError if packages for GGUF files are missing."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise FhoptError(
                f"{package} is not installed; GGUF files require it. Install it with: pip install 'fhopt[hf]'"
            )


@contextmanager
def not_read(path: Path) -> Iterator[None]:
    """Convert loading errors for a file inside the context to FhoptError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FhoptError(
            f"{path} could not be read as a GGUF model ({reason}). Download the file again, or convert it "
            "with llama.cpp's script."
        ) from error


def _plain(model: Any) -> Any:
    """Remove the traces of quantization from a dequantized model, so that it can be moved and saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


@contextmanager
def frugal() -> Iterator[None]:
    """Cache gguf's readers and name maps, which transformers creates repeatedly, and dequantize row by row."""
    gguf: Any = importlib.import_module("gguf")
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map", "dequantize")}
    gguf.GGUFReader = functools.cache(_plain_reader(before["GGUFReader"], gguf.GGUFValueType))
    gguf.get_tensor_name_map = functools.cache(before["get_tensor_name_map"])
    gguf.dequantize = functools.partial(_dequantize_rows, before["dequantize"])
    try:
        with _quick_strings():
            yield
    finally:
        for name, make in before.items():
            setattr(gguf, name, make)


@contextmanager
def _quick_strings() -> Iterator[None]:
    """Make transformers decode lists of strings in one call, if it has the function for single values."""
    try:
        of: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        parse = of._gguf_parse_value
    except (ImportError, AttributeError):
        yield
        return

    def parsed(value: Any, kinds: Any) -> Any:
        return value.tobytes().decode() if kinds == [9, 8] else parse(value, kinds)  # a list of strings

    of._gguf_parse_value = parsed
    try:
        yield
    finally:
        of._gguf_parse_value = parse


def _plain_reader(reader: Any, kinds: Any) -> Any:
    """Make a gguf reader class with fast list parsing, for vocabularies. kinds: gguf's type numbers."""

    def field_parts(self: Any, at: int, kind: int) -> Any:
        known = getattr(self, "byte_order", "") == "I" and kind == kinds.ARRAY
        found = _list_at(self.data, at, kinds, reader.gguf_scalar_to_np) if known else None
        return found or reader._get_field_parts(self, at, kind)

    return type("PlainReader", (reader,), {"data": property(_bytes, _keep), "_get_field_parts": field_parts})


def _list_at(data: Any, at: int, kinds: Any, scalars: Any) -> tuple[int, list[Any], list[int], list[Any]] | None:
    """Parse a list as gguf does: its size, parts, indices of values, types. None for lists that gguf rejects.

    A number is one part; a string is two, its length and its bytes.
    """
    if at + 12 > len(data):
        return None
    kind, count = data[at : at + 4].view(np.uint32), data[at + 4 : at + 12].view(np.uint64)
    here, parts, is_string = at + 12, [kind, count], kind[0] == kinds.STRING
    if not is_string and kind[0] not in scalars:
        return None
    if is_string:
        for _ in range(int(count[0])):
            if here + 8 > len(data):
                return None
            length = data[here : here + 8].view(np.uint64)
            end = here + 8 + int(length[0])
            if end > len(data):
                return None
            parts += (length, data[here + 8 : end])
            here = end
    else:
        dtype = np.dtype(scalars[kind[0]])
        end = here + int(count[0]) * dtype.itemsize
        if end > len(data):
            return None
        values = data[here:end].view(dtype)
        parts += [values[i : i + 1] for i in range(len(values))]
        here = end
    values_of = list(range(3, len(parts), 2)) if is_string else list(range(2, len(parts)))
    return here - at, parts, values_of, [kinds.ARRAY, *([kinds(kind[0])] if count[0] else [])]


def _bytes(reader: Any) -> Any:
    return vars(reader)["data"]


def _keep(reader: Any, mapped: Any) -> None:
    """Store a mapped file as a plain array: gguf slices it millions of times, and slices of memory maps are slow."""
    vars(reader)["data"] = mapped.view(np.ndarray)


def _dequantize_rows(dequantize: Callable[[Any, Any], Any], data: Any, kind: Any) -> Any:
    """Dequantize blocks [..., rows, bytes] to float32 [..., rows, columns], a few rows at a time."""
    rows = max(1, _ROWS_BYTES // max(1, data[0].nbytes)) if data.ndim > 1 and len(data) else len(data)
    if rows >= len(data):
        return dequantize(data, kind)
    first = dequantize(data[:rows], kind)
    result = np.empty((len(data), *first.shape[1:]), first.dtype)
    result[:rows] = first
    for start in range(rows, len(data), rows):
        result[start : start + rows] = dequantize(data[start : start + rows], kind)
        release_pages(data)
    return result


def release_pages(data: Any) -> None:
    """Release a mapped file's pages from memory, which are not needed again."""
    while isinstance(data, np.ndarray):
        data = data.base
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)
