"""Small models with random weights, and plans for them; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration import collect, probe
from fhopt.fitting import allocation, choices, fit_plan
from fhopt.fitting.bases import CandidateBases
from fhopt.fitting.candidates import COMPETING, fit_bases
from fhopt.models.capture import Captured, capture
from fhopt.models.model_facts import cache_argument
from fhopt.passes import outcome, pipeline
from fhopt.plan.latent_plan import LatentPlan

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


def cached(cache: Any) -> dict[str, Any]:
    """Return `cache` as a keyword argument, under the name that this version of transformers uses."""
    from transformers import LlamaForCausalLM

    return {cache_argument(LlamaForCausalLM): cache}


def token_ids(batch: int = 1, tokens: int = 16) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens))


def found(model: Any, tokens: int = 16) -> tuple[Captured, outcome.Outcome]:
    captured = capture(model, (), {"input_ids": token_ids(1, tokens), "use_cache": False})
    return captured, pipeline.find_attentions(captured.program)


def run(captured: Captured, batch: probe.Batch | None = None) -> Tensor:
    """Return the main output of the graph on a batch, or on its example inputs."""
    result = torch.fx.Interpreter(captured.program.module).run(*probe.graph_arguments(captured, batch or {}))
    output: Tensor = result[captured.result]
    return output


FAR: dict[str, Any] = dict(sinks=4, recent=8)
TOKENS = 2048  # context length for plans of `Fitted`


class FittedModel:
    """A model with statistics, bases of every layout and their rates, so that plans are cheap to make."""

    def __init__(self, name: str) -> None:
        self.model = MAKERS[name]()
        self.captured, self.outcome = found(self.model, 96)
        self.statistics = collect.collect(self.captured, self.outcome, numbered(6), **FAR)
        self.bases: CandidateBases = {name: {} for name in self.statistics}
        for layout in (choices.AUTO, "freq", "head"):
            more = fit_bases(self.statistics, layout, context=96, tokens=TOKENS)
            self.bases = {name: {**layouts, **more[name]} for name, layouts in self.bases.items()}
        others = numbered(4, start=6)
        self.costs = collect.measure_costs(
            self.captured, self.outcome, others, self.bases, allocation.STEPS, **FAR
        )  # fmt: skip

    def plan(self, ratio: float, layout: str = "band", **options: Any) -> LatentPlan:
        wanted = ("input", *COMPETING) if layout == choices.AUTO else (layout,)
        bases = {name: {w: pair for w, pair in t.items() if w in wanted} for name, t in self.bases.items()}
        chosen: dict[str, Any] = dict(recent=8, block=8, tokens=TOKENS) | options
        known = bases if all(bases.values()) else None  # no site of this model has the layout `input`
        return fit_plan.fit_ratio(self.statistics, bases=known, costs=self.costs, ratio=ratio, layout=layout, **chosen)


def numbered(count: int, tokens: int = 96, start: int = 0) -> list[tuple[int, dict[str, Tensor]]]:
    """Numbered calibration batches of one random sequence each."""
    return [(start + i, {"input_ids": token_ids(1, tokens)}) for i in range(count)]
