"""`torch.compile(model, backend="flashhead")`: find attention, apply a plan if there is one, hand the rest to inductor.

Registered through the entry point group `torch_dynamo_backends`, so no import is needed. Options:

    plan     a LatentPlan or the path of one; without it nothing is approximated and inductor gets the graph as it came
    strict   raise FhoptError when a plan is given and no site of the graph is in it (default: warn once a graph)

Every other option goes to inductor. `fhopt.backend.last_outcome()` tells what the last compilation found and missed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from fhopt import codegen, passes
from fhopt.errors import FhoptError, PassError
from fhopt.fitting import check_model
from fhopt.passes.graph import Program, copy_program
from fhopt.spec import LatentPlan

OPTIONS = frozenset({"plan", "strict"})
_outcomes: list[passes.Outcome] = []


def last_outcome() -> passes.Outcome | None:
    """What the most recent compilation in this process found, compressed and missed."""
    return _outcomes[0] if _outcomes else None


def flashhead(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Raises FhoptError for options that are wrong."""
    ours, inductor = _split_options(options or {})
    plan = _plan(ours.get("plan"))
    program = copy_program(module, example_inputs)
    training = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    outcome = _find(program, training)
    _outcomes[:] = [outcome]
    if plan is None or not outcome.sites:
        return _compile(module, example_inputs, mode, inductor)
    weights = {name: program.values[node] for node, name in program.parameters.items()}
    check_model(plan, weights, "the model that is compiled")
    codegen.install()
    passes.optimize(outcome, plan, training)
    if not outcome.compressed:
        _report_unused(outcome, bool(ours.get("strict")))
        return _compile(module, example_inputs, mode, inductor)
    return _bind(outcome.program, example_inputs, mode, inductor)


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = {k: v for k, v in options.items() if k in OPTIONS}
    return ours, {k: v for k, v in options.items() if k not in OPTIONS}


def _plan(given: Any) -> LatentPlan | None:
    if given is None or isinstance(given, LatentPlan):
        return given
    if isinstance(given, (str, os.PathLike)):
        return LatentPlan.load(given)
    raise FhoptError(f"option plan is a {type(given).__name__}; expected a LatentPlan or the path of one.")


def _find(program: Program, training: bool) -> passes.Outcome:
    """Sites of the graph; a graph that the finder cannot read is left to inductor, and says so.

    In training, activation checkpoints keep their memory saving, and what is inside them is left alone.
    """
    try:
        return passes.find(program, inline_checkpoints=not training)
    except PassError as error:
        warnings.warn(f"fhopt left a graph to inductor: {error}", RuntimeWarning, stacklevel=2)
        return passes.Outcome(program, missed=[passes.Explanation("normalize", "", str(error), "")])


def _report_unused(outcome: passes.Outcome, strict: bool) -> None:
    reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "no attention was found"
    message = f"the plan changed nothing in this graph: {reasons}."
    if strict:
        raise FhoptError(message + " Fit a plan for this model, or drop the option strict.")
    warnings.warn("fhopt: " + message, RuntimeWarning, stacklevel=2)


def _bind(
    program: Program, example_inputs: list[Any], mode: str | None, inductor: dict[str, Any]
) -> Callable[..., Any]:
    """Compile the rewritten graph; its bases are extra inputs, passed at every call."""
    extra = list(program.values.values())[len(example_inputs) :]
    _keep_static(extra)
    compiled = _compile(program.module, [*example_inputs, *extra], mode, inductor)

    def run(*inputs: Any) -> Any:
        return compiled(*inputs, *extra)

    return run


def _keep_static(tensors: list[Tensor]) -> None:
    """Tell AOTAutograd that the sizes of these inputs never change: Dynamo has no source to guard them by."""
    context = TracingContext.try_get()
    if context is not None:
        for index, tensor in enumerate(tensors):
            context.tensor_to_context[tensor] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(), tensor_source=ConstantSource(f"fhopt_basis_{index}")
            )


def _compile(
    module: fx.GraphModule, example_inputs: list[Any], mode: str | None, inductor: dict[str, Any]
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **inductor}
    compiled: Any = compile_fx(module, example_inputs, config_patches=patches or None)
    return compiled
