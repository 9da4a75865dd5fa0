"""Reading a GGUF file: its weights dequantized to one dtype, its configuration, its tokenizer.

transformers does the reading. What is added here: metadata is parsed once, not three times, and its long lists without
a call of many functions for each word; a tensor is dequantized a few rows at a time, since gguf holds several copies of
a whole one; and the model does not keep what it was made from.
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
from fhopt.models.transformers_import import QuietProgress, transformers

_ROWS_BYTES = 1 << 24  # of quantized blocks that are dequantized at once


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read the model, its weights in `dtype`, and the tokenizer of a GGUF file. Raises FhoptError."""
    hf = transformers()
    check_packages()
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(hf, "GgufConfig"):  # else newer versions leave weights in their blocks where they have kernels
        options["quantization_config"] = hf.GgufConfig(dequantize=True)
    with not_read(path), QuietProgress(), frugal():
        tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = hf.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return _plain(model), tokenizer


def check_packages() -> None:
    """Raise FhoptError where packages are missing that read GGUF files."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise FhoptError(
                f"{package} is not installed; GGUF files need it. Install it with: pip install 'fhopt[hf]'"
            )


@contextmanager
def not_read(path: Path) -> Iterator[None]:
    """Raise FhoptError for what readers raise inside about a file."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FhoptError(
            f"{path} could not be read as a GGUF model ({reason}). Fetch the file again, or convert it with "
            "llama.cpp's own script."
        ) from error


def _plain(model: Any) -> Any:
    """Make a dequantized model one like any other: its weights are plain tensors, and may be moved and saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


@contextmanager
def frugal() -> Iterator[None]:
    """Cache gguf's readers and name maps, which transformers makes again each time, and dequantize row by row."""
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
    """Let transformers decode strings of a list at once, where it has the function that makes a list of their bytes."""
    try:
        of: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        parse = of._gguf_parse_value
    except (ImportError, AttributeError):
        yield
        return

    def parsed(value: Any, kinds: Any) -> Any:
        return value.tobytes().decode() if kinds == [9, 8] else parse(value, kinds)  # a list, of strings

    of._gguf_parse_value = parsed
    try:
        yield
    finally:
        of._gguf_parse_value = parse


def _plain_reader(reader: Any, kinds: Any) -> Any:
    """Make a reader of gguf that is quick with lists, as vocabularies are. kinds: gguf's numbers of types."""

    def field_parts(self: Any, at: int, kind: int) -> Any:
        known = getattr(self, "byte_order", "") == "I" and kind == kinds.ARRAY
        found = _list_at(self.data, at, kinds, reader.gguf_scalar_to_np) if known else None
        return found or reader._get_field_parts(self, at, kind)

    return type("PlainReader", (reader,), {"data": property(_bytes, _keep), "_get_field_parts": field_parts})


def _list_at(data: Any, at: int, kinds: Any, scalars: Any) -> tuple[int, list[Any], list[int], list[Any]] | None:
    """Read a list as gguf does: its size, its parts, which of them are values, its types. None for what gguf refuses.

    A part of a number is that number; a string has two, its length and its bytes.
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
    """Keep a mapped file as a plain array: gguf makes slices of it by the million, and those of maps are slow."""
    vars(reader)["data"] = mapped.view(np.ndarray)


def _dequantize_rows(dequantize: Callable[[Any, Any], Any], data: Any, kind: Any) -> Any:
    """Dequantize blocks [..., rows, bytes] to float32 [..., rows, columns], some rows at a time."""
    rows = max(1, _ROWS_BYTES // max(1, data[0].nbytes)) if data.ndim > 1 and len(data) else len(data)
    if rows >= len(data):
        return dequantize(data, kind)
    first = dequantize(data[:rows], kind)
    result = np.empty((len(data), *first.shape[1:]), first.dtype)
    result[:rows] = first
    for start in range(rows, len(data), rows):
        result[start : start + rows] = dequantize(data[start : start + rows], kind)
        forget(data)
    return result


def forget(data: Any) -> None:
    """Tell the system that the pages of a mapped file that were read are not needed again."""
    while isinstance(data, np.ndarray):
        data = data.base
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)
