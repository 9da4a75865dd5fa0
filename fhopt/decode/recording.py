"""Recording of a decode step: every tensor operation of a model's forward, weights, and attention on the cache.

The forward runs on a recording cache under a torch dispatch mode. Everything from the keys and values passed to
`Cache.update` to the attention result is one operation, so that the other values have the same shapes in every step.
The caller's cache is unchanged.

Letters: B sequences, H query heads, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves  # torch's own walk over the arguments of operators

from fhopt.attention.recorded import recorded
from fhopt.codegen.cpu.skinny_linear import BlockedWeight, SignedBytes, kept_quantized
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.arguments import Path, leaves
from fhopt.decode.length import LengthGuard
from fhopt.decode.opaque_modules import recorded_modules, unchanged_state
from fhopt.decode.recording_cache import RecordingCaches

SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_OPTIONS = ("scaling", "dropout", "softcap", "is_causal")  # attention options stored in a recording
_PLAIN = (Tensor, torch.nn.Parameter)
_OF_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ATEN = torch.ops.aten
_EMPTY = {_ATEN.empty, _ATEN.empty_strided, _ATEN.empty_like, _ATEN.new_empty, _ATEN.new_empty_strided}
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.linear.default, torch.ops.fhopt.linear_kernel.default}


@dataclass(frozen=True)
class ValueRef:
    """A recorded value, by its number."""

    number: int


@dataclass(frozen=True)
class CacheRef:
    """The cache argument of the step."""


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """A parameter, buffer or other tensor of a module: the dictionary that holds it, its name there, its address.

    kept: the storage of a quantized weight; one of its components is at `address`.
    """

    holder: dict[str, Any]
    name: str
    tensor: Tensor
    address: int
    kept: SignedBytes | BlockedWeight | None = None


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A layer's attention call. layer: index in the cache."""

    module: torch.nn.Module
    layer: int
    options: Mapping[str, Any]


@dataclass(eq=False)
class RecordedValue:
    """A tensor or number. source: of one that no operation made: a path of the arguments, a weight, "constant"."""

    value: Any
    source: Path | HeldWeight | str | None = None


