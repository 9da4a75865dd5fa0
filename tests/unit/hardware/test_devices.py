"""Devices and their rates."""

from __future__ import annotations

import pytest

from fhopt.errors import FhoptError
from fhopt.hardware import devices
from fhopt.hardware.devices import DEVICES, find_device, layout_time


def test_a_shared_latent_head_suits_a_gpu_and_separate_heads_a_cpu() -> None:
    """32 query heads, 32,768 tokens in bfloat16: one head of width 256, half the bytes of 8 heads of width 64."""
    times = {n: [layout_time(DEVICES[n], 32, *shape, 32768) for shape in ((1, 256, 256, 512), (8, 64, 64, 128))]
             for n in ("h100", "cpu")}  # fmt: skip
    assert times["h100"][0] < times["h100"][1]
    assert times["cpu"][0] > times["cpu"][1]
    measured = (6.1e-3, 3.0e-3)  # 8-bit codes, one thread of a Zen 4 with AVX-512 VNNI
    assert all(m / 1.3 < t < 1.3 * m for t, m in zip(times["cpu"], measured, strict=True))


def test_threads_add_up_until_the_memory_channels_are_full() -> None:
    eight, many = find_device("cpu:8"), find_device("cpu:64")
    assert eight.bandwidth_gb_s == 200 and eight.matrix_tflops == pytest.approx(8 * 0.235)
    assert many.bandwidth_gb_s == devices.SOCKET_GB_S


@pytest.mark.parametrize("name", ["h900", "h100:2", "cpu:0", "cpu:many", ""])
def test_an_unknown_device_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(
        FhoptError, match=r"is unknown; expected one of h100, h200, .*, cpu, cpu-avx2, cpu:THREADS, or here"
    ):
        find_device(name)
