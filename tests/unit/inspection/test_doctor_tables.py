"""The tables of `fhopt doctor`, at the widths of terminals."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hand_plans import SITE
from rich.console import Console

from fhopt.hardware.devices import find_device
from fhopt.hardware.this_machine import GpuFacts, Machine, findings
from fhopt.inspection.doctor_tables import machine_report, prospects_report
from fhopt.inspection.prospects import Placement, site_prospects
from fhopt.plan.cache_size import CacheLayer

LAYERS = [CacheLayer("layers.0", "sliding", 512, False, 6), CacheLayer("layers.1", numbers=6)]
SITES = [replace(SITE, name=f"layers.{i}.attention") for i in range(2)]
MACHINE = Machine(
    cpu="AMD EPYC 9R14 96-Core Processor", vector_units=("AVX2", "AVX-512 VNNI"), cores=192, threads=1,
    memory_gb=1622.4, free_gb=1500.1, read_gb_s=412.3, kernels="", compiler="",
    compiler_fault="No C++ compiler was found (looked for g++, clang++, c++).",
    gpus=(GpuFacts("NVIDIA H100 80GB HBM3", "sm_90", "h100", 85.0, 84.1, ""),), gpu_fault="",
    versions={"fhopt": "0.1.0", "torch": "2.15.0", "transformers": None}, cache_folder="/home/somebody/.cache/fhopt",
    cache_bytes=12_345_678, cache_fault="",
)  # fmt: skip


def shown(what: object, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(what)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_a_machine_fits_a_terminal_with_every_fix(width: int) -> None:
    text = shown(machine_report(MACHINE, findings(MACHINE)), width)
    assert "none works" in text and "192; 1 thread used" in text and "12.3 MB, writable" in text
    assert "Install g++ (or clang++) with its headers." in text and "pip install 'fhopt[hf]'" in text
    assert "NVIDIA H100 80GB HBM3 (sm_90), 84.1 of 85.0 GB free, with Triton kernels" in text
    assert "transformers None" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_model_on_two_devices_fits_a_terminal(width: int) -> None:
    places = [Placement(replace(find_device("cpu"), name="CPU"), 10**12), Placement(find_device("h100"), 84 * 10**9)]
    made = site_prospects("model", SITES, places, 8_000_000_000, LAYERS, positions=131_072, missed=1)
    text = shown(prospects_report(made), width)
    assert "16.0 GB, 2 bytes each" in text and "2; 1 not rewritten, see fhopt explain" in text
    assert "1 layer: caches only the newest 512 tokens (sliding window)" in text
    assert "context that fits, h100" in text and "pays on CPU" in text
    assert "faster at 32,768 tokens" in text


def test_a_model_that_does_not_fit_says_none() -> None:
    made = site_prospects("model", SITES, [Placement(find_device("cpu"), 1)], 1000, LAYERS)
    assert "none" in shown(prospects_report(made), 80)
