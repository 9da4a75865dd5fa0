"""Kernel specifications for GPUs, which this machine need not have."""

from __future__ import annotations

from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.resources import Resources

SMALL = Resources(num_warps=4, registers=64, shared=8192, tensor_cores={"mma.sync": 8}, loop_instructions=100)
H100 = GPUS["h100"]
