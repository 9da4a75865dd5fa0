"""A model's loop over its decoder layers, if each iteration only calls the layer.

    for layer in self.layers[: self.config.num_hidden_layers]:
        hidden_states = layer(hidden_states, attention_mask=causal_mask, ...)

If decode steps ran ahead (fhopt/hf/steps_ahead.py), nothing happens between two such calls. The layers after the first
then need no module call and no second guard check, which are most of a step's Python time. The model's own `forward`
runs unmodified on a proxy of the model whose layer list holds callables. A callable returns the precomputed result if
its call is the expected one, and otherwise calls the layer. If all calls have the same arguments, the first returns the
result of the last layer, and the loop skips the iterations between. Analysis of the source of `forward` decides whether
a loop qualifies.

A shallow copy of such a module (`copy.copy`) runs the original module, as a shallow copy of a layer with a program
does.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch

from fhopt.hf.steps_ahead import LayerWalk

LOOP = "_fhopt_layer_loop"  # attribute of a module with a layer list
TRUSTED = ("torch", "transformers")  # packages whose decorators call the wrapped function
LOOKS_UP = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Tuple, ast.Compare, ast.BoolOp, ast.IfExp,
    ast.UnaryOp, ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop,
)  # fmt: skip


class SharedState(Protocol):
    """The part of a model's shared state that a loop needs (fhopt/hf/layer_programs.py)."""

    walk: LayerWalk

    def state_of(self, layer: torch.nn.Module, /) -> Any:
        """Return the state of a layer; None if it has none."""


class _Turn:
    """Proxy of a layer in one iteration of a loop."""

    def __init__(self, layer: torch.nn.Module, state: Any, turns: Turns, walk: LayerWalk) -> None:
        self._fhopt_layer, self._fhopt_state, self._fhopt_turns, self._fhopt_walk = layer, state, turns, walk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's result."""
        walk = self._fhopt_walk
        done = walk.due_result(self._fhopt_state, args, kwargs)
        if done is not None:
            return done
        outer, walk.turns = walk.turns, self._fhopt_turns
        try:
            return self._fhopt_layer(*args, **kwargs)
        finally:
            walk.turns = outer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fhopt_layer, name)


class Turns:
    """Proxy of a layer list: iterating over it, or over a slice, yields `_Turn` objects."""

    def __init__(self, layers: torch.nn.ModuleList, shared: SharedState, alike: bool) -> None:
        """`alike`: every iteration has the same arguments except the first argument."""
        self._layers, self.elements = layers, tuple(layers)
        found = [(layer, shared.state_of(layer)) for layer in self.elements]
        self.states = [state for _, state in found if state is not None]
        self._turns = tuple(x if state is None else _Turn(x, state, self, shared.walk) for x, state in found)
        self._walk, self._alike = shared.walk, alike

    def stand_for(self, layers: Any) -> bool:
        """Return whether `layers` is the proxied list, with unchanged elements."""
        if layers is not self._layers or len(layers) != len(self.elements):
            return False
        return all(map(is_, layers._modules.values(), self.elements))

    def __iter__(self) -> Iterator[Any]:
        return _walked(self._turns, self._walk) if self._alike else iter(self._turns)

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self._layers[index]
        found = self._turns[index]
        return _walked(found, self._walk) if self._alike and index.step in (None, 1) else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)


def _walked(turns: tuple[Any, ...], walk: LayerWalk) -> Iterator[Any]:
    """Yield consecutive turns, except those that the previous turn already ran."""
    at = 0
    while at < len(turns):
        walk.may_skip, walk.skipped = (vars(turns[at]).get("_fhopt_state"), len(turns) - at - 1), 0
        yield turns[at]
        at += 1 + walk.skipped


