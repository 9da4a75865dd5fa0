"""Calls of wrappers: `torch.compile(model, backend="flashhead")(...)` and its methods, such as `generate`.

Decode steps of a model with a plan run as a decode program, as without torch.compile: Dynamo does not trace them, and
inductor does not compile them. All other calls are compiled.

The wrapper from `torch.compile(model)` has the methods of the wrapped model. They call the model instead of the
wrapper, so `generate` silently runs uncompiled code. After `install`, methods of this backend's wrappers run with the
model's calls compiled (`torch.nn.Module._compiled_call_impl`, which `model.compile()` sets permanently). Outside of
such a method the model is unchanged. Wrappers of other backends are not affected.

Attributes and calls of wrappers can be intercepted only in `torch._dynamo.eval_frame.OptimizedModule`, which is
private: tests fail if it changes. Dynamo skips the file of that class, so it must skip the functions here as well:
guards read attributes of wrappers, and a compiled function around a wrapper may call it after a graph break.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, MethodType
from typing import Any, TypeVar

import torch

from fhopt.decode.programs import decode_programs

BACKEND = "flashhead"
_F = TypeVar("_F", bound=Callable[..., Any])
_lock = threading.Lock()
_inside: ContextVar[Mapping[int, Any]] = ContextVar("inside", default=MappingProxyType({}))  # compiled calls, by model


def _skipped(function: _F) -> _F:
    """Make Dynamo skip the function itself, but not what it calls."""
    skipped: _F = torch.compiler.disable(function, recursive=False)
    return skipped


def _untraced(function: _F) -> _F:
    """Make Dynamo skip the function and all that it calls."""
    untraced: _F = torch.compiler.disable(function)
    return untraced


def install() -> None:
    """Make methods of this backend's wrappers call compiled code, and decode steps run as programs. Idempotent."""
    from torch._dynamo.eval_frame import OptimizedModule

    before, call = OptimizedModule.__getattr__, OptimizedModule.__call__
    if getattr(before, "_is_of_fhopt", False):
        return

    @_skipped
    @functools.wraps(before)
    def compiled_attribute(self: Any, name: str) -> Any:
        value = before(self, name)
        is_method = isinstance(value, MethodType) and not hasattr(torch.nn.Module, name)
        if is_method and value.__self__ is self._modules.get("_orig_mod") and _is_ours(self):
            return _compiling(value, self)
        return value

    @_skipped
    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self._modules.get("_orig_mod")
        has_hooks = self._forward_hooks or self._forward_pre_hooks
        if _runs_program(model, args, kwargs) and not has_hooks and _is_ours(self):
            return model(*args, **kwargs)
        return call(self, *args, **kwargs)

    compiled_attribute._is_of_fhopt = True  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = compiled_attribute  # type: ignore[method-assign]
    OptimizedModule.__call__ = run  # type: ignore[method-assign]


@_untraced
def _runs_program(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of a model is a decode step that its decode programs take."""
    programs = None if torch.compiler.is_compiling() else decode_programs(model)
    return programs is not None and programs.takes(args, kwargs)


@_untraced
def _is_ours(wrapper: Any) -> bool:
    from torch._dynamo.eval_frame import innermost_backend

    callback = getattr(wrapper.__dict__.get("dynamo_ctx"), "callback", None)
    return callable(callback) and getattr(innermost_backend(callback), "compiler_name", None) == BACKEND


def _compiling(method: MethodType, wrapper: Any) -> Callable[..., Any]:
    """Wrap a method so that calls of its module are compiled while it runs."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _compiled_calls(method.__self__, wrapper):
            return method(*args, **kwargs)

    return run


@contextmanager
def _compiled_calls(model: Any, wrapper: Any) -> Iterator[None]:
    """Run calls of `model` in this thread compiled with the wrapper's settings, inside the context.

    A model compiled in place is not affected.
    """
    _begin_dispatch(model)
    inside = _inside.get()
    token = _inside.set({**inside, id(model): _compiled_call(model, wrapper)})
    try:
        yield
    finally:
        _inside.reset(token)
        _end_dispatch(model)


def _begin_dispatch(model: Any) -> None:
    with _lock:
        if model._compiled_call_impl is None:
            model._compiled_call_impl = _Dispatch(model)
        if isinstance(model._compiled_call_impl, _Dispatch):
            model._compiled_call_impl.users += 1


def _end_dispatch(model: Any) -> None:
    with _lock:
        dispatch = model._compiled_call_impl
        if isinstance(dispatch, _Dispatch):
            dispatch.users -= 1
            if not dispatch.users:
                model._compiled_call_impl = None


class _Dispatch:
    """A model's call: compiled by the wrapper whose method runs in this thread, else uncompiled."""

    def __init__(self, model: Any) -> None:
        self.plain, self.key, self.users = model._call_impl, id(model), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _inside.get().get(self.key, self.plain)(*args, **kwargs)


def _compiled_call(model: Any, wrapper: Any) -> Any:
    held = wrapper.__dict__.get("_fhopt_call")
    if held is None:
        plain, compiled = model._call_impl, wrapper.dynamo_ctx(model._call_impl)

        def held(*args: Any, **kwargs: Any) -> Any:
            return (plain if _runs_program(model, args, kwargs) else compiled)(*args, **kwargs)

        wrapper.__dict__["_fhopt_call"] = held
    return held


__all__ = ["install"]
