"""Check of attention programs: the backend `flashhead` against eager mode, within what rounding explains.

    check(program)      ->  CompiledAs(sites=1)     raises WrongProgram if the backend is wrong

The compiled graph must be right for all calls: outputs, NaN and infinite elements, dtypes, the gradients of all inputs,
and inputs that the program writes to. Eager mode is the reference; if `aot_eager` differs from it as well, the program
is invalid.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from graph_programs import AttentionProgram, CallResult, Holder, converted, normal, run
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad

# Rounding error of a dtype -> relative difference that is always allowed. float64: below the resolution of float32.
MIN_TOLERANCE = {2.0**-52: 4e-9, 2.0**-23: 2.0**-17, 2.0**-10: 2.0**-8, 2.0**-7: 2.0**-5}
ILL_CONDITIONED = 0.1  # elements that rounding may change by more than this share of the largest are not compared
LARGEST_OPERAND = 1e3  # larger elements of inputs are masks
INDUCTOR = "torch._inductor.compile_fx.compile_fx"
TRACED = ("torch.func", "checkpoint(")  # graphs with these run only after AOTAutograd as in eager mode


class WrongProgram(AssertionError):
    """The compiled program is wrong; the message contains its source."""

    def __init__(self, program: AttentionProgram, call: int, problem: str) -> None:
        super().__init__(f"call {call + 1} of {len(program.calls)}: {problem}\n\n{program}")
        self.program, self.call, self.problem = program, call, problem


class Invalid(Exception):
    """The program cannot run in eager mode, or aot_eager is wrong as well."""


@dataclass(frozen=True)
class CompiledAs:
    """How a correct program was compiled. sites: calls of fhopt functions in the compiled graphs."""

    sites: int
    graphs: int


@dataclass(frozen=True)
class Expected:
    """Eager results of one call, and float64 results with the error that rounding may cause."""

    plain: CallResult
    precise: CallResult
    errors: tuple[tuple[float, ...], ...]


def check(program: AttentionProgram) -> CompiledAs:
    """Compile a program once and run all its calls. Raises Wrong, or Invalid if nothing can be compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _leave_transforms()
        try:
            expected = [_expected(program, call) for call in range(len(program.calls))]
        except Exception as error:
            raise Invalid(f"eager: {type(error).__name__}: {error}") from error
        seen: list[int] = []

        def compile_fx(module: Any, inputs: Any, **_: Any) -> Any:
            seen.append(_rewritten(module))
            is_traced = program.aot or any(name in program.source for name in TRACED)
            return aot_eager(module, inputs) if is_traced else module.forward

        with mock.patch(INDUCTOR, compile_fx):
            failure = _first_problem(program, expected, dict(backend="flashhead", options={"ratio": 1}))
        if failure is None:
            return CompiledAs(sum(seen), len(seen))
        again = _first_problem(program, expected[: failure[0] + 1], dict(backend="aot_eager"))
        if again is not None and again[0] <= failure[0]:
            raise Invalid(f"aot_eager: {again[1]}")
    raise WrongProgram(program, *failure)


def _leave_transforms() -> None:
    """Exit torch.func transforms that an exception in an earlier program left open."""
    forward_ad._current_level = -1
    with contextlib.suppress(RuntimeError):  # raised if there is no such level
        torch._C._exit_dual_level(level=0)
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)


def _rewritten(module: Any) -> int:
    """Count the calls of fhopt functions in a graph."""
    if not hasattr(module, "graph"):
        return 0
    names = [str(getattr(n.target, "__module__", "")) + str(n.target) for n in module.graph.nodes]
    return sum("attention" in name and name.startswith(("fhopt", "torch._opsfhopt")) for name in names)


def _first_problem(
    program: AttentionProgram, expected: Sequence[Expected], how: dict[str, Any]
) -> tuple[int, str] | None:
    torch._dynamo.reset()
    is_held = any(i.held != "argument" for i in program.inputs)
    values = converted(program, program.values(0), None)
    target = Holder(program, values) if is_held else program.function
    runner = torch.compile(target, dynamic=program.dynamic, fullgraph=True, **how)
    for call, known in enumerate(expected):
        _leave_transforms()
        try:
            found = run(program, runner, converted(program, program.values(call), None), program.calls[call].mode)
        except Exception as error:
            return call, f"raises {type(error).__name__}: {str(error)[:600]}"
        problem = difference(known, found)
        if problem is not None:
            return call, problem
    return None


def _expected(program: AttentionProgram, call: int) -> Expected:
    mode, values = program.calls[call].mode, program.values(call)
    plain_mode = mode.removeprefix("autocast ") if mode != "autocast" else "train"
    plain = run(program, program.function, converted(program, values, None), mode)
    precise = run(program, program.function, converted(program, values, torch.float64), plain_mode)
    single = run(program, program.function, converted(program, values, torch.float32), plain_mode)
    generator = torch.Generator().manual_seed(call)
    epsilon = program.precision
    noisy = [
        v * (1 + epsilon * normal(tuple(v.shape), generator)) if v.is_floating_point() else v
        for v in converted(program, values, torch.float64)
    ]
    moved = run(program, program.function, noisy, plain_mode)
    wide = replace(program, source=program.source.replace("torch.float32", "torch.float64"))
    widened = run(wide, wide.function, converted(program, values, torch.float64), plain_mode)
    return Expected(plain, precise, _errors(epsilon, max(program.level, 1.0), plain, precise, single, moved, widened))


