"""Loading of GGUF files with weights left in quantized blocks, for decoding on CPU.

transformers parses the configuration and maps weight names, but dequantizes every weight. Here matrices stay in the
blocks of the file, as `BlockWeight`s of ordinary linear layers and embeddings. If transformers permutes whole rows of a
matrix (queries and keys of some families), the blocks are permuted; a matrix with any other change is dequantized.

Letters: N rows of a weight, K elements per row.
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
from fhopt.codegen.cpu.gguf_blocks import FORMATS, interleave_rows
from fhopt.errors import FhoptError
from fhopt.hf.block_weight import BlockWeight
from fhopt.models.gguf_files import check_packages, frugal, not_read, release_pages
from fhopt.models.gguf_header import check_gguf_size
from fhopt.models.transformers_import import QuietProgress, transformers
from fhopt.progress import Progress, silent

_READER = "transformers.modeling_gguf_pytorch_utils"
Process = Callable[[Any, str], Any]  # transformers' conversion of a named tensor: values -> values


def load_gguf(
    file: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16, progress: Progress = silent
) -> tuple[Any, Any]:
    """Load the model of a GGUF file with its matrices in quantized blocks, and its tokenizer.

    dtype: of all other weights and of the KV cache. Matrices in formats without a kernel (IQ1 to IQ3, Q5_0, Q5_1) are
    dequantized. The model accepts plans fitted to the dequantized model (`fhopt fit FILE`) and runs only on CPU. Raises
    FhoptError if the file cannot be loaded this way. progress: called with the stages `loading` and `kernels`, which
    take minutes to build the first time.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FhoptError(f"{path} is not a file; expected a GGUF file. Check the path.")
    check_packages()
    check_gguf_size(path)
    codegen.register_kernels()
    codegen.start_blocks()
    progress("loading", 0, 1)
    with not_read(path), QuietProgress(), frugal():
        hf = transformers()
        tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = hf.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = _model_of(hf, config, dtype)
        _fill(model, path, dtype)
    progress("kernels", 0, 1)
    if not codegen.prepare_blocks():
        raise FhoptError(
            "no C++ compiler was found, and block-quantized weights require compiled kernels. Install g++ "
            "(or clang++), or load the file dequantized."
        )
    model.config.name_or_path = str(path.parent)
    return model.eval().requires_grad_(False), tokenizer


def _model_of(hf: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build a model with weights on the meta device and real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return hf.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fill(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Load a file's weights into a model. Raises FhoptError, and what gguf and transformers raise."""
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(os.path.join(path.parent, path.name))  # the path that transformers used
    names, process = _names_and_process(model, path, reader)
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            continue
        weight = _kept(tensor, process, dtype)
        if weight is None:
            numbers = process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)
            weight = torch.from_numpy(np.array(numbers)).to(dtype)
        release_pages(tensor.data)
        _set(model, name, weight)
    model.tie_weights()
    absent = [name for name, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise FhoptError(f"{path} has no {absent[0]}. Load it dequantized, or download the file again.")


def _names_and_process(model: Any, path: Path, reader: Any) -> tuple[Mapping[str, str], Process]:
    """Return transformers' names and conversion for the file's tensors. Raises FhoptError."""
    try:
        of: Any = importlib.import_module(_READER)
        family = str(reader.fields["general.architecture"].contents())
        processor = of.TENSOR_PROCESSORS.get(family, of.TensorProcessor)(config=model.config.to_dict())
        names = of.get_gguf_hf_weights_map(model, processor)
    except (ImportError, AttributeError, NotImplementedError) as error:
        from transformers import __version__

        raise FhoptError(
            f"transformers {__version__} has no mapping of {path} to the weights of {type(model).__name__} "
            f"({error}). Load the file dequantized."
        ) from error

    def process(numbers: Any, name: str) -> Any:
        parsed: dict[str, Any] = {"tensors": {}}
        return processor.process(
            weights=numbers, name=name, tensor_key_mapping=names, parsed_parameters=parsed
        ).weights  # fmt: skip

    return names, process


def _kept(tensor: Any, process: Process, dtype: torch.dtype) -> Tensor | None:
    """Return a matrix in its blocks; None for other tensors, or if the conversion does more than permute rows."""
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
    return BlockWeight(interleave_rows(in_order, format, width), dtype)


def _set(model: Any, name: str, weight: Tensor) -> None:
    """Assign a weight to its module. Raises FhoptError on a shape mismatch."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    expected = getattr(module, key)
    if tuple(expected.shape) != tuple(weight.shape):
        raise FhoptError(
            f"{name} is {tuple(weight.shape)} in the file; expected {tuple(expected.shape)}. Load it dequantized."
        )
    is_buffer = key in module._buffers
    setattr(module, key, weight if is_buffer else torch.nn.Parameter(weight, requires_grad=False))
