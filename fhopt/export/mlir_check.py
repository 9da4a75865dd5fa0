"""`fhopt verify`: proof, from the code of an exported decode step, that attention runs on latents, and at what cost.

The functions are analyzed in linalg, where every operation states its loops and every tensor its sizes. The only
dynamic size is T, the number of quantized tokens. Requirements:

    no contraction yields more than H x S elements per token    the only dot products with a token are scores;
                                                                D_K z or D_V z would be a key or a value
    no float tensor has more elements per token than scores,    nothing of the size of keys or values is ever written
    or than one bit group of one side has
    bytes that a token adds to the arguments                    = those of the plan
    multiplications that grow with T                            = H (R_K + R_V) S over all sites, nothing else

Counts are polynomials in T (sympy). Nothing is executed, and no part of fhopt is used except the plan.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch

from fhopt.errors import FhoptError
from fhopt.files import read_file
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan

PROGRAM_BYTES = 1 << 30  # max size of a step
T = sympy.Symbol("T", positive=True, integer=True)
_BITS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_NAMED = {  # (loops of both sides, of the left, summed, of the right) as positions in the operands' shapes
    "linalg.matmul": ((), (0,), (1,), (1,)),
    "linalg.batch_matmul": ((0,), (1,), (2,), (2,)),
    "linalg.batch_matvec": ((0,), (1,), (2,), ()),
    "linalg.batch_vecmat": ((0,), (), (1,), (2,)),
    "linalg.matvec": ((), (0,), (1,), ()),
    "linalg.vecmat": ((), (), (0,), (1,)),
    "linalg.dot": ((), (), (0,), ()),
}


@dataclass(frozen=True)
class CountedOperation:
    """An operation: its name, the Python source line that it comes from, and a count (of elements or MACs)."""

    operation: str
    source: str
    count: Any  # a polynomial in T

    def __str__(self) -> str:
        return f"{self.operation} ({self.source}): {self.count}"


@dataclass
class OperationCounts:
    """Operation counts of a function, polynomials in T.

    macs: multiply-adds of contractions. results: results of contractions that grow with T. tensors: float results of
    any operation that grow with T. argument_bytes: of all arguments.
    """

    macs: Any = 0
    results: list[CountedOperation] = field(default_factory=list)
    tensors: list[CountedOperation] = field(default_factory=list)
    argument_bytes: Any = 0


@dataclass(frozen=True)
class MlirCheck:
    """Result of a check: `faults` is empty if all requirements hold. Counts per quantized token; macs as text."""

    macs: str
    macs_per_token: int
    bytes_per_token: int
    largest_per_token: int  # elements of the largest float tensor
    scores_per_token: int  # H x S of the site with most heads
    exact_bytes_per_token: int
    faults: tuple[str, ...]


def verify_folder(folder: Path) -> MlirCheck:
    """Check an export of `fhopt export`, or a rewritten folder, whose step is lowered first. Raises FhoptError."""
    from fhopt.export import mlir
    from fhopt.export.pt2_step import read_step_description
    from fhopt.models import rewritten_folder
    from fhopt.models.rewritten_model import load_exact

    if rewritten_folder.is_rewritten(folder):
        rewritten = rewritten_folder.read_folder(folder)
        model = load_exact(rewritten).eval()
        step = mlir.lower_step(model, rewritten.plan).step
        text = step.operation.get_asm(enable_debug_info=True)
        return verify_text(text, rewritten.plan, next(model.parameters()).element_size())
    about = read_step_description(folder)
    files = [folder / name for name in ("step.mlir", "step.mlirbc") if (folder / name).is_file()]
    if not files:
        raise FhoptError(
            f"{folder} has no MLIR; expected an exported folder. Write one with: fhopt export FOLDER --target mlir."
        )
    plan = LatentPlan.load(folder / rewritten_folder.PLAN)
    window_dtypes = [t["dtype"] for t in about["state"] if None not in t["shape"]]
    return verify_text(read_file(files[0], PROGRAM_BYTES), plan, getattr(torch, window_dtypes[0]).itemsize)


def verify_text(text: str | bytes, plan: LatentPlan, itemsize: int = 4) -> MlirCheck:
    """Check a step in linalg (text or bytecode as MLIR prints it) against a plan.

    itemsize: bytes per element of unquantized latents. Raises FhoptError for anything but linalg.
    """
    return compare_counts(walk(text), plan, itemsize)


def walk(text: str | bytes) -> OperationCounts:
    """Count the operations of a module's functions. Raises FhoptError if it cannot be parsed or counted."""
    ir = _bindings()
    context = ir.Context()
    importlib.import_module("torch_mlir.dialects.torch").register_dialect(context)
    try:
        module = ir.Module.parse(text, context)
    except Exception as error:  # the parser's own type is not public
        raise FhoptError(
            f"the file is not valid MLIR ({str(error).splitlines()[0][:200]}). Export it again."
        ) from error
    counts = OperationCounts()
    for function in module.body.operations:
        if function.operation.name == "func.func":
            for argument in function.regions[0].blocks[0].arguments:
                counts.argument_bytes += _numbers(argument.type) * _bytes(argument.type)
            _check_dialects(function.operation)
            for operation in _operations(function.operation):
                _count(ir, operation, counts)
    if not counts.macs:
        raise FhoptError(
            "the program has no contraction; expected a decode step in linalg. Export with --dialect linalg."
        )
    return counts


