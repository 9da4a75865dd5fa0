"""Decode steps of a model with a plan as one program per layer, in eager mode on CPU.

    before   layer(x, ...)    60 torch operations, 7 of them matmuls
    after    layer(x, ...)    run(program up to attention); attention on the cache; run(the rest)

Before its first decode step a layer is traced twice (fhopt/hf/layer_trace.py). It is lowered
(fhopt/codegen/layers/lowering.py) if both traces agree; layers with equal traces share a program. A layer with the
structure of one that has a program (fhopt/hf/layer_structure.py) is only called once with a mock cache, without
tracing. A program is used only if it reproduces the results of such a call. Steps of consecutive layers are one call
(fhopt/hf/steps_ahead.py), and if a loop only calls the layers, the others are not called at all
(fhopt/hf/layer_loop.py). A layer runs operation by operation if anything differs: an option, a hook, a replaced weight
or attention, gradients, or a graph under compilation.

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
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.codegen.layers.held_objects import Entry
from fhopt.codegen.layers.lowering import lower_trace
from fhopt.codegen.layers.program import LayerProgram
from fhopt.codegen.layers.trace import LayerTrace, UnsupportedError
from fhopt.hf.bound_program import BoundProgram, ReadyStep
from fhopt.hf.layer_loop import drop_loop, use_loop
from fhopt.hf.layer_structure import WeightPlace, structure_of, twin_of, weight_places, weights_at
from fhopt.hf.layer_trace import Recording, leaf, observe, rehearse
from fhopt.hf.steps_ahead import Follower, LayerWalk
from fhopt.plan.latent_plan import LatentPlan

STATE = "_fhopt_layer_programs"  # attribute of a layer
IMPLEMENTATION = "_attn_implementation_internal"  # attribute of a configuration; its property takes microseconds
CALL = torch.nn.Module.__call__
MAX_TRIED = 4  # per input shape; give up if no two traces agree
REHEARSALS = (0, 1000)  # trace at two cache lengths to catch length-dependent code
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Candidate:
    """A trace with its program, or None and the reason. `later`: the cache offsets that gave this trace."""

    program: LayerProgram | None
    reason: str
    later: set[int]


@dataclass(frozen=True, eq=False)
class _Pattern:
    """A program bound to one layer, for layers of the same structure.

    recording: without the layer's tensors, modules and weights, which may be freed earlier.
    """

    program: LayerProgram
    recording: Recording
    places: dict[int, WeightPlace]

    @staticmethod
    def of(
        layer: torch.nn.Module, program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Pattern | None:  # fmt: skip
        """Return the pattern of a recorded call; None if the layer's result depends on its layer index."""
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
        """Return the recording that tracing another layer would give. Raises UnsupportedError."""
        known = self.recording
        seen = observe(forward, args, kwargs, known)
        attention = known.trace.attention
        borders = [ref.number for ref in (*attention.args, *attention.results)]
        tensors = dict(zip(borders, seen.borders, strict=True)) | {known.trace.output.number: seen.output}
        arguments = {number: leaf(args, kwargs, path) for number, path in known.inputs.items()}
        weights = weights_at(layer, self.places)
        return replace(known, weights=weights, attention=seen.attention, tensors=tensors, arguments=arguments)


class LayerPrograms:
    """State shared by a model's layers: programs by trace, and patterns by structure."""

    def __init__(self) -> None:
        self.candidates: dict[LayerTrace, _Candidate] = {}
        self.patterns: dict[Hashable, _Pattern | None] = {}
        self.arguments: dict[Hashable, Any] = {}  # of programs: layers with equal arguments share one object
        self.walk = LayerWalk()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty state: programs are bound to weight addresses."""
        return LayerPrograms, ()

    @staticmethod
    def state_of(layer: torch.nn.Module) -> LayerState | None:
        """Return the state of a layer; None if it has none."""
        return vars(layer).get(STATE)

    def rehearse(
        self, layer: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[LayerProgram, Recording]:
        """Return a layer's program for calls like this one, and a recording. Raises UnsupportedError."""
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
        raise UnsupportedError("its operations depend on the cache length")


