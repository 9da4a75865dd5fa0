"""Launch configurations of kernels: candidates, defaults, and those that are kept in the file cache."""

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

LARGEST_STATE = 12288  # numbers of queries and outputs that the registers of two warps hold
FULL_STATE = 10240  # from which they hold no more than a tile of 16 tokens beside it
TILE_ROWS = 128  # rows of a program of `chunk_kernel`, where there are as many
WITHIN_ROWS = 64  # rows up to which a program of `chunk_kernel` has all of a kv head, and rebuilds as it goes
LONGEST = 128  # tokens of a tile at most
SCATTERED = 32  # the same where each has an address of its own


@dataclass(frozen=True)
class Config:
    """How a launch is cut and scheduled; the text of a kernel does not depend on it.

    block_t: tokens a step of the loop. block_m: query rows of a program, padded.
    """

    block_t: int
    block_m: int
    num_warps: int
    num_stages: int


def candidates(spec: KernelSpec, rows: int) -> tuple[Config, ...]:
    """List configurations worth trying for `rows` = S * H/J query rows of a latent head, first the defaults."""
    tried = [default_config(spec, rows), default_config(spec, rows, "hip")]
    sizes = dict.fromkeys(config.block_m for config in tried)
    shapes = ((16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))  # block_t, num_warps
    tried += [Config(t, m, warps, stages) for m in sizes for t, warps in shapes for stages in (3, 2, 4)]
    return tuple(dict.fromkeys(tried))


def default_config(spec: KernelSpec, rows: int, backend: str = "cuda") -> Config:
    """Choose the configuration of a decode step where none has been tuned; backend "cuda" or "hip" (AMD).

    Found by compiling for sm_80, sm_90 and gfx942: of those that spill nothing, the fewest instructions a quantized
    value. What lives in registers throughout, queries and outputs, decides how many rows and tokens fit. Two warps
    repeat less than four. More than 32 rows cost as much a row as 32.
    """
    if spec.dtype == "float32" and backend == "cuda":  # not for the tensor core
        return Config(16, 8, 2, 2)
    least, columns = 8 if backend == "cuda" else 16, _columns(spec)  # rows of the smallest product of the tensor core
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
    """Cut the tiles of a configuration for rows that lie in any block: registers hold the address of each."""
    return dataclasses.replace(config, block_t=min(SCATTERED, config.block_t))


def prefill_config(
    spec: KernelSpec, rows: int, key_size: int, value_size: int, rebuilds: bool = False, arch: int = 90
) -> Config:
    """Choose the configuration of `chunk_kernel` for M = `rows`; arch as in gpus.py.

    Found by compiling for sm_80, sm_89 and sm_90, with masks and without: nothing spills, and shared memory is that of
    the smallest. rebuilds: keys and values are reconstructed within.
    """
    if spec.dtype == "float32":  # not for the tensor core
        return Config(16, 16, 4, 1)
    m, size = max(16, 1 << (rows - 1).bit_length()), max(padded(key_size), padded(value_size))
    if rebuilds:
        return Config(32, min(WITHIN_ROWS, m), 8, 2)
    if size > 128:
        return Config(32, min(64, m), 8, 2)
    return Config(64 if arch >= 90 else 32, min(TILE_ROWS, m), 8 if m >= TILE_ROWS else 4, 2)


def rebuild_config(operands: int) -> Config:
    """Choose the configuration of `rebuild_kernel` for a decoder of K `operands`: of wide ones all loads come first."""
    return Config(64, 1, 4, 1) if operands <= 128 else Config(32, 1, 8, 1)


def _columns(spec: KernelSpec, widened: int = 1) -> int:
    """Count the numbers of queries and outputs that a program keeps for one row, padding among them.

    Those of values that are read byte by byte count `widened` times: the bytes are made words in registers.
    """
    sides = pieces(spec.key_tiers, spec.key_width), pieces(spec.value_tiers, spec.value_width)
    return sum(
        piece.size * len(fields(piece, spec.dtype)) * (widened if piece.is_coded and piece.word == 8 else 1)
        for side in sides
        for piece in side
    )


def tuned_config(spec: KernelSpec, rows: int, device_name: str) -> Config | None:
    """Look up what was tuned for a device, else what `choose` chose, else None; by name as torch tells it."""
    gpu = gpu_named(device_name)
    tuned = read_config("tuned", spec, rows, device_name)
    return tuned if tuned or gpu is None else read_config("chosen", spec, rows, gpu.name)


def write_config(
    kind: str, spec: KernelSpec, rows: int, device_name: str, best: Config, times: Mapping[Config, float]
) -> None:
    """Keep a configuration and what was measured of others. Raises FhoptError where it cannot be written."""
    path = config_path(kind, spec, rows, device_name)
    timed = [{"config": dataclasses.asdict(c), "ms": ms} for c, ms in times.items()]
    text = json.dumps({"device": device_name, "best": dataclasses.asdict(best), "times": timed}, indent=1)
    try:
        make_private(path.parent)
        with appearing(path) as target:
            target.write_text(text)
    except OSError as error:
        raise FhoptError(
            f"the configuration cannot be kept: {error.strerror} ({path}). Set FHOPT_CACHE_DIR to a folder that you "
            "may write to."
        ) from error


def read_config(kind: str, spec: KernelSpec, rows: int, device_name: str) -> Config | None:
    """Read a kept configuration; None where there is none or its file is damaged."""
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
        return None  # there is none, no home folder, or it is damaged


def config_path(kind: str, spec: KernelSpec, rows: int, device_name: str) -> Path:
    """Return the file of a configuration, by text of the kernel, device, Triton and M up to a power of two."""
    parts = (attention.render(spec), device_name, triton_version())
    known = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}-{spec.name}-m{1 << (rows - 1).bit_length()}-{known}.json"
