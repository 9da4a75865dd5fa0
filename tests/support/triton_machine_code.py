"""Native code of the Triton latent-attention kernel for GPUs that this machine need not have."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu.configs import default_config
from fhopt.codegen.gpu.row_layout import Piece
from fhopt.codegen.gpu.signatures import attention_example
from fhopt.codegen.tiers import Tiers
from fhopt.plan.kernel_spec import KernelSpec

INT4 = KernelSpec(((4, 128, 0.3),), ((4, 128, 0.3),), 128, 128, "bfloat16", False)
WIDE: Tiers = ((8, 32, 0.02), (4, 64, 0.3), (2, 32, 0.9))
MIXED = KernelSpec(WIDE, WIDE, 128, 128, "bfloat16", False)
PLANED = KernelSpec(((6, 64, 0.08), (3, 64, 0.5)), ((5, 64, 0.15), (16, 64, 0.0)), 128, 128, "float16", True)


def compile_for(targets: list[tuple[str, int | str, int]], specs: list[KernelSpec], rows: int) -> None:
    """Compile the default configuration and print the results, one entry per target, spec and kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fhopt.codegen.build import load_module

    found = []
    for spec in specs:
        module = load_module(spec.name, render_kernel(spec, "triton"))
        for target in targets:
            config = default_config(spec, rows, target[0])
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            for name, (types, constants, aligned) in attention_example(
                spec, config, packed=target[0] == "cuda"
            ).items():
                source = ASTSource(getattr(module, name), types, constants, aligned)
                made = triton.compile(source, target=GPUTarget(*target), options=options)
                text = made.asm["ptx" if target[0] == "cuda" else "amdgcn"]
                spills = spilled(made.asm["cubin"]) if target[0] == "cuda" else amd_spills(text)
                kinds = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
                found.append(
                    {
                        "arch": target[1], "kernel": name, "spills": spills, "shared": made.metadata.shared,
                        "products": sum(text.count(kind) for kind in kinds), "packed": packed(text),
                        "loaded": loaded(made.asm["ttir"]), "block_t": config.block_t,
                    }
                )  # fmt: skip
    print(json.dumps(found))


def spilled(cubin: bytes) -> int:
    """Bytes of stack in NVIDIA native code, which uses the stack only for spills."""
    import triton

    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])  # type: ignore[index]


def amd_spills(text: str) -> int:
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))


def packed(ptx: str) -> list[tuple[str, int, int, int]]:
    """Operands of the inline PTX: direction and size of the shift, mask, ones."""
    pattern = r"\.reg \.b32 t; (sh[lr])\.b32 t, %r\d+, (\d+); lop3\.b32 %r\d+, t, (\d+), (\d+), 0xEA;"
    return [(way, int(n), int(mask), int(ones)) for way, n, mask, ones in re.findall(pattern, ptx)]


def loaded(ttir: str) -> list[tuple[int, int]]:
    """(count, bytes each) of the loads in a kernel's loop: tensors of `tt.load` in `scf.for`."""
    loop = ttir.partition("scf.for")[2]
    sizes = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4}
    shapes = re.findall(r"tt\.load .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)>>", loop.partition("scf.yield")[0])
    return [(math.prod(map(int, shape.split("x")[:-1])), sizes[kind]) for shape, kind in shapes]


def compile_features() -> None:
    """Compile with every feature of a call, in the combinations that change the code most."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fhopt.codegen.build import load_module

    every: list[dict[str, Any]] = [
        {"mask": "bool", "lengths": True, "whole": True},
        {"mask": "float32", "pages": True, "page": 64, "lengths": True},
        {"pages": True, "page": 32, "lengths": True},
        {"pages": True, "page": 8, "lengths": True, "mask": "bool"},
    ]
    spec = replace(INT4, softcap=True)
    module = load_module(spec.name, render_kernel(spec, "triton"))
    for features in every:
        for block_m in (8, 32):
            config = replace(default_config(spec, 8), block_m=block_m)
            page = features.get("page", 64)
            config = replace(config, block_t=math.gcd(config.block_t, page) if page % 16 == 0 else config.block_t)
            source = ASTSource(
                module.attention_kernel, *attention_example(spec, config, **features)["attention_kernel"]
            )
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps})
    print(json.dumps(len(every)))


NVIDIA = [("cuda", 80, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32)]
AMD = [("hip", "gfx942", 64)]


def bytes_of(piece: Piece) -> range:
    begin = piece.start * piece.word // 8
    return range(begin, begin + piece.used * (2 if piece.bits == 16 else piece.word // 8))


class StubModule(ModuleType):
    """A module whose kernels are never launched."""

    attention_kernel = merge_kernel = None
