"""`torch.compile(model, backend="flashhead")`: find attention, apply a plan, and compile the graph with inductor.

Registered through the entry point group `torch_dynamo_backends`, so no import is needed. Options:

    plan                 a LatentPlan or its path: the sites that it names run on latents
    ratio                1: exact mode, attention in its fastest exact implementation. Another number: fit a plan of
                         that ratio online, to the calls of the model; a warning says if no call can be recorded
    max_loss             without plan and ratio: fit the smallest plan within that loss online (default 0.01, 1%)
    calibration_tokens   tokens of the calls to which a plan is fitted online (default 16,384)
    weights              "check" (default): use a plan only for the weights that it was fitted for; "trust": for any
    skinny_products      on CPUs, run matmuls of up to 16 rows on a kernel that loads the weight once, and larger 16-bit
                         ones on another kernel if the CPU has only AVX2 (default: True; False: use inductor)
    strict               raise FhoptError if a plan compresses no site of a graph (default: warn)
    assume_finite        rewrite attention whose scores may overflow, where the model gives NaN and a rewrite does not:
                         scores in float16, exponentials without a maximum (default: False; with a plan: True)

All other options are passed to inductor. `fhopt.report(compiled)` shows how each attention was compiled, and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from fhopt.backend import compile_report, compiled_generate, online_fit
from fhopt.backend.bound_inputs import Binder
from fhopt.backend.compile_report import CompileReport
from fhopt.backend.inductor import Compiled, InductorCompiler, takes_gradients
from fhopt.backend.settings import Settings, loaded_plans
from fhopt.cache import module_buffers
from fhopt.codegen import dispatch
from fhopt.errors import FhoptError, PassError, Stale
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.graph.program import Program, copy_program
from fhopt.plan.fingerprint import check_fingerprint

_outcomes: list[passes_outcome.Outcome] = []


def last_outcome() -> passes_outcome.Outcome | None:
    """Return the outcome of the last compiled graph: sites found, compressed, not rewritten; None before the first."""
    return _outcomes[0] if _outcomes else None


def flashhead(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one Dynamo graph. Raises FhoptError for invalid options."""
    settings, theirs = Settings.parse(options or {})
    compiler = InductorCompiler(mode, theirs, settings.products)
    program = copy_program(module, example_inputs)
    training = takes_gradients(module.graph) and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    root = compile_report.owner(program.weights.values())
    report = compile_report.report_of(root)
    outcome = _find(program, training, settings)
    if settings.plan is not None and outcome.sites:
        compiled = _compile_with_plan(module, example_inputs, outcome, training, settings, compiler, report)
    else:
        compiled = _compile_exactly(module, example_inputs, outcome, training, compiler)
    if settings.target is not None:
        has_attention = bool(outcome.sites or outcome.missed)
        compiled = online_fit.recording(
            compiled, module, example_inputs, root, settings.target, report, training, has_attention
        )
    report.add_graph(outcome, training)
    outcome.program.values.clear()  # holds weights and caches
    _outcomes[:] = [outcome]
    return compiled


def reset() -> None:
    """Discard compile reports, loaded plans and unfinished online fits; `torch.compiler.reset` calls it."""
    _outcomes.clear()
    loaded_plans.clear()
    compile_report.forget_reports()
    online_fit.forget_fits()


flashhead.reset = reset  # type: ignore[attr-defined]  # where torch looks for it


def _find(program: Program, training: bool, settings: Settings) -> passes_outcome.Outcome:
    """Find the sites of the graph; if a pass fails, leave the graph to inductor, with a warning.

    In models that cache latents themselves, attention runs on these unless the plan names the site. In training,
    activation checkpoints are not inlined, to preserve their memory savings, and attention inside them is not
    rewritten.
    """
    try:
        outcome = pipeline.find_attentions(
            program, inline_checkpoints=not training, assume_finite=settings.assume_finite
        )
        return outcome if training else pipeline.absorb_projections(outcome, settings.plan)
    except PassError as error:
        warnings.warn(f"fhopt left a graph to inductor: {error}", RuntimeWarning, stacklevel=2)
        return passes_outcome.Outcome(program, missed=[passes_outcome.Explanation("normalize", "", str(error), "")])


# --------------------------------------------------------------------------------------------------- exact


def _compile_exactly(
    module: fx.GraphModule,
    example_inputs: list[Any],
    outcome: passes_outcome.Outcome,
    training: bool,
    compiler: InductorCompiler,
) -> Compiled:
    """Compile every attention to its fastest exact implementation; pass a graph without gain to inductor unchanged."""
    if not pipeline.exact(outcome, module.graph, training):
        return compiler.now(module, example_inputs)
    dispatch.register_kernels()
    later = compiler.later(copy_program(module, example_inputs).module)
    return _bind(outcome.program, example_inputs, compiler, lambda inputs, stale: later(*inputs))


# --------------------------------------------------------------------------------------------------- with a plan


