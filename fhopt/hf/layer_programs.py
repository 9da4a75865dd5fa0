"""Decode steps of a model with a plan, layer by layer as programs, in eager mode on a CPU.

    before   layer(x, ...)    sixty operations of torch, of which seven are products
    after    layer(x, ...)    run(program up to attention); attention on the cache; run(the rest)

Before its first decode step a layer is rehearsed twice (fhopt/hf/layer_trace.py), and lowered
(fhopt/codegen/layers/lowering.py) where both give the same trace; layers with equal traces share a program. Before a
program is used, it is run on the numbers of a rehearsal and must give what the layer gave. A call runs as before
wherever something is different: an option, a hook, a weight or an attention that was replaced, gradients, a graph
that is being compiled.

Letters: B sequences, S new tokens, D width.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fhopt.attention.interface import latent_attention
from fhopt.codegen import layer_programs_are_built
from fhopt.codegen.cpu.skinny_linear import MOST_ROWS
from fhopt.codegen.layers.lowering import lower
from fhopt.codegen.layers.program import LayerProgram, Stored, run_segment
from fhopt.codegen.layers.trace import LayerTrace, UnsupportedError
from fhopt.hf.cache_steps import CacheStep, prepare_step, result_tensors
from fhopt.hf.layer_trace import Path, Recording, leaves, rehearse
from fhopt.plan.latent_plan import LatentPlan

STATE = "_fhopt_layer_programs"  # of a layer
IMPLEMENTATION = "_attn_implementation_internal"  # of a configuration: what its property returns, in microseconds
MOST_TRIED = 4  # calls of one shape: what never looks alike twice is left alone
REHEARSALS = (0, 1000)  # tokens by which a cache shall seem longer
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest number
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Candidate:
    """A trace that was met: its program, or None and the reason; `later`: in which rehearsals."""

    program: LayerProgram | None
    reason: str
    later: set[int]


class LayerPrograms:
    """What a model's layers share: programs by their traces."""

    def __init__(self) -> None:
        self.candidates: dict[LayerTrace, _Candidate] = {}

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

    bound: for each shape of its input, programs that are bound to its weights. tried: calls of a shape.
    """

    def __init__(self) -> None:
        self.bound: dict[tuple[Any, ...], list[_Bound]] = {}
        self.tried: Counter[tuple[Any, ...]] = Counter()


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
        self.reason = ""  # why there is no program

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        """Return a state that knows nothing yet: programs are bound to the weights of one layer."""
        layer, inner = copy.deepcopy(self.layer, memo), copy.deepcopy(self.inner, memo)
        return LayerState(layer, self.shared, inner, self.attention)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make a state that knows nothing yet."""
        return LayerState, (self.layer, LayerPrograms(), self.inner, self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        x = args[0] if args else kwargs.get("hidden_states")
        if type(x) is not Tensor or torch.is_grad_enabled() or self.layer.training:
            return self.original(*args, **kwargs)
        if _implementation(self.layer if self.inner is None else self.inner) != self.attention:
            return self.original(*args, **kwargs)
        key = (x.shape, x.dtype)
        for bound in self.known.bound.get(key, ()):
            if bound.fits(args, kwargs):
                return bound(args, kwargs)
        if x.dim() != 3 or x.numel() > MOST_ROWS * x.shape[-1] or not x.is_cpu or self.known.tried[key] >= MOST_TRIED:
            return self.original(*args, **kwargs)
        made = self._bind(key, x.shape[1] > 1, args, kwargs)
        return self.original(*args, **kwargs) if made is None else made(args, kwargs)

    def _bind(
        self, key: tuple[Any, ...], several: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Bound | None:
        """Return a program for calls like this one; None where there is none, or none yet.

        several: tokens of a sequence, as short prompts have them too, which come once.
        """
        if torch.is_autocast_enabled("cpu") or not layer_programs_are_built() or not _is_open(self.layer):
            return None
        self.known.tried[key] += 1
        if several and self.known.tried[key] <= MOST_TRIED // 2:
            return None
        try:
            program, recording = self.shared.rehearse(self.layer, self.original, args, kwargs)
            bound = _Bound(self.layer, program, recording, args, kwargs)
            if not bound.agrees(recording):
                raise UnsupportedError("its program gives other numbers")
        except UnsupportedError as error:
            self.reason = str(error)
            self.known.tried[key] = MOST_TRIED
            log.info("%s runs operation by operation: %s", type(self.layer).__name__, error)
            if self.inner is not None:
                _use(self.inner, self.shared)
            return None
        self.known.bound[key] = [b for b in self.known.bound.get(key, ()) if b.is_current()] + [bound]
        return bound


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return vars(self)[STATE](*args, **kwargs)


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


_CONSTANT, _READ, _TENSOR, _OTHER = range(4)  # kinds of arguments


class _Bound:
    """A program with the weights of one layer, for calls like a recorded one."""

    def __init__(
        self, layer: torch.nn.Module, program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.program, self.attention, self.extra = program, recording.attention, recording.extra
        self.externals = (ctypes.c_int64 * program.externals)()
        self.address = ctypes.addressof(self.externals)
        weights = recording.weights.values()
        self.plain = [(w.tensor, w.address) for w in weights if w.kept is None]
        self.quantized = [w for w in weights if w.kept is not None]
        self.held: list[tuple[dict[str, Any], str, Any]] = [
            (w.holder, w.name, w.tensor) for w in weights if w.kept is None
        ]
        self.held += [(m._modules, name, part) for m in layer.modules() for name, part in m._modules.items()]
        for number, weight in recording.weights.items():
            self.externals[number] = weight.address
        self.reads = [(n, path) for n, path in recording.inputs.items() if n in program.read]
        self.attended = recording.trace.attention.results[0].number
        like = recording.tensors[self.attended]
        self.result_of_attention = (like.shape, like.dtype)
        self.hooks = [h for m in layer.modules() if m is not layer for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.replaced = [("forward" in vars(m), vars(m)) for m in layer.modules() if m is not layer]
        self.count, self.names = len(args), tuple(kwargs)
        paths = {path for _, path in self.reads}
        self.arguments = [(path, *_expected(x, path in paths)) for path, x in leaves(args, kwargs)]
        self.query, self.keys, self.values = program.segments[0].stored
        (self.output,) = program.segments[1].stored
        self.steps: WeakKeyDictionary[Any, CacheStep] = WeakKeyDictionary()  # by the layer of a cache
        self.tensors = tensors = result_tensors(program, self.result_of_attention)
        stored = self.query.external, self.keys.external, self.values.external
        places = (x.data_ptr() for x in (tensors.query, tensors.keys, tensors.values, tensors.attended))
        self.fixed = list(zip((*stored, self.attended), places, strict=True))  # of externals, and their addresses
        scaling = self.attention.options.get("scaling")
        self.options = {
            "scale": self.query.shape[3] ** -0.5 if scaling is None else scaling,
            "softcap": self.attention.options.get("softcap") or 0.0,
        }
        is_causal = self.attention.options.get("is_causal", getattr(self.attention.module, "is_causal", True))
        sinks = self.attention.options.get("s_aux")
        self.is_single = self.query.shape[2] == 1 and bool(is_causal) and sinks is None

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is like the recorded one, and the layer still what it was."""
        if len(args) != self.count or tuple(kwargs) != self.names or torch.is_autocast_enabled("cpu"):
            return False
        for path, kind, expected in self.arguments:
            x = _leaf(args, kwargs, path)
            if kind == _CONSTANT:
                same = x is expected or (type(x) is type(expected) and x == expected)
            elif kind == _READ:
                same = type(x) is Tensor and (x.shape, x.dtype, x.stride()) == expected and x.is_cpu
            elif kind == _TENSOR:
                same = type(x) is Tensor
            else:
                same = type(x) is expected
            if not same:
                return False
        return self.is_current()

    def is_current(self) -> bool:
        """Return whether the layer has the weights and the parts that it had, and nothing hooks into these."""
        for holder, name, thing in self.held:
            if holder.get(name) is not thing:
                return False
        for tensor, address in self.plain:
            if tensor.data_ptr() != address:
                return False
        for was, holder in self.replaced:
            if ("forward" in holder) is not was:
                return False
        return not any(self.hooks) and all(weight.is_current() for weight in self.quantized)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the program."""
        externals, threads = self.externals, torch.get_num_threads()
        for number, path in self.reads:
            externals[number] = _leaf(args, kwargs, path).data_ptr()
        call, cache = self.attention, _leaf(args, kwargs, self.attention.cache)
        mask = None if call.mask is None else _leaf(args, kwargs, call.mask)
        if mask is None and self.is_single:
            step = self._step(cache, threads)
            if step is not None:
                output = self._new(self.output)
                step(cache.layers[call.layer])
                return self._result(output)
        query, keys, values = (self._new(stored) for stored in (self.query, self.keys, self.values))
        run_segment(self.program, 0, externals, self.address, threads)
        read = cache.update(keys, values, call.layer)
        attended, _ = latent_attention(call.module, query, read[0], read[1], mask, **call.options)
        return self._result(self._finish(attended, threads))

    def _step(self, cache: Any, threads: int) -> CacheStep | None:
        """Return the step of a layer of the cache, prepared for this call; None where this is an ordinary one."""
        layer = cache.layers[self.attention.layer]
        step = self.steps.get(layer)
        if step is None or not step.is_current(layer, threads):
            tensors, options = self.tensors, self.options
            if cache.offloading:
                return None
            step = prepare_step(layer, self.program, self.address, tensors, options, threads)
            if step is None:
                return None
            self.steps[layer] = step
        for external, address in self.fixed:
            self.externals[external] = address
        return step

    def _result(self, output: Tensor) -> Any:
        """Return what the layer returns with this output."""
        return output if self.extra < 0 else (output, *(None,) * self.extra)

    def _finish(self, attended: Tensor, threads: int) -> Tensor:
        self.externals[self.attended] = attended.data_ptr()
        output = self._new(self.output)
        run_segment(self.program, 1, self.externals, self.address, threads)
        return output

    def _new(self, stored: Stored) -> Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.externals[stored.external] = tensor.data_ptr()
        return tensor

    def agrees(self, recording: Recording) -> bool:
        """Return whether the program gives what a recorded call gave, from what went into it."""
        threads = torch.get_num_threads()
        for number, _ in self.reads:
            self.externals[number] = recording.arguments[number].data_ptr()
        made = [self._new(stored) for stored in (self.query, self.keys, self.values)]
        run_segment(self.program, 0, self.externals, self.address, threads)
        expected = [recording.tensors[ref.number] for ref in recording.trace.attention.args]
        made.append(self._finish(recording.tensors[self.attended], threads))
        expected.append(recording.tensors[recording.trace.output.number])
        return all(_close(x, y) for x, y in zip(made, expected, strict=True))


def _expected(x: Any, is_read: bool) -> tuple[int, Any]:
    """Return the kind of an argument, and what a call must have there."""
    if isinstance(x, Tensor):
        return (_READ, (x.shape, x.dtype, x.stride())) if is_read else (_TENSOR, None)
    if x is None or isinstance(x, (bool, int, float, str)):
        return _CONSTANT, x
    return _OTHER, type(x)


def _leaf(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    key = path[0]
    x = args[key] if isinstance(key, int) else kwargs[key]
    return x if len(path) == 1 else x[path[1]]


def _close(x: Tensor, y: Tensor) -> bool:
    difference, largest = (x.float() - y.float()).abs().max(), y.float().abs().max()
    return bool(difference <= TOLERANCE[y.dtype] * largest + 1e-6)


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


def _use(layer: torch.nn.Module, shared: LayerPrograms, inner: torch.nn.Module | None = None) -> None:
    """Let a module run as a program, unless something else stands in for it."""
    if "forward" not in vars(layer):
        vars(layer)[STATE] = LayerState(layer, shared, inner, _implementation(layer if inner is None else inner))
        vars(layer)["forward"] = partial(_forward, layer)  # a method would be pickled as the attribute `_forward`


def drop_programs(model: torch.nn.Module) -> None:
    """Undo `use_programs`."""
    for module in model.modules():
        if vars(module).pop(STATE, None) is not None:
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
