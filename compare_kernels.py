"""Hashes of generated kernels, to hold two checkouts against each other: are they byte for byte the same?

    python compare_kernels.py > old.txt                in a checkout of 1f3e2d3, with PYTHONPATH=.
    python compare_kernels.py > new.txt; diff old.txt new.txt        in another
    python compare_kernels.py PLAN > plan.txt          the kernels of a plan's sites alone

Bit groups of every number of bits, alone and mixed, in all dtypes, with and without a softcap, for C++, Triton (decode
and prefill) and torch; and the files that depend on no plan.
"""

import hashlib
import importlib
import sys


def module(*names):
    for name in names:
        try:
            return importlib.import_module(f"fhopt.{name}")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("fhopt"):
                raise
    raise SystemExit(f"none of {names} is there")


KernelSpec = module("plan.kernel_spec", "spec").KernelSpec
render = module("codegen.build").render
prefill = module("codegen.gpu.prefill", "codegen.triton_chunk")
FIXED = {
    "head": module("codegen.cpu.lm_head", "codegen.cpp_head"),
    "packing": module("codegen.cpu.packing", "codegen.pack"),
    "pages": module("codegen.cpu.pages", "codegen.cpp_pages"),
    "graph kernels": module("codegen.cpu.graph_kernels", "codegen.native"),
    "skinny": module("codegen.cpu.skinny_linear", "codegen.skinny"),
}
MIXED = (
    ((8, 16, 0.01), (4, 32, 0.1), (2, 16, 0.4)),
    ((3, 8, 0.6), (16, 72, 0.0), (5, 24, 0.15), (8, 16, 0.02)),
    ((4, 32, 0.2), (3, 24, 0.3), (1, 8, 1.0)),
    ((8, 8, 0.1), (6, 40, 0.2), (5, 16, 0.3), (4, 56, 0.4), (3, 8, 0.5), (2, 120, 0.6), (1, 16, 0.7), (16, 8, 1.0)),
    ((16, 16, 1.0), (8, 32, 0.05)),
    ((4, 128, 0.1), (2, 128, 0.3)),
)


def specs():
    sides = [((), width) for width in (7, 24, 32, 128, 200)]
    sides += [(((b, w, 0.37 / b),), w) for b in (1, 2, 3, 4, 5, 6, 8, 16) for w in (8, 16, 24, 64, 136)]
    sides += [(groups, sum(width for _, width, _ in groups)) for groups in MIXED]
    for i, (key, key_width) in enumerate(sides):
        for j in sorted({i, (7 * i + 3) % len(sides)}):
            value, value_width = sides[j]
            for dtype in ("float32", "bfloat16", "float16"):
                for softcap in (False, True):
                    yield KernelSpec(key, value, key_width, value_width, dtype, softcap)


def of_plan(folder):
    plan = module("plan", "spec").LatentPlan.load(folder)
    for site in plan.sites:
        sides = [tuple((t.bits, t.width, t.step) for t in side.tiers) for side in (site.key, site.value)]
        for dtype in ("float32", "bfloat16"):
            yield KernelSpec(*sides, site.key.width, site.value.width, dtype, bool(site.site.softcap))


def show(name, text):
    print(hashlib.sha256(text.encode()).hexdigest(), name)


for spec in of_plan(sys.argv[1]) if len(sys.argv) > 1 else specs():
    for target in ("cpp", "triton", "torch"):
        try:
            show(f"{target} {spec}", render(spec, target))
        except Exception as error:
            print("refused", target, spec, type(error).__name__)
    try:
        show(f"prefill {spec}", prefill.render(spec))
    except Exception as error:
        print("refused prefill", spec, type(error).__name__)
for name, fixed in FIXED.items():
    if len(sys.argv) == 1:
        show(name, fixed.render() if hasattr(fixed, "render") else fixed.TEXT)
