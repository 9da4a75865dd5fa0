"""The engine configurations that compare.py measures: program, environment and model format of each.

Each engine runs as its documentation says is fastest: flash attention if it has a switch for it, weights packed for the
CPU, its own batching, its own KV-cache types. A new release or option is one line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "fhopt"


@dataclass(frozen=True)
class EngineConfig:
    """One engine with its benchmark options.

    name: in results; its first word is the engine. runner: of runners/run_<runner>.py. environment, form: names of
    environments.py. plan: of fhopt. is_compiled: its first process in a new cache folder is slower, and is reported
    separately. is_default: measured if --engine names nothing. shares_cache: its compiled code serves every context.
    """

    name: str
    runner: str
    environment: str
    form: str
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""
    is_compiled: bool = False
    is_default: bool = True
    shares_cache: bool = False

    @property
    def slug(self) -> str:
        """Return the name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    @property
    def is_ours(self) -> bool:
        """Return whether this is fhopt."""
        return self.runner == OURS

    @property
    def has_small_weights(self) -> bool:
        """Return whether its weights are quantized."""
        return self.form in ("q4_0.gguf", "onnx-int4") or "weights" in self.options


FROZEN = {"pattern_matcher": False, "freezing": True}  # inductor options, the fastest for decode steps on a CPU
CHUNK = 512  # tokens per call of eager attention: its logits are [B, H, S, T]


def _transformers() -> list[EngineConfig]:
    """Return the configurations of transformers, including torchao's weights."""

    def made(name: str, environment: str = "fhopt", **options: Any) -> EngineConfig:
        is_compiled, is_default = "compiled" in options, options.pop("is_default", True)
        return EngineConfig(name, "transformers", environment, "folder", options, "", is_compiled, is_default)

    return [
        made("transformers sdpa"),
        made("transformers eager", attention="eager", chunk=CHUNK),
        made("transformers compiled, sdpa", compiled={}),
        made("transformers compiled, eager", attention="eager", chunk=CHUNK, compiled=FROZEN, is_default=False),
        made("transformers sdpa, float32", dtype="float32", is_default=False),
        made("torchao int8 weights, sdpa", "torchao", weights="int8"),
        made("torchao int4 weights, sdpa", "torchao", weights="int4", is_default=False),
    ]


CACHES = ("f16", "q8_0", "q4_0")
WEIGHTS = ("f16", "q4_0")


def _llama(engine: str, runner: str, environment: str, rare: Sequence[tuple[str, str]]) -> list[EngineConfig]:
    """Return F16 and Q4_0 weights, each with three KV-cache types. rare: measured only with --engine."""
    return [
        EngineConfig(
            f"{engine} {w.upper()}, K/V {kv}", runner, environment, f"{w}.gguf", {"cache": kv}, "", False, is_default
        )
        for w in WEIGHTS
        for kv in CACHES
        for is_default in ((w, kv) not in rare,)
    ]


def _others() -> list[EngineConfig]:
    made = [
        EngineConfig(
            f"OpenVINO {w.upper()}, K/V {kv}", "openvino", "openvino", f"{w}.gguf", {"cache": kv}, "", False,
            (w, kv) in (("f16", "u8"), ("f16", "u4"), ("q4_0", "u8")),
        )
        for w in WEIGHTS
        for kv in ("f16", "u8", "u4")
    ]  # fmt: skip
    for kind in ("int4", "fp32"):
        made.append(EngineConfig(f"ONNX-Runtime {kind}", "onnxruntime", "onnxruntime-genai", f"onnx-{kind}"))
    made.append(EngineConfig("vLLM bfloat16", "vllm", "vllm", "folder", {}, "", True, True, True))
    return [*made, EngineConfig("vLLM bfloat16, eager", "vllm", "vllm", "folder", {"eager": True}, "", False, False)]


def _fhopt() -> list[EngineConfig]:
    """Return fhopt: `apply` and `generate()`, also on a GGUF file whose weights stay in blocks, and compiled steps."""
    made = [EngineConfig(f"fhopt {plan}", OURS, "fhopt", "folder", {}, plan) for plan in ("exact", "4x", "8x")]
    made.append(EngineConfig("fhopt 4x, Q4_0", OURS, "fhopt", "q4_0.gguf", {}, "4x"))
    made.append(EngineConfig("fhopt exact, compiled", OURS, "fhopt", "folder", {"compiled": True}, "", True))
    for plan, is_default in (("4x", True), ("8x", False)):
        made.append(
            EngineConfig(f"fhopt {plan}, compiled", OURS, "fhopt", "folder", {"compiled": True}, plan, True, is_default)
        )
    return made


ENGINE_CONFIGS = (
    *_transformers(),
    *_llama("llama.cpp", "llama_cpp", "llama.cpp", ()),
    *_llama("ik_llama", "ik_llama", "ik-llama", (("f16", "q4_0"), ("q4_0", "f16"), ("q4_0", "q4_0"))),
    *_llama("ik_llama-native", "ik_llama", "ik-llama-native", [(w, kv) for w in WEIGHTS for kv in CACHES]),
    *_others(),
    *_fhopt(),
)
SMALL_WEIGHTS = frozenset(engine.name for engine in ENGINE_CONFIGS if engine.has_small_weights)
QUICK = ("transformers sdpa", "llama.cpp F16, K/V f16", "fhopt 4x")


def chosen(names: Sequence[str], is_quick: bool = False) -> list[EngineConfig]:
    """Return the engines whose names begin with one of `names`; without any, the default ones, or those of a quick run.

    A full name selects only that engine. Raises ValueError for a name that no engine begins with.
    """
    if not names:
        return [engine for engine in ENGINE_CONFIGS if (engine.name in QUICK if is_quick else engine.is_default)]
    for name in names:
        if not any(engine.name.lower().startswith(name.lower()) for engine in ENGINE_CONFIGS):
            engines = dict.fromkeys(engine.name.split()[0] for engine in ENGINE_CONFIGS)
            raise ValueError(
                f"no engine is called {name!r}; expected the start of a name, such as {', '.join(engines)}."
            )
    return [engine for engine in ENGINE_CONFIGS if any(_is_meant(engine.name.lower(), name.lower()) for name in names)]


def _is_meant(engine: str, name: str) -> bool:
    return engine == name or (engine.startswith(name) and all(other.name.lower() != name for other in ENGINE_CONFIGS))
