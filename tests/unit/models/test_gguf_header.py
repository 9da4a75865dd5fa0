"""The size of a GGUF file by its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_text_gguf

import fhopt
from fhopt.errors import FhoptError
from fhopt.models import gguf_header
from fhopt.models.gguf_files import read_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_text_gguf(tmp_path / "text.gguf", {"attn": "Q8_0", "ffn": "Q4_1"})
    return tmp_path / "text.gguf"


def test_a_whole_file_is_accepted_and_its_described_size_ends_at_the_last_tensor(file: Path) -> None:
    gguf_header.check_gguf_size(file)
    gguf: Any = pytest.importorskip("gguf")
    last = max(gguf.GGUFReader(file).tensors, key=lambda t: t.data_offset)
    with file.open("rb") as opened:
        assert gguf_header._described_bytes(opened) == last.data_offset + last.n_bytes


def test_a_file_that_lacks_one_byte_is_refused_by_every_loader(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("rb") as opened:
        size = gguf_header._described_bytes(opened)
    file.write_bytes(file.read_bytes()[: size - 1])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # nothing slow runs before
    for load in (read_gguf, fhopt.load_gguf):
        with pytest.raises(FhoptError, match=f"is truncated: it has {size - 1:,} bytes; expected {size:,}. Fetch"):
            load(file, torch.float32)


@pytest.mark.parametrize("length", [10, 100, 3000])
def test_a_file_that_ends_in_its_header_is_refused(length: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FhoptError, match=f"ends in its header, after {length:,} bytes"):
        gguf_header.check_gguf_size(file)


def test_a_version_of_another_byte_order_is_left_to_gguf(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:8] = content[4:8][::-1]
    file.write_bytes(content[:2000])
    gguf_header.check_gguf_size(file)
