"""Small models with random weights, and plans for them; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fhopt import calibrate, fitting, passes
from fhopt.capture import Captured, capture
from fhopt.spec import LatentPlan, SiteStatistics

VOCABULARY = 97


def tiny_llama(attention: str = "sdpa", **changes: Any) -> Any:
    """Llama: 2 layers, H=4, G=2, D=16, half-split RoPE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=attention, bos_token_id=0,
        eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


def tiny_gpt2(attention: str = "sdpa") -> Any:
    """GPT-2: 2 layers, H=G=4, D=16, learned positions, fused QKV as Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MAKERS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def token_ids(batch: int = 1, tokens: int = 16) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens))


def found(model: Any, tokens: int = 16) -> tuple[Captured, passes.Outcome]:
    captured = capture(model, (), {"input_ids": token_ids(1, tokens), "use_cache": False})
    return captured, passes.find(captured.program)


def run(captured: Captured) -> Tensor:
    """Main output of the graph on its example inputs."""
    result = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())
    output: Tensor = result[captured.result]
    return output


class Fitted:
    """A model with statistics, from which plans are cheap."""

    def __init__(self, name: str) -> None:
        self.model = MAKERS[name]()
        self.captured, self.outcome = found(self.model, 96)
        batches = [{"input_ids": token_ids(1, 96)} for _ in range(6)]
        self.statistics: dict[str, SiteStatistics] = calibrate.collect(
            self.captured, self.outcome, batches, sinks=4, recent=8
        )

    def plan(self, ratio: float, layout: str = "freq", **options: Any) -> LatentPlan:
        chosen: dict[str, Any] = dict(recent=8, block=8, tokens=2048) | options
        return fitting.fit(self.statistics, ratio=ratio, layout=layout, **chosen)
