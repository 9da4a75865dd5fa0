"""Small models in rewritten folders, run by vLLM; for tests in the environment of `make test-serving`."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rewritten_folders import written
from small_models import VOCABULARY, FittedModel

from fhopt.plan.latent_plan import LatentPlan

LENGTH = 512  # maximum sequence length
WINDOW: dict[str, Any] = dict(sinks=4, recent=32, block=16)
ENGINE: dict[str, Any] = dict(
    enforce_eager=True, dtype="float32", max_model_len=LENGTH, skip_tokenizer_init=True, disable_log_stats=False,
    kv_cache_memory_bytes=8 << 20, max_num_seqs=8,
)  # fmt: skip


def plan_of(fitted: FittedModel, ratio: float = 4, segment: int = 0, **options: Any) -> LatentPlan:
    """Fit a plan. segment: encode keys relative to segments, although the bases were fitted without."""
    plan = fitted.plan(ratio, **(WINDOW | options))
    return replace(plan, sites=tuple(replace(site, segment=segment) for site in plan.sites))


def folder_of(path: Path, model: Any, plan: LatentPlan) -> str:
    written(path, model, plan)
    return str(path)


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
    return ids


@contextmanager
def without_llvmlite(is_loaded: bool) -> Iterator[None]:
    """Hide a module whose objects report any attribute: vLLM 0.32 for CPUs inspects those of all modules at start.

    is_loaded: import it first, as vLLM would.
    """
    if is_loaded:
        importlib.import_module("numba")
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden


class Served:
    """A folder loaded by vLLM in this process."""

    def __init__(self, folder: str, **options: Any) -> None:
        from vllm import LLM

        with without_llvmlite("speculative_config" in options):
            self.llm = LLM(folder, **(ENGINE | options))
        self.config = self.llm.llm_engine.vllm_config

    def greedy(self, prompts: Sequence[list[int]], count: int = 24, **options: Any) -> list[list[int]]:
        """Decode greedily after each prompt, all in one request."""
        return [list(one.outputs[0].token_ids) for one in self.results(prompts, max_tokens=count, **options)]

    def results(self, prompts: Sequence[list[int]], **options: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(**(dict(temperature=0, ignore_eos=True, detokenize=False) | options))
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found: list[Any] = self.llm.generate(asked, parameters, use_tqdm=False)
        return found

    def log_likelihood(self, ids: list[int]) -> float:
        """Mean log probability of every token but the first."""
        (one,) = self.results([ids], max_tokens=1, prompt_logprobs=0)
        known = [next(iter(token.values())).logprob for token in one.prompt_logprobs[1:]]
        return float(sum(known) / len(known))

    def metric(self, name: str) -> int:
        return int(next(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}"))

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
