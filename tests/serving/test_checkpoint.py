"""The DeepSeek layout of `fhopt export --target vllm` in vLLM: the tokens of the original."""

from __future__ import annotations

from pathlib import Path

import torch
from mla_export import VLLM, exported, sites_of, tiny
from served_models import Served, prompt

from fhopt.fitting import fit_plan

PROMPTS = [prompt(seed, length) for seed, length in enumerate((5, 40, 17))]


def test_one_kv_head_gives_the_tokens_of_the_original_alone_and_together(tmp_path: Path) -> None:
    model = tiny("Llama", num_key_value_heads=1, tie_word_embeddings=True)
    exported(model, fit_plan.exact_plan(sites_of(model)), tmp_path / "out", VLLM)
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    # vLLM's rotary kernel for CPUs is wrong for [T, H, D], as MLA has it: without its own kernels it is right. On a CPU
    # with AMX it would choose a backend that takes weights of 16 bits alone.
    options = {"compilation_config": {"custom_ops": ["none"]}, "block_size": 16, "attention_backend": "CPU_MLA"}
    engine = Served(str(tmp_path / "out"), **options)
    assert [engine.greedy([ids], 12)[0] for ids in PROMPTS] == expected
    assert engine.greedy(PROMPTS, 12) == expected
    engine.close()
