"""GGUF files opened with their weights left in blocks, for decoding on a CPU.

transformers reads the configuration and knows the names of weights; it dequantizes all of them. Here matrices keep the
blocks of the file, as `BlockWeight`s of ordinary linear layers and embeddings. What transformers does to a matrix
(rows of queries and keys of some families stand in another order) is done to its blocks, where it moves whole rows; a
matrix of which it does anything else is dequantized.

Letters: N rows of a weight, K numbers in each.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fhopt import codegen
from fhopt.codegen.cpu.gguf_blocks import FORMATS, arranged
from fhopt.errors import FhoptError
from fhopt.hf.block_weight import BlockWeight
from fhopt.models.gguf_files import check_packages, forget, frugal, not_read
from fhopt.models.transformers_import import QuietProgress, transformers

_READER = "transformers.modeling_gguf_pytorch_utils"
Process = Callable[[Any, str], Any]  # what transformers does to a tensor of a name: numbers -> numbers


def load_gguf(file: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load the model of a GGUF file, its matrices left in their blocks, and its tokenizer.

    dtype: of everything else, and of the KV cache. Matrices in formats without a kernel (IQ1 to IQ3, Q5_0, Q5_1) are
    dequantized. The model takes plans that were fitted to the dequantized one (`fhopt fit FILE`), and runs on CPUs.
    Raises FhoptError for a file that cannot be read so.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FhoptError(f"{path} is not a file; expected a GGUF file.")
    check_packages()
    codegen.install()
    codegen.start_blocks()
    with not_read(path), QuietProgress(), frugal():
        hf = transformers()
        tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = hf.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = _model_of(hf, config, dtype)
        _fill(model, path, dtype)
    if not codegen.prepare_blocks():
        raise FhoptError(
            "no C++ compiler was found, and weights in blocks are multiplied by compiled kernels. Install g++ (or "
            "clang++), or load the file dequantized."
        )
    model.config.name_or_path = str(path.parent)
    return model.eval().requires_grad_(False), tokenizer


def _model_of(hf: Any, config: Any, dtype: torch.dtype) -> Any:
    """Make a model whose weights take no memory yet; its buffers are there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return hf.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fill(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Give a model the weights of a file. Raises FhoptError, and what gguf and transformers raise."""
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(os.path.join(path.parent, path.name))  # as transformers names it, which made one
    names, process = _names_and_process(model, path, reader)
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            continue
        weight = _kept(tensor, process, dtype)
        if weight is None:
            numbers = process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)
            weight = torch.from_numpy(np.array(numbers)).to(dtype)
        forget(tensor.data)
        _set(model, name, weight)
    model.tie_weights()
    absent = [name for name, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise FhoptError(f"{path} has no {absent[0]}. Load it dequantized, or fetch the file again.")


def _names_and_process(model: Any, path: Path, reader: Any) -> tuple[Mapping[str, str], Process]:
    """Return the names that transformers gives to the file's tensors, and what it does to these. Raises FhoptError."""
    try:
        of: Any = importlib.import_module(_READER)
        family = str(reader.fields["general.architecture"].contents())
        processor = of.TENSOR_PROCESSORS.get(family, of.TensorProcessor)(config=model.config.to_dict())
        names = of.get_gguf_hf_weights_map(model, processor)
    except (ImportError, AttributeError, NotImplementedError) as error:
        from transformers import __version__

        raise FhoptError(
            f"transformers {__version__} does not say which weights of {type(model).__name__} are in {path} ({error}). "
            "Load the file dequantized."
        ) from error

    def process(numbers: Any, name: str) -> Any:
        parsed: dict[str, Any] = {"tensors": {}}
        return processor.process(
            weights=numbers, name=name, tensor_key_mapping=names, parsed_parameters=parsed
        ).weights  # fmt: skip

    return names, process


def _kept(tensor: Any, process: Process, dtype: torch.dtype) -> Tensor | None:
    """Return a matrix in its blocks; None for another tensor, or where whole rows are not all that is moved."""
    format, data = int(tensor.tensor_type), tensor.data
    if format not in FORMATS or data.ndim != 2:
        return None
    width, rows = int(tensor.shape[0]), data.shape[0]
    order, columns = np.arange(rows), np.arange(width)
    moved = process(np.broadcast_to(order[:, None], (rows, width)), tensor.name)
    across = process(np.broadcast_to(columns, (rows, width)), tensor.name)
    if moved.shape != (rows, width) or not (moved[:, :1] == moved[:, -1:]).all():
        return None
    if across.shape != (rows, width) or not (across[[0, -1]] == columns).all():
        return None
    order = moved[:, 0]
    if not np.array_equal(np.sort(order), np.arange(rows)):
        return None
    is_in_order = bool((order == np.arange(rows)).all())
    in_order = np.asarray(data) if is_in_order else np.asarray(data)[order]
    return BlockWeight(arranged(in_order, format, width), dtype)


def _set(model: Any, name: str, weight: Tensor) -> None:
    """Put a weight into its place. Raises FhoptError where it is of another shape."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    expected = getattr(module, key)
    if tuple(expected.shape) != tuple(weight.shape):
        raise FhoptError(
            f"{name} is {tuple(weight.shape)} in the file; expected {tuple(expected.shape)}. Load it dequantized."
        )
    is_buffer = key in module._buffers
    setattr(module, key, weight if is_buffer else torch.nn.Parameter(weight, requires_grad=False))
