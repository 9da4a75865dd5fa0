"""Models by every kind of name that the command line accepts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_models import call, encoder, save_tiny_model

from fhopt.models.loader import load_model
from fhopt.passes import pipeline

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)


@pytest.mark.parametrize(
    ("config", "model", "options", "sites"),
    [
        ("BertConfig", "BertModel", SMALL | dict(vocab_size=40), 1),
        ("ViTConfig", "ViTModel", SMALL | dict(image_size=16, patch_size=8), 1),
        ("T5Config", "T5ForConditionalGeneration", dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1,
            num_heads=4), 3),
        ("WhisperConfig", "WhisperModel", dict(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8, max_source_positions=10,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0), 3),
    ],
)  # fmt: skip
def test_a_folder_of_an_encoder_of_text_images_or_audio_is_a_model(
    config: str, model: str, options: dict[str, Any], sites: int, tmp_path: Path
) -> None:
    import transformers as hf

    torch.manual_seed(0)
    getattr(hf, model)(getattr(hf, config)(**options)).save_pretrained(tmp_path)
    result = call("inspect", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["sites"]) == sites


def test_an_exported_program_is_a_model(tmp_path: Path) -> None:
    module, arguments = encoder()
    torch.export.save(torch.export.export(module.eval(), arguments), tmp_path / "encoder.pt2")
    result = call("inspect", str(tmp_path / "encoder.pt2"), "--json")
    assert result.exit_code == 0, result.output
    assert [s["heads"] for s in json.loads(result.stdout)["sites"]] == [4]


def save_tiny_gguf(path: Path) -> None:
    """Save a one-layer Llama with a tokenizer of six words."""
    gguf: Any = pytest.importorskip("gguf")
    words, width, kv_width, inner = ["<s>", *"abcd", "ab"], 32, 16, 48
    writer = gguf.GGUFWriter(path, "llama")
    numbers = dict(
        context_length=64, embedding_length=width, block_count=1, feed_forward_length=inner, head_count=4,
        head_count_kv=2, layer_norm_rms_eps=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(words), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (kv_width, width),
        "blk.0.attn_v": (kv_width, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_a_gguf_file_is_a_model_and_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    save_tiny_gguf(tmp_path / "tiny.gguf")
    parsed: list[Any] = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            parsed.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    assert len(parsed) == 1 and gguf.GGUFReader is Reader
    assert loaded.tokenizer("abcd").input_ids == [5, 3, 4]
    assert len(pipeline.find_attentions(loaded.capture().program).sites) == 1


SAMPLE = ("--sequences", "6", "--rate-sequences", "2", "--context", "256", "--recent", "64", "--json")


@pytest.mark.usefixtures("without_compiling")
def test_a_hugging_face_folder_is_a_model(tmp_path: Path) -> None:
    """Save a model with its tokenizer, load it, fit and evaluate a plan, like a user's own model."""
    save_tiny_model(tmp_path / "model")
    picture = str(tmp_path / "plan.png")
    result = call(
        "fit", str(tmp_path / "model"), *SAMPLE, "--bytes-per-token", "100", "--explain", picture, "-o",
        str(tmp_path / "plan"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    exact = 2 * 2 * 2 * 2 * 16  # layers, sides, kv heads, head size, bytes
    assert exact / 100 <= json.loads(result.stdout)["ratio"] < exact / 100 * 1.1
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["model", "plan", "plan.png"]  # the checkpoint is removed
    options = ["--plan", str(tmp_path / "plan"), "--data", "license", "--context", "300", "--json"]
    result = call("eval", str(tmp_path / "model"), *options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["perplexity"]["license"]
    assert figures["exact"] > 1 and abs(figures["increase_percent"]) < 50
