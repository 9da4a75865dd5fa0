"""Clocks of benchmarks/gpu/suite.py: CUDA graphs on a GPU, the host clock in a dry run."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import click
import torch

T = TypeVar("T")
Call = Callable[[], object]
COLD = 4  # total size of rotating buffers, relative to the L2 cache
LONG = 2 << 30  # min bytes loaded by a graph, so that its launch time is negligible
REPLAYS, WARM = 20, 3
SHARE = 0.85  # of the free memory
NEEDS = "bench-gpu needs a GPU that torch can use (torch.cuda.is_available() is False); --dry runs without one."


@dataclass(frozen=True)
class TimedDevice:
    """Device and clock of a run: everything that --dry changes except the sizes.

    dtype: of models. cold, long: total bytes of rotating buffers, and bytes loaded by a measurement. free: available
    bytes of memory. clock: milliseconds per call, given calls and the number of passes over them. wait: until the
    device is done. tuner: clock of `tune`, None for its own. compiler: of dense attention. mark: prefix of each case.
    """

    name: str
    device: str
    dtype: torch.dtype
    cold: int
    long: int
    free: Callable[[], int]
    clock: Callable[[Sequence[Call], int], float]
    wait: Call
    tuner: Callable[[Call], float] | None
    compiler: str
    mark: str = ""


def this_gpu() -> TimedDevice:
    """Return the GPU of this machine. Without one: print a line, and exit with status 2."""
    if not torch.cuda.is_available():
        click.echo(NEEDS, err=True)
        sys.exit(2)
    cold = COLD * torch.cuda.get_device_properties(0).L2_cache_size
    wait, name = torch.cuda.synchronize, torch.cuda.get_device_name()
    return TimedDevice(name, "cuda", torch.bfloat16, cold, LONG, gpu_free, graph_ms, wait, None, "inductor")


def dry_machine() -> TimedDevice:
    """Return a CPU that reports so little memory that some cases are skipped."""
    free, cold = 450_000, 2_000
    return TimedDevice(
        "dry", "cpu", torch.float32, cold, 2 * cold, lambda: free, host_ms, lambda: None,
        lambda call: host_ms([call], 1), "eager", "dry, ",
    )  # fmt: skip


def gpu_free() -> int:
    """Return the bytes of the GPU's memory that are free."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def graph_ms(calls: Sequence[Call], turns: int) -> float:
    """Return milliseconds per call: a CUDA graph contains all, `turns` times; the median over replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles and plans, which cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * turns:
            call()
    times = []
    for _ in range(WARM + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM:]) / (turns * len(calls))


def host_ms(calls: Sequence[Call], turns: int) -> float:
    """Return milliseconds per call by the host clock, the median over all calls of all passes."""
    times = []
    for call in [*calls] * turns:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def copy_gb_s(machine: TimedDevice) -> float:
    """Measure the GB/s at which a copy loads and stores."""
    size = min(int(SHARE * machine.free()) // 4, max(machine.cold, machine.long // 2))
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / machine.clock([functools.partial(target.copy_, source)], 1) / 1e6


def rotating(machine: TimedDevice, size: int, make: Callable[[], T]) -> tuple[list[T], int]:
    """Create buffers of `size` bytes that together exceed the cache; return them and the number of passes to time.

    Raises MemoryError, with a message, if they do not fit.
    """
    count = max(1, math.ceil(machine.cold / size))
    needed, free = count * size, machine.free()
    if needed > SHARE * free:
        raise MemoryError(f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    return [make() for _ in range(count)], math.ceil(machine.long / needed)
