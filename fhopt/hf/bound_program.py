"""A layer program bound to one layer's weights: its guard checks and its execution.

Letters: B sequences, H query heads, S new tokens, D head size, E value head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from fhopt.codegen.layers.held_objects import Entry, HeldObjects
from fhopt.codegen.layers.program import LayerProgram, Stored, run_segment
from fhopt.hf.attention_interface import latent_attention_forward
from fhopt.hf.cache_steps import CacheStep, prepare_step, result_tensors
from fhopt.hf.layer_trace import Recording, Weight, leaf, leaves

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative to the largest absolute value

_CONSTANT, _READ, _TENSOR, _OTHER = range(4)  # argument kinds


@dataclass(eq=False, slots=True)
class ReadyStep:
    """A step with all addresses set. read: tensors that the program loads; result: the layer's return value."""

    bound: BoundProgram
    step: CacheStep
    read: list[Tensor]
    output: Tensor
    result: Any


class Conditions:
    """Guards of layer programs: the program may run only if the layers are unchanged since tracing.

    held: dictionaries with the names and objects in them; hooks: dictionaries that must be empty; weights: plain ones,
    checked by address, and quantized ones.
    """

    def __init__(self, held: Iterable[Entry], hooks: Iterable[dict[Any, Any]], weights: Iterable[Weight]) -> None:
        self.objects, self.weights = HeldObjects(held, hooks), tuple(weights)
        plain = [w for w in self.weights if w.kept is None]
        self._quantized = [w for w in self.weights if w.kept is not None]
        self._plain, self._addresses = [w.tensor for w in plain], [w.address for w in plain]

    def hold(self) -> bool:
        """Return whether all guards pass."""
        if not self.objects.are_held() or list(map(Tensor.data_ptr, self._plain)) != self._addresses:
            return False
        return all(weight.is_current() for weight in self._quantized)