class _WithTurns:
    """Proxy of a module during its forward: the module's attributes, with turns instead of layers."""

    __slots__ = ("_fhopt_given",)

    def __init__(self, module: torch.nn.Module, name: str, turns: Turns) -> None:
        object.__setattr__(self, "_fhopt_given", (module, name, turns))

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(self._fhopt_given[0])

    def __getattr__(self, name: str) -> Any:
        module, layers, turns = self._fhopt_given
        found = getattr(module, name)
        return turns if name == layers and turns.stand_for(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fhopt_given[0], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fhopt_given[0], name)


class LayerLoop:
    """The `forward` of a module that holds a list of layers with programs. name: of the list."""

    def __init__(self, module: torch.nn.Module, name: str, shared: SharedState) -> None:
        self._module, self._name, self._shared = module, name, shared
        self._turns: Turns | None = None
        self._known: tuple[Any, CallLoop | None] = (None, None)  # a forward and its loop

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerLoop:
        """Return the loop for a copy of the module."""
        return LayerLoop(copy.deepcopy(self._module, memo), self._name, self._shared)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments of the constructor."""
        return LayerLoop, (self._module, self._name, self._shared)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        module, walk = self._module, self._shared.walk
        forward = type(module).forward
        turns = self._current_turns(forward) if walk.has_chains() else None
        if turns is None or not walk.has_chain(turns.states):
            return forward(module, *args, **kwargs)
        due, may_skip, walk.due = walk.due, walk.may_skip, None
        try:
            return forward(_WithTurns(module, self._name, turns), *args, **kwargs)
        finally:
            walk.due, walk.may_skip, walk.skipped = due, may_skip, 0

    def _current_turns(self, forward: Callable[..., Any]) -> Turns | None:
        """Return the proxy of the layers; None if the loop must call them as modules."""
        layers = self._module._modules.get(self._name)
        if self._known[0] is not forward:
            self._known, self._turns = (forward, call_loop(forward, self._name)), None
        loop = self._known[1]
        if loop is None or type(layers) is not torch.nn.ModuleList:
            return None
        if self._turns is None or not self._turns.stand_for(layers):
            self._turns = Turns(layers, self._shared, loop.alike)
        return self._turns


# -------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class CallLoop:
    """A loop whose iterations are one call each. `alike`: the arguments are constant, except the previous result."""

    alike: bool


def call_loop(forward: Callable[..., Any], name: str) -> CallLoop | None:
    """Return the loop of a method over the attribute `name` of its object, if each iteration only calls the element.

    The call takes the result of the previous one. The only other expressions in the loop look up attributes and
    elements, and compare them. Returns None if there are several loops, if iterations do more, or if the method uses
    its object for anything but attribute access.
    """
    function = _definition(forward)
    if function is None or not function.args.args:
        return None
    holder = function.args.args[0].arg
    names, attributes = _names(function), [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    of_holder = sum(isinstance(node.value, ast.Name) and node.value.id == holder for node in attributes)
    if names["super"] or names[holder] != of_holder:  # passed on: other code may iterate over its list
        return None
    mentions = [node for node in ast.walk(function) if _is_attribute(node, holder, name)]
    loops = [node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While, ast.AsyncFor))]
    mine = [loop for loop in loops if isinstance(loop, ast.For) and _layer_of(loop, holder, name)]
    if len(mentions) != 1 or len(mine) != 1:
        return None
    (loop,) = mine
    if names["enumerate"] and "enumerate" in getattr(inspect.unwrap(forward), "__globals__", {}):
        return None
    is_within = any(node is loop for other in loops if other is not loop for node in ast.walk(other))
    call = None if is_within else _call_of(loop, str(_layer_of(loop, holder, name)))
    return None if call is None else CallLoop(_is_alike(loop, call, function))


def _is_alike(loop: ast.For, call: ast.Call, function: ast.FunctionDef) -> bool:
    """Return whether the arguments, except the first, and the code after the loop are independent of the iteration."""
    of_turn = _names(loop.target) & (_names(function) - _names(loop))
    changing = {*_names(loop.target), *_names(call.args[0])}
    return not of_turn and not any(changing & set(_names(part)) for part in _rest(call))


def _names(tree: ast.AST) -> Counter[str]:
    """Count the occurrences of each variable."""
    return Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _definition(forward: Callable[..., Any]) -> ast.FunctionDef | None:
    """Return the AST of a function below trusted decorators; None if the source is unavailable."""
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        if str(forward.__globals__.get("__name__")).partition(".")[0] not in TRUSTED:
            return None
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType):
        return None
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, SyntaxError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


def _is_attribute(node: ast.AST, holder: str, name: str) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr != name:
        return False
    return isinstance(node.value, ast.Name) and node.value.id == holder


def _layer_of(loop: ast.For, holder: str, name: str) -> str | None:
    """Return the loop variable over the attribute or its slice, with or without `enumerate`; None for other loops."""
    target, walked = loop.target, loop.iter
    if isinstance(walked, ast.Call):
        is_enumerate = isinstance(walked.func, ast.Name) and walked.func.id == "enumerate" and len(walked.args) == 1
        if not is_enumerate or not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return None
        walked, target = walked.args[0], target.elts[1]
    if isinstance(walked, ast.Subscript) and isinstance(walked.slice, ast.Slice) and not _does_more(walked.slice):
        walked = walked.value
    return target.id if isinstance(target, ast.Name) and _is_attribute(walked, holder, name) else None


def _call_of(loop: ast.For, layer: str) -> ast.Call | None:
    """Return the call if a loop's body is only `x = layer(x, ...)` or `x = layer(x, ...)[0]`."""
    if len(loop.body) != 1 or loop.orelse or not isinstance(loop.body[0], ast.Assign):
        return None
    (target, *others), value = loop.body[0].targets, loop.body[0].value
    call = value.value if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant) else value
    if others or not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or not call.args:
        return None
    first, function, rest = call.args[0], call.func, _rest(call)
    if not isinstance(first, ast.Name) or first.id != target.id:
        return None
    if not isinstance(function, ast.Name) or function.id != layer:
        return None
    of_layer = {id(n.value) for part in rest for n in ast.walk(part) if isinstance(n, ast.Attribute)}
    names = [n for part in rest for n in ast.walk(part) if isinstance(n, ast.Name) and n.id == layer]
    return None if any(map(_does_more, rest)) or any(id(n) not in of_layer for n in names) else call


