"""Modules that are one operation of a recorded decode step, because what they do depends on values or on other state.

Experts that are chosen by tokens, and recurrent layers with a state in the cache or in themselves, run as in the model.
They are found when a recording fails: the outermost module without attention in which it failed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode  # no public way to ask for a mode

from fhopt.codegen.programs.errors import UnsupportedError


class StatefulError(UnsupportedError):
    """A module changes its own attributes in a step. module: which."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(f"{type(module).__name__} changes its attributes in each step")
        self.module = module


def failed_module(model: torch.nn.Module, error: BaseException, attentions: frozenset[int]) -> torch.nn.Module | None:
    """Return the outermost module in whose forward an exception was raised; not one like those with attention.

    attentions: ids of the modules that attend to the cache. Decoder layers of one class may have attention or not.
    """
    attends = {id(m) for m in model.modules() if any(id(part) in attentions for part in m.modules())}
    kinds = {type(module) for module in model.modules() if id(module) in attends}
    lists = [{id(part) for part in m} for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    siblings = {key for members in lists if not attends.isdisjoint(members) for key in members}
    chain = _parents(model, error.module) if isinstance(error, StatefulError) else _running(model, error)
    found: torch.nn.Module | None = None
    for module in chain:
        found = None if type(module) in kinds or id(module) in siblings else found or module
    return found


def _running(model: torch.nn.Module, error: BaseException) -> Iterator[torch.nn.Module]:
    """Yield the modules in whose forward an exception was raised, from the outermost on."""
    trace, known = error.__traceback__, {id(module) for module in model.modules()}
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and id(module) in known and trace.tb_frame.f_code.co_name == "forward":
            yield module
        trace = trace.tb_next


def _parents(model: torch.nn.Module, module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield a module of a model and those that contain it, from the outermost on."""
    names = next(name for name, m in model.named_modules() if m is module).split(".")
    for count in range(len(names) + 1):
        yield model.get_submodule(".".join(names[:count]))


@contextmanager
def unchanged_state(model: torch.nn.Module, opaque: frozenset[type]) -> Iterator[None]:
    """Restore replaced attributes, and the buffers of opaque modules, after the context.

    Attributes that are added stay: transformers marks models whose layers it has hooked.
    Raises StatefulError at its end, if a module that is not opaque, nor inside one, changed an attribute.
    """
    inside = {id(part) for m in model.modules() if type(m) in opaque for part in m.modules()}
    before = [(m, holder, dict(holder)) for m in model.modules() for holder in (vars(m), m._buffers, m._parameters)]
    states = [x for m, holder, _ in before if id(m) in inside and holder is not m._parameters for x in holder.values()]
    tensors = [x for x in states if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)]
    copies = [(x, x.clone(), x._version) for x in tensors]
    changed: list[torch.nn.Module] = []
    try:
        yield
    finally:
        for module, holder, held in before:
            if any(holder.get(name) is not x for name, x in held.items()):
                changed += [module] if id(module) not in inside else []
                holder.update(held)
        for x, copy, version in copies:
            if x._version != version:
                x.copy_(copy)
    if changed:
        raise StatefulError(changed[0])


@contextmanager
def recorded_modules(recorder: Any) -> Iterator[None]:
    """Record the calls of opaque modules inside the context as single operations of `recorder`."""
    replaced: list[tuple[torch.nn.Module, Any]] = []
    if recorder.opaque:
        for name, module in recorder.model.named_modules():
            if type(module) in recorder.opaque:
                replaced.append((module, vars(module).get("forward")))
                vars(module)["forward"] = functools.partial(_called, recorder, name, module.forward)
    try:
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before


def _called(recorder: Any, name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
    mode: Any = _get_current_dispatch_mode()
    if recorder.paused or mode is not recorder:
        return forward(*args, **kwargs)  # inside another one, or a call of another thread
    return recorder.called(name, forward, args, kwargs)
