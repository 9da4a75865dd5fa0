"""Tracing of a decoder layer's decode step: tensor operations, weights, and attention on the cache.

The layer is called with a mock cache under a torch dispatch mode that records every operation. Everything from the keys
and values passed to `Cache.update` to the attention result is one operation of the trace, so that all other shapes are
the same in every step. Values are numbered in order of first use: layers with the same operations give equal traces.

Letters: B sequences, H query heads, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fhopt.codegen.cpu.skinny_linear import BlockedWeight, SignedBytes, kept_quantized
from fhopt.codegen.layers.trace import ATTENTION, LayerTrace, Ref, TracedOp, TracedValue, UnsupportedError
from fhopt.hf.attention_interface import rehearsed

Path = tuple[int | str, ...]  # of a layer argument: position or name, then index in a tuple
SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_OPTIONS = ("scaling", "dropout", "softcap", "is_causal", "s_aux")  # attention options stored in a recording


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter or buffer: the dictionary that holds it, its name there, the tensor, its address.

    kept: the storage of a quantized weight; one of its components is at `address`.
    """

    holder: dict[str, Any]
    name: str
    tensor: Tensor
    address: int
    kept: SignedBytes | BlockedWeight | None = None

    def is_current(self) -> bool:
        """Return whether the module still has this tensor, at this address."""
        if self.holder[self.name] is not self.tensor:
            return False
        if self.kept is not None:
            return self.kept.is_current(self.tensor)
        return self.tensor.data_ptr() == self.address


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A layer's attention call. cache, mask: their paths among the layer's arguments."""

    module: torch.nn.Module
    layer: int  # index in the cache
    cache: Path
    mask: Path | None
    options: Mapping[str, Any]


@dataclass(eq=False)
class Recording:
    """A trace with the layer's and the call's own data.

    inputs: values that are arguments. weights: values that are weights. tensors: the values at segment borders (query,
    keys, values; attention result; layer output), as the call computed them. arguments: the argument tensors.
    """

    trace: LayerTrace
    inputs: dict[int, Path]
    weights: dict[int, Weight]
    attention: AttentionCall
    tensors: dict[int, Tensor]
    arguments: dict[int, Tensor]
    extra: int  # elements of the result after the first, all None; -1 if the result is a tensor


class _Recorder(TorchDispatchMode):
    """Recording state of one call."""

    def __init__(self, layer: torch.nn.Module, arguments: dict[Path, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments = arguments
        self.paths = {id(x): path for path, x in arguments.items() if isinstance(x, Tensor)}
        weights = list(_weights_of(layer))
        self.named = {id(t): (holder, name, t) for holder, name, t in weights}
        self.quantized = [w for w in weights if type(w[2]) not in (Tensor, torch.nn.Parameter)]
        self.layers = set(map(id, layer.modules()))
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # keeps ids unique
        self.values: list[TracedValue] = []
        self.ops: list[TracedOp] = []
        self.inputs: dict[int, Path] = {}
        self.weights: dict[int, Weight] = {}
        self.pending: tuple[Tensor, Tensor, int] | None = None
        self.attention: AttentionCall | None = None
        self.borders: dict[int, Tensor] = {}
        self.failure: UnsupportedError | None = None
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        if torch.is_inference_mode_enabled():  # inference mode passes composite operations undecomposed
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if not self.paused and self.failure is None:
            try:
                self._record(func, args, kwargs or {}, result)
            except UnsupportedError as error:
                self.failure = error
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else [result]
        traced = tuple(self._reference(x) for x in args)
        named = tuple(sorted((name, self._reference(x)) for name, x in kwargs.items()))
        refs = tuple(self._made(x) for x in results if isinstance(x, Tensor))
        self.ops.append(TracedOp(str(func._schema.name) + _overload(func), traced, named, refs))

    def _reference(self, x: Any) -> Any:
        """Return an argument in trace form: tensors by value number."""
        if isinstance(x, Tensor):
            return Ref(self._number(x))
        if isinstance(x, (list, tuple)):
            return tuple(self._reference(y) for y in x)
        if not isinstance(x, SCALARS):
            raise UnsupportedError(f"an operand of type {type(x).__name__}")
        return x

    def _number(self, x: Tensor) -> int:
        """Return the number of a recorded value, an argument or a weight."""
        known = self.numbers.get(id(x))
        if known is not None:
            return known
        path, weight = self.paths.get(id(x)), self._weight(x)
        if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cpu or x.layout != torch.strided:
            raise UnsupportedError(f"a tensor of type {type(x).__name__}")
        if path is None and weight is None:
            raise UnsupportedError("a tensor that is neither an argument nor a weight of the layer")
        number = self._add(x, "weight" if path is None else "input")
        if path is not None:
            self.inputs[number] = path
        elif weight is not None:
            self.weights[number] = weight
        return number

    def _weight(self, x: Tensor) -> Weight | None:
        """Return the weight that a tensor is, or is a component of."""
        known = self.named.get(id(x))
        if known is not None and type(x) in (Tensor, torch.nn.Parameter):
            return Weight(*known, x.data_ptr())
        for quantized in self.quantized:
            kept = kept_quantized(quantized[2])
            if kept is not None and any(part is x for part in kept.parts):
                return Weight(*quantized, x.data_ptr(), kept)
        return None

    def _made(self, x: Tensor) -> Ref:
        number = self.numbers.get(id(x))  # of an in-place operation
        return Ref(self._add(x, "result") if number is None else number)

    def _add(self, x: Tensor, source: str) -> int:
        number = self.numbers[id(x)] = len(self.values)
        self.alive.append(x)
        self.values.append(TracedValue(source, tuple(x.shape), tuple(x.stride()), x.dtype))
        return number

    # ---- attention

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Record nothing inside the context."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def updated(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record the keys and values written to the cache."""
        if self.pending is not None or self.attention is not None:
            self.failure = self.failure or UnsupportedError("two writes to the cache")
        self.pending = (keys, values, layer)
        return keys, values

    def attended(self, module: Any, query: Tensor, key: Any, value: Any, mask: Any, options: Any, out: Any) -> None:
        """Record attention as one operation."""
        try:
            self._attend(module, query, key, value, mask, options, out)
        except UnsupportedError as error:
            self.failure = self.failure or error

    def _attend(self, module: Any, query: Tensor, key: Any, value: Any, mask: Any, options: Any, out: Any) -> None:
        pending, self.pending = self.pending, None
        if pending is None or key is not pending[0] or value is not pending[1] or id(module) not in self.layers:
            raise UnsupportedError("attention on other keys than the cache returned")
        sinks = options.get("s_aux")
        if options.get("position_bias") is not None or (sinks is not None and id(sinks) not in self.named):
            raise UnsupportedError("attention with a position bias, or with sink logits that are not a weight")
        mask_path = None if mask is None else self.paths.get(id(mask))
        cache = next((path for path, x in self.arguments.items() if _is_cache(x)), None)
        if (mask is not None and mask_path is None) or cache is None:
            raise UnsupportedError("attention with a mask that is not an argument of the layer")
        refs = tuple(Ref(self._number(x)) for x in (query, *pending[:2]))
        if sinks is not None:
            self._number(sinks)
        result = self._made(out)
        self.borders |= {ref.number: x for ref, x in zip((*refs, result), (query, *pending[:2], out), strict=True)}
        self.ops.append(TracedOp(ATTENTION, refs, (), (result,)))
        self.attention = AttentionCall(module, pending[2], cache, mask_path, _kept(options))

    def recording(self, result: Any) -> Recording:
        """Return the recording of a call that returned `result`. Raises UnsupportedError."""
        if self.failure is not None:
            raise self.failure
        first, extra = _parted(result)
        is_plain = isinstance(first, Tensor) and (extra < 0 or all(x is None for x in result[1:]))
        if not is_plain or id(first) not in self.numbers or not first.is_contiguous():
            raise UnsupportedError("a layer that returns more than one tensor")
        if self.attention is None:
            raise UnsupportedError("a layer without attention on the cache")
        number = self.numbers[id(first)]
        trace = LayerTrace(tuple(self.values), tuple(self.ops), Ref(number))
        borders = self.borders | {number: first}
        arguments = {n: self.alive[n] for n in self.inputs}
        return Recording(trace, self.inputs, self.weights, self.attention, borders, arguments, extra)


