"""A transformers quantizer that lets `AutoModelForCausalLM.from_pretrained(FOLDER)` load a rewritten folder.

transformers looks up a configuration's quantization method in its registry. This quantizer does not change weights: it
verifies the folder before they are loaded, and applies the plan afterwards. Without fhopt the method is unknown:
transformers warns and loads the original model.
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
    """The `quantization_config` of config.json: method and version of the folder.

    `dequantize` marks weights as unquantized: the model can be moved, cast and trained.
    """

    def __init__(
        self, quant_method: str = rewritten_folder.METHOD, version: int = rewritten_folder.VERSION, **_: Any
    ) -> None:
        self.quant_method, self.version, self.dequantize = quant_method, version, True


class FhoptQuantizer(HfQuantizer):  # type: ignore[misc]
    """A quantizer that verifies a rewritten folder and applies its plan."""

    requires_calibration = True
    is_trainable = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = [Path(f) for f in kwargs.get("checkpoint_files") or ()]
        folders = {file.parent for file in files}
        if len(folders) != 1:
            raise FhoptError(
                f"weights of a rewritten folder come from {len(folders)} folders; expected the folder written "
                "by `fhopt rewrite`. Pass only this folder to from_pretrained."
            )
        self.folder = rewritten_folder.read_folder(next(iter(folders)))
        if {file.name for file in files} != self.folder.weight_files:
            raise rewritten_folder.damaged(self.folder.path, "weights of another folder were about to be loaded")
        return model

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        from fhopt.hf.apply import apply

        rewritten_folder.check_weights(self.folder, model)
        return apply(model, self.folder.plan)

    def is_serializable(self) -> bool:
        """Return False; a loaded model drops its quantizer, and saves as the original."""
        return False


def register_fhopt_quantizer() -> None:
    """Register configuration and quantizer with transformers, once."""
    if rewritten_folder.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(rewritten_folder.METHOD)(FhoptConfig)
        register_quantizer(rewritten_folder.METHOD)(FhoptQuantizer)


register_fhopt_quantizer()  # the purpose of importing this module