def _rest(call: ast.Call) -> list[ast.expr]:
    """Return a call's arguments except the first."""
    return [*call.args[1:], *(keyword.value for keyword in call.keywords)]


def _does_more(tree: ast.AST) -> bool:
    """Return whether an expression does more than look up and compare."""
    return not all(isinstance(node, LOOKS_UP) for node in ast.walk(tree))


# ------------------------------------------------------------------------------------------------------- modules


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module that holds a list of layers."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or LOOP not in vars(self):
        return type(self).forward(self, *args, **kwargs)
    return vars(self)[LOOP](*args, **kwargs)


def use_loop(module: torch.nn.Module, name: str, shared: SharedState) -> None:
    """Replace a module's forward by a `LayerLoop` over a list, unless its forward is already replaced."""
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return
    forward = functools.partial(_forward, module)
    signature = _signature(MethodType(type(module).forward, module))
    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    vars(module)[LOOP], vars(module)["forward"] = LayerLoop(module, name, shared), forward


def _signature(method: Callable[..., Any]) -> inspect.Signature | None:
    """Return a method's signature with only picklable parts: no types, plain defaults; None if unknown."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return None
    empty, plain = inspect.Parameter.empty, (bool, int, float, str)

    def default(of: inspect.Parameter) -> Any:
        return of.default if of.default is empty or isinstance(of.default, plain) else None

    return inspect.Signature([p.replace(annotation=empty, default=default(p)) for p in parameters])


def drop_loop(module: torch.nn.Module) -> None:
    """Undo `use_loop`."""
    held = vars(module)
    forward = held.get("forward")
    if held.pop(LOOP, None) is not None and isinstance(forward, functools.partial) and forward.func is _forward:
        del held["forward"]
