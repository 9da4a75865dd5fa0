"""Models that cache latents, and the pass that rewrites their attention to run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fhopt.backend.bound_inputs import Binder
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.graph.nodes import fake
from fhopt.passes.graph.program import copy_program

B, H, N, P, E, R, C, T = 2, 4, 16, 8, 12, 24, 64, 33  # channels of a key: N from the latent, P rotated


class Absorbing:
    """A torch.compile backend that absorbs projections and records the outcomes; graphs run without inductor."""

    def __init__(self) -> None:
        self.outcomes: list[passes_outcome.Outcome] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = copy_program(module, inputs)
        outcome = pipeline.absorb_projections(pipeline.find_attentions(program))
        self.outcomes.append(pipeline.lower_program(outcome))
        bind = Binder(program, len(inputs))
        return lambda *given: program.module(*given, *bind(given))

    @property
    def absorbed(self) -> list[str]:
        return [name for outcome in self.outcomes for name in outcome.compressed]

    @property
    def reasons(self) -> set[str]:
        return {m.reason for outcome in self.outcomes for m in outcome.missed if m.stage == "absorb_projection"}

    def expanded(self) -> list[str]:
        """Nodes with one row per key for each of H heads, that is, expanded keys or values."""
        nodes = [n for outcome in self.outcomes for n in outcome.program.graph.nodes if isinstance(fake(n), Tensor)]
        return [n.name for n in nodes if fake(n).dim() == 4 and fake(n).shape[1] == H and fake(n).shape[2] != 1]


class Mla(nn.Module):
    """Latent and rotary part in one cache [B, T, R + P]; `expand` makes keys [B, H, T, D] and values [B, H, T, E]."""

    def __init__(self, expand: Callable[[Any, Tensor], tuple[Tensor, Tensor]], **options: Any) -> None:
        super().__init__()
        self.expand, self.options = expand, options
        self.q, self.down, self.o = nn.Linear(C, H * (N + P)), nn.Linear(C, R + P), nn.Linear(H * E, C)
        self.norm, self.head_norm = nn.RMSNorm(R), nn.RMSNorm(N)
        self.up = nn.Parameter(torch.randn(H, N + E, R) / 4)
        self.bias = nn.Parameter(torch.randn(H, N + E))
        self.sinks = nn.Parameter(torch.randn(H))
        self.seen = torch.zeros(())

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        latent, rotary = self.down(x).split([R, P], -1)
        z = torch.cat((cache, torch.cat((self.norm(latent), rotary), -1)), 1)  # [B, T, R + P]
        query = self.q(x).unflatten(-1, (H, N + P)).transpose(1, 2)
        result = attend(self, query, *self.expand(self, z))
        return self.o(result.transpose(1, 2).flatten(2))


def attend(module: Mla, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale, cap = 0.3, module.options.get("softcap")
    if cap is None and not module.options.get("sinks"):
        mask = module.options.get("mask")
        dropout = module.options.get("dropout", 0.0)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    logits = query @ key.transpose(-1, -2) * scale
    if cap is not None:
        return (torch.tanh(logits / cap) * cap).softmax(-1) @ value
    sinks = module.sinks.view(1, H, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat((logits, sinks), -1).softmax(-1)[..., :-1] @ value


def plain(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    latent, rotary = z.split([R, P], -1)
    both = torch.einsum("btr,hdr->bhtd", latent, module.up)
    return with_rotary(both[..., :N], rotary), both[..., N:]


def with_rotary(key: Tensor, rotary: Tensor) -> Tensor:
    return torch.cat((key, rotary.unsqueeze(1).expand(-1, H, -1, -1)), -1)


def inputs(tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, cache = (torch.randn(B, n, w, generator=generator).double() for n, w in ((1, C), (tokens - 1, R + P)))
    return x, cache
