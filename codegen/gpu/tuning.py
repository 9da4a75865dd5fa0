"""Tuning of launch configurations: by a kernel's resources, or by timing on a GPU.

    choose         compile the candidates, drop those that do not fit, rank the others       needs no GPU
    tune           time the candidates that fit                                              needs one
    tuned_config   (configs.py) the result of either, from the file cache; a tuned one first

Without a GPU there are no timings. Decoding is memory-bound, and bytes in flight keep a memory busy (Little's law):
configurations are ranked by the bytes of rows in flight per multiprocessor, up to ENOUGH_BYTES; then by the fewest loop
instructions per token; then by the most warps to hide them.

    bytes in flight = resident blocks * tokens of a tile * tiles in flight * bytes of a row

Tiles in flight: one for data loaded at its use, and one less than the stages for data copied asynchronously.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, M rows (S queries of the heads that share a latent
head).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu import attention
from fhopt.codegen.gpu.configs import Config, candidate_configs, default_config, write_config
from fhopt.codegen.gpu.gpus import Gpu, gpu_named
from fhopt.codegen.gpu.resources import CompileRequest, Occupancy, Resources, compile_kernels, objection, occupancy
from fhopt.codegen.gpu.signatures import attention_example
from fhopt.codegen.tiers import Tiers, is_scaled
from fhopt.errors import FhoptError
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SCALE_BYTES

ENOUGH_BYTES = 32 * 1024  # in flight per multiprocessor; a heuristic, overruled by `tune`
KERNEL = "attention_kernel"


# --------------------------------------------------------------------------------------------------- without a GPU


@dataclass(frozen=True)
class ConfigAssessment:
    """Assessment of one configuration. reason: why it is rejected; "" if it is not.

    bytes_ahead: of rows, in flight per multiprocessor. token_instructions: of warps, in the loops, per token and latent
    head.
    """

    config: Config
    resources: Resources
    occupancy: Occupancy | None = None  # None if rejected
    bytes_ahead: int = 0
    token_instructions: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class TunedConfigs:
    """Configurations of a kernel on a GPU; `best` is None if all are rejected."""

    best: ConfigAssessment | None
    verdicts: tuple[ConfigAssessment, ...]  # of all tried ones, the default first


def tune_kernel(spec: KernelSpec, rows: int, gpu: Gpu, most: int = 0) -> TunedConfigs:
    """Choose the best configuration for `rows` = M on `gpu` by compiling, and save it for `tuned_config`.

    most: max candidates to compile, the default and evenly spaced others; 0: all. Raises FhoptError without Triton.
    """
    return choose_each([(spec, rows)], gpu, most)[0]


def choose_each(
    kernels: Sequence[tuple[KernelSpec, int]], gpu: Gpu, most: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[TunedConfigs]:  # fmt: skip
    """Choose a configuration for each kernel (spec, M), compiled in one process. progress: as in `compile_kernels`."""
    tried = []
    for spec, rows in kernels:
        first = default_config(spec, rows, gpu.backend)
        tried.append(_some(tuple(dict.fromkeys((first, *candidate_configs(spec, rows)))), most))
    requests = [
        request(attention.render_triton(spec), spec, config, gpu)
        for (spec, _), configs in zip(kernels, tried, strict=True)
        for config in configs
    ]
    resources = iter(compile_kernels(requests, gpu, progress))
    return [
        _best(spec, rows, gpu, tuple(_judge(spec, rows, config, next(resources), gpu) for config in configs))
        for (spec, rows), configs in zip(kernels, tried, strict=True)
    ]


def _best(spec: KernelSpec, rows: int, gpu: Gpu, verdicts: tuple[ConfigAssessment, ...]) -> TunedConfigs:
    left = [v for v in verdicts if not v.reason]
    if not left:
        return TunedConfigs(None, verdicts)
    best = max(left, key=_rank)  # the first of equals
    with contextlib.suppress(FhoptError):  # `compile_kernels` has already reported an unwritable cache
        write_config("chosen", spec, rows, gpu.name, best.config, {})
    return TunedConfigs(best, verdicts)


def request(text: str, spec: KernelSpec, config: Config, gpu: Gpu) -> CompileRequest:
    """Request the attention kernel of a rendered file, with the launcher's arguments for one query."""
    types, constants, attrs = attention_example(spec, config, packed=gpu.backend == "cuda")[KERNEL]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return CompileRequest(text, KERNEL, types, constants, attrs, options)


def token_bytes(spec: KernelSpec) -> int:
    """Return the bytes of one token in one latent head: packed latents and scales, or floats, of keys and values."""
    itemsize = getattr(torch, spec.dtype).itemsize

    def side(tiers: Tiers, width: int) -> int:
        codes = sum(bits * w for bits, w, _ in tiers) // 8 if tiers else width * itemsize
        return int(codes + (SCALE_BYTES if is_scaled(tiers) else 0))

    return side(spec.key_tiers, spec.key_width) + side(spec.value_tiers, spec.value_width)


