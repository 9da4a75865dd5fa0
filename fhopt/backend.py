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

import functools
import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from fhopt import __version__, buffers, codegen, door, journal, passes, profiling
from fhopt.binding import Binder
from fhopt.errors import FhoptError, PassError, Stale
from fhopt.fitting import check_model
from fhopt.journal import Journal
from fhopt.passes.graph import Program, copy_program
from fhopt.spec import PLAN_FILES, LatentPlan

Compiled = Callable[..., Any]
OPTIONS = frozenset({"plan", "ratio", "max_loss", "calibration_tokens", "weights", "skinny_products", "strict"})
_outcomes: list[passes.Outcome] = []


@dataclass(frozen=True)
class Settings:
    """The options that are ours, checked. ratio None: the smallest plan whose loss is at most `max_loss`."""

    plan: LatentPlan | None = None
    profile: profiling.Wish | None = None  # None: nothing is approximated but by a plan
    trusting: bool = False
    products: bool = True
    strict: bool = False

    @staticmethod
    def parse(options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """(ours, inductor's). Raises FhoptError."""
        ours = {k: v for k, v in options.items() if k in OPTIONS}
        theirs = {k: v for k, v in options.items() if k not in OPTIONS}
        if ours.get("weights", "check") not in ("check", "trust"):
            raise FhoptError(f"option weights is {ours['weights']!r}; expected 'check' or 'trust'.")
        plan = _plan(ours.get("plan"))
        if plan is not None and (clash := [k for k in ("ratio", "max_loss", "calibration_tokens") if k in ours]):
            raise FhoptError(f"option {clash[0]} is for fitting a plan, and one is given. Drop one of both.")
        wish = None if plan is not None or ours.get("ratio") == 1 else profiling.Wish.parse(ours)
        trusting, products = ours.get("weights") == "trust", bool(ours.get("skinny_products", True))
        return Settings(plan, wish, trusting, products, bool(ours.get("strict"))), theirs


def _plan(given: Any) -> LatentPlan | None:
    if given is None or isinstance(given, LatentPlan):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _loaded(os.path.realpath(given))
    raise FhoptError(f"option plan is a {type(given).__name__}; expected a LatentPlan or the path of one.")


_plans: dict[str, tuple[LatentPlan, list[int]]] = {}  # as first read: all graphs of a process have the same


def _loaded(path: str) -> LatentPlan:
    if path not in _plans:
        plan = LatentPlan.load(path)
        _plans[path] = plan, _stamps(path)
    plan, stamps = _plans[path]
    if _stamps(path) != stamps:
        warnings.warn(
            f"{path} has changed since it was read; graphs go on with the plan as it was. Call torch.compiler.reset() "
            "to compile with the new one.",
            RuntimeWarning,
            stacklevel=2,
        )
    return plan


def _stamps(path: str) -> list[int]:
    return [file.stat().st_mtime_ns for name in PLAN_FILES if (file := Path(path) / name).exists()]


def last_outcome() -> passes.Outcome | None:
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
    training = _takes_gradients(module.graph) and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    root = journal.owner(program.weights.values())
    notes = journal.journal_of(root)
    outcome = _find(program, training, settings.plan)
    if settings.plan is not None and outcome.sites:
        compiled = _by_plan(module, example_inputs, outcome, training, settings, compiler, notes)
    else:
        compiled = _exactly(module, example_inputs, outcome, training, compiler)
    if settings.profile is not None and root is not None and not training:
        compiled = profiling.watched(compiled, module, example_inputs, root, settings.profile, notes)
    notes.add(outcome, training)
    outcome.program.values.clear()  # holds weights and caches
    _outcomes[:] = [outcome]
    return compiled


def _takes_gradients(graph: fx.Graph) -> bool:
    """True where gradients are on, or are turned on somewhere in the graph."""
    turns_on = any(n.target is torch._C._set_grad_enabled and n.args[0] for n in graph.nodes)
    return turns_on or torch.is_grad_enabled()


def reset() -> None:
    """What `torch.compiler.reset` does to this backend: journals and unfinished profiles are forgotten."""
    _outcomes.clear()
    _plans.clear()
    journal.forget()
    profiling.forget()


flashhead.reset = reset  # type: ignore[attr-defined]  # where torch looks for it


def _find(program: Program, training: bool, plan: LatentPlan | None = None) -> passes.Outcome:
    """Sites of the graph; a graph that the finder cannot read is left to inductor, and says so.

    Models that keep latents by themselves read them directly, where `plan` does not say otherwise. In training,
    activation checkpoints keep their memory saving, and what is inside them is left alone.
    """
    try:
        outcome = passes.find(program, inline_checkpoints=not training)
        return outcome if training else passes.absorb_projections(outcome, plan)
    except PassError as error:
        warnings.warn(f"fhopt left a graph to inductor: {error}", RuntimeWarning, stacklevel=2)
        return passes.Outcome(program, missed=[passes.Explanation("normalize", "", str(error), "")])


# --------------------------------------------------------------------------------------------------- exact


def _exactly(
    module: fx.GraphModule, example_inputs: list[Any], outcome: passes.Outcome, training: bool, compiler: Compiler
) -> Compiled:
    """Every attention by the best exact way; a graph that gains nothing goes to inductor as it came."""
    if not (outcome.sites or outcome.compressed) or not passes.exact(outcome, module.graph, training):
        return compiler.now(module, example_inputs)
    codegen.install()
    later = compiler.later(copy_program(module, example_inputs).module)
    return _bind(outcome.program, example_inputs, compiler, lambda inputs, stale: later(*inputs))


# --------------------------------------------------------------------------------------------------- by a plan


def _by_plan(
    module: fx.GraphModule, example_inputs: list[Any], outcome: passes.Outcome, training: bool, settings: Settings,
    compiler: Compiler, notes: Journal,
) -> Compiled:  # fmt: skip
    """The graph with everything on latents that the plan names."""
    plan = settings.plan
    assert plan is not None
    if not plan.weights and not settings.trusting:
        check_model(plan, outcome.program.weights, "the model that is compiled")
    codegen.install()
    pristine = copy_program(module, example_inputs).module
    passes.optimize(outcome, plan, training, settings.trusting, keeper=buffers)
    if not outcome.compressed:
        if not outcome.reading:
            _report_unused(outcome, settings, notes)
        return compiler.now(module, example_inputs)
    notes.state = journal.PLANNED
    others = _Others(pristine, training, settings, compiler, notes)
    return _bind(outcome.program, example_inputs, compiler, others)


def _report_unused(outcome: passes.Outcome, settings: Settings, notes: Journal) -> None:
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
        buffers.restore(inputs)  # what runs next may read caches as they were
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
        passes.optimize(outcome, self.settings.plan, self.training, keeper=buffers)
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


# --------------------------------------------------------------------------------------------------- inductor


@dataclass(frozen=True)
class Compiler:
    """Inductor with the user's mode and options."""

    mode: str | None
    options: Mapping[str, Any]
    products: bool = True

    def now(self, module: fx.GraphModule, example_inputs: list[Any]) -> Compiled:
        """Compile what Dynamo is tracing."""
        from torch._inductor.compile_fx import compile_fx

        if not _takes_gradients(module.graph):
            module = codegen.call_kernels(module, self._products())
        compiled: Any = compile_fx(module, example_inputs, config_patches=self._patches(module) or None)
        return compiled

    def later(self, module: fx.GraphModule) -> Compiled:
        """Compile a graph outside of Dynamo's tracing, at its first call."""
        return torch.compile(module, backend="inductor", options=self._patches(module) or None)

    def _products(self) -> bool:
        """Where inductor is asked to make products itself, they are left to it."""
        from torch._inductor import list_mode_options

        wanted = {**(list_mode_options(self.mode) if self.mode else {}), **self.options}
        return self.products and not any(wanted.get(k) for k in ("max_autotune", "max_autotune_gemm", "freezing"))

    def _patches(self, module: fx.GraphModule) -> dict[str, Any]:
        from torch._inductor import list_mode_options

        patches = {**(list_mode_options(self.mode) if self.mode else {}), **self.options}
        ours = cacheable(module.graph)
        if ours:
            patches["unsafe_marked_cacheable_functions"] = {
                **patches.get("unsafe_marked_cacheable_functions", {}), **ours,
            }  # fmt: skip
        return patches


def cacheable(graph: fx.Graph) -> dict[str, str]:
    """Functions of ours that the graph calls, with what their behaviour depends on: so caches of graphs keep working.

    Everything else that a plan decides stands in the graph as a number, or comes in as an input.
    """
    targets: dict[Any, None] = {n.target: None for n in graph.nodes if n.op == "call_function"}
    ours = [t for t in targets if str(getattr(t, "__module__", "")).startswith("fhopt") and hasattr(t, "__name__")]
    return {f"{t.__module__}.{t.__name__}": f"{__version__}-{_source_digest(t.__module__)}" for t in ours}


@functools.cache
def _source_digest(name: str) -> str:
    """Of a module and of what all such functions may call."""
    names = (name, *(f"fhopt.{n}" for n in ("ops", "latents", "storage", "chunks", "encoding", "pages", "page_ops")))
    sources = [importlib.import_module(n).__file__ for n in names]
    return hashlib.sha256(b"".join(Path(str(s)).read_bytes() for s in sources)).hexdigest()[:16]


door.install()
