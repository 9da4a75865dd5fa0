"""Placement of models larger than one device: `--device-map` of the command line.

    auto, balanced, sequential    over this process's devices by accelerate: GPUs first, then CPU memory, then disk
    cpu, cuda, cuda:1, ...        all on one device; cuda without a number is the GPU of the local rank
    FILE.json                     {"module": device number, "cpu" or "disk", ...}, as transformers' `device_map`

Several processes on one machine (torchrun) share its GPUs and its free CPU memory evenly.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.files import read_file

BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")
Memory = Mapping[int | str, int]  # bytes by device, as accelerate reports them


def placement(text: str | None) -> dict[str, Any]:
    """Return `from_pretrained` options for the value of `--device-map`; empty for None. Raises FhoptError."""
    if text is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise FhoptError(
            "accelerate is not installed; --device-map requires it. Install it with: pip install 'fhopt[hf]'"
        )
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns about weights that are placed already
    if text.endswith(".json"):
        return {"device_map": _read(Path(text))}
    rank, count = _local()
    if text in BY_ACCELERATE:
        from accelerate.utils import get_max_memory

        return {"device_map": text, "max_memory": share_memory(get_max_memory(), rank, count)}
    return {"device_map": {"": str(_device(text, rank))}}


def share_memory(memory: Memory, rank: int, count: int) -> dict[int | str, int]:
    """Return the memory that process `rank` of `count` on a machine may use. Raises FhoptError for too few GPUs."""
    numbers = sorted(d for d in memory if isinstance(d, int))
    if numbers and len(numbers) < count:
        raise FhoptError(
            f"{count} processes exceed {len(numbers)} GPUs; expected at most one process per GPU. Lower "
            "--nproc-per-node."
        )
    own = numbers[rank * len(numbers) // count : (rank + 1) * len(numbers) // count]
    rest = {device: size // count for device, size in memory.items() if not isinstance(device, int)}
    return {device: memory[device] for device in own} | rest


def _local() -> tuple[int, int]:
    """Return (local rank, local world size)."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device(text: str, rank: int) -> torch.device:
    try:
        device = torch.device(text)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FhoptError(
            f"device {text!r} is unknown ({str(error).splitlines()[0]}); expected {', '.join(BY_ACCELERATE)}, "
            "cpu, cuda, or a JSON file that maps modules to devices."
        ) from error
    return device


def _read(path: Path) -> dict[str, Any]:
    try:
        modules = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise FhoptError(
            f"{path} is not a JSON file ({error}); expected one object that maps modules to devices."
        ) from error
    if not isinstance(modules, dict) or not all(isinstance(v, (int, str)) for v in modules.values()):
        raise FhoptError(f'{path} is not a device map; expected {{"model.layers.0": 0, "lm_head": "cpu", ...}}.')
    return modules
