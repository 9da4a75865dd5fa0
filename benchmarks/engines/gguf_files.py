"""Conversion of a Hugging Face folder to a GGUF file: the same weights for llama.cpp, ik_llama and OpenVINO.

For Llama and Qwen2 decoders with a byte-pair tokenizer. llama.cpp's own script supports more models, needs more
packages, and is not in the packages that contain llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from fhopt.errors import FhoptError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
PRE_TOKENIZERS = {"llama": "smollm", "qwen2": "qwen2"}  # prompts are token ids, so any known one will do
F16, Q4_0, Q8_0, F32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F16", "Q4_0", "Q8_0", "F32"))


@dataclass(frozen=True)
class CheckpointSource:
    """A Hugging Face folder: its configuration, and weights by name."""

    folder: Path
    config: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> CheckpointSource:
        """Load the configuration. Raises FhoptError for an unsupported architecture."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or ["?"])[0]
        if name not in ARCHITECTURES:
            raise FhoptError(
                f"{name} cannot be written as GGUF here; known are {', '.join(ARCHITECTURES)}. Convert it with "
                "llama.cpp's convert_hf_to_gguf.py and give the files by --gguf and --gguf-q4."
            )
        return CheckpointSource(folder, config)

    @property
    def architecture(self) -> str:
        """Return the name of the architecture in GGUF."""
        return ARCHITECTURES[self.config["architectures"][0]]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and float32 weights, one at a time."""
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    yield name, weights.get_tensor(name).float()


def write(folder: Path, target: Path, kind: str) -> None:
    """Write `target`. kind: "f16", or "q4_0" for 4-bit linear layers (8-bit embeddings), as llama-quantize does.

    Raises FhoptError for an unsupported model.
    """
    source = CheckpointSource.read(folder)
    staging = target.with_name(f".{target.name}.part")
    writer = gguf.GGUFWriter(staging, source.architecture)
    _add_settings(writer, source, kind)
    _add_tokenizer(writer, source)
    names = gguf.get_tensor_name_map(_architecture(source), source.config["num_hidden_layers"])
    for name, weight in source.weights():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise FhoptError(f"{name} of {folder} has no name in GGUF; expected the weights of {source.architecture}.")
        data = _permuted(source, name, weight).numpy()
        to = _type(known, data, kind)
        writer.add_tensor(known, gguf.quantize(data, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    staging.replace(target)


def _architecture(source: CheckpointSource) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == source.architecture)


def _type(name: str, data: np.ndarray[Any, Any], kind: str) -> Any:
    """Return the type of a tensor: norms and biases stay float32."""
    if data.ndim < 2:
        return F32
    if kind == "f16" or data.shape[-1] % 32:
        return F16
    return Q8_0 if name.startswith(("token_embd", "output")) else Q4_0


def _permuted(source: CheckpointSource, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Permute rows of queries and keys for GGUF's Llama, which rotates neighbors; transformers rotates halves."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = next((key for key in heads if f".{key}." in name), None)
    if part is None or source.architecture != "llama":
        return weight
    count = source.config[heads[part]]
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_settings(writer: Any, source: CheckpointSource, kind: str) -> None:
    config = source.config
    heads, size = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_name(source.folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(config.get("head_dim") or size // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q4_0)


def _add_tokenizer(writer: Any, source: CheckpointSource) -> None:
    """Add tokens and merges of tokenizer.json, padded with unused tokens to the vocabulary size."""
    content = json.loads((source.folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {index: token for token, index in content["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    count = source.config["vocab_size"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[source.architecture])
    writer.add_token_list([added.get(i) or tokens.get(i) or f"[PAD{i}]" for i in range(count)])
    writer.add_token_types(
        [kinds.CONTROL if i in added else kinds.NORMAL if i in tokens else kinds.UNUSED for i in range(count)]
    )
    writer.add_token_merges(merges)
    for name in ("bos", "eos"):
        value = source.config.get(f"{name}_token_id")
        if isinstance(value, int):
            getattr(writer, f"add_{name}_token_id")(value)
