"""Argument types, constants and alignment of kernels, to compile them without a launch."""

from __future__ import annotations

from math import gcd

from fhopt.codegen.gpu.attention import MERGED, sides_of
from fhopt.codegen.gpu.configs import Config, rebuild_config
from fhopt.codegen.gpu.prefill import operand_table, padded
from fhopt.codegen.gpu.row_layout import row_size
from fhopt.codegen.tiers import is_scaled
from fhopt.plan.kernel_spec import KernelSpec

Example = tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_OPTIONAL = ("lengths", "table", "pages")
STRIDES = tuple(
    f"{name}_{axis}"
    for name, axes in (
        ("query", "bhs"), ("key", "bht"), ("key_scale", "bht"), ("value", "bht"), ("value_scale", "bht"),
        ("mask", "bhst"), ("lengths", "b"), ("table", "b"), ("pages", "bh"),
    )
    for axis in axes
)  # fmt: skip
SIZES = (
    "heads", "units", "queries", "tokens", "slots", "splits", "key_group", "value_group", "kept_first", "kept_last",
    "leaving",
)  # fmt: skip
PREFILL_STRIDES = tuple(
    f"{name}_{axis}"
    for name, axes in (
        ("query", "bhs"), ("key", "bht"), ("key_scale", "bht"), ("value", "bht"), ("value_scale", "bht"),
        ("mask", "bhs"), ("lengths", "b"),
    )
    for axis in axes
)  # fmt: skip
PREFILL_SIZES = ("heads", "groups", "queries", "tokens", "splits", "key_group", "value_group")


def attention_example(spec: KernelSpec, config: Config, **features: object) -> dict[str, Example]:
    """Describe the kernels of a decode step, by name, for `triton.compile(ASTSource(...))`.

    Types, constants and alignment are those of the launcher's calls for contiguous tensors. Features by name: mask
    ("bool" or a dtype), lengths, table, pages (True), whole (bool), page, span (int), packed (False for AMD).
    """
    types: dict[str, str] = {"query": POINTERS[spec.dtype]}
    for side, tiers in sides_of(spec):
        types[side] = "*u8" if tiers else POINTERS[spec.dtype]
        types[f"{side}_scale"] = "*fp16" if is_scaled(tiers) else "constexpr"
    mask = features.get("mask")
    types["mask"] = "constexpr" if not mask else "*u8" if mask == "bool" else POINTERS[str(mask)]
    types |= {name: "*i32" if features.get(name) else "constexpr" for name in _OPTIONAL}
    whole = bool(features.get("whole"))
    types |= {"output": POINTERS[spec.dtype] if whole else "*fp32", "lse": "*fp32"}
    types["total"] = "constexpr" if whole else "*fp32"
    types |= dict.fromkeys((*STRIDES, *SIZES), "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants: dict[str, object] = {name: None for name, kind in types.items() if kind == "constexpr"}
    ones = ("key_scale_t", "value_scale_t", "mask_t")
    types |= dict.fromkeys(ones, "constexpr")
    constants |= dict.fromkeys(ones, 1) | {
        "SPAN": features.get("span", 0), "PAGE": features.get("page", 0),
        "WHOLE": whole, "PACKED": bool(features.get("packed", True)),
        "KEY_ALIGN": gcd(16, row_size(spec.key_tiers, spec.key_width)),
        "VALUE_ALIGN": gcd(16, row_size(spec.value_tiers, spec.value_width)),
        "BLOCK_T": config.block_t, "BLOCK_M": config.block_m,
    }  # fmt: skip
    merging = dict.fromkeys(("partial", "tops", "totals"), "*fp32") | {"output": POINTERS[spec.dtype], "lse": "*fp32"}
    merging["splits"] = "i32"
    return {
        "attention_kernel": example_of(types, constants),
        "merge_kernel": example_of(merging, {"BLOCK_S": 32, "BLOCK_R": MERGED}),
    }


def prefill_example(
    spec: KernelSpec, config: Config, key_size: int, value_size: int, rebuilds: bool = True, **features: object
) -> dict[str, Example]:
    """Describe the prefill kernels, by name, for `triton.compile(ASTSource(...))`.

    Types, constants and alignment are those of the launcher's calls for contiguous tensors; `rebuild_kernel` is that of
    the keys. rebuilds: keys and values are reconstructed within `chunk_kernel`. Features by name: mask ("bool" or a
    dtype), lengths (True), exact (float32 out), packed (False for AMD).
    """
    number, packed = POINTERS[spec.dtype], bool(features.get("packed", True))
    sides = (("key", spec.key_tiers, spec.key_width), ("value", spec.value_tiers, spec.value_width))
    types = {"query": number}
    for side, tiers, _ in sides:
        types[side] = "*u8" if tiers else number
        types[f"{side}_scale"] = "*fp16" if is_scaled(tiers) else "constexpr"
        types |= {f"{side}_table": number, f"{side}_bias": "*fp32"} if rebuilds else {}
        types |= {} if rebuilds else dict.fromkeys((f"{side}_table", f"{side}_bias"), "constexpr")
    mask = features.get("mask")
    types["mask"] = "constexpr" if not mask else "*u8" if mask == "bool" else POINTERS[str(mask)]
    types["lengths"] = "*i32" if features.get("lengths") else "constexpr"
    types |= {"output": "*fp32" if features.get("exact") else number, "lse": "*fp32"}
    types |= dict.fromkeys((*PREFILL_STRIDES, *PREFILL_SIZES), "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants: dict[str, object] = {name: None for name, kind in types.items() if kind == "constexpr"}
    aligned = [gcd(16, row_size(tiers, width)) for _, tiers, width in sides]
    constants |= dict.fromkeys(("key_scale_t", "value_scale_t"), 1) | {
        "D": key_size, "E": value_size, "BLOCK_D": padded(key_size), "BLOCK_E": padded(value_size),
        "KEY_ALIGN": aligned[0], "VALUE_ALIGN": aligned[1], "PACKED": packed,
        "BLOCK_T": config.block_t, "BLOCK_M": config.block_m,
    }  # fmt: skip
    kernels = {"chunk_kernel": example_of(types, constants)}
    if rebuilds:
        rows = {"rows": types["key"], "scale": types["key_scale"], "table": number, "bias": "*fp32", "output": number}
        rows |= dict.fromkeys(("rows_b", "rows_h", "rows_t", "scale_b", "scale_h", "scale_t", "tokens", "group"), "i32")
        tile = rebuild_config(len(operand_table(spec.key_tiers, spec.key_width, spec.dtype).channels)).block_t
        known: dict[str, object] = {"scale": None} if rows["scale"] == "constexpr" else {}
        known |= {"scale_t": 1, "VALUES": False, "D": key_size, "BLOCK_D": padded(key_size), "ALIGN": aligned[0]}
        kernels["rebuild_kernel"] = example_of(rows, known | {"PACKED": packed, "BLOCK_T": tile})
    return kernels


def example_of(types: dict[str, str], constants: dict[str, object]) -> Example:
    """Describe one kernel by the types of all non-constant arguments; addresses are aligned."""
    types = types | dict.fromkeys(constants, "constexpr")
    aligned: dict[tuple[int, ...], list[list[object]]] = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")
    }
    return types, constants, aligned