def _errors(
    epsilon: float, level: float, plain: CallResult, precise: CallResult, single: CallResult, moved: CallResult,
    widened: CallResult,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Estimate how much rounding changes each tensor of a result.

    The estimate sums four changes: by rounding in eager mode, by input noise of one rounding error, by float32, scaled
    to the precision in use, and by casts to float32 in the program. A multiple of the precision is added, because
    operations may run in another order: relative to the tensor's own elements, and to inputs. The gradient of a
    projection sums products of four operands, which cancel in a saturated softmax: its floor is that power of the
    largest operand. A mask level costs as many digits as the scores added to it lose.
    """
    least = MIN_TOLERANCE[max(e for e in MIN_TOLERANCE if e <= epsilon)]
    inputs = torch.cat([torch.zeros(1, dtype=torch.float64), *(x.flatten().double() for x in precise.inputs)]).abs()
    size = float(inputs[inputs < LARGEST_OPERAND].max())
    unit = 8 * epsilon * level
    floors = {"outputs": unit * size, "gradients": unit * max(size, size**4), "inputs": 0.0}
    results: list[tuple[float, ...]] = []
    for field in fields(CallResult):
        lists = [getattr(r, field.name) for r in (plain, precise, single, moved, widened)]
        floor = floors[field.name]
        results.append(tuple(_error(epsilon, least, floor, *tensors) for tensors in zip(*lists, strict=False)))
    return tuple(results)


def _error(
    epsilon: float, least: float, floor: float, plain: Any, precise: Any, single: Any, moved: Any, widened: Any
) -> float:  # fmt: skip
    """Return the error of one tensor; infinite for an ill-conditioned one."""
    if (
        any(not isinstance(x, Tensor) for x in (plain, precise, single, moved, widened))
        or not precise.is_floating_point()
    ):
        return 0.0
    rounded, noise = _largest(plain.double() - precise), _largest(moved - precise) + _largest(widened - precise)
    share = min(1.0, epsilon / torch.finfo(torch.float32).eps)
    measured, size = 8 * (rounded + noise + share * _largest(single.double() - precise)), _largest(precise)
    return math.inf if measured > ILL_CONDITIONED * size > ILL_CONDITIONED * floor else measured + least * size + floor


def _largest(x: Tensor) -> float:
    """Return the largest magnitude of the finite elements."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def difference(expected: Expected, found: CallResult) -> str | None:
    """Describe the first difference between the expected and the actual result; None if they agree."""
    has_nan = any(
        isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in expected.plain.outputs
    )
    for field, errors in zip(fields(CallResult), expected.errors, strict=True):
        if has_nan and field.name == "gradients":
            continue  # which gradients NaN reaches depends on the order of operations
        plain, precise, mine = (getattr(r, field.name) for r in (expected.plain, expected.precise, found))
        if len(plain) != len(mine):
            return f"{len(mine)} {field.name}; eager gives {len(plain)}"
        for place, (p, e, m) in enumerate(zip(plain, precise, mine, strict=False)):
            error = errors[place] if place < len(errors) else 0.0
            problem = _difference(p, e, m, error)
            if problem is not None:
                return f"{field.name}[{place}]: {problem}"
    return None


def _difference(plain: Any, precise: Any, mine: Any, error: float) -> str | None:
    if not isinstance(plain, Tensor) or not isinstance(mine, Tensor):
        return None if type(plain) is type(mine) else f"{_named(mine)}; eager gives {_named(plain)}"
    if (plain.shape, plain.dtype, plain.requires_grad) != (mine.shape, mine.dtype, mine.requires_grad):
        return f"{_named(mine)}; eager gives {_named(plain)}"
    plain, mine = plain.detach(), mine.detach()
    if not plain.is_floating_point():
        return None if torch.equal(plain, mine) else "other elements than in eager mode"
    if not torch.equal(plain.isnan(), mine.isnan()):
        return f"{int(mine.isnan().sum())} elements are NaN; in eager mode {int(plain.isnan().sum())}"
    if not torch.equal(plain.isinf(), mine.isinf()) or not torch.equal(plain[plain.isinf()], mine[mine.isinf()]):
        return "other elements are infinite than in eager mode"
    apart = (mine.double() - plain.double()).abs()
    if isinstance(precise, Tensor):
        apart = torch.minimum(apart, (mine.double() - precise.detach().double()).abs().nan_to_num(math.inf, math.inf))
    largest = _largest(apart)
    if largest > error:
        return f"differs by {largest:.2e} where rounding explains {error:.2e} (largest element {_largest(plain):.2e})"
    return None


def _named(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{x.dtype} {tuple(x.shape)}{' with a gradient' if x.requires_grad else ''}".removeprefix("torch.")
