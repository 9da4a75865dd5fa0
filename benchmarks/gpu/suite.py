"""Checks of kernels and decode steps on a GPU, followed by benchmarks.

    python -m benchmarks.gpu.suite          benchmarks/results/gpu.json, gpu.png, gpu.md
    python -m benchmarks.gpu.suite --check  only the first part
    python -m benchmarks.gpu.suite --tune   first time the configurations of each kernel and store the fastest
    python -m benchmarks.gpu.suite --quick  few cases (also QUICK=1), to gpu-quick.*
    python -m benchmarks.gpu.suite --dry    the same code on a CPU in tiny sizes, under Triton's interpreter: no results

1. Every generated kernel is compared with a reference in float64 (attention), or byte for byte (encode, pack, unpack).
   The first wrong one ends the run.
2. Single-token attention: latents against every installed dense implementation. Calls are captured in a CUDA graph and
   rotate over buffers that together are COLD times the L2 cache; a result is the median over replays. Bytes are those
   of the keys and values, or of the quantized values and scales; a copy is measured in the same run. The baseline of a
   case is its fastest dense implementation.
3. Whole decode steps of models with the shapes of Llama-2-7B and Llama-3.1-8B, random weights and random tokens in the
   KV caches: transformers with a StaticCache against a LatentCache of the same number of tokens, both with CUDA graphs.
   If not all layers fit into memory with the full-precision cache, two smaller numbers of layers are measured and the
   time is extrapolated, step(L) = step(n) + (L - n) (step(n) - step(m)) / (n - m); such a result is called
   step_ms_scaled.

--dry differs in device, clock and sizes, and compiles dense implementations only with Dynamo. It shows that this file
runs. Its output is marked, and stored only with --out.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D head size, J latent heads, R latent width, L layers.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and "--dry" in sys.argv and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton's interpreter mode and the visible GPUs are fixed when the modules below are imported.
    _environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _environment)

import tempfile
from pathlib import Path

import click
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from benchmarks import recording
from benchmarks.cpu.decode import grouped_attention
from benchmarks.gpu.attention import measure_attention, tune_kernels
from benchmarks.gpu.cases import QUICK, TINY_SIZES, RunSizes
from benchmarks.gpu.checks import check
from benchmarks.gpu.decode_steps import measure_steps
from benchmarks.gpu.report import GpuReport, draw, markdown, summary
from benchmarks.gpu.timing import TimedDevice, copy_gb_s, dry_machine, this_gpu
from benchmarks.recording import Row, is_quick, record


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few cases; also QUICK=1.")
@click.option("--check", "only_check", is_flag=True, help="Check the kernels, measure nothing.")
@click.option("--tune", "tunes", is_flag=True, help="Time each kernel's configurations first; the fastest is kept.")
@click.option("--dry", is_flag=True, help="On a CPU, in tiny sizes, under Triton's interpreter. No figure counts.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; with --dry, none unless given.")
def main(quick: bool, only_check: bool, tunes: bool, dry: bool, out: Path | None) -> None:
    """Check the generated kernels on a GPU, then benchmark them."""
    machine = dry_machine() if dry else this_gpu()
    quick = quick or is_quick()
    sizes = TINY_SIZES if dry else QUICK if quick else RunSizes()
    if tunes:
        tune_kernels(machine, sizes)
    click.echo(f"{machine.mark}checked: {check(machine, sizes)} calls are right", err=True)
    if only_check:
        return
    report = GpuReport("gpu-dry" if dry else "gpu-quick" if quick else "gpu", machine.mark)
    with tempfile.TemporaryDirectory() as folder:
        recording.RESULTS = out or (Path(folder) if dry else recording.RESULTS)
        measure(machine, sizes, report)


def measure(machine: TimedDevice, sizes: RunSizes, report: GpuReport) -> None:
    """Measure everything, and write the files of the report."""
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code object of one class
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    copy = copy_gb_s(machine)
    report.add([Row(f"{machine.mark}copy", "torch", "gb_s", copy, "GB/s")])
    for shape in sizes.shapes:
        for batch in sizes.batches:
            for tokens in sizes.tokens:
                measure_attention(machine, report, shape, batch, tokens, copy)
    for network in sizes.networks:
        for batch in network.batches:
            for tokens in sizes.step_tokens:
                measure_steps(machine, report, network, batch, tokens)
    (recording.RESULTS / f"{report.file}.md").write_text(markdown(report, machine, copy), encoding="utf-8")
    record(report.file, report.rows, draw, summary(report))


if __name__ == "__main__":
    main()
