"""Reading GGUF files."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_text_gguf

from fhopt.errors import FhoptError
from fhopt.models import gguf_files


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0", "Q4_1"])
def test_rows_are_dequantized_a_few_at_a_time_as_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_model_read_is_one_like_any_other(tmp_path: Path) -> None:
    save_text_gguf(tmp_path / "text.gguf")
    model, tokenizer = gguf_files.read_gguf(tmp_path / "text.gguf", torch.bfloat16)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert not any(b.is_meta for b in model.buffers())
    model.to(torch.float32).save_pretrained(tmp_path / "saved")
    assert model.dtype == torch.float32 and (tmp_path / "saved" / "model.safetensors").is_file()
    assert tokenizer("ab").input_ids


def test_metadata_is_read_from_plain_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FhoptError, match="could not be read as a GGUF model"):
        gguf_files.read_gguf(tmp_path / "text.gguf", torch.float32)