def _lowered(trace: LayerTrace) -> _Candidate:
    try:
        return _Candidate(lower_trace(trace), "", set())
    except UnsupportedError as error:
        return _Candidate(None, str(error), set())


class _Known(threading.local):
    """Per-thread state of a layer: only one thread may use the addresses that programs are bound to.

    bound: programs bound to the layer's weights, by input shape. tried: calls per shape. unlike: shapes for which the
    program of a layer of the same structure gives other results.
    """

    def __init__(self) -> None:
        self.bound: dict[tuple[Any, ...], list[BoundProgram]] = {}
        self.tried: Counter[tuple[Any, ...]] = Counter()
        self.unlike: set[tuple[Any, ...]] = set()


class LayerState:
    """A layer, and its programs."""

    def __init__(
        self, layer: torch.nn.Module, shared: LayerPrograms, inner: torch.nn.Module | None, attention: str | None
    ) -> None:
        self.layer, self.shared = layer, shared
        self.inner = inner  # its attention, which may run as a program if the whole layer cannot
        self.attention = attention  # the attention implementation of the programs
        self.original: Callable[..., Any] = MethodType(type(layer).forward, layer)
        self.known = _Known()
        self.follower = Follower()
        self.reason = ""  # reason for having no program

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        """Return an empty state: programs are bound to one layer's weights."""
        layer, inner = copy.deepcopy(self.layer, memo), copy.deepcopy(self.inner, memo)
        return LayerState(layer, self.shared, inner, self.attention)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty state."""
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
        if x.dim() != 3 or x.numel() > MAX_ROWS * x.shape[-1] or not x.is_cpu or self.known.tried[key] >= MAX_TRIED:
            return self.original(*args, **kwargs)
        made = self._bind(key, x.shape[1] > 1, args, kwargs)
        return self.original(*args, **kwargs) if made is None else self._run(made, args, kwargs)

    def _run(self, bound: BoundProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ready = bound.ready(args, kwargs)
        if ready is None:
            return bound(args, kwargs)
        return self.shared.walk.run(self, ready, args, kwargs, partial(_following, bound))

    def calls(self) -> list[Entry]:
        """Return the entries that make a call of the layer run this state, except hooks. Raises UnsupportedError."""
        layer = self.layer
        forward, call = vars(layer).get("forward"), type(layer).__call__
        # Older versions of transformers override `__call__`, which differs only in training.
        name = getattr(call, "__qualname__", "")
        if not _is_run(layer) or not (call is CALL or name == "GradientCheckpointingLayer.__call__"):
            raise UnsupportedError("its forward method was replaced")
        return [(vars(layer), "forward", forward), (vars(layer), "_compiled_call_impl", None)]

    def held(self) -> list[Entry]:
        """Return the guards that `_is_as_it_was` checks: dictionaries, names in them, and their current values."""
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
        """Return the program bound for calls like this one."""
        return next((bound for bound in self.known.bound.get(key, ()) if bound.fits(args, kwargs)), None)

    def _bind(
        self, key: tuple[Any, ...], several: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundProgram | None:
        """Return a program for calls like this one; None if there is none (yet).

        several: more than one token per sequence, as in short prompts, which may not recur.
        """
        if torch.is_autocast_enabled("cpu") or not layer_programs_are_built() or not _is_open(self.layer):
            return None
        self.known.tried[key] += 1
        if several and self.known.tried[key] <= MAX_TRIED // 2:
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
            self.known.tried[key] = MAX_TRIED
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
        """Bind the program of a layer of the same structure; None if there is none that gives the same results."""
        pattern = self.shared.patterns.get(structure)
        if pattern is None or key in self.known.unlike:
            return None
        try:
            recording = pattern.recorded(self.layer, self.original, args, kwargs)
            return self._bound(key, pattern.program, recording, args, kwargs)
        except UnsupportedError as error:
            self.known.unlike.add(key)
            log.info("%s is traced on its own: %s", type(self.layer).__name__, error)
            return None

    def _bound(
        self, key: tuple[Any, ...], program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> BoundProgram:  # fmt: skip
        """Bind a program to the layer. Raises UnsupportedError if it does not reproduce the recording."""
        bound = BoundProgram(self.layer, program, recording, args, kwargs)
        if not bound.agrees(recording):
            raise UnsupportedError("its program gives other results")
        bound.arguments = self.shared.arguments.setdefault(bound.arguments, bound.arguments)
        self.known.bound[key] = [b for b in self.known.bound.get(key, ()) if b.is_current()] + [bound]
        return bound


def _following(
    first: BoundProgram, state: LayerState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ReadyStep | None:
    """Return the step of a layer in an expected call; None if it is not prepared, or not a single step.

    first: the program of a layer called with the same arguments, except the input, which only looks the same.
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
    state = vars(self).get(STATE)  # None if a wrapper still calls this after `drop_programs`
    if state is None or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return state(*args, **kwargs)


