"""vLLM features beyond plain requests: adapters, beams, several processes, an HTTP server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from served_models import LENGTH, Served, folder_of, plan_of, prompt
from small_models import VOCABULARY, FittedModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fhopt.plan.latent_plan import LatentPlan

PROMPTS = [prompt(seed, length) for seed, length in enumerate((5, 90, 210))]
START_SECONDS = 240.0
RANK = 4


@pytest.fixture(scope="module")
def plan(llama: FittedModel) -> LatentPlan:
    return plan_of(llama, layout="head")  # a latent per kv head, as required by several processes


@pytest.fixture(scope="module")
def folder(llama: FittedModel, plan: LatentPlan, tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("served") / "folder", llama.model, plan)


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[int]]:
    engine = Served(folder)
    tokens = engine.greedy(PROMPTS)
    engine.close()
    return tokens


# --------------------------------------------------------------------------------------------------- adapters


def save_adapter(path: Path, model: Any) -> None:
    """Save an adapter of all attention projections, large enough to change tokens."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    names = [n for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
    for name in names:
        weight = model.get_submodule(name).weight
        for part, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
            drawn = 0.3 * torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = drawn
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj",
    ], "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(described))


def test_an_adapter_changes_only_its_own_requests(
    folder: str, llama: FittedModel, expected: list[list[int]], tmp_path: Path
) -> None:
    """No batch mixes requests with and without an adapter: vLLM 0.32 for CPUs confuses them, even without a plan."""
    from vllm.lora.request import LoRARequest

    save_adapter(tmp_path / "adapter", llama.model)
    engine = Served(folder, enable_lora=True, max_lora_rank=8, max_loras=1)
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))

    def tokens(prompts: list[list[int]], adapters: Any) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=24)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        done = engine.llm.generate(asked, parameters, use_tqdm=False, lora_request=adapters)
        return [list(one.outputs[0].token_ids) for one in done]

    adapted = tokens(PROMPTS, [adapter] * len(PROMPTS))
    assert adapted != expected
    assert tokens(PROMPTS, None) == expected
    assert [tokens([ids], [adapter])[0] for ids in PROMPTS] == adapted
    engine.close()


# --------------------------------------------------------------------------------------------------- beams


def test_beam_search_finds_what_is_at_least_as_likely(folder: str, tmp_path: Path) -> None:
    """vLLM's beam search requires a tokenizer, although prompts are tokens."""
    from vllm.sampling_params import BeamSearchParams

    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0").save_pretrained(tmp_path)
    engine = Served(folder, max_logprobs=16, skip_tokenizer_init=False, tokenizer=str(tmp_path))
    found = {}
    for width in (1, 4):
        (one,) = engine.llm.beam_search(
            [{"prompt_token_ids": PROMPTS[2]}], BeamSearchParams(beam_width=width, max_tokens=12, ignore_eos=True)
        )
        best = one.sequences[0]
        found[width] = best.cum_logprob
        behind = best.tokens[len(PROMPTS[2]) :]
        assert len(behind) == 12
        if width == 1:
            assert behind == engine.greedy([PROMPTS[2]], 12)[0]
    assert found[4] >= found[1] - 1e-3
    engine.close()


# --------------------------------------------------------------------------------------------------- processes


@contextmanager
def server(folder: str, *options: str) -> Iterator[str]:
    """Start a server on a free loopback port, wait until it answers, and return its address.

    Runs the module of `vllm serve`, because that program stops at once in vLLM's CPU build: it looks up the version of
    a package named vllm.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1",
        "--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", str(LENGTH),
        "--skip-tokenizer-init", "--kv-cache-memory-bytes", str(8 << 20), "--max-num-seqs", "8", *options,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _wait(process: subprocess.Popen[str], port: int) -> None:
    """Wait until the server reports that it is healthy."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stdout is not None
            pytest.fail(f"the server stopped: {process.stdout.read()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail("the server did not start in time")


def completions(address: str, folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that follow each prompt, all in one request."""
    body = {
        "model": folder, "prompt": prompts, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "detokenize": False,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choices = json.loads(answer.read())["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]


def test_a_server_gives_the_tokens_of_the_engine(folder: str, expected: list[list[int]]) -> None:
    with server(folder) as address:
        assert completions(address, folder, PROMPTS) == expected
        assert completions(address, folder, PROMPTS[-1:]) == expected[-1:]  # its prefix is cached by now


def test_two_processes_share_the_kv_heads(folder: str, expected: list[list[int]]) -> None:
    with server(folder, "--tensor-parallel-size", "2") as address:
        assert completions(address, folder, PROMPTS) == expected