def _bindings() -> Any:
    try:
        return importlib.import_module("torch_mlir.ir")
    except ImportError as error:
        raise FhoptError(
            "torch-mlir is not installed; `fhopt verify` requires the extra mlir. Install it with: pip "
            "install 'fhopt[mlir]'"
        ) from error


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _check_dialects(function: Any) -> None:
    """Raise FhoptError for operations of dialects that do not state their loops."""
    seen = {operation.name.partition(".")[0] for operation in _operations(function)}
    if unknown := seen - {"linalg", "tensor", "arith", "math", "func", "cf", "affine", "scf", "tm_tensor"}:
        raise FhoptError(
            f"the program has {min(unknown)} operations; expected linalg on tensors. Export with --dialect linalg."
        )


# --------------------------------------------------------------------------------------------------- counting


def _count(ir: Any, operation: Any, counts: OperationCounts) -> None:
    """Add an operation to the counts."""
    is_contraction = operation.name in _NAMED or (operation.name == "linalg.generic" and _multiplies(operation))
    if is_contraction:
        counts.macs += _named_loops(operation) if operation.name in _NAMED else _generic_loops(ir, operation)
    for result in operation.results:
        if not str(result.type).startswith("tensor<"):
            continue
        numbers = _numbers(result.type)
        if sympy.degree(numbers, T) > 1:
            raise FhoptError(
                f"{operation.name} ({_source(operation)}) produces {numbers} elements; expected a size that "
                "contains T at most once."
            )
        if not numbers.has(T):
            continue
        here = CountedOperation(operation.name, _source(operation), numbers)
        if is_contraction:
            counts.results.append(here)
        if _is_float(result.type):
            counts.tensors.append(here)


def _multiplies(operation: Any) -> bool:
    """Return whether a generic operation sums products."""
    inside = {inner.name for inner in _operations(operation)}
    reduces = "reduction" in str(operation.attributes["iterator_types"])
    return reduces and "arith.mulf" in inside and "arith.addf" in inside


def _named_loops(operation: Any) -> Any:
    left, right = (_shape(operation.operands[i].type) for i in (0, 1))
    batch, rows, summed, columns = _NAMED[operation.name]
    return math.prod([*(left[i] for i in (*batch, *rows, *summed)), *(right[i] for i in columns)])


def _generic_loops(ir: Any, operation: Any) -> Any:
    """Multiply the sizes of all loops, which follow from the shapes of the operands."""
    sizes: dict[int, Any] = {}
    maps = [ir.AffineMapAttr(m) for m in operation.attributes["indexing_maps"]]
    for operand, attribute in zip(operation.operands, maps, strict=True):
        affine = ir.AffineMap(attribute) if not hasattr(attribute, "value") else attribute.value
        for size, expression in zip(_shape(operand.type), affine.results, strict=True):
            text = str(expression)
            if text.startswith("d") and text[1:].isdigit():
                sizes[int(text[1:])] = size
    return math.prod(sizes.values(), start=sympy.Integer(1))


def _shape(kind: Any) -> list[Any]:
    """Return the sizes of a tensor type, T for a dynamic one."""
    text = str(kind).partition("tensor<")[2].partition(">")[0].partition(",")[0]
    return [T if part == "?" else sympy.Integer(int(part)) for part in text.split("x")[:-1]]


def _numbers(kind: Any) -> Any:
    return math.prod(_shape(kind), start=sympy.Integer(1)) if str(kind).startswith("tensor<") else sympy.Integer(0)


def _element(kind: Any) -> str:
    return str(kind).partition("tensor<")[2].partition(">")[0].partition(",")[0].split("x")[-1]


def _is_float(kind: Any) -> bool:
    return _element(kind) in ("f16", "bf16", "f32", "f64")


def _bytes(kind: Any) -> int:
    return _BITS.get(_element(kind), 0) // 8


def _source(operation: Any) -> str:
    """Return file:line of the innermost Python code that an operation comes from."""
    text = str(operation.location)
    path, _, rest = text.partition('"')[2].partition('"')
    line = rest.lstrip(":").partition(":")[0]
    return f"{path.rpartition('/')[2]}:{line}" if path and line.isdigit() else "unknown line"


# --------------------------------------------------------------------------------------------------- verdict


def compare_counts(counts: OperationCounts, plan: LatentPlan, itemsize: int = 4) -> MlirCheck:
    """Compare the counts of a step with those of a plan."""
    scores = max(site.site.heads for site in plan.sites)
    most = max(scores, *(_widest_group(site) for site in plan.sites))
    expected_bytes = sum(site.token_bytes(itemsize) for site in plan.sites)
    expected_macs = sum(site.site.heads * (site.key.width + site.value.width) for site in plan.sites)
    macs, bytes_ = (int(sympy.Poly(p, T).coeff_monomial(T)) for p in (counts.macs, counts.argument_bytes))
    largest = max((int(f.count.coeff(T, 1)) for f in counts.tensors), default=0)
    faults = [
        f"a contraction produces {f.count} elements, more than {scores} scores per token: {f.operation} ({f.source})"
        for f in counts.results
        if int(f.count.coeff(T, 1)) > scores
    ]
    faults += [
        f"a tensor has {f.count} elements; expected at most {most} per token: {f.operation} ({f.source})"
        for f in counts.tensors
        if int(f.count.coeff(T, 1)) > most
    ]
    if bytes_ != expected_bytes:
        faults.append(f"a token takes {bytes_} bytes; expected {expected_bytes} as in the plan")
    if macs != expected_macs:
        faults.append(f"a token takes {macs:,} multiplications; expected {expected_macs:,} for attention on latents")
    unique = tuple(dict.fromkeys(faults))
    exact = plan.exact_token_bytes(itemsize)
    return MlirCheck(str(sympy.expand(counts.macs)), macs, bytes_, largest, scores, exact, unique)


def _widest_group(site: SitePlan) -> int:
    """Count the elements per token of the widest bit group."""
    sides: Sequence[Any] = (site.key, site.value)
    return max(side.groups * max((t.width for t in side.tiers), default=side.width) for side in sides)
