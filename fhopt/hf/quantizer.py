"""A quantizer for transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)` opens a rewritten folder.

transformers looks up the method that a configuration names in its registry of quantizers. This one leaves weights as
they are: it checks the folder before they are read, and applies the plan afterwards. Without fhopt the method is
unknown, of which transformers warns, and the model opens as the exact original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fhopt.errors import FhoptError
from fhopt.models import rewritten_folder


class FhoptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json: the method and the version of the folder.

    `dequantize` marks weights as ordinary ones: the model can be moved, cast and trained.
    """

    def __init__(
        self, quant_method: str = rewritten_folder.METHOD, version: int = rewritten_folder.VERSION, **_: Any
    ) -> None:
        self.quant_method, self.version, self.dequantize = quant_method, version, True


class FhoptQuantizer(HfQuantizer):  # type: ignore[misc]
    """A quantizer that checks a rewritten folder, and applies its plan."""

    requires_calibration = True
    is_trainable = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = [Path(f) for f in kwargs.get("checkpoint_files") or ()]
        folders = {file.parent for file in files}
        if len(folders) != 1:
            raise FhoptError(
                f"weights of a rewritten model come from {len(folders)} folders; expected one, that `fhopt rewrite` "
                "wrote. Give from_pretrained the folder and no weights of your own."
            )
        self.folder = rewritten_folder.read_folder(next(iter(folders)))
        if {file.name for file in files} != self.folder.weight_files:
            raise rewritten_folder.damaged(
                self.folder.path, "other weights were about to be read than those of the folder"
            )
        return model

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        from fhopt.hf.apply import apply

        rewritten_folder.check_weights(self.folder, model)
        return apply(model, self.folder.plan)

    def is_serializable(self) -> bool:
        """Return False; a model drops its quantizer once it is loaded, and saves as the exact original."""
        return False


def register() -> None:
    """Enter configuration and quantizer into transformers' registry, once."""
    if rewritten_folder.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(rewritten_folder.METHOD)(FhoptConfig)
        register_quantizer(rewritten_folder.METHOD)(FhoptQuantizer)


register()  # what this module is imported for
