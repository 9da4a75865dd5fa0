"""The state of an exported decode step: tensors that the caller hands from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.export.step_attention import StateTensor
from fhopt.plan.latent_plan import LatentPlan

# --------------------------------------------------------------------------------------------------- state


class State:
    """The caller's side: buffers, and what to do with the results of a step. `capacity`: sealed places from the start.

    run_step and run_seal are anything that computes what `Step` and `Seal` do, in torch tensors.
    """

    def __init__(self, plan: LatentPlan, tensors: Sequence[StateTensor], run_step: Any, run_seal: Any) -> None:
        self.plan, self.run_step, self.run_seal = plan, run_step, run_seal
        self.names = [t.name for t in tensors]
        self.buffers = [t.empty(plan.block) for t in tensors]
        self.tokens = self.sealed = 0

    @property
    def counts(self) -> Tensor:
        """Open and sealed tokens."""
        return torch.tensor([self.tokens - self.sealed, self.sealed])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Logits [B,S,V] of new tokens [B,S], which are in the state afterwards."""
        logits, *new = self.run_step(ids, self.counts, *self.buffers)
        opened = [i for i, name in enumerate(self.names) if ".open_" in name]
        at = self.tokens - self.sealed
        for i, tokens in zip(opened, new, strict=True):
            self.buffers[i][:, :, at : at + ids.shape[1]] = tokens
        self.tokens += ids.shape[1]
        while self.plan.window.quantized_tokens(self.tokens) > self.sealed:
            self._seal(opened)
        result: Tensor = logits
        return result

    def _seal(self, opened: Sequence[int]) -> None:
        """Put the oldest block of the window behind the sealed rows."""
        first, block = self.plan.sinks, self.plan.block
        rows = self.run_seal(*(self.buffers[i][:, :, first : first + block].contiguous() for i in opened))
        grown = [i for i in range(len(self.buffers)) if i not in opened]
        for i, new in zip(grown, rows, strict=True):
            buffer = self.buffers[i]
            if buffer.shape[2] < self.sealed + block:  # twice the room, so that moving costs little
                buffer = torch.cat([buffer, torch.zeros_like(buffer)], 2)
            buffer[:, :, self.sealed : self.sealed + block] = new
            self.buffers[i] = buffer
        for i in opened:
            buffer = self.buffers[i]
            buffer[:, :, first : buffer.shape[2] - block] = buffer[:, :, first + block :].clone()
        self.sealed += block
