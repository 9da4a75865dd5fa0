"""Timing of single-token attention on a GPU: latents against every dense implementation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu.cases import HeadShape, LatentStorage, RunSizes
from benchmarks.gpu.report import GpuReport, line
from benchmarks.gpu.timing import Call, TimedDevice, rotating
from benchmarks.recording import Row
from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu.tuning import Workload, random_call, tune
from fhopt.ops import attention as ops_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PAGE_TOKENS = 16


def dense_implementations(shape: HeadShape, batch: int, tokens: int, machine: TimedDevice) -> dict[str, Attend]:
    """Return all installed implementations of attention of q [B,H,1,D] to k, v [B,G,T,D] by name; a call may raise."""
    results: dict[str, Attend] = {}
    backends = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
    )  # fmt: skip
    for backend in backends:
        name = f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"
        results[name] = functools.partial(by_sdpa, backend, False)
        if not shape.is_mha:
            results[f"{name}, heads as queries"] = functools.partial(by_sdpa, backend, True)
    results["products and softmax"] = by_products
    compiled = torch.compile(flex_attention, dynamic=False, backend=machine.compiler)
    results["FlexAttention"] = functools.partial(compiled, enable_gqa=not shape.is_mha)
    if importlib.util.find_spec("flash_attn") is not None:
        results["flash-attn"] = by_flash_attn
    if importlib.util.find_spec("flashinfer") is not None:
        results["flashinfer"] = Flashinfer(shape, batch, tokens, machine)
    return results


def by_sdpa(backend: SDPBackend, grouped: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with torch's scaled_dot_product_attention; grouped: query heads of a kv head become its queries."""
    if grouped:
        query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with two matmuls and a softmax, without repeated keys and values."""
    logits = ops_attention.grouped_scores(query * query.shape[-1] ** -0.5, key)
    return ops_attention.grouped_mix(torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype), value)


def by_flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with the package flash-attn, which interprets the random keys and values as [B,T,G,D]."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found, unused-ignore]

    batch, groups, tokens, dim = key.shape
    turned = [x.view(batch, tokens, groups, dim) for x in (key, value)]
    return flash_attn_with_kvcache(query.transpose(1, 2), *turned)


class Flashinfer:
    """The package flashinfer, over pages of PAGE_TOKENS tokens in order; planned at the first call."""

    def __init__(self, shape: HeadShape, batch: int, tokens: int, machine: TimedDevice) -> None:
        self.shape, self.batch, self.tokens, self.machine = shape, batch, tokens, machine
        self.wrapper: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with query [B,H,1,D] to key and value [B,G,T,D]."""
        self.wrapper = self.wrapper or self.plan()
        pools = [x.view(-1, PAGE_TOKENS, self.shape.kv_heads, self.shape.dim) for x in (key, value)]
        return self.wrapper.run(query.squeeze(2), tuple(pools))

    def plan(self) -> Any:
        """Plan calls for this shape, as flashinfer requires."""
        import flashinfer  # type: ignore[import-not-found, unused-ignore]

        count, whole = self.tokens // PAGE_TOKENS, functools.partial(torch.tensor, dtype=torch.int32)
        space = torch.zeros(128 << 20, dtype=torch.uint8, device=self.machine.device)
        shared = self.shape.heads // self.shape.kv_heads
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=shared >= 4)
        begins, pages, last = (
            whole(list(x)).to(self.machine.device)
            for x in (range(0, self.batch * count + 1, count), range(self.batch * count), [PAGE_TOKENS] * self.batch)
        )
        wrapper.plan(
            begins, pages, last, self.shape.heads, self.shape.kv_heads, self.shape.dim, PAGE_TOKENS,
            q_data_type=self.machine.dtype, kv_data_type=self.machine.dtype,
        )  # fmt: skip
        return wrapper


def measure_attention(
    machine: TimedDevice, report: GpuReport, shape: HeadShape, batch: int, tokens: int, copy: float
) -> None:
    """Measure all implementations of one case."""
    case = report.case(shape.name, batch, tokens)
    dense = dense_times(machine, report, case, shape, batch, tokens)
    best = min(dense.values(), default=None)
    size = batch * tokens * shape.dense_bytes(machine.dtype)
    rows = [row for name, ms in dense.items() for row in figures(case, name, ms, size, copy)]
    for latent in shape.latents:
        name, size = shape.label(latent, machine.dtype), batch * tokens * shape.latent_bytes(latent, machine.dtype)
        try:
            ms = latent_ms(machine, shape, latent, batch, tokens)
        except (MemoryError, torch.OutOfMemoryError) as error:
            report.leave_out(case, name, error)
            continue
        rows += figures(case, name, ms, size, copy, best)
    report.add(rows)
    click.echo(line(case, rows), err=True)


def figures(case: str, impl: str, ms: float, size: int, copy: float, best: float | None = None) -> list[Row]:
    """Return rows: milliseconds, for a latent with the fastest dense implementation as baseline; GB/s versus a copy."""
    ratio = None if best is None else best / ms
    speed = size / ms / 1e6
    return [
        Row(case, impl, "time_ms", ms, "ms", baseline=best, ratio=ratio),
        Row(case, impl, "gb_s", speed, "GB/s", baseline=copy, ratio=speed / copy),
    ]


def dense_times(
    machine: TimedDevice, report: GpuReport, case: str, shape: HeadShape, batch: int, tokens: int
) -> dict[str, float]:
    """Measure milliseconds of every dense implementation that runs."""
    query = torch.randn(batch, shape.heads, 1, shape.dim, dtype=machine.dtype, device=machine.device)

    def make() -> list[Tensor]:
        size = batch, shape.kv_heads, tokens, shape.dim
        return [torch.randn(size, dtype=machine.dtype, device=machine.device) for _ in range(2)]

    size = batch * tokens * shape.dense_bytes(machine.dtype)
    try:
        pairs, turns = rotating(machine, size, make)
    except (MemoryError, torch.OutOfMemoryError) as error:
        report.leave_out(case, "dense ways", error)
        return {}
    results = {}
    for name, attend in dense_implementations(shape, batch, tokens, machine).items():
        try:
            with torch.no_grad():
                results[name] = machine.clock([functools.partial(attend, query, *pair) for pair in pairs], turns)
        except Exception as error:  # an implementation that lacks this shape, device or size may raise anything
            report.leave_out(case, name, error)
    torch._dynamo.reset()
    return results


def latent_ms(machine: TimedDevice, shape: HeadShape, latent: LatentStorage, batch: int, tokens: int) -> float:
    """Measure milliseconds of the generated kernel in its own configuration."""
    spec = shape.spec(latent, machine.dtype)
    kernel, workload = build_triton(spec), Workload(batch, shape.heads, latent.heads, latent.heads, 1, tokens)

    def make() -> Call:
        arguments, options = random_call(spec, workload, machine.device)
        return functools.partial(kernel, *arguments, **options)

    return machine.clock(*rotating(machine, batch * tokens * shape.latent_bytes(latent, machine.dtype), make))


def tune_kernels(machine: TimedDevice, sizes: RunSizes) -> None:
    """Time the configurations of every measured kernel; the results are stored in the file cache."""
    batch, tokens = sizes.tuned
    for shape in sizes.shapes:
        for latent in shape.latents:
            spec = shape.spec(latent, machine.dtype)
            workload = Workload(batch, shape.heads, latent.heads, latent.heads, 1, tokens)
            tuned = tune(spec, workload, device=machine.device, device_name=machine.name, timer=machine.tuner)
            click.echo(f"{machine.mark}{shape.name}, {spec.name}: {tuned.best}, of {len(tuned.times_ms)}", err=True)
