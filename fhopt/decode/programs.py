"""Decode programs of a model: its `forward` runs a program where one fits, and the original otherwise."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook  # no public way to ask for hooks on all modules
from torch.utils._python_dispatch import _get_current_dispatch_mode  # no public way to ask for a mode

from fhopt.codegen import programs_are_built
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.capture import capture_step
from fhopt.decode.dump import dump_program
from fhopt.decode.guards import is_open
from fhopt.decode.program import DecodeProgram
from fhopt.decode.recording_cache import cached_tokens
from fhopt.decode.signature import CallSignature, cache_of
from fhopt.decode.step import Attend

STATE = "_fhopt_decode_programs"  # attribute of a model
MAX_TRIED = 4  # captures per shape
log = logging.getLogger(__name__)


@dataclass(eq=False)
class KnownProgram:
    """A program and the calls that it runs."""

    signature: CallSignature
    program: DecodeProgram


class _Known(threading.local):
    """Per-thread programs: they have tensors of their own."""

    def __init__(self) -> None:
        self.programs: dict[Any, list[KnownProgram]] = {}
        self.tried: Counter[Any] = Counter()


class DecodePrograms:
    """The programs of a model.

    attentions: names of the modules that attend to the cache. attend: their attention function. is_in_use: whether the
    model uses that function. is_own: tells modules whose `forward` fhopt replaced, which programs include.
    """

    def __init__(
        self, model: torch.nn.Module, attentions: tuple[str, ...], attend: Attend,
        is_in_use: Callable[[torch.nn.Module], bool], is_own: Callable[[torch.nn.Module], bool],
    ) -> None:  # fmt: skip
        self.model, self._attentions, self._attend = model, attentions, attend
        self._is_in_use, self._is_own = is_in_use, is_own
        self._known = _Known()
        self.reason = ""  # of the last failure to capture

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodePrograms:
        """Return an empty state for a copy of the model: programs are bound to the addresses of weights."""
        return DecodePrograms(copy.deepcopy(self.model, memo), *self._rest())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty state."""
        return DecodePrograms, (self.model, *self._rest())

    def _rest(self) -> tuple[Any, ...]:
        return self._attentions, self._attend, self._is_in_use, self._is_own

    @property
    def has_program(self) -> bool:
        """Whether this thread has a program."""
        return any(self._known.programs.values())

    @property
    def programs(self) -> list[DecodeProgram]:
        """The programs of this thread."""
        return [known.program for found in self._known.programs.values() for known in found]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        found = self._step_of(args, kwargs)
        if found is not None:
            is_done, result = self._step(found[0], args, kwargs, *found[1:])
            if is_done:
                return result
        return type(self.model).forward(self.model, *args, **kwargs)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is a decode step that runs as a program, or that may be captured as one."""
        found = self._step_of(args, kwargs)
        if found is None:
            return False
        key, _, length = found
        known = self._known.programs.get(key, ())
        if any(x.signature.fits(args, kwargs, length) and x.program.holds(length) for x in known):
            return True
        return self._known.tried[key] < MAX_TRIED and is_open(self.model, self._is_own) and programs_are_built()

    def _step_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, int] | None:
        """Return tokens' shape and dtype, cache, and its length, of a call that may be a decode step; else None."""
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if not isinstance(ids, Tensor) or torch.is_grad_enabled() or not _is_step(ids) or not self._may_run():
            return None
        cache = cache_of(args, kwargs)
        length = 0 if cache is None else cached_tokens(cache)
        return ((ids.shape, ids.dtype), cache, length) if length else None

    def _may_run(self) -> bool:
        if self.model.training or torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None:
            return False
        if _has_any_global_hook():
            return False
        return self._is_in_use(self.model)

    def _step(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, length: int
    ) -> tuple[bool, Any]:
        for known in self._known.programs.get(key, ()):
            if known.signature.fits(args, kwargs, length) and known.program.holds(length):
                is_done, result = known.program.run(args, kwargs, cache, length)
                if is_done:
                    return True, result
        program = self._captured(key, args, kwargs, cache, length)
        return (False, None) if program is None else program.run(args, kwargs, cache, length)

    def _captured(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, length: int
    ) -> DecodeProgram | None:
        """Return a new program for a call; None if there is none (yet)."""
        known = self._known
        if known.tried[key] >= MAX_TRIED or not programs_are_built():
            return None
        if not is_open(self.model, self._is_own):
            self.reason = "a submodule is hooked, wrapped, or of another package"
            return None
        known.tried[key] += 1
        if key[0][1] > 1 and known.tried[key] <= MAX_TRIED // 2:  # short prompts, which may not recur
            return None
        try:
            forward = MethodType(type(self.model).forward, self.model)
            attentions = frozenset(id(self.model.get_submodule(name)) for name in self._attentions)
            captured = capture_step(self.model, forward, args, kwargs, attentions, cache)
            program = DecodeProgram(self.model, captured, self._attend)
        except UnsupportedError as error:
            self.reason = str(error)
            log.info("%s runs operation by operation: %s", type(self.model).__name__, error)
            return None
        current = [p for p in known.programs.get(key, ()) if p.program.guards.hold()]
        dump_program(self.model, program)
        known.programs[key] = [KnownProgram(CallSignature(args, kwargs, length), program), *current]
        return program


def _is_step(ids: Tensor) -> bool:
    """Return whether a call may be a decode step: token ids [B,S], or embeddings [B,S,H], of few tokens, on the CPU."""
    return ids.dim() in (2, 3) and ids.is_cpu and 1 <= ids.shape[0] * ids.shape[1] <= MAX_ROWS


# --------------------------------------------------------------------------------------------------- models


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a model."""
    state = vars(self).get(STATE)  # None if a wrapper still calls this after `drop_programs`
    if state is None or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return state(*args, **kwargs)


def use_programs(
    model: torch.nn.Module, attentions: tuple[str, ...], attend: Attend, is_in_use: Callable[[torch.nn.Module], bool],
    is_own: Callable[[torch.nn.Module], bool],
) -> None:  # fmt: skip
    """Run the decode steps of a model as programs, unless its `forward` is already replaced; as of `DecodePrograms`."""
    if "forward" in vars(model) or isinstance(model, torch.jit.ScriptModule):
        return
    forward = functools.partial(_forward, model)  # pickle looks a method up as attribute `_forward`
    forward.__signature__ = _signature(MethodType(type(model).forward, model))  # type: ignore[attr-defined]
    vars(model)[STATE] = DecodePrograms(model, attentions, attend, is_in_use, is_own)
    vars(model)["forward"] = forward


def drop_programs(model: torch.nn.Module) -> None:
    """Undo `use_programs`."""
    if vars(model).pop(STATE, None) is not None and _is_run(model):  # a wrapper around it stays
        del vars(model)["forward"]


def _is_run(model: torch.nn.Module) -> bool:
    """Return whether `_forward` is a model's own `forward`, unwrapped."""
    forward = vars(model).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward and forward.args == (model,)


def decode_programs(model: torch.nn.Module) -> DecodePrograms | None:
    """Return the programs of a model; None without a plan, or if they are disabled."""
    return vars(model).get(STATE)


def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """Return a method's signature with only picklable parts: no types, plain defaults."""
    empty, plain = inspect.Parameter.empty, (bool, int, float, str)

    def default(of: inspect.Parameter) -> Any:
        return of.default if of.default is empty or isinstance(of.default, plain) else None

    parameters = inspect.signature(method).parameters.values()
    return inspect.Signature([p.replace(annotation=empty, default=default(p)) for p in parameters])
