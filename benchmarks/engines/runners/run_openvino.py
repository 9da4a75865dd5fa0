"""Runner of OpenVINO GenAI: its pipeline with continuous batching, step by step.

options: cache: KV-cache type, u8, u4 or f16. The model is a GGUF file, which it loads itself. Prefix caching is off, so
that each sequence is prefilled.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.engines.protocol import EngineClock, EngineReport, EngineRequest, StepCounter, run

BLOCK = 32  # tokens per block of its KV cache on a CPU
CHUNK = 2048  # max tokens per prefill step


def pipeline(request: EngineRequest) -> genai.ContinuousBatchingPipeline:
    """Load the model with a KV cache for all sequences."""
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = request.batch * (-(-_most(request) // BLOCK) + 1) + 1
    scheduler.max_num_batched_tokens = CHUNK
    scheduler.max_num_seqs = request.batch
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": request.threads,
        "ENABLE_CPU_PINNING": True,
        "KV_CACHE_PRECISION": request.options["cache"],
    }
    return genai.ContinuousBatchingPipeline(request.model, scheduler, "CPU", properties)


def _most(request: EngineRequest) -> int:
    """Return the positions of a sequence: the first one generates during prefill of the last one's prompt."""
    return request.most + StepCounter.extra_tokens(request, CHUNK)


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    clock, made = EngineClock(request), pipeline(request)
    config = genai.GenerationConfig()
    config.max_new_tokens = _most(request) - request.context
    config.ignore_eos = True
    config.do_sample = False
    clock.start()
    handles = [
        made.add_request(index, ov.Tensor(np.array([ids], dtype=np.int64)), config)
        for index, ids in enumerate(request.tokens())
    ]
    counter = StepCounter(clock)
    while not clock.is_done and made.has_non_finished_requests():
        made.step()
        for index, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    counter.add(index, output.generated_ids)
        counter.end_step()
    return counter.report(("openvino-genai", "openvino"))


if __name__ == "__main__":
    run(measure)