def _some(configs: tuple[Config, ...], most: int) -> tuple[Config, ...]:
    """Select `most` of the candidates: the first and evenly spaced others."""
    if not most or most >= len(configs):
        return configs
    return tuple(configs[i * len(configs) // most] for i in range(most))


def _judge(spec: KernelSpec, rows: int, config: Config, resources: Resources, gpu: Gpu) -> ConfigAssessment:
    reason = objection(resources, gpu)
    if not reason and not resources.tensor_cores and spec.dtype != "float32":
        reason = "uses no tensor core"
    if reason:
        return ConfigAssessment(config, resources, reason=reason)
    held = occupancy(resources, gpu)
    tiles = 1 + resources.copied_share * max(0, config.num_stages - 2)
    ahead = round(held.blocks * config.block_t * tiles * token_bytes(spec))
    passes = -(-rows // config.block_m)  # over the tokens
    return ConfigAssessment(
        config, resources, held, ahead, passes * resources.loop_instructions * resources.num_warps / config.block_t
    )


def _rank(verdict: ConfigAssessment) -> tuple[float, ...]:
    assert verdict.occupancy is not None
    return min(verdict.bytes_ahead, ENOUGH_BYTES), -verdict.token_instructions, verdict.occupancy.warps


# --------------------------------------------------------------------------------------------------- on a GPU


@dataclass(frozen=True)
class Workload:
    """Sizes of the call to time."""

    batch: int = 8
    heads: int = 32
    key_heads: int = 8  # J of keys
    value_heads: int = 8
    queries: int = 1
    tokens: int = 32_768

    @property
    def rows(self) -> int:
        """Rows M of the kernel."""
        return gcd(self.heads // self.key_heads, self.heads // self.value_heads) * self.queries


@dataclass(frozen=True)
class Tuning:
    """The fastest configuration, milliseconds of each that ran, and why others did not."""

    best: Config
    times_ms: Mapping[Config, float]
    rejected: Mapping[Config, str]


Timer = Callable[[Callable[[], object]], float]


def tune(
    spec: KernelSpec, workload: Workload, *, device: torch.device | str = "cuda", device_name: str = "",
    kernel: Callable[..., object] | None = None, timer: Timer | None = None,
) -> Tuning:  # fmt: skip
    """Time the candidates for `spec` on random rows of `workload`, and save the fastest for `tuned_config`.

    kernel: the timed kernel, called like `TritonKernel`, the default. timer: milliseconds of a call, by default the
    median of CUDA events with an empty L2 cache. Raises FhoptError without a GPU, or if nothing runs.
    """
    if timer is None or not device_name:
        if not torch.cuda.is_available():
            raise FhoptError("there is no GPU to tune on. Tune on a machine with a GPU, or use the filter's choice.")
        device_name = device_name or torch.cuda.get_device_name(device)
        timer = timer or _by_events
    kernel = kernel or build_triton(spec)
    tried, rejected = candidate_configs(spec, workload.rows), dict[Config, str]()
    gpu = gpu_named(device_name)
    if gpu is not None:
        rejected = {v.config: v.reason for v in tune_kernel(spec, workload.rows, gpu).verdicts if v.reason}
    arguments, options = random_call(spec, workload, device)
    times: dict[Config, float] = {}
    for config in tried:
        if config in rejected:
            continue
        try:
            times[config] = timer(lambda config=config: kernel(*arguments, **options, config=config))  # type: ignore[misc]
        except Exception as error:  # Triton's and torch's errors have no common base class
            rejected[config] = f"does not run: {' '.join(str(error).split()) or type(error).__name__}"
    if not times:
        raise FhoptError(
            f"no configuration of {spec.name} runs on {device_name} ({next(iter(rejected.values()))}). Fit with fewer "
            "or narrower tiers for this device."
        )
    best = min(times, key=lambda config: times[config])
    write_config("tuned", spec, workload.rows, device_name, best, times)
    return Tuning(best, times, rejected)


def random_call(
    spec: KernelSpec, workload: Workload, device: torch.device | str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw tensors (query, key, key_scale, value, value_scale, no mask) and options for the kernel of `spec`."""
    dtype = getattr(torch, spec.dtype)
    shape = workload.batch, workload.heads, workload.queries, spec.key_width
    arguments: list[Tensor | None] = [torch.randn(shape, dtype=dtype, device=device)]
    for tiers, width, heads in (
        (spec.key_tiers, spec.key_width, workload.key_heads),
        (spec.value_tiers, spec.value_width, workload.value_heads),
    ):
        rows = workload.batch, heads, workload.tokens
        if tiers:
            size = sum(bits * w for bits, w, _ in tiers) // 8
            arguments.append(torch.randint(0, 256, (*rows, size), dtype=torch.uint8, device=device))
            arguments.append(torch.rand(rows, device=device).to(torch.float16))
        else:
            arguments += [torch.randn((*rows, width), dtype=dtype, device=device), None]
    options = {"scale": spec.key_width**-0.5, "softcap": 30.0 if spec.softcap else 0.0}
    return (*arguments, None), options


def _by_events(call: Callable[[], object]) -> float:
    """Measure the median milliseconds of a call."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))
