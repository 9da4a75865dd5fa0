"""Launch configurations of kernels: candidates, defaults, and the file cache of tuned ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fhopt.codegen.gpu import attention
from fhopt.codegen.gpu.gpus import gpu_named
from fhopt.codegen.gpu.prefill import padded
from fhopt.codegen.gpu.resources import triton_version
from fhopt.codegen.gpu.row_layout import fields, pieces
from fhopt.errors import FhoptError
from fhopt.files import appearing, read_file
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cache_folder, make_private

LARGEST_STATE = 12288  # max query and output elements in the registers of two warps
FULL_STATE = 10240  # above this, registers fit only a tile of 16 tokens in addition
TILE_ROWS = 128  # rows of a program of `chunk_kernel`, if there are as many
WITHIN_ROWS = 64  # max rows of a kv head for one program of `chunk_kernel`, which then rebuilds keys and values itself
LONGEST = 128  # max tokens of a tile
SCATTERED = 32  # the same if each token has its own address


@dataclass(frozen=True)
class Config:
    """Tiling and scheduling of a launch; the text of a kernel does not depend on it.

    block_t: tokens per loop iteration. block_m: query rows of a program, padded.
    """

    block_t: int
    block_m: int
    num_warps: int
    num_stages: int


def candidate_configs(spec: KernelSpec, rows: int) -> tuple[Config, ...]:
    """Return configurations worth trying for `rows` = S * H/J query rows of a latent head, defaults first."""
    tried = [default_config(spec, rows), default_config(spec, rows, "hip")]
    sizes = dict.fromkeys(config.block_m for config in tried)
    shapes = ((16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))  # block_t, num_warps
    tried += [Config(t, m, warps, stages) for m in sizes for t, warps in shapes for stages in (3, 2, 4)]
    return tuple(dict.fromkeys(tried))


def default_config(spec: KernelSpec, rows: int, backend: str = "cuda") -> Config:
    """Choose the configuration of a decode step if none has been tuned; backend "cuda" or "hip" (AMD).

    Found by compiling for sm_80, sm_90 and gfx942: the fewest instructions per quantized value among those without
    spills. Values that live in registers throughout, queries and outputs, determine how many rows and tokens fit. Two
    warps duplicate less work than four. Beyond 32 rows the cost per row is constant.
    """
    if spec.dtype == "float32" and backend == "cuda":  # does not use the tensor core
        return Config(16, 8, 2, 2)
    least, columns = 8 if backend == "cuda" else 16, _columns(spec)  # rows of the tensor core's smallest matmul
    m = min(32, max(least, 1 << (rows - 1).bit_length()))
    while m > least and columns * m > LARGEST_STATE:
        m //= 2
    if backend == "hip":
        return Config(32, m, 4, 2)
    if not (spec.key_tiers and spec.value_tiers):
        return Config(32, m, 4, 3)
    state = _columns(spec, widened=2) * m
    return Config(64 if 3 * state <= LARGEST_STATE else 32 if state < FULL_STATE else 16, m, 2, 3)


def scattered_config(config: Config) -> Config:
    """Reduce the tile size of a configuration for rows in arbitrary blocks, each with its address in registers."""
    return dataclasses.replace(config, block_t=min(SCATTERED, config.block_t))


def prefill_config(
    spec: KernelSpec, rows: int, key_size: int, value_size: int, rebuilds: bool = False, arch: int = 90
) -> Config:
    """Choose the configuration of `chunk_kernel` for M = `rows`; arch as in gpus.py.

    Found by compiling for sm_80, sm_89 and sm_90, with masks and without: nothing spills, and shared memory is the
    smallest GPU's. rebuilds: keys and values are reconstructed within the kernel.
    """
    if spec.dtype == "float32":  # does not use the tensor core
        return Config(16, 16, 4, 1)
    m, size = max(16, 1 << (rows - 1).bit_length()), max(padded(key_size), padded(value_size))
    if rebuilds:
        return Config(32, min(WITHIN_ROWS, m), 8, 2)
    if size > 128:
        return Config(32, min(64, m), 8, 2)
    return Config(64 if arch >= 90 else 32, min(TILE_ROWS, m), 8 if m >= TILE_ROWS else 4, 2)


def rebuild_config(operands: int) -> Config:
    """Choose the configuration of `rebuild_kernel` for a decoder of K `operands`; wide ones issue all loads first."""
    return Config(64, 1, 4, 1) if operands <= 128 else Config(32, 1, 8, 1)


def _columns(spec: KernelSpec, widened: int = 1) -> int:
    """Return the query and output elements that a program stores per row, including padding.

    Those of values loaded byte by byte count `widened` times: registers hold the bytes as words.
    """
    sides = pieces(spec.key_tiers, spec.key_width), pieces(spec.value_tiers, spec.value_width)
    return sum(
        piece.size * len(fields(piece, spec.dtype)) * (widened if piece.is_coded and piece.word == 8 else 1)
        for side in sides
        for piece in side
    )


def tuned_config(spec: KernelSpec, rows: int, device_name: str) -> Config | None:
    """Return the tuned configuration of a device (torch's name), else the one `tune_kernel` chose, else None."""
    gpu = gpu_named(device_name)
    tuned = read_config("tuned", spec, rows, device_name)
    return tuned if tuned or gpu is None else read_config("chosen", spec, rows, gpu.name)


def write_config(
    kind: str, spec: KernelSpec, rows: int, device_name: str, best: Config, times: Mapping[Config, float]
) -> None:
    """Save a configuration and the times of the others. Raises FhoptError if it cannot be written."""
    path = config_path(kind, spec, rows, device_name)
    timed = [{"config": dataclasses.asdict(c), "ms": ms} for c, ms in times.items()]
    text = json.dumps({"device": device_name, "best": dataclasses.asdict(best), "times": timed}, indent=1)
    try:
        make_private(path.parent)
        with appearing(path) as target:
            target.write_text(text)
    except OSError as error:
        raise FhoptError(
            f"the kernel configuration cannot be saved: {error.strerror} ({path}). Set FHOPT_CACHE_DIR to a "
            "writable folder."
        ) from error


def read_config(kind: str, spec: KernelSpec, rows: int, device_name: str) -> Config | None:
    """Load a saved configuration; None without one, or if its file is damaged."""
    try:
        return Config(**json.loads(read_file(config_path(kind, spec, rows, device_name)))["best"])
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        FhoptError,
    ):
        return None  # no file, no home folder, or damaged


def config_path(kind: str, spec: KernelSpec, rows: int, device_name: str) -> Path:
    """Return the file of a configuration, by kernel text, device, Triton version and M up to a power of two."""
    parts = (attention.render_triton(spec), device_name, triton_version())
    known = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}-{spec.name}-m{1 << (rows - 1).bit_length()}-{known}.json"
