"""A command's MODEL by name: its form, and its properties according to its files, before loading.

Nothing here imports torch or transformers, so that a command rejects an invalid name immediately.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import read_file
from fhopt.models.model_files import CONFIG, MANIFEST, check_model

_POSITIONS = ("max_position_embeddings", "n_positions")
_DTYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class StoredFacts:
    """Properties stored in a model's files; None if unknown. dtype: such as bfloat16."""

    positions: int | None = None
    has_chat_template: bool | None = None
    dtype: str | None = None


def folder_of(name: str) -> Path | None:
    """Return the folder that MODEL names; None for other forms, including `demo`."""
    path = Path(name).expanduser()
    return path if name != "demo" and path.is_dir() else None


def no_chat_template(name: str) -> FhoptError:
    """Make the error for a model without a chat template."""
    return FhoptError(f"{name} has no chat template, which a chat requires. Use `fhopt generate {name} --raw PROMPT`.")


def check_text_model(name: str) -> None:
    """Raise FhoptError if MODEL is, by name and files, not a causal language model with a tokenizer.

    First runs the other checks of `fhopt.models.model_files.check_model`.
    """
    check_model(name)
    folder = folder_of(name)
    if folder is not None:
        _check_causal(folder)
    elif name != "demo" and Path(name).suffix != ".gguf":
        raise FhoptError(
            f"{name} has no tokenizer; expected a language model. Pass demo, a Hugging Face folder, or a GGUF file."
        )


def _check_causal(folder: Path) -> None:
    names = _read(folder / CONFIG).get("architectures") or []
    is_causal = any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    if names and not is_causal and not (folder / MANIFEST).is_file():
        raise FhoptError(
            f"{folder} is a {names[0]}, which does not generate text; expected a causal language model. Pass "
            "another MODEL."
        )


def stored_facts(name: str) -> StoredFacts:
    """Return the properties stored in MODEL's files; none for forms other than a folder."""
    folder = folder_of(name)
    if folder is None:
        return StoredFacts()
    config = _read(folder / CONFIG)
    text = config.get("text_config")
    known = [c[k] for c in (text, config) if isinstance(c, Mapping) for k in _POSITIONS if isinstance(c.get(k), int)]
    files = (folder / "chat_template.jinja", folder / "chat_template.json", folder / "additional_chat_templates")
    has_template = any(f.exists() for f in files) or bool(_read(folder / "tokenizer_config.json").get("chat_template"))
    dtypes = [c[k] for c in (config, text) if isinstance(c, Mapping) for k in _DTYPES if isinstance(c.get(k), str)]
    return StoredFacts(known[0] if known else None, has_template, dtypes[0] if dtypes else None)


def is_of_few_bits(name: str) -> bool:
    """Return whether MODEL is stored in bfloat16, or in a GGUF file, which mostly has fewer bits."""
    return name == "demo" or Path(name).suffix == ".gguf" or stored_facts(name).dtype == "bfloat16"


def _read(file: Path) -> Mapping[str, Any]:
    """Load a JSON object; an empty one if it is unreadable, which the loader reports."""
    try:
        value = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError, FhoptError):
        return {}
    return value if isinstance(value, dict) else {}
