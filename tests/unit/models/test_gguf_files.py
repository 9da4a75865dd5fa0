"""Loading GGUF files."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import save_text_gguf

from fhopt.errors import FhoptError
from fhopt.models import gguf_files


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0", "Q4_1"])
def test_rows_dequantized_in_parts_equal_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf: Any = pytest.importorskip("gguf")
    quantization = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(torch.randn(11, 64).numpy(), quantization)
    expected = gguf.dequantize(blocks, quantization)
    calls: list[int] = []

    def dequantize(data: Any, which: Any) -> Any:
        calls.append(len(data))
        return gguf.dequantize(data, which)

    monkeypatch.setattr(gguf_files, "_ROWS_BYTES", 4 * blocks[0].nbytes)
    found = gguf_files._dequantize_rows(dequantize, blocks, quantization)
    assert calls == [4, 4, 3] and found.dtype == expected.dtype and (found == expected).all()


def test_the_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    save_text_gguf(tmp_path / "text.gguf")
    model, tokenizer = gguf_files.read_gguf(tmp_path / "text.gguf", torch.bfloat16)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert not any(b.is_meta for b in model.buffers())
    model.to(torch.float32).save_pretrained(tmp_path / "saved")
    assert model.dtype == torch.float32 and (tmp_path / "saved" / "model.safetensors").is_file()
    assert tokenizer("ab").input_ids


def test_metadata_is_parsed_from_plain_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf: Any = pytest.importorskip("gguf")
    save_text_gguf(tmp_path / "text.gguf")
    with gguf_files.frugal():
        reader = gguf.GGUFReader(tmp_path / "text.gguf")
        assert reader is gguf.GGUFReader(tmp_path / "text.gguf")
    assert type(reader.data).__name__ == "ndarray" and isinstance(reader.data.base.base, mmap.mmap)
    assert not isinstance(reader.tensors[0].data, type(None))
    plain = gguf.GGUFReader(tmp_path / "text.gguf")
    assert [t.name for t in plain.tensors] == [t.name for t in reader.tensors]
    assert all((a.data == b.data).all() for a, b in zip(plain.tensors, reader.tensors, strict=True))
    assert plain.fields.keys() == reader.fields.keys()
    for name, field in plain.fields.items():
        found = reader.fields[name]
        assert (found.offset, found.types, found.data) == (field.offset, field.types, field.data), name
        for a, b in zip(found.parts, field.parts, strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING] in [field.types for field in plain.fields.values()]


def test_strings_are_decoded_like_in_transformers() -> None:
    of: Any = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    before, given = of._gguf_parse_value, np.frombuffer("ä b".encode(), np.uint8)
    with gguf_files.frugal():
        assert of._gguf_parse_value is not before
        assert of._gguf_parse_value(given, [9, 8]) == before(given, [9, 8]) == "ä b"
        assert of._gguf_parse_value(given, [8]) == "ä b" and of._gguf_parse_value(given, [9, 0]) == given[0]
    assert of._gguf_parse_value is before


def test_lists_longer_than_the_file_are_left_to_gguf() -> None:
    gguf: Any = pytest.importorskip("gguf")
    kinds, scalars = gguf.GGUFValueType, gguf.GGUFReader.gguf_scalar_to_np

    def list_of(kind: int, count: int, rest: bytes) -> Any:
        data = np.frombuffer(kind.to_bytes(4, "little") + count.to_bytes(8, "little") + rest, np.uint8)
        return gguf_files._list_at(data, 0, kinds, scalars)

    one = (3).to_bytes(8, "little") + b"abc"
    size, parts, values, types = list_of(kinds.STRING, 2, 2 * one)
    assert size == 34 and [parts[i].tobytes() for i in values] == [b"abc", b"abc"]
    assert types == [kinds.ARRAY, kinds.STRING]
    size, parts, values, types = list_of(kinds.INT16, 3, b"\1\0\2\0\3\0")
    assert size == 18 and [parts[i].tolist() for i in values] == [[1], [2], [3]]
    assert types == [kinds.ARRAY, kinds.INT16]
    assert list_of(kinds.STRING, 0, b"") == (12, list_of(kinds.STRING, 0, b"")[1], [], [kinds.ARRAY])
    for kind, count, rest in (
        (kinds.STRING, 3, 2 * one), (kinds.STRING, 1, one[:-1]), (kinds.STRING, 1, b"\1"), (kinds.INT32, 2, b"1234567"),
        (kinds.STRING, 2**60, one), (kinds.INT32, 2**62, b"1234"), (kinds.ARRAY, 1, one), (99, 1, one),
    ):  # fmt: skip
        assert list_of(kind, count, rest) is None
    assert gguf_files._list_at(np.zeros(11, np.uint8), 0, kinds, scalars) is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FhoptError, match="could not be read as a GGUF model"):
        gguf_files.read_gguf(tmp_path / "text.gguf", torch.float32)
