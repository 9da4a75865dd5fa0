"""Runner of transformers: `generate()` in eager mode, or a loop of decode steps compiled by inductor.

options
    attention   "sdpa" or "eager"
    dtype       "bfloat16" or "float32"
    compiled    options of inductor: a static cache and compiled decode steps, prefill in eager mode
    chunk       tokens per prefill call; all by default
    weights     "int8" or "int4": weight-only quantization by torchao
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache, StoppingCriteria, StoppingCriteriaList

from benchmarks.engines.protocol import EngineClock, EngineReport, EngineRequest, run


class Ticks(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Records the time of each token of `generate()`; never stops it."""

    def __init__(self, clock: EngineClock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return False for each sequence."""
        self.clock.step()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(request: EngineRequest) -> Any:
    """Load the model of a Hugging Face folder."""
    torch.set_num_threads(request.threads)
    options = request.options
    model = AutoModelForCausalLM.from_pretrained(
        request.model, dtype=getattr(torch, options.get("dtype", "bfloat16")), local_files_only=True,
        attn_implementation=options.get("attention", "sdpa"),
    ).eval()  # fmt: skip
    if options.get("weights"):
        quantize(model, options["weights"])
    return model


def quantize(model: Any, kind: str) -> None:
    """Quantize the weights of linear layers with torchao, in groups of 32 for 4 bits."""
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    config = Int8WeightOnlyConfig()
    if kind == "int4":
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, kind), granularity=PerGroup(32))
    quantize_(model, config)


@torch.no_grad()
def generate(model: Any, request: EngineRequest, packages: tuple[str, ...]) -> EngineReport:
    """Measure `model.generate()`, greedy."""
    clock, ids = EngineClock(request), torch.tensor(request.tokens())
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    chunk = {"prefill_chunk_size": request.options["chunk"]} if request.options.get("chunk") else {}
    clock.start()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.steps,
        stopping_criteria=StoppingCriteriaList([Ticks(clock)]), **chunk,
    )  # fmt: skip
    return clock.report(packages, out[0, request.context :].tolist())


@torch.no_grad()
def decode_steps(
    model: Any, step: Callable[..., Any], cache: Any, request: EngineRequest, packages: tuple[str, ...]
) -> EngineReport:
    """Measure a loop: `model` prefills `cache`, `step`, its compiled form, generates token by token."""
    clock, ids = EngineClock(request), torch.tensor(request.tokens())
    parts = ids.split(request.options.get("chunk") or request.context, 1)
    clock.start()
    for part in parts[:-1]:
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = _next(model(parts[-1], past_key_values=cache, use_cache=True, logits_to_keep=1))
    tokens = [int(token[0])]
    clock.step()
    while not clock.is_done:
        token = _next(step(token, past_key_values=cache, use_cache=True))
        tokens.append(int(token[0]))
        clock.step()
    return clock.report(packages, tokens)


def _next(output: Any) -> torch.Tensor:
    """Return the most likely tokens [B, 1]."""
    return output.logits[:, -1].argmax(-1, keepdim=True)


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    model = load(request)
    packages = ("transformers", "torch", *(("torchao",) if request.options.get("weights") else ()))
    compiled = request.options.get("compiled")
    if compiled is None:
        return generate(model, request, packages)
    step = torch.compile(model, options=compiled)
    return decode_steps(model, step, StaticCache(model.config, max_cache_len=request.most), request, packages)


if __name__ == "__main__":
    run(measure)