@dataclass(eq=False)
class RecordedOp:
    """An operation: an OpOverload, "attention", "length", or the name of a module. results: value numbers.

    is_tuple: whether it returns several values. call: of attention.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    is_tuple: bool = False
    call: AttentionCall | None = None


@dataclass(eq=False)
class StepRecording:
    """A recorded call. output: its result, with `ValueRef` and `CacheRef` for tensors and the cache."""

    values: list[RecordedValue]
    ops: list[RecordedOp]
    output: Any
    guards: list[LengthGuard] = field(default_factory=list)


class StepRecorder(TorchDispatchMode):
    """Recording state of one call of a model. opaque: classes of modules that are recorded as one operation."""

    def __init__(self, model: torch.nn.Module, arguments: dict[Path, Any], opaque: frozenset[type]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.opaque = model, opaque
        self.paths = {id(x): path for path, x in arguments.items() if isinstance(x, Tensor)}
        held = list(_tensors_of(model))
        self.named = {id(t): (holder, name, t) for holder, name, t in held}
        self.quantized = [entry for entry in held if type(entry[2]) not in _PLAIN]
        outside = [*[x for x in arguments.values() if isinstance(x, Tensor)], *[t for _, _, t in held]]
        self.lasting = {_storage(x) for x in outside if type(x) in _PLAIN}  # of tensors that outlive the call
        self.numbers: dict[int, int] = {}
        self.values: list[RecordedValue] = []  # keeps tensors alive, and ids unique
        self.ops: list[RecordedOp] = []
        self.guards: list[LengthGuard] = []
        self.unfilled: set[int] = set()  # storages that no recorded operation has written to
        self.pending: tuple[Tensor, Tensor, int] | None = None  # new keys and values, layer
        self.cached: tuple[Tensor, Tensor] | None = None  # what the cache returned for them; attention alone may use it
        self.attentions = 0
        self.computed: set[int] = set()  # numbers of values that follow from a matmul, attention or an opaque module
        self.paused = False
        self.caches: RecordingCaches | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        if torch.is_inference_mode_enabled():  # inference mode passes composite operations undecomposed
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if not self.paused:
            self._check(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            self._record(func, args, kwargs or {}, result)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse what depends on values of tokens, and what writes to an argument or a weight."""
        if any(tag in func.tags for tag in _OF_VALUES) and self._is_computed((args, kwargs)):
            raise UnsupportedError(f"it depends on values of tokens ({func._schema.name})")
        if not func._schema.is_mutable:
            return
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                x = args[index] if index < len(args) else kwargs.get(argument.name)
                if isinstance(x, Tensor) and _storage(x) in self.lasting:
                    raise UnsupportedError(f"it writes to an argument, a weight or a constant ({func._schema.name})")

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is torch.ops.aten.lift_fresh.default and id(args[0]) not in self.numbers:
            self._add(result, "constant")
            self.lasting.add(_storage(result))
            return
        is_tuple = isinstance(result, (tuple, list))
        is_computed = func in _PRODUCTS or self._is_computed((args, kwargs))
        self._check_filled(func, args, kwargs, result)
        refs = [self.reference(x) for x in args]
        named = {name: self.reference(x) for name, x in kwargs.items()}
        made = tuple([self._add(x) for x in (result if is_tuple else [result])])
        self.computed.update(made if is_computed else ())
        self.ops.append(RecordedOp(func, tuple(refs), named, made, is_tuple))

    def _check_filled(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Refuse new memory that something else than a recorded operation fills, such as a C function."""
        if func.overloadpacket in _EMPTY:
            self.unfilled.add(_storage(result))
            return
        touched = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} & self.unfilled
        if not touched:
            return
        if func._schema.is_mutable:
            self.unfilled -= touched
        elif touched - {_storage(x) for x in tree_leaves(result) if isinstance(x, Tensor)}:  # not only a view
            raise UnsupportedError(f"memory that no operation of torch fills ({func._schema.name})")

    def _is_computed(self, x: Any) -> bool:
        """Return whether an argument depends on the values of tokens, further than by their embeddings."""
        if isinstance(x, Tensor):
            return self.numbers.get(id(x)) in self.computed
        if isinstance(x, (tuple, list)):
            return any(map(self._is_computed, x))
        return isinstance(x, dict) and any(map(self._is_computed, x.values()))

    def reference(self, x: Any) -> Any:
        """Return an argument with `ValueRef`s for tensors. Raises UnsupportedError."""
        if isinstance(x, Tensor):
            return ValueRef(self._number(x))
        if isinstance(x, (list, tuple)):
            return tuple(map(self.reference, x))
        if isinstance(x, dict):
            return {name: self.reference(y) for name, y in x.items()}
        if self.caches is not None and self.caches.is_stand_in(x):
            return CacheRef()
        if not isinstance(x, SCALARS):
            raise UnsupportedError(f"an operand of type {type(x).__name__}")
        return x

    def _number(self, x: Tensor) -> int:
        """Return the number of a recorded value, an argument or a weight."""
        known = self.numbers.get(id(x))
        if known is not None:
            return known
        if self.cached is not None and (x is self.cached[0] or x is self.cached[1]):
            raise UnsupportedError("it uses cached keys or values outside attention")
        path, weight = self.paths.get(id(x)), self._weight(x)
        if type(x) not in _PLAIN or not x.is_cpu or x.layout != torch.strided:
            raise UnsupportedError(f"a tensor of type {type(x).__name__}")
        if path is None and weight is None:
            raise UnsupportedError("a tensor that is neither an argument nor a weight of the model")
        return self._add(x, path if path is not None else weight)

    def _weight(self, x: Tensor) -> HeldWeight | None:
        """Return the weight that a tensor is, or is a component of."""
        known = self.named.get(id(x))
        if known is not None and type(x) in _PLAIN:
            return HeldWeight(*known, x.data_ptr())
        for quantized in self.quantized:
            kept = kept_quantized(quantized[2])
            if kept is not None and any(part is x for part in kept.parts):
                return HeldWeight(*quantized, x.data_ptr(), kept)
        return None

    def _add(self, x: Any, source: Path | HeldWeight | str | None = None) -> int:
        """Give a value a number; after an operation in place, a tensor gets a new one."""
        number = len(self.values)
        if isinstance(x, Tensor):
            self.numbers[id(x)] = number
        self.values.append(RecordedValue(x, source))
        return number

    # ---- cache, attention, modules

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Record nothing inside the context."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def updated(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Record the keys and values written to the cache; return stand-ins for all cached ones."""
        if self.pending is not None:
            raise UnsupportedError("two writes to the cache")
        self.pending = (keys, values, layer)
        with self.pausing():
            self.cached = keys.detach(), values.detach()
        return self.cached

    def length_tensor(self, length: Tensor, layer: int) -> Tensor:
        """Record the length of a static cache, which is a tensor."""
        with self.pausing():
            made = length.clone()
        self.ops.append(RecordedOp("length", (CacheRef(), layer), {}, (self._add(made),)))
        return made

    def attend(self, module: Any, query: Tensor, key: Any, value: Any, mask: Any, options: Mapping[str, Any]) -> Tensor:
        """Record attention as one operation. Its result is the new values, a placeholder. Raises UnsupportedError."""
        with self.pausing():
            out = value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()
        if self.paused:
            raise UnsupportedError("attention in a module that runs eagerly")
        pending, cached, self.pending, self.cached = self.pending, self.cached, None, None
        if pending is None or cached is None or key is not cached[0] or value is not cached[1]:
            raise UnsupportedError("attention on other keys than the cache returned")
        if options.get("position_bias") is not None:
            raise UnsupportedError("attention with a position bias")
        refs = tuple([self.reference(x) for x in (query, *pending[:2], mask, options.get("s_aux"))])
        call = AttentionCall(module, pending[2], {n: options[n] for n in _OPTIONS if options.get(n) is not None})
        made = self._add(out)
        self.computed.add(made)
        self.ops.append(RecordedOp("attention", (CacheRef(), *refs), {}, (made,), call=call))
        self.attentions += 1
        return out

    def called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module, and record it as one operation. Raises UnsupportedError if it does not return tensors."""
        refs, named = tuple(map(self.reference, args)), {n: self.reference(x) for n, x in kwargs.items()}
        with self.pausing():
            result = forward(*args, **kwargs)
        is_tuple = isinstance(result, tuple)
        results = result if is_tuple else (result,)
        if not all(isinstance(x, (Tensor, type(None))) for x in results):
            raise UnsupportedError(f"{name} returns something else than tensors")
        made = tuple([self._add(x) for x in results])
        self.computed.update(made)
        self.ops.append(RecordedOp(name, refs, named, made, is_tuple))
        return result

    def finished(self, result: Any) -> StepRecording:
        """Return the recording of a call that returned `result`. Raises UnsupportedError."""
        if self.pending is not None or not self.attentions:
            raise UnsupportedError("a step without attention on the cache")
        return StepRecording(self.values, self.ops, self._template(result), self.guards)

    def _template(self, x: Any) -> Any:
        """Return the result with references; dictionaries (as transformers' outputs are) keep their class."""
        if isinstance(x, dict):
            return (type(x), {name: self._template(y) for name, y in x.items()})
        if type(x) in (tuple, list):
            return (type(x), [self._template(y) for y in x])
        return self.reference(x)


def record_step(
    model: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], offset: int,
    opaque: frozenset[type] = frozenset(),
) -> StepRecording:  # fmt: skip
    """Run `forward` of a model once on a recording cache, and return the recording; cache and model are unchanged.

    offset: added to the cache length, and to the lengths of masks among the arguments. opaque: classes of modules that
    are one operation each. Raises UnsupportedError if the model does what programs cannot.
    """
    caches = RecordingCaches(offset)
    args, kwargs = caches.replaced(args, kwargs)
    recorder = StepRecorder(model, dict(leaves(args, kwargs)), opaque)
    recorder.caches = caches
    caches.recorder = recorder
    recorded.attention = recorder.attend
    try:
        with torch.random.fork_rng(devices=[]), unchanged_state(model, opaque), recorded_modules(recorder), recorder:
            result = forward(*args, **kwargs)
        return recorder.finished(result)
    finally:
        recorded.attention = None


def _storage(x: Tensor) -> int:
    """Return a key of the storage of a tensor, which is alive."""
    return x.untyped_storage()._cdata


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the parameters, buffers and tensor attributes of all modules, with their dictionaries and names."""
    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, tensor in holder.items():
                if isinstance(tensor, Tensor):
                    yield holder, name, tensor
