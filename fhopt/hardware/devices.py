"""Devices of the cost model: bandwidth, arithmetic throughput, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fhopt.errors import FhoptError
from fhopt.system import cores


@dataclass(frozen=True)
class Device:
    """Peak rates of one device, dense (without sparsity). kind: "gpu" or "cpu"."""

    name: str
    kind: str
    bandwidth_gb_s: float
    matrix_tflops: float  # 16-bit multiply-adds, two operations each
    vector_tflops: float  # float32 multiply-adds, two operations each; also the rate of converting quantized values
    memory_gb: float

    def roofline(self, size: Any, operations: Any, conversions: Any, itemsize: int) -> tuple[Any, Any]:
        """Compute the seconds for `size` bytes and for the arithmetic; arguments are numbers or expressions."""
        throughput = self.matrix_tflops if itemsize == 2 else self.vector_tflops
        arithmetic = operations / round(1e12 * throughput) + conversions / round(1e12 * self.vector_tflops)
        return size / round(1e9 * self.bandwidth_gb_s), arithmetic


DEVICES = {
    device.name: device
    for device in (
        Device("h100", "gpu", 3350, 989.4, 66.9, 80),  # NVIDIA H100 SXM5 data sheet
        Device("h200", "gpu", 4800, 989.4, 66.9, 141),  # NVIDIA H200 SXM data sheet
        Device("a100-80", "gpu", 2039, 312, 19.5, 80),  # NVIDIA A100 80GB SXM data sheet
        Device("a10", "gpu", 600, 125, 31.2, 24),  # NVIDIA A10 data sheet
        Device("l4", "gpu", 300, 121, 30.3, 24),  # NVIDIA L4 data sheet, half of its rates with sparsity
        Device("4090", "gpu", 1008, 165.2, 82.6, 24),  # NVIDIA Ada architecture white paper, float32 accumulation
        Device("b200", "gpu", 8000, 2250, 75, 180),  # NVIDIA HGX B200 data sheet, an eighth of the board
        Device("mi300x", "gpu", 5300, 1307.4, 163.4, 192),  # AMD Instinct MI300X data sheet
        Device("edge", "gpu", 204.8, 42.5, 5.3, 64),  # NVIDIA Jetson AGX Orin 64GB technical brief; half of dense int8
        Device("cpu", "cpu", 25, 0.235, 0.118, 384),  # one thread, measured: AMD Zen 4 with AVX-512 and bf16
        Device("cpu-avx2", "cpu", 17.7, 0.088, 0.088, 128),  # one thread, measured: AMD Zen 3, which has only AVX2
    )
}
HERE = "here"  # this machine's CPU, measured by fhopt/hardware/this_cpu.py
SHOWN = ("h100", HERE)  # default devices
SOCKET_GB_S = 460.8  # twelve channels of DDR5-4800: the limit for many threads


def find_device(name: str) -> Device:
    """Return the device called `name`. Raises FhoptError that lists the names.

    "cpu:16" is the table's CPU with 16 threads. "here" and "here:16" are this machine's CPU, measured on first use.
    """
    base, _, threads = name.partition(":")
    return _this_cpu(threads) if base == HERE else _known_device(name, base, threads)


def _this_cpu(threads: str) -> Device:
    name = HERE
    if threads and not (threads.isdecimal() and 1 <= int(threads) <= cores()):
        raise FhoptError(f"device '{name}:{threads}' is unknown; expected {name}:THREADS with 1 to {cores()} threads.")
    import torch  # late: device names are checked before torch is imported

    from fhopt.hardware import this_cpu

    rates = this_cpu.measured(int(threads) if threads else torch.get_num_threads())
    matrix = max(rates.bfloat16_tflops, rates.float32_tflops)
    if "AMX BF16" in this_cpu.vector_units():  # torch uses it for matmuls, but decode steps are GEMV
        matrix = min(matrix, 2 * rates.float32_tflops)
    return Device(f"{name}:{rates.threads}", "cpu", rates.read_gb_s, matrix, rates.float32_tflops, rates.memory_gb)


def _known_device(name: str, base: str, threads: str) -> Device:
    device = DEVICES.get(base)
    if device is None or (threads and (device.kind != "cpu" or not threads.isdecimal() or int(threads) < 1)):
        raise FhoptError(
            f"device {name!r} is unknown; expected one of {', '.join(DEVICES)}, cpu:THREADS, or "
            "here (this machine's CPU, measured; here:THREADS)."
        )
    if not threads:
        return device
    count = int(threads)
    return replace(
        device,
        name=name,
        bandwidth_gb_s=min(count * device.bandwidth_gb_s, SOCKET_GB_S),
        matrix_tflops=count * device.matrix_tflops,
        vector_tflops=count * device.vector_tflops,
    )


# Operations in which a CPU unpacks one quantized value to a byte or a word. Fitted to nine shapes of heads (9/3x64 to
# 32/8x128) on one thread with AVX-512 VNNI, bfloat16 queries, layouts `head` and `band` at 4x, whose times differ by
# 1.3 to 4.1 times. The model predicts 0.82 to 1.10 of that ratio, and with AVX2 0.74 to 0.94.
UNPACKING = 8


def layout_time(
    device: Device, heads: int, latent_heads: int, key_width: int, value_width: int, row_bytes: float, tokens: int,
    *, itemsize: int = 2, shared: bool = False,
) -> float:  # fmt: skip
    """Estimate the seconds for `heads` query heads to attend to `tokens` latents of one sequence, to compare layouts.

    key_width and value_width (R_K, R_V) and row_bytes (packed latents and scales of both) are per token and latent
    head. Queries and unquantized latents have `itemsize` bytes per element; smaller rows are unpacked first. `shared`
    rows serve as keys and values, R_K = R_V: row_bytes counts them once, and they are unpacked once.
    """
    row = key_width if shared else key_width + value_width
    conversions = latent_heads * row if row_bytes < itemsize * row else 0
    conversions *= UNPACKING if device.kind == "cpu" else 1
    size, operations = latent_heads * row_bytes, 2 * heads * (key_width + value_width)
    return max(device.roofline(tokens * size, tokens * operations, tokens * conversions, itemsize))


def channel_seconds(device: Device, heads: int, latent_heads: int, *, shared: bool = False) -> float:
    """Estimate the seconds of arithmetic for `heads` query heads to use one channel of a token's latents on a CPU.

    The channel is quantized, in each latent head, of keys or of values; a channel of `shared` rows serves both.
    """
    _, arithmetic = device.roofline(0, 2 * heads * (1 + shared), latent_heads * UNPACKING, 2)
    return float(arithmetic)