def _compile_with_plan(
    module: fx.GraphModule, example_inputs: list[Any], outcome: passes_outcome.Outcome, training: bool,
    settings: Settings, compiler: InductorCompiler, report: CompileReport,
) -> Compiled:  # fmt: skip
    """Compile the graph with the sites that the plan names on latents."""
    plan = settings.plan
    assert plan is not None
    if not plan.weights and not settings.trusting:
        check_fingerprint(plan, outcome.program.weights, "the model that is compiled")
    dispatch.register_kernels()
    original = copy_program(module, example_inputs).module
    pipeline.optimize(outcome, plan, training, settings.trusting, keeper=module_buffers.BufferKeeper())
    if not outcome.compressed:
        if not outcome.reading:
            _report_unused(outcome, settings, report)
        return compiler.now(module, example_inputs)
    report.state = compile_report.PLANNED
    others = _OtherWeights(original, training, settings, compiler, report)
    return _bind(outcome.program, example_inputs, compiler, others)


def _report_unused(outcome: passes_outcome.Outcome, settings: Settings, report: CompileReport) -> None:
    """Warn that the plan compressed nothing. Raises FhoptError if the option `strict` is set."""
    reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "no attention was found"
    message = f"the plan changed nothing in this graph: {reasons}."
    if settings.strict:
        raise FhoptError(message + " Fit a plan for this model, or drop the option strict.")
    report.add_event(message)
    warnings.warn("fhopt: " + message, RuntimeWarning, stacklevel=2)


class _OtherWeights:
    """Graphs for other weights than those of the first call: another layer of the class, or none in the plan.

    Dynamo does not call the backend for them, so they are compiled on first use.
    """

    def __init__(
        self,
        original: fx.GraphModule,
        training: bool,
        settings: Settings,
        compiler: InductorCompiler,
        report: CompileReport,
    ) -> None:
        self.original, self.training, self.settings = original, training, settings
        self.compiler, self.report = compiler, report
        self.variants: list[_Variant] = []
        self.exact: Compiled | None = None

    def __call__(self, inputs: Sequence[Any], stale: Stale) -> Any:
        """Run the graph for the weights of these inputs, compiled on first use."""
        if stale.is_settled and self.exact is not None:
            return self.exact(*inputs)
        for variant in self.variants:
            try:
                return variant(inputs)
            except Stale:
                continue
        module_buffers.restore(inputs)  # the next graph may need the original buffers
        compiled = self._compile_variant(inputs)
        if compiled is not None:
            self.variants.append(compiled)
            return compiled(inputs)
        stale.is_settled = True
        if self.exact is None:
            self._warn(stale)
            self.exact = self.compiler.later(self.original)
        return self.exact(*inputs)

    def _compile_variant(self, inputs: Sequence[Any]) -> _Variant | None:
        assert self.settings.plan is not None
        if not self.settings.plan.weights:  # without fingerprints, its bases belong to the first call's weights
            return None
        program = copy_program(self.original, inputs)
        outcome = _find(program, self.training, self.settings)
        pipeline.optimize(outcome, self.settings.plan, self.training, keeper=module_buffers.BufferKeeper())
        if not outcome.compressed:
            return None
        self.report.add_graph(outcome, self.training)
        return _Variant(self.compiler.later(program.module), Binder(program, len(inputs)))

    def _warn(self, stale: Stale) -> None:
        message = (
            f"{stale}: this graph runs in exact mode. Fit a plan for the new weights, or set "
            "options={'weights': 'trust'} if they changed little."
        )
        self.report.add_event(message)
        warnings.warn("fhopt: " + message, RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class _Variant:
    """A compiled graph with its extra inputs."""

    compiled: Compiled
    binder: Binder

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run the graph. Raises Stale if it is not for the weights of these inputs."""
        return self.compiled(*inputs, *self.binder(inputs))


def _bind(
    program: Program,
    example_inputs: list[Any],
    compiler: InductorCompiler,
    others: Callable[[Sequence[Any], Stale], Any],
) -> Compiled:
    """Compile the rewritten graph and bind its extra inputs at every call."""
    extra = list(program.values.values())[len(example_inputs) :]
    _keep_static(extra)
    compiled = compiler.now(program.module, [*example_inputs, *extra])
    if not extra:
        return compiled
    variant = _Variant(compiled, Binder(program, len(example_inputs)))

    def run(*inputs: Any) -> Any:
        try:
            return variant(inputs)
        except Stale as stale:
            return others(inputs, stale)

    return run


def _keep_static(tensors: list[Tensor]) -> None:
    """Mark the sizes of these inputs as static for AOTAutograd, since Dynamo has no source to guard them by."""
    context = TracingContext.try_get()
    if context is not None:
        for index, tensor in enumerate(tensors):
            context.tensor_to_context[tensor] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(), tensor_source=ConstantSource(f"fhopt_basis_{index}")
            )


compiled_generate.install()
