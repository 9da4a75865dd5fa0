"""Guards of decode programs: a program runs only if the model is as it was when its step was captured.

Guarded are the dictionaries of all modules: parameters and buffers by identity and address, submodules, hooks and other
attributes by identity; numbers and strings in configurations; the classes of modules and their methods. Native code
checks dictionaries: by the next step, streaming the weights has evicted these objects from the CPU caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.programs.held_objects import Entry, HeldObjects
from fhopt.decode.recording import SCALARS, HeldWeight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_OF_ALL = {*vars(torch.nn.Module())} - {*_HOOKS, "_parameters", "_buffers", "_modules", "training"}  # not guarded
_RECORDS = "transformers.utils.output_capturing"  # its hooks return hidden states, which are in the captured result


class ModelGuards:
    """What a program assumes about its model. weights: those that it reads."""

    def __init__(self, model: torch.nn.Module, weights: Iterable[HeldWeight]) -> None:
        weights, self._modules = tuple(weights), list(model.modules())
        inner = self._modules[1:]
        plain = [weight for weight in weights if weight.kept is None]
        self._quantized = [weight for weight in weights if weight.kept is not None]
        self._plain, self._addresses = [w.tensor for w in plain], [w.address for w in plain]
        held: list[Entry] = [(weight.holder, weight.name, weight.tensor) for weight in weights]
        held += [(m._modules, name, part) for m in self._modules for name, part in m._modules.items()]
        held += [(vars(m), "forward", vars(m).get("forward")) for m in inner]
        held += [entry for m in self._modules for entry in _attributes(m)]
        held += [entry for config in _configurations(self._modules) for entry in _numbers(config)]
        hooks = [vars(m)[name] for m in inner for name in _HOOKS]
        self._filled = [(x, len(x)) for x in hooks if x]
        held += [(x, key, hook) for x, _ in self._filled for key, hook in x.items()]
        self._objects = HeldObjects(held, [x for x in hooks if not x])
        self._kinds = list(map(type, self._modules))
        kinds: list[Any] = list(dict.fromkeys(self._kinds))
        self._methods = [(kind, kind.forward, kind.__call__) for kind in kinds]

    def hold(self) -> bool:
        """Return whether all guards pass."""
        if not self._objects.are_held() or list(map(Tensor.data_ptr, self._plain)) != self._addresses:
            return False
        if list(map(type, self._modules)) != self._kinds or any(len(x) != count for x, count in self._filled):
            return False
        if any(kind.forward is not forward or kind.__call__ is not call for kind, forward, call in self._methods):
            return False
        return all(weight.kept is None or weight.kept.is_current(weight.tensor) for weight in self._quantized)


def is_open(model: torch.nn.Module, is_own: Any) -> bool:
    """Return whether no hook or wrapper of a submodule would be bypassed by a program.

    is_own: tells modules whose `forward` fhopt replaced. Modules of other packages, such as adapters that can be
    switched on and off, are not open.
    """
    home = type(model).__module__.partition(".")[0]
    for module in model.modules():
        if module._backward_hooks:
            return False
        if module is not model:  # its own hooks run around a program
            is_replaced = "forward" in vars(module) and not is_own(module)
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if is_replaced or any(getattr(hook, "__module__", None) != _RECORDS for hook in hooks):
                return False
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers", "fhopt", home):
            return False
    return True


def _attributes(module: torch.nn.Module) -> list[Entry]:
    """Return the entries of a module's own attributes, except tensors, which are guarded if a program reads them."""
    own = vars(module)
    return [(own, n, x) for n, x in own.items() if n not in _OF_ALL and n != "forward" and not isinstance(x, Tensor)]


def _numbers(config: Any) -> list[Entry]:
    """Return the entries of a configuration that are numbers, strings or None."""
    return [(vars(config), n, x) for n, x in vars(config).items() if isinstance(x, SCALARS)]


def _configurations(modules: Iterable[torch.nn.Module]) -> list[Any]:
    """Return the configurations that modules hold, and those inside them."""
    found: dict[int, Any] = {}
    pending = [x for module in modules for x in vars(module).values()]
    while pending:
        x = pending.pop()
        if hasattr(x, "model_type") and hasattr(x, "to_dict") and id(x) not in found:
            found[id(x)] = x
            pending += vars(x).values()
    return list(found.values())
