"""Runner of ik_llama.cpp through its C interface: the library in the package ik-llama-cpp-python.

options: cache: KV-cache type, f16, q8_0 or q4_0. Flash attention is on, and weights are repacked for the CPU at loading
(`-rtr`), as its documentation advises. The loop is llama.cpp's (run_llama_cpp.py).
"""

from __future__ import annotations

from typing import Any

from ik_llama_cpp import _ctypes_api as library

from benchmarks.engines.protocol import EngineReport, EngineRequest, run, versions
from benchmarks.engines.runners.run_llama_cpp import check, context_of, generate


def context(request: EngineRequest) -> tuple[Any, int]:
    """Return a context for all sequences, and the size of the vocabulary."""
    library.llama_backend_init()
    model_params = library.llama_model_default_params()
    model_params.repack_tensors = True
    model = library.llama_model_load_from_file(request.model.encode(), model_params)
    params = library.llama_context_default_params()
    check(params)
    params.n_ctx = -(-request.batch * request.most // 256) * 256
    params.flash_attn = True
    return context_of(library, model, params, request, "ik_llama")


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    report = generate(library, *context(request), request)
    report.versions = versions(("ik-llama-cpp-python",))
    return report


if __name__ == "__main__":
    run(measure)
