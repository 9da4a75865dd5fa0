"""`torch.compile(model, backend="flashhead")`: find attention, apply a plan if there is one, hand the rest to inductor.

Registered through the entry point group `torch_dynamo_backends`, so no import is needed. Options:

    plan                 a LatentPlan or the path of one: what it names runs on latents
    ratio                1: nothing is approximated; attention takes the best exact way. Another number: profile, and
                         fit a plan of that size
    max_loss             without plan and ratio: profile, and fit the smallest plan that passes (default 0.01, 1 %)
    calibration_tokens   that are watched before a plan is fitted (default 16,384)
    weights              "check" (default): a plan is used for the weights that it was fitted for; "trust": for any
    skinny_products      on CPUs, products of up to 16 rows with a weight go to a kernel that reads the weight once
                         (default: True; False: to inductor)
    strict               raise FhoptError when a plan is given and no site of the graph is in it (default: warn)

Every other option goes to inductor. `fhopt.report(compiled)` tells what became of each attention, and why.
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
from fhopt.backend.compile_report import Journal
from fhopt.backend.inductor import Compiled, Compiler, takes_gradients
from fhopt.backend.settings import Settings, loaded_plans
from fhopt.cache import module_buffers
from fhopt.codegen import dispatch
from fhopt.errors import FhoptError, PassError, Stale
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.graph.program import Program, copy_program
from fhopt.plan.fingerprint import check_model
from fhopt.plan.latent_plan import LatentPlan

_outcomes: list[passes_outcome.Outcome] = []


def last_outcome() -> passes_outcome.Outcome | None:
    """What the most recent compilation in this process found, compressed and missed."""
    return _outcomes[0] if _outcomes else None


def flashhead(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one Dynamo graph. Raises FhoptError for options that are wrong."""
    settings, theirs = Settings.parse(options or {})
    compiler = Compiler(mode, theirs, settings.products)
    program = copy_program(module, example_inputs)
    training = takes_gradients(module.graph) and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    root = compile_report.owner(program.weights.values())
    notes = compile_report.journal_of(root)
    outcome = _find(program, training, settings.plan)
    if settings.plan is not None and outcome.sites:
        compiled = _by_plan(module, example_inputs, outcome, training, settings, compiler, notes)
    else:
        compiled = _exactly(module, example_inputs, outcome, training, compiler)
    if settings.profile is not None and root is not None and not training:
        compiled = online_fit.watched(compiled, module, example_inputs, root, settings.profile, notes)
    notes.add(outcome, training)
    outcome.program.values.clear()  # holds weights and caches
    _outcomes[:] = [outcome]
    return compiled


def reset() -> None:
    """What `torch.compiler.reset` does to this backend: journals and unfinished profiles are forgotten."""
    _outcomes.clear()
    loaded_plans.clear()
    compile_report.forget()
    online_fit.forget()


flashhead.reset = reset  # type: ignore[attr-defined]  # where torch looks for it


def _find(program: Program, training: bool, plan: LatentPlan | None = None) -> passes_outcome.Outcome:
    """Sites of the graph; a graph that the finder cannot read is left to inductor, and says so.

    Models that keep latents by themselves read them directly, where `plan` does not say otherwise. In training,
    activation checkpoints keep their memory saving, and what is inside them is left alone.
    """
    try:
        outcome = pipeline.find(program, inline_checkpoints=not training)
        return outcome if training else pipeline.absorb_projections(outcome, plan)
    except PassError as error:
        warnings.warn(f"fhopt left a graph to inductor: {error}", RuntimeWarning, stacklevel=2)
        return passes_outcome.Outcome(program, missed=[passes_outcome.Explanation("normalize", "", str(error), "")])


# --------------------------------------------------------------------------------------------------- exact


def _exactly(
    module: fx.GraphModule,
    example_inputs: list[Any],
    outcome: passes_outcome.Outcome,
    training: bool,
    compiler: Compiler,
) -> Compiled:
    """Every attention by the best exact way; a graph that gains nothing goes to inductor as it came."""
    if not (outcome.sites or outcome.compressed) or not pipeline.exact(outcome, module.graph, training):
        return compiler.now(module, example_inputs)
    dispatch.install()
    later = compiler.later(copy_program(module, example_inputs).module)
    return _bind(outcome.program, example_inputs, compiler, lambda inputs, stale: later(*inputs))