def rehearse(
    layer: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], later: int
) -> Recording:
    """Run `forward` of a layer once with a mock cache and return the recording; the cache is unchanged.

    later: offset added to the cache length; two traces with different offsets reveal length-dependent code. Raises
    UnsupportedError if the layer does what programs cannot.
    """
    recorder = _Recorder(layer, dict(leaves(args, kwargs)))
    with _attention_stand_in(recorder), recorder:
        result = _beside_the_cache(forward, args, kwargs, recorder.updated, later)
    return recorder.recording(result)


def _beside_the_cache(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], updated: Callable[..., Any], later: int
) -> Any:
    """Call `forward` with mock caches. Raises UnsupportedError if it fails."""

    def replaced(x: Any) -> Any:
        return _CacheStandIn(x, updated, later) if _is_cache(x) else x

    try:
        return forward(*map(replaced, args), **{name: replaced(x) for name, x in kwargs.items()})
    except Exception as error:  # the layer uses the cache in a way that the mock does not support
        raise UnsupportedError(f"its dry run fails ({type(error).__name__}: {error})") from error


@dataclass(eq=False)
class Observation:
    """Inputs of a layer call's cache update and attention, and the call's results.

    borders: query, keys, values and attention result. output: first element of the result. extra: as of `Recording`.
    """

    borders: tuple[Tensor, ...]
    attention: AttentionCall
    output: Any
    extra: int


