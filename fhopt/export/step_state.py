"""State of an exported decode step, which the caller passes from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.export.step_attention import StateTensor
from fhopt.plan.latent_plan import LatentPlan


class StepState:
    """Caller's side of an exported step: the buffers, and how the results of a step are written to them.

    run_step, run_seal: functions that compute `ExportedStep` and `Seal` on torch tensors. tokens: number of tokens in
    the state; quantized: number of those that are packed latents.
    """

    def __init__(self, plan: LatentPlan, tensors: Sequence[StateTensor], run_step: Any, run_seal: Any) -> None:
        self.plan, self.run_step, self.run_seal = plan, run_step, run_seal
        self.names = [t.name for t in tensors]
        self.buffers = [t.empty(plan.block) for t in tensors]
        self.tokens = self.quantized = 0

    @property
    def counts(self) -> Tensor:
        """Number of tokens in sinks and window, and of quantized tokens."""
        return torch.tensor([self.tokens - self.quantized, self.quantized])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Compute the logits [B,S,V] of new tokens [B,S], and add these to the state."""
        logits, *new = self.run_step(ids, self.counts, *self.buffers)
        windows = [i for i, name in enumerate(self.names) if ".open_" in name]
        at = self.tokens - self.quantized
        for i, tokens in zip(windows, new, strict=True):
            self.buffers[i][:, :, at : at + ids.shape[1]] = tokens
        self.tokens += ids.shape[1]
        while self.plan.window.quantized_tokens(self.tokens) > self.quantized:
            self._quantize_block(windows)
        result: Tensor = logits
        return result

    def _quantize_block(self, windows: Sequence[int]) -> None:
        """Quantize the oldest block of the window and append it to the packed latents."""
        first, block = self.plan.sinks, self.plan.block
        rows = self.run_seal(*(self.buffers[i][:, :, first : first + block].contiguous() for i in windows))
        grown = [i for i in range(len(self.buffers)) if i not in windows]
        for i, new in zip(grown, rows, strict=True):
            buffer = self.buffers[i]
            if buffer.shape[2] < self.quantized + block:  # doubled, to amortize copies
                buffer = torch.cat([buffer, torch.zeros_like(buffer)], 2)
            buffer[:, :, self.quantized : self.quantized + block] = new
            self.buffers[i] = buffer
        for i in windows:
            buffer = self.buffers[i]
            buffer[:, :, first : buffer.shape[2] - block] = buffer[:, :, first + block :].clone()
        self.quantized += block