# --------------------------------------------------------------------------------------------------- by a plan


def _by_plan(
    module: fx.GraphModule, example_inputs: list[Any], outcome: passes_outcome.Outcome, training: bool,
    settings: Settings, compiler: Compiler, notes: Journal,
) -> Compiled:  # fmt: skip
    """The graph with everything on latents that the plan names."""
    plan = settings.plan
    assert plan is not None
    if not plan.weights and not settings.trusting:
        check_model(plan, outcome.program.weights, "the model that is compiled")
    dispatch.install()
    pristine = copy_program(module, example_inputs).module
    pipeline.optimize(outcome, plan, training, settings.trusting, keeper=module_buffers.BufferKeeper())
    if not outcome.compressed:
        if not outcome.reading:
            _report_unused(outcome, settings, notes)
        return compiler.now(module, example_inputs)
    notes.state = compile_report.PLANNED
    others = _Others(pristine, training, settings, compiler, notes)
    return _bind(outcome.program, example_inputs, compiler, others)


def _report_unused(outcome: passes_outcome.Outcome, settings: Settings, notes: Journal) -> None:
    reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "no attention was found"
    message = f"the plan changed nothing in this graph: {reasons}."
    if settings.strict:
        raise FhoptError(message + " Fit a plan for this model, or drop the option strict.")
    notes.say(message)
    warnings.warn("fhopt: " + message, RuntimeWarning, stacklevel=2)


class _Others:
    """Graphs for weights that the first one is not for: another layer of the class, or none of the plan's.

    Dynamo does not come back for them, so they are compiled when they are called.
    """

    def __init__(
        self, pristine: fx.GraphModule, training: bool, settings: Settings, compiler: Compiler, notes: Journal
    ) -> None:
        self.pristine, self.training, self.settings = pristine, training, settings
        self.compiler, self.notes = compiler, notes
        self.known: list[_Variant] = []
        self.exact: Compiled | None = None

    def __call__(self, inputs: Sequence[Any], stale: Stale) -> Any:
        """Run the graph that is right for these inputs."""
        if stale.is_settled and self.exact is not None:
            return self.exact(*inputs)
        for variant in self.known:
            try:
                return variant(inputs)
            except Stale:
                continue
        module_buffers.restore(inputs)  # what runs next may read caches as they were
        made = self._variant(inputs)
        if made is not None:
            self.known.append(made)
            return made(inputs)
        stale.is_settled = True
        if self.exact is None:
            self._tell(stale)
            self.exact = self.compiler.later(self.pristine)
        return self.exact(*inputs)

    def _variant(self, inputs: Sequence[Any]) -> _Variant | None:
        assert self.settings.plan is not None
        if not self.settings.plan.weights:  # it does not know whose its bases are: those of the first call
            return None
        program = copy_program(self.pristine, inputs)
        outcome = _find(program, self.training, self.settings.plan)
        pipeline.optimize(outcome, self.settings.plan, self.training, keeper=module_buffers.BufferKeeper())
        if not outcome.compressed:
            return None
        self.notes.add(outcome, self.training)
        return _Variant(self.compiler.later(program.module), Binder(program, len(inputs)))

    def _tell(self, stale: Stale) -> None:
        message = (
            f"{stale}: this graph runs exactly for them. Fit a plan for the new weights, or say "
            "options={'weights': 'trust'} if they changed little."
        )
        self.notes.say(message)
        warnings.warn("fhopt: " + message, RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class _Variant:
    """A compiled graph with its extra inputs."""

    compiled: Compiled
    binder: Binder

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run it. Raises Stale when it is not for these inputs."""
        return self.compiled(*inputs, *self.binder(inputs))


def _bind(
    program: Program, example_inputs: list[Any], compiler: Compiler, others: Callable[[Sequence[Any], Stale], Any]
) -> Compiled:
    """Compile the rewritten graph; its extra inputs are bound at every call."""
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
    """Tell AOTAutograd that the sizes of these inputs never change: Dynamo has no source to guard them by."""
    context = TracingContext.try_get()
    if context is not None:
        for index, tensor in enumerate(tensors):
            context.tensor_to_context[tensor] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(), tensor_source=ConstantSource(f"fhopt_basis_{index}")
            )


compiled_generate.install()
