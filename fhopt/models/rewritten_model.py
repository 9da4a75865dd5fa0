"""Loading of the original model of a rewritten folder."""

from __future__ import annotations

from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.models import rewritten_folder
from fhopt.models.rewritten_folder import RewrittenFolder
from fhopt.models.transformers_import import QuietProgress, transformers


def load_exact(folder: RewrittenFolder, **options: Any) -> torch.nn.Module:
    """Load the original model of a verified folder. Raises FhoptError."""
    kind = _model_class(folder)
    try:
        with QuietProgress():
            config = kind.config_class.from_pretrained(folder.path, local_files_only=True)
            _check_size(folder, config)
            del config.quantization_config
            model, loading = kind.from_pretrained(
                folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
                **options,
            )  # fmt: skip
    except FhoptError:
        raise
    except Exception as error:  # a forged configuration makes transformers raise many types
        raise rewritten_folder.damaged(folder.path, f"{type(error).__name__}: {_short(error)}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := loading.get(what):
            raise rewritten_folder.damaged(folder.path, f"{what.replace('_', ' ')} in its weights: {min(names)!r}")
    rewritten_folder.check_weights(folder, model)
    loaded: torch.nn.Module = model
    return loaded


def _model_class(folder: RewrittenFolder) -> Any:
    """Return the transformers class that the configuration names."""
    hf = transformers()
    names = folder.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind: Any = getattr(hf, name, None) if name.isidentifier() else None
    is_model = isinstance(kind, type) and issubclass(kind, hf.PreTrainedModel)
    if not is_model or kind.config_class is None:
        raise FhoptError(
            f"{folder.path} is a {name[:60]!r}, which transformers {hf.__version__} does not have. Install a "
            "newer transformers."
        )
    if folder.config.get("model_type") != kind.config_class.model_type:
        raise rewritten_folder.damaged(folder.path, f"{name} is not a {str(folder.config.get('model_type'))[:40]!r}")
    return kind


def _check_size(folder: RewrittenFolder, config: Any) -> None:
    """Raise FhoptError for more layers than tensors: building them could take forever."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(folder.tensors):
        raise rewritten_folder.damaged(folder.path, f"{str(layers)[:20]} layers have {len(folder.tensors)} tensors")


def _short(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
