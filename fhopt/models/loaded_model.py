"""A loaded model: module or exported program, tokenizer, name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.models.capture import Captured, capture, capture_graphs, from_exported

TOKENS = 16  # of an example input


@dataclass
class LoadedModel:
    """A loaded model, ready for capture.

    module: None for an exported program. tokenizer: None for models without one. inputs: example arguments (args,
    kwargs) of models that do not take token ids.
    """

    name: str
    module: torch.nn.Module | None
    tokenizer: Any = None
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    program: torch.export.ExportedProgram | None = None

    def capture(self, tokens: int = TOKENS) -> Captured:
        """Capture the graph of one forward pass. Raises FhoptError unless it is one graph.

        Language models run on `tokens` token ids, other models on their example inputs.
        """
        if self.program is not None:
            return from_exported(self.program)
        assert self.module is not None
        return capture(self.module, *self._call(tokens))

    def captures(self) -> list[Captured]:
        """Capture all graphs of one forward pass, on TOKENS token ids or on the example inputs."""
        if self.program is not None:
            return [from_exported(self.program)]
        assert self.module is not None
        return capture_graphs(self.module, *self._call(TOKENS))

    def _call(self, tokens: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self.tokenizer is None:
            return self.inputs
        vocabulary = int(self.module.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        ids = torch.arange(1, tokens + 1).remainder(vocabulary).unsqueeze(0)
        return (), self.arguments(ids)

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """Make the keyword arguments of a forward pass over token ids [B, T] without a KV cache."""
        is_decoder = hasattr(self.module, "generate")
        return {"input_ids": ids, "use_cache": False} if is_decoder else {"input_ids": ids}

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters of the module, or of the exported program, by name."""
        owner = self.module if self.module is not None else self.program
        assert owner is not None
        return dict(owner.named_parameters())

    def language_model(self) -> torch.nn.Module:
        """Return the module. Raises FhoptError unless it is a causal language model with a tokenizer."""
        if self.module is None or self.tokenizer is None or not hasattr(self.module, "generate"):
            raise FhoptError(f"{self.name} is not a causal language model with a tokenizer. Pass one, such as `demo`.")
        return self.module