def _is_run(layer: torch.nn.Module) -> bool:
    """Return whether `_forward` is a layer's own `forward`, unwrapped."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward and forward.args == (layer,)


def _implementation(module: torch.nn.Module) -> str | None:
    """Return the configured attention implementation of a module; None if it has no configuration."""
    config = vars(module).get("config")
    name: str | None = None if config is None else vars(config).get(IMPLEMENTATION)
    return name


def _is_open(layer: torch.nn.Module) -> bool:
    """Return whether no hook or replacement in a layer's submodules would be bypassed by a program."""
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
            return False  # such as an adapter that can be switched on and off
    return True


# --------------------------------------------------------------------------------------------------- models


def use_programs(model: torch.nn.Module, plan: LatentPlan) -> None:
    """Run the decode steps of layers of `model` with sites of `plan` as programs.

    A decoder layer is an element of a module list. If a program cannot run the whole layer, it may run its attention.
    """
    shared = LayerPrograms()
    for site in (site.site.name.partition("#")[0] for site in plan.sites):
        name = _layer_name(model, site)
        if name is not None:
            _use(model.get_submodule(name), shared, model.get_submodule(site))
            holder, _, layers = name.rpartition(".")[0].rpartition(".")
            use_loop(model.get_submodule(holder), layers, shared)


def _use(layer: torch.nn.Module, shared: LayerPrograms, inner: torch.nn.Module | None = None) -> None:
    """Run a module as a program, unless its forward is already replaced."""
    if "forward" not in vars(layer):
        vars(layer)[STATE] = LayerState(layer, shared, inner, _implementation(layer if inner is None else inner))
        vars(layer)["forward"] = partial(_forward, layer)  # pickle looks a method up as attribute `_forward`


def drop_programs(model: torch.nn.Module) -> None:
    """Undo `use_programs`."""
    for module in model.modules():
        drop_loop(module)
        if vars(module).pop(STATE, None) is not None and _is_run(module):  # a wrapper around it stays
            del vars(module)["forward"]


def program_reasons(model: torch.nn.Module) -> dict[str, str]:
    """Return why each decoder layer does not run as a program, by name; "" if it does, or still may."""
    states = ((name, vars(module).get(STATE)) for name, module in model.named_modules())
    return {name: "" if state.known.bound else state.reason for name, state in states if state is not None}


def _layer_name(model: torch.nn.Module, site: str) -> str | None:
    """Return the name of the innermost module-list element that contains a site."""
    parts = site.split(".")
    for end in range(len(parts), 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), torch.nn.ModuleList):
            return ".".join(parts[:end]) if end < len(parts) else None
    return None
