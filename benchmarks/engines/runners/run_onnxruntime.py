"""Runner of ONNX Runtime GenAI: its generator on the CPU, one call per token of all sequences.

The model is a folder that its own builder wrote (environments.py), with 32-bit or 4-bit weights.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as og

from benchmarks.engines.protocol import EngineClock, EngineReport, EngineRequest, run


def load(request: EngineRequest) -> og.Model:
    """Load the model with a number of threads."""
    config = og.Config(request.model)
    options = {"intra_op_num_threads": request.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    clock, model = EngineClock(request), load(request)
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=request.batch, max_length=request.most, min_length=request.most)
    params.set_search_options(do_sample=False, past_present_share_buffer=True)
    generator = og.Generator(model, params)
    clock.start()
    generator.append_tokens(np.array(request.tokens(), dtype=np.int32))
    tokens = []
    for _ in range(request.steps):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        clock.step()
    return clock.report(("onnxruntime-genai", "onnxruntime"), tokens)


if __name__ == "__main__":
    run(measure)