def observe(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], like: Recording) -> Observation:
    """Run `forward` of a layer once with a mock cache and return its inputs and results; the cache is unchanged.

    like: the recording of a layer of the same structure; operations are not recorded. Raises UnsupportedError if cache,
    mask or result differ from it.
    """
    seen = _Seen(None if like.attention.mask is None else leaf(args, kwargs, like.attention.mask), like.attention)
    with _attention_stand_in(seen):
        result = _beside_the_cache(forward, args, kwargs, seen.updated, 0)
    first, extra = _parted(result)
    if seen.calls != 1 or seen.updates != 1 or seen.attention is None:
        raise UnsupportedError("it calls the cache or attention differently from a layer of the same structure")
    if extra != like.extra or not isinstance(first, Tensor):
        raise UnsupportedError("it returns something else than a layer of the same structure")
    return Observation(seen.borders, seen.attention, first, extra)


class _Seen:
    """Observation state of one call."""

    def __init__(self, mask: Any, like: AttentionCall) -> None:
        self.mask, self.like = mask, like
        self.updates = self.calls = 0
        self.written: tuple[Any, Any, int] = (None, None, 0)
        self.borders: tuple[Tensor, ...] = ()
        self.attention: AttentionCall | None = None

    def pausing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def updated(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.updates += 1
        self.written = keys, values, layer
        return keys, values

    def attended(self, module: Any, query: Tensor, key: Any, value: Any, mask: Any, options: Any, out: Any) -> None:
        keys, values, layer = self.written
        self.calls += 1
        if mask is self.mask and key is keys and value is values and options.get("position_bias") is None:
            self.borders = query, keys, values, out
            self.attention = AttentionCall(module, layer, self.like.cache, self.like.mask, _kept(options))


def _parted(result: Any) -> tuple[Any, int]:
    """Return the first element of a layer's result, and the number of elements after it; -1 if it is not a tuple."""
    return (result[0], len(result) - 1) if isinstance(result, tuple) and result else (result, -1)


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _OPTIONS if options.get(name) is not None}


def _is_cache(x: Any) -> bool:
    return hasattr(x, "get_seq_length") and hasattr(x, "update")


class _CacheStandIn:
    """Mock of a cache for tracing: returns only the new keys and values, and stores nothing.

    later: offset added to the cache length.
    """

    def __init__(self, cache: Any, updated: Callable[..., Any], later: int) -> None:
        self._cache, self._later, self.update = cache, later, updated

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # passes isinstance checks
        return type(self._cache)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return the number of tokens."""
        return self._cache.get_seq_length(*args, **kwargs) + self._later

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"it asks the cache for {name}")


@contextmanager
def _attention_stand_in(recorder: _Recorder | _Seen) -> Iterator[None]:
    """Record this thread's attention inside the context; its result is the new values, a placeholder."""

    def attend(module: Any, query: Tensor, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Tensor:
        with recorder.pausing():
            out = value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()
        recorder.attended(module, query, key, value, mask, options, out)
        return out

    rehearsed.attention = attend
    try:
        yield
    finally:
        rehearsed.attention = None


def leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the arguments of a call with their paths, flattening tuples."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, x in named:
        if isinstance(x, (tuple, list)):
            yield from (((key, i), y) for i, y in enumerate(x))
        else:
            yield (key,), x


def leaf(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    """Return the argument of a call at a path from `leaves`."""
    key = path[0]
    x = args[key] if isinstance(key, int) else kwargs[key]
    return x if len(path) == 1 else x[path[1]]


def _overload(func: Any) -> str:
    return f".{func._schema.overload_name}" if func._schema.overload_name else ""


def _weights_of(layer: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in layer.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name, tensor
