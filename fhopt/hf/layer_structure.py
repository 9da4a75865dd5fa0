"""Decoder layers of the same structure, which can share a recording with their own weights.

A model has dozens of layers of one class and configuration that differ in weights and layer index. Two layers have the
same structure if their modules have the same names, classes and attributes (scalars and strings by value, other objects
by identity), their weights the same shapes, and their calls the same arguments. Code that depends on the layer index is
detected by running a clone with another index (`twin_of`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpu.skinny_linear import BlockedWeight, SignedBytes, kept_quantized
from fhopt.codegen.layers.trace import UnsupportedError
from fhopt.hf.layer_trace import SCALARS, Weight, leaves

_NUMBERS = {"layer_idx", "layer_index", "layer_id", "layer_number"}  # layer index attributes
_PARTS = ("_parameters", "_buffers")
# `forward`: set on linear layers that fhopt replaces; `extra_repr`: set by torchao on modules with quantized weights.
_OF_ALL = {*vars(torch.nn.Module()), "forward", "extra_repr"} - {"training"}


def structure_of(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Return a structural hash key, equal for layers with the same structure and call arguments."""
    modules = [(name, type(module), _attributes(module), _shapes(module)) for name, module in _modules(layer).items()]
    return tuple(modules), tuple([(path, _kind(x)) for path, x in leaves(args, kwargs)])


def twin_of(layer: torch.nn.Module, is_renumbered: bool) -> torch.nn.Module:
    """Return a clone of a layer with the same weights, optionally with another layer index.

    The clone has module objects of its own, so that concurrent calls of `layer` are unaffected. A replaced
    `forward` is not copied.
    """
    twin: torch.nn.Module = object.__new__(type(layer))
    attributes = {name: x for name, x in vars(layer).items() if name != "forward"}
    if is_renumbered:
        numbers = {name: x for name, x in attributes.items() if name in _NUMBERS and type(x) is int}
        attributes |= {name: 0 if x else 1 for name, x in numbers.items()}
    parts = layer._modules.items()
    attributes["_modules"] = {name: None if part is None else twin_of(part, is_renumbered) for name, part in parts}
    vars(twin).update(attributes)
    return twin


def _modules(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return dict(layer.named_modules(remove_duplicate=False))


def _attributes(module: torch.nn.Module) -> Hashable:
    named = [(n, x) for n, x in vars(module).items() if n not in _OF_ALL and n not in _NUMBERS and "fhopt" not in n]
    return tuple([(name, x if isinstance(x, SCALARS) else (type(x), id(x))) for name, x in named])


def _shapes(module: torch.nn.Module) -> Hashable:
    return tuple([(n, None if x is None else _kind(x)) for part in _PARTS for n, x in vars(module)[part].items()])


def _kind(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        strides = x.stride() if x.layout == torch.strided else None
        return type(x), x.shape, strides, x.dtype, x.layout, x.device, _looks(_kept(x))
    return (type(x), x if isinstance(x, SCALARS) else None)


@dataclass(frozen=True)
class WeightPlace:
    """The location of a weight in a layer: module name, dictionary of the module, name in it.

    place: which component of a quantized weight; looks: its quantized format (`_looks`).
    """

    module: str
    part: str
    name: str
    place: int
    looks: Hashable = None

    def of(self, modules: Mapping[str, torch.nn.Module]) -> Weight:
        """Return the weight at this location of a layer, given its modules by name.

        Raises UnsupportedError for a weight that programs cannot load.
        """
        holder = vars(modules[self.module])[self.part]
        tensor = holder[self.name]
        kept = _kept(tensor)
        if kept is None and not _is_plain(tensor):
            raise UnsupportedError(f"a weight of type {type(tensor).__name__}")
        read = tensor if kept is None else kept.parts[self.place]
        if _looks(kept) != self.looks:
            raise UnsupportedError("a weight that is stored differently in a layer of the same structure")
        return Weight(holder, self.name, tensor, read.data_ptr(), kept)


def weight_places(layer: torch.nn.Module, weights: Mapping[int, Weight]) -> dict[int, WeightPlace]:
    """Return the locations of a recording's weights, by value number."""
    holders = {id(vars(module)[part]): (name, part) for name, module in _modules(layer).items() for part in _PARTS}
    return {number: WeightPlace(*holders[id(w.holder)], w.name, *_place(w)) for number, w in weights.items()}


def _place(weight: Weight) -> tuple[int, Hashable]:
    """Return the index of the component at a quantized weight's address, and the format."""
    if weight.kept is None:
        return 0, None
    place = [part.data_ptr() for part in weight.kept.parts].index(weight.address)
    return place, _looks(weight.kept)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def _kept(x: Tensor) -> SignedBytes | BlockedWeight | None:
    """Return the quantized storage of a weight; None if it is a plain tensor or has no kernel."""
    return None if _is_plain(x) else kept_quantized(x)


def _looks(kept: SignedBytes | BlockedWeight | None) -> Hashable:
    """Return a key that is equal for weights that one program can load: format, dtypes, shapes and strides."""
    if kept is None:
        return None
    return getattr(kept, "format", None), tuple([(part.dtype, part.shape, part.stride()) for part in kept.parts])


def weights_at(layer: torch.nn.Module, places: Mapping[int, WeightPlace]) -> dict[int, Weight]:
    """Return the weights of a layer at these locations. Raises UnsupportedError."""
    modules = _modules(layer)
    return {number: place.of(modules) for number, place in places.items()}
