"""Decode steps of a model with a plan, layer by layer as programs, in eager mode on a CPU.

    before   layer(x, ...)    sixty operations of torch, of which seven are products
    after    layer(x, ...)    run(program up to attention); attention on the cache; run(the rest)

Before its first decode step a layer is rehearsed twice (fhopt/hf/layer_trace.py), and lowered
(fhopt/codegen/layers/lowering.py) where both give the same trace; layers with equal traces share a program. Those that
are built like one that has a program (fhopt/hf/layer_structure.py) are called beside the cache once, and no operation
is recorded. Before a program is used, it is run on the numbers of such a call and must give what the layer gave. Steps
of layers that follow each other are one call (fhopt/hf/steps_ahead.py), and where a loop does no more than to call
them, the others are not called at all (fhopt/hf/layer_loop.py). A call runs as before wherever something is different:
an option, a hook, a weight or an attention that was replaced, gradients, a graph that is being compiled.

Letters: B sequences, S new tokens, D width.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen import layer_programs_are_built
from fhopt.codegen.cpu.skinny_linear import MOST_ROWS
from fhopt.codegen.layers.held_objects import Entry
from fhopt.codegen.layers.lowering import lower
from fhopt.codegen.layers.program import LayerProgram
from fhopt.codegen.layers.trace import LayerTrace, UnsupportedError
from fhopt.hf.bound_program import BoundProgram, ReadyStep
from fhopt.hf.layer_loop import drop_loop, use_loop
from fhopt.hf.layer_structure import WeightPlace, structure_of, twin_of, weight_places, weights_at
from fhopt.hf.layer_trace import Recording, leaf, observe, rehearse
from fhopt.hf.steps_ahead import Follower, Walk
from fhopt.plan.latent_plan import LatentPlan

STATE = "_fhopt_layer_programs"  # of a layer
IMPLEMENTATION = "_attn_implementation_internal"  # of a configuration: what its property returns, in microseconds
CALL = torch.nn.Module.__call__
MOST_TRIED = 4  # calls of one shape: what never looks alike twice is left alone
REHEARSALS = (0, 1000)  # tokens by which a cache shall seem longer
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Candidate:
    """A trace that was met: its program, or None and the reason; `later`: in which rehearsals."""

    program: LayerProgram | None
    reason: str
    later: set[int]


@dataclass(frozen=True, eq=False)
class _Pattern:
    """A program that was bound to a layer, for layers that are built alike.

    recording: without tensors, modules and weights of the layer, which may come to an end before others do.
    """

    program: LayerProgram
    recording: Recording
    places: dict[int, WeightPlace]

    @staticmethod
    def of(
        layer: torch.nn.Module, program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Pattern | None:  # fmt: skip
        """Return the pattern of a recorded call; None where the layer does something with its number."""
        try:
            seen, again = [
                observe(MethodType(type(layer).forward, twin_of(layer, is_renumbered)), args, kwargs, recording)
                for is_renumbered in (False, True)
            ]
        except UnsupportedError:
            return None
        is_same = all(map(torch.equal, (*seen.borders, seen.output), (*again.borders, again.output)))
        if not is_same or seen.attention.options != again.attention.options:
            return None
        attention = replace(recording.attention, module=torch.nn.Module(), options={})
        known = replace(recording, weights={}, tensors={}, arguments={}, attention=attention)
        return _Pattern(program, known, weight_places(layer, recording.weights))

    def recorded(
        self, layer: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Recording:
        """Return what a rehearsal of another layer would have recorded. Raises UnsupportedError."""
        known = self.recording
        seen = observe(forward, args, kwargs, known)
        attention = known.trace.attention
        borders = [ref.number for ref in (*attention.args, *attention.results)]
        tensors = dict(zip(borders, seen.borders, strict=True)) | {known.trace.output.number: seen.output}
        arguments = {number: leaf(args, kwargs, path) for number, path in known.inputs.items()}
        weights = weights_at(layer, self.places)
        return replace(known, weights=weights, attention=seen.attention, tensors=tensors, arguments=arguments)


class LayerPrograms:
    """What a model's layers share: programs by their traces, and by how layers are built."""

    def __init__(self) -> None:
        self.candidates: dict[LayerTrace, _Candidate] = {}
        self.patterns: dict[Hashable, _Pattern | None] = {}
        self.arguments: dict[Hashable, Any] = {}  # of programs: layers that are called alike have the same object
        self.walk = Walk()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make one that knows nothing yet: programs are bound to weights by their addresses."""
        return LayerPrograms, ()

    @staticmethod
    def state_of(layer: torch.nn.Module) -> LayerState | None:
        """Return the state of a layer; None where it has none."""
        return vars(layer).get(STATE)

    def rehearse(
        self, layer: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[LayerProgram, Recording]:
        """Return the program of a layer for calls like this one, and a recording. Raises UnsupportedError."""
        for later in REHEARSALS:
            recording = rehearse(layer, forward, args, kwargs, later)
            candidate = self.candidates.get(recording.trace)
            if candidate is None:
                candidate = self.candidates[recording.trace] = _lowered(recording.trace)
            if candidate.program is None:
                raise UnsupportedError(candidate.reason)
            candidate.later.add(later)
            if len(candidate.later) == len(REHEARSALS):
                return candidate.program, recording
        raise UnsupportedError("what it does depends on the length of the cache")


def _lowered(trace: LayerTrace) -> _Candidate:
    try:
        return _Candidate(lower(trace), "", set())
    except UnsupportedError as error:
        return _Candidate(None, str(error), set())


class _Known(threading.local):
    """What a thread knows of a layer: addresses that programs are bound to are written and read by one thread.

    bound: for each shape of its input, programs that are bound to its weights. tried: calls of a shape. unlike: shapes
    for which the program of a layer that is built alike gives other numbers.
    """

    def __init__(self) -> None:
        self.bound: dict[tuple[Any, ...], list[BoundProgram]] = {}
        self.tried: Counter[tuple[Any, ...]] = Counter()
        self.unlike: set[tuple[Any, ...]] = set()


class LayerState:
    """A layer, and what is known of it."""

    def __init__(
        self, layer: torch.nn.Module, shared: LayerPrograms, inner: torch.nn.Module | None, attention: str | None
    ) -> None:
        self.layer, self.shared = layer, shared
        self.inner = inner  # its attention, which may run as a program where the whole layer cannot
        self.attention = attention  # the implementation that programs are for
        self.original: Callable[..., Any] = MethodType(type(layer).forward, layer)
        self.known = _Known()
        self.follower = Follower()
        self.reason = ""  # why there is no program

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        """Return a state that knows nothing yet: programs are bound to the weights of one layer."""
        layer, inner = copy.deepcopy(self.layer, memo), copy.deepcopy(self.inner, memo)
        return LayerState(layer, self.shared, inner, self.attention)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make a state that knows nothing yet."""
        return LayerState, (self.layer, self.shared, self.inner, self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        x = args[0] if args else kwargs.get("hidden_states")
        if type(x) is not Tensor or torch.is_grad_enabled() or not self._is_as_it_was():
            return self.original(*args, **kwargs)
        done = self.shared.walk.result_of(self, args, kwargs)
        if done is not None:
            return done
        key = (x.shape, x.dtype)
        bound = self._fitting(key, args, kwargs)
        if bound is not None:
            return self._run(bound, args, kwargs)
        if x.dim() != 3 or x.numel() > MOST_ROWS * x.shape[-1] or not x.is_cpu or self.known.tried[key] >= MOST_TRIED:
            return self.original(*args, **kwargs)
        made = self._bind(key, x.shape[1] > 1, args, kwargs)
        return self.original(*args, **kwargs) if made is None else self._run(made, args, kwargs)

    def _run(self, bound: BoundProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ready = bound.ready(args, kwargs)
        if ready is None:
            return bound(args, kwargs)
        return self.shared.walk.run(self, ready, args, kwargs, partial(_following, bound))

    def calls(self) -> list[Entry]:
        """Return what makes a call of the layer run this state, hooks aside. Raises UnsupportedError."""
        layer = self.layer
        forward, call = vars(layer).get("forward"), type(layer).__call__
        # Older versions of transformers have a call of their own, which differs in training alone.
        name = getattr(call, "__qualname__", "")
        if not _is_run(layer) or not (call is CALL or name == "GradientCheckpointingLayer.__call__"):
            raise UnsupportedError("something else is called in its place")
        return [(vars(layer), "forward", forward), (vars(layer), "_compiled_call_impl", None)]

    def held(self) -> list[Entry]:
        """Return what `_is_as_it_was` looks at: dictionaries, names in them, and what stands there now."""
        module = self.layer if self.inner is None else self.inner
        found: list[Entry] = [(vars(self.layer), "training", self.layer.training)]
        config = vars(module).get("config")
        found.append((vars(module), "config", config))
        if config is not None:
            found.append((vars(config), IMPLEMENTATION, vars(config).get(IMPLEMENTATION)))
        return found

    def _is_as_it_was(self) -> bool:
        attention = _implementation(self.layer if self.inner is None else self.inner)
        return attention == self.attention and not self.layer.training

    def _fitting(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundProgram | None:
        """Return the program that was bound for calls like this one."""
        return next((bound for bound in self.known.bound.get(key, ()) if bound.fits(args, kwargs)), None)

    def _bind(
        self, key: tuple[Any, ...], several: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundProgram | None:
        """Return a program for calls like this one; None where there is none, or none yet.

        several: tokens of a sequence, as short prompts have them too, which come once.
        """
        if torch.is_autocast_enabled("cpu") or not layer_programs_are_built() or not _is_open(self.layer):
            return None
        self.known.tried[key] += 1
        if several and self.known.tried[key] <= MOST_TRIED // 2:
            return None
        structure = structure_of(self.layer, args, kwargs)
        bound = self._bound_as_others(key, structure, args, kwargs)
        if bound is not None:
            return bound
        try:
            program, recording = self.shared.rehearse(self.layer, self.original, args, kwargs)
            bound = self._bound(key, program, recording, args, kwargs)
        except UnsupportedError as error:
            self.reason = str(error)
            self.known.tried[key] = MOST_TRIED
            log.info("%s runs operation by operation: %s", type(self.layer).__name__, error)
            if self.inner is not None:
                _use(self.inner, self.shared)
            return None
        if structure not in self.shared.patterns:
            found = _Pattern.of(self.layer, program, recording, args, kwargs)
            self.shared.patterns[structure] = found
        return bound

    def _bound_as_others(
        self, key: tuple[Any, ...], structure: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundProgram | None:
        """Bind the program of a layer that is built alike; return None where there is none that gives the same."""
        pattern = self.shared.patterns.get(structure)
        if pattern is None or key in self.known.unlike:
            return None
        try:
            recording = pattern.recorded(self.layer, self.original, args, kwargs)
            return self._bound(key, pattern.program, recording, args, kwargs)
        except UnsupportedError as error:
            self.known.unlike.add(key)
            log.info("%s is rehearsed on its own: %s", type(self.layer).__name__, error)
            return None

    def _bound(
        self, key: tuple[Any, ...], program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> BoundProgram:  # fmt: skip
        """Bind a program to the layer. Raises UnsupportedError where it does not give what was recorded."""
        bound = BoundProgram(self.layer, program, recording, args, kwargs)
        if not bound.agrees(recording):
            raise UnsupportedError("its program gives other numbers")
        bound.arguments = self.shared.arguments.setdefault(bound.arguments, bound.arguments)
        self.known.bound[key] = [b for b in self.known.bound.get(key, ()) if b.is_current()] + [bound]
        return bound


def _following(
    first: BoundProgram, state: LayerState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ReadyStep | None:
    """Return the step of a layer in a call that is expected; None where it is not prepared, or no single step.

    first: the program of a layer that is called with the same arguments, but for its input, and with such an input.
    """
    x = args[0]
    if not state._is_as_it_was() or state.layer._forward_pre_hooks:  # which may write weights
        return None
    for bound in state.known.bound.get((x.shape, x.dtype), ()):
        if (first.takes(x) and bound.fits_as(first)) or bound.fits(args, kwargs):
            return bound.ready(args, kwargs)
    return None


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer."""
    state = vars(self).get(STATE)  # None where a wrapper calls what was there before `drop_programs`
    if state is None or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return state(*args, **kwargs)


def _is_run(layer: torch.nn.Module) -> bool:
    """Return whether a call of a layer's own `forward` is one of `_forward`, with nothing around it."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward and forward.args == (layer,)


def _implementation(module: torch.nn.Module) -> str | None:
    """Return the attention implementation that a module of transformers is to use; None where it has none."""
    config = vars(module).get("config")
    name: str | None = None if config is None else vars(config).get(IMPLEMENTATION)
    return name


def _is_open(layer: torch.nn.Module) -> bool:
    """Return whether nothing hooks into a layer's parts or stands in for them, which a program would pass by."""
    from fhopt.hf.skinny_products import is_replaced

    home = type(layer).__module__.partition(".")[0]
    for module in layer.modules():
        if module._backward_hooks or module.training:
            return False
        if module is not layer:  # its own hooks run around a program
            stands_in = "forward" in vars(module) and not is_replaced(module)
            if stands_in or module._forward_hooks or module._forward_pre_hooks:
                return False
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers", home):
            return False  # such as an adapter, which may be switched on and off
    return True


# --------------------------------------------------------------------------------------------------- models


def use_programs(model: torch.nn.Module, plan: LatentPlan) -> None:
    """Let the decoder layers of `model` that hold sites of `plan` run decode steps as programs.

    A decoder layer is an element of a list of modules; of one that does more than programs can, its attention may.
    """
    shared = LayerPrograms()
    for site in (site.site.name.partition("#")[0] for site in plan.sites):
        name = _layer_name(model, site)
        if name is not None:
            _use(model.get_submodule(name), shared, model.get_submodule(site))
            holder, _, layers = name.rpartition(".")[0].rpartition(".")
            use_loop(model.get_submodule(holder), layers, shared)


def _use(layer: torch.nn.Module, shared: LayerPrograms, inner: torch.nn.Module | None = None) -> None:
    """Let a module run as a program, unless something else stands in for it."""
    if "forward" not in vars(layer):
        vars(layer)[STATE] = LayerState(layer, shared, inner, _implementation(layer if inner is None else inner))
        vars(layer)["forward"] = partial(_forward, layer)  # a method would be pickled as the attribute `_forward`


def drop_programs(model: torch.nn.Module) -> None:
    """Undo `use_programs`."""
    for module in model.modules():
        drop_loop(module)
        if vars(module).pop(STATE, None) is not None and _is_run(module):  # what stands around it now stays
            del vars(module)["forward"]


def program_reasons(model: torch.nn.Module) -> dict[str, str]:
    """Return for every decoder layer that may run as a program why it does not; "" where it does, or may yet."""
    states = ((name, vars(module).get(STATE)) for name, module in model.named_modules())
    return {name: "" if state.known.bound else state.reason for name, state in states if state is not None}


def _layer_name(model: torch.nn.Module, site: str) -> str | None:
    """Return the name of the innermost element of a list of modules that a site is part of."""
    parts = site.split(".")
    for end in range(len(parts), 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), torch.nn.ModuleList):
            return ".".join(parts[:end]) if end < len(parts) else None
    return None