class BoundProgram:
    """A layer program with the weights of one layer, for calls like the recorded one."""

    def __init__(
        self, layer: torch.nn.Module, program: LayerProgram, recording: Recording, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.program, self.attention, self.extra = program, recording.attention, recording.extra
        self.externals = (ctypes.c_int64 * program.externals)()
        self.address = ctypes.addressof(self.externals)
        weights, inner = recording.weights.values(), [m for m in layer.modules() if m is not layer]
        held: list[Entry] = [(w.holder, w.name, w.tensor) for w in weights if w.kept is None]
        held += [(m._modules, name, part) for m in layer.modules() for name, part in m._modules.items()]
        held += [(vars(m), "forward", vars(m).get("forward")) for m in inner]
        hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.conditions = Conditions(held, hooks, weights)
        for number, weight in recording.weights.items():
            self.externals[number] = weight.address
        self.reads = [(n, path) for n, path in recording.inputs.items() if n in program.read]
        self.attended = recording.trace.attention.results[0].number
        like = recording.tensors[self.attended]
        self.result_of_attention = (like.shape, like.dtype)
        self.count, self.names = len(args), tuple(kwargs)
        paths = {path for _, path in self.reads}
        self.arguments = tuple([(path, *_expected(x, path in paths)) for path, x in leaves(args, kwargs)])
        self.query, self.keys, self.values = program.segments[0].stored
        (self.output,) = program.segments[1].stored
        self.steps: WeakKeyDictionary[Any, CacheStep] = WeakKeyDictionary()  # by the layer of a cache
        self.tensors = tensors = result_tensors(program, self.result_of_attention)
        stored = self.query.external, self.keys.external, self.values.external
        places = (x.data_ptr() for x in (tensors.query, tensors.keys, tensors.values, tensors.attended))
        self.fixed = list(zip((*stored, self.attended), places, strict=True))  # externals and their addresses
        self.are_fixed = False  # whether these addresses are set
        self.stride = args[0].stride() if args and isinstance(args[0], Tensor) else None
        self.recent: tuple[Any, Any] = (None, None)  # cache of `steps`: weak references to a cache layer and its step
        scaling = self.attention.options.get("scaling")
        self.options = {
            "scale": self.query.shape[3] ** -0.5 if scaling is None else scaling,
            "softcap": self.attention.options.get("softcap") or 0.0,
        }
        is_causal = self.attention.options.get("is_causal", getattr(self.attention.module, "is_causal", True))
        sinks = self.attention.options.get("s_aux")
        self.is_single = self.query.shape[2] == 1 and bool(is_causal) and sinks is None

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call matches the recorded one and the layer's guards pass."""
        if len(args) != self.count or tuple(kwargs) != self.names or torch.is_autocast_enabled("cpu"):
            return False
        for path, kind, expected in self.arguments:
            x = leaf(args, kwargs, path)
            if kind == _CONSTANT:
                same = type(x) is expected[0] and x == expected[1]
            elif kind == _READ:
                same = type(x) is Tensor and (x.shape, x.dtype, x.stride()) == expected and x.is_cpu
            elif kind == _TENSOR:
                same = type(x) is Tensor
            else:
                same = type(x) is expected
            if not same:
                return False
        return self.is_current()

    def fits_as(self, other: BoundProgram) -> bool:
        """Return whether the program fits a call that `other`, bound to another layer, fits with the same arguments."""
        return self.arguments is other.arguments and self.is_current()

    def takes(self, x: Tensor) -> bool:
        """Return whether `x` has the strides of the recorded first argument."""
        return x.stride() == self.stride

    def is_current(self) -> bool:
        """Return whether the layer's weights, submodules and hooks are unchanged."""
        return self.conditions.hold()

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReadyStep | None:
        """Return this call's decode step with every address set; None if it is not a single-token step on a cache.

        Run or discard the step before another one of this program is made ready.
        """
        mask = self.attention.mask
        if not self.is_single or (mask is not None and leaf(args, kwargs, mask) is not None):
            return None
        step = self._step(leaf(args, kwargs, self.attention.cache), torch.get_num_threads())
        if step is None:
            return None
        return self.made_ready(step, self._read(args, kwargs))

    def made_ready(self, step: CacheStep, read: list[Tensor]) -> ReadyStep:
        """Return the step with a new output. read: tensors that the program loads; their addresses are set."""
        output = self._new(self.output)
        return ReadyStep(self, step, read, output, self._result(output))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the program with an ordinary attention call."""
        threads = torch.get_num_threads()
        self.are_fixed = False
        self._read(args, kwargs)
        call, cache = self.attention, leaf(args, kwargs, self.attention.cache)
        mask = None if call.mask is None else leaf(args, kwargs, call.mask)
        query, keys, values = (self._new(stored) for stored in (self.query, self.keys, self.values))
        run_segment(self.program, 0, self.externals, self.address, threads)
        read = cache.update(keys, values, call.layer)
        attended, _ = latent_attention_forward(call.module, query, read[0], read[1], mask, **call.options)
        return self._result(self._finish(attended, threads))

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Set the addresses of a call's arguments, and return the tensors that the program loads."""
        read = [leaf(args, kwargs, path) for _, path in self.reads]
        for (number, _), tensor in zip(self.reads, read, strict=True):
            self.externals[number] = tensor.data_ptr()
        return read

    def _step(self, cache: Any, threads: int) -> CacheStep | None:
        """Return the prepared step of a cache layer; None if the call needs an ordinary attention call."""
        layer = cache.layers[self.attention.layer]
        if getattr(cache, "warns", False):  # earlier steps may have quantized the first tokens
            cache.tell_unlike_text()
        step = self.prepared(layer, threads)
        if step is None:
            tensors, options = self.tensors, self.options
            if cache.offloading:
                return None
            step = prepare_step(layer, self.program, self.address, tensors, options, threads)
            if step is None:
                return None
            self.steps[layer] = step
            self.recent = ref(layer), ref(step)
        if not self.are_fixed:
            for external, address in self.fixed:
                self.externals[external] = address
            self.are_fixed = True
        return step

    def prepared(self, layer: Any, threads: int) -> CacheStep | None:
        """Return the step prepared for a cache layer if it may run again."""
        known, of_it = self.recent
        step: CacheStep | None = of_it() if known is not None and known() is layer else self.steps.get(layer)
        return step if step is not None and (step.is_current(layer, threads) or step.move(layer, threads)) else None

    def _result(self, output: Tensor) -> Any:
        """Return the layer's return value for this output."""
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
        """Return whether the program reproduces the results of a recorded call."""
        threads = torch.get_num_threads()
        self.are_fixed = False
        for number, _ in self.reads:
            self.externals[number] = recording.arguments[number].data_ptr()
        made = [self._new(stored) for stored in (self.query, self.keys, self.values)]
        run_segment(self.program, 0, self.externals, self.address, threads)
        expected = [recording.tensors[ref.number] for ref in recording.trace.attention.args]
        made.append(self._finish(recording.tensors[self.attended], threads))
        expected.append(recording.tensors[recording.trace.output.number])
        return all(_close(x, y) for x, y in zip(made, expected, strict=True))


def _expected(x: Any, is_read: bool) -> tuple[int, Any]:
    """Return the kind of an argument, and what a call must pass for it."""
    if isinstance(x, Tensor):
        return (_READ, (x.shape, x.dtype, x.stride())) if is_read else (_TENSOR, None)
    if x is None or isinstance(x, (bool, int, float, str)):
        return _CONSTANT, (type(x), x)
    return _OTHER, type(x)


def _close(x: Tensor, y: Tensor) -> bool:
    difference, largest = (x.float() - y.float()).abs().max(), y.float().abs().max()
    return bool(difference <= TOLERANCE[y.dtype] * largest + 1e-6)
