"""`fhopt verify`: proof, from the code of an exported step alone, that it reads latents and what that costs.

The functions are walked in linalg, where every operation states its loops and every tensor its sizes; the one size that
grows is T, the sealed tokens. What must hold:

    no contraction yields more than H x S numbers per token     scores are all that is made of a token by multiplying;
                                                                D_K z or D_V z would be a key or a value
    no float tensor has more numbers per token than scores,     nothing of the size of keys or values is ever written
    or than one tier of one side has
    what a token adds to the arguments                          = the bytes that the plan says
    multiplications that grow with T                            = H (R_K + R_V) S over all sites, nothing else

Counts are polynomials in T (sympy). Nothing is run, and no other part of fhopt is asked but the plan.
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
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan

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
class Found:
    """One operation: its name, the line of the Python code that it comes from, and a count (numbers, or MACs)."""

    operation: str
    source: str
    count: Any  # a polynomial in T

    def __str__(self) -> str:
        return f"{self.operation} ({self.source}): {self.count}"


@dataclass
class Walk:
    """What a function consists of. All counts are polynomials in T.

    macs: multiplications and additions of contractions. results: what contractions yield that grows with T. tensors:
    the largest float results that do, by any operation. argument_bytes: of all arguments.
    """

    macs: Any = 0
    results: list[Found] = field(default_factory=list)
    tensors: list[Found] = field(default_factory=list)
    argument_bytes: Any = 0


@dataclass(frozen=True)
class Verdict:
    """`faults` is empty where everything holds. Numbers per sealed token; macs as text."""

    macs: str
    macs_per_token: int
    bytes_per_token: int
    largest_per_token: int  # numbers of the largest float tensor
    scores_per_token: int  # H x S of the site with most heads
    exact_bytes_per_token: int
    faults: tuple[str, ...]


def verify_folder(folder: Path) -> Verdict:
    """The verdict on what `fhopt export` wrote, or on a rewritten folder, whose step is lowered. Raises FhoptError."""
    from fhopt.export import mlir
    from fhopt.export.pt2_step import read_description
    from fhopt.models import rewritten_folder
    from fhopt.models.rewritten_model import load_exact

    if rewritten_folder.is_rewritten(folder):
        found = rewritten_folder.read_folder(folder)
        model = load_exact(found).eval()
        step = mlir.lower(model, found.plan).step
        text = step.operation.get_asm(enable_debug_info=True)
        return verify_text(text, found.plan, next(model.parameters()).element_size())
    about = read_description(folder)
    files = [folder / name for name in ("step.mlir", "step.mlirbc") if (folder / name).is_file()]
    if not files:
        raise FhoptError(f"{folder} holds no MLIR; expected what `fhopt export FOLDER --target mlir` wrote.")
    plan = LatentPlan.load(folder / rewritten_folder.PLAN)
    uncoded = [t["dtype"] for t in about["state"] if None not in t["shape"]]
    return verify_text(files[0].read_bytes(), plan, getattr(torch, uncoded[0]).itemsize)


def verify_text(text: str | bytes, plan: LatentPlan, itemsize: int = 4) -> Verdict:
    """The verdict on a step in linalg (text or bytecode as MLIR prints it), for a plan.

    itemsize: bytes of a number of uncoded latents. Raises FhoptError for what is no linalg.
    """
    return verdict(walk(text), plan, itemsize)


def walk(text: str | bytes) -> Walk:
    """Walk the functions of a module. Raises FhoptError when it cannot be read, or grows in more than one way."""
    ir = _bindings()
    context = ir.Context()
    importlib.import_module("torch_mlir.dialects.torch").register_dialect(context)
    try:
        module = ir.Module.parse(text, context)
    except Exception as error:  # the parser's own, which is no public class
        raise FhoptError(f"this is no MLIR ({str(error).splitlines()[0][:200]}). Export it again.") from error
    found = Walk()
    for function in module.body.operations:
        if function.operation.name == "func.func":
            for argument in function.regions[0].blocks[0].arguments:
                found.argument_bytes += _numbers(argument.type) * _bytes(argument.type)
            _check_dialects(function.operation)
            for operation in _operations(function.operation):
                _count(ir, operation, found)
    if not found.macs:
        raise FhoptError("there is no contraction in it; expected a step in linalg. Export with --dialect linalg.")
    return found


def _bindings() -> Any:
    try:
        return importlib.import_module("torch_mlir.ir")
    except ImportError as error:
        raise FhoptError(
            "torch-mlir is not installed; this needs the extra mlir. Install it with: pip install 'fhopt[mlir]'"
        ) from error


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _check_dialects(function: Any) -> None:
    """Raise FhoptError for operations whose loops nobody can see."""
    seen = {operation.name.partition(".")[0] for operation in _operations(function)}
    if unknown := seen - {"linalg", "tensor", "arith", "math", "func", "cf", "affine", "scf", "tm_tensor"}:
        raise FhoptError(
            f"it holds operations of {min(unknown)}; expected linalg on tensors. Export with --dialect linalg."
        )


# --------------------------------------------------------------------------------------------------- counting


def _count(ir: Any, operation: Any, found: Walk) -> None:
    """Add an operation to what was found."""
    is_contraction = operation.name in _NAMED or (operation.name == "linalg.generic" and _multiplies(operation))
    if is_contraction:
        found.macs += _named_loops(operation) if operation.name in _NAMED else _generic_loops(ir, operation)
    for result in operation.results:
        if not str(result.type).startswith("tensor<"):
            continue
        numbers = _numbers(result.type)
        if sympy.degree(numbers, T) > 1:
            raise FhoptError(
                f"{operation.name} ({_source(operation)}) makes {numbers} numbers; expected T at most once."
            )
        if not numbers.has(T):
            continue
        here = Found(operation.name, _source(operation), numbers)
        if is_contraction:
            found.results.append(here)
        if _is_float(result.type):
            found.tensors.append(here)


def _multiplies(operation: Any) -> bool:
    """True for a generic that sums products."""
    inside = {inner.name for inner in _operations(operation)}
    reduces = "reduction" in str(operation.attributes["iterator_types"])
    return reduces and "arith.mulf" in inside and "arith.addf" in inside


def _named_loops(operation: Any) -> Any:
    left, right = (_shape(operation.operands[i].type) for i in (0, 1))
    batch, rows, summed, columns = _NAMED[operation.name]
    return math.prod([*(left[i] for i in (*batch, *rows, *summed)), *(right[i] for i in columns)])


def _generic_loops(ir: Any, operation: Any) -> Any:
    """The product of the sizes of all loops, which operands tell."""
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
    """Sizes of a tensor type, T for what grows."""
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
    """file:line of the innermost Python code that an operation comes from."""
    text = str(operation.location)
    path, _, rest = text.partition('"')[2].partition('"')
    line = rest.lstrip(":").partition(":")[0]
    return f"{path.rpartition('/')[2]}:{line}" if path and line.isdigit() else "unknown line"


# --------------------------------------------------------------------------------------------------- verdict


def verdict(found: Walk, plan: LatentPlan, itemsize: int = 4) -> Verdict:
    """What was found against what a plan says."""
    scores = max(site.site.heads for site in plan.sites)
    most = max(scores, *(_largest_tier(site) for site in plan.sites))
    wanted_bytes = sum(site.token_bytes(itemsize) for site in plan.sites)
    wanted_macs = sum(site.site.heads * (site.key.width + site.value.width) for site in plan.sites)
    macs, bytes_ = (int(sympy.Poly(p, T).coeff_monomial(T)) for p in (found.macs, found.argument_bytes))
    largest = max((int(f.count.coeff(T, 1)) for f in found.tensors), default=0)
    faults = [
        f"a contraction makes {f.count} numbers, more than {scores} scores per token: {f.operation} ({f.source})"
        for f in found.results
        if int(f.count.coeff(T, 1)) > scores
    ]
    faults += [
        f"a tensor has {f.count} numbers, expected at most {most} per token: {f.operation} ({f.source})"
        for f in found.tensors
        if int(f.count.coeff(T, 1)) > most
    ]
    if bytes_ != wanted_bytes:
        faults.append(f"a token takes {bytes_} bytes, the plan says {wanted_bytes}")
    if macs != wanted_macs:
        faults.append(f"a token takes {macs:,} multiplications, attention on the plan's latents {wanted_macs:,}")
    unique = tuple(dict.fromkeys(faults))
    exact = plan.exact_token_bytes(itemsize)
    return Verdict(str(sympy.expand(found.macs)), macs, bytes_, largest, scores, exact, unique)


def _largest_tier(site: SitePlan) -> int:
    """Numbers per token of the widest run of channels that is read at once."""
    sides: Sequence[Any] = (site.key, site.value)
    return max(side.groups * max((t.width for t in side.tiers), default=side.width) for side in sides)
