"""Programs: graphs whose parameters, buffers and inputs are placeholders with example values.

Graphs from Dynamo and lifted graphs from torch.export have this form, so that one implementation of a pass serves both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.plan.cache_size import CacheLayer

# A module whose `forward` was replaced by a bound method, or by a partial of its own, as in fhopt.apply.
_BOUND_FORWARD = re.compile(r"\.forward\.(?:__self__\b|args\[0\])")
_SOURCE_FIELD = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Bound:
    """The computation of an extra input from other inputs, in each call.

    sources: the placeholders it depends on (weights, caches of the user). make: their values -> a tensor of the shape,
    dtype and device of the example. It is called again if a source is another tensor or was changed, and raises
    `errors.Stale` if no value is valid for these sources.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass
class Program:
    """One captured graph.

    module: the graph module, owned by this object (passes change it in place).
    values: real example value of each placeholder, by node name (parameters are the model's own, never changed).
    parameters: placeholder name -> qualified parameter name. buffers: placeholder name -> qualified buffer name.
    bound: name of an extra input (`add_constant`) -> its computation from other inputs.
    layers: what transformers' KV cache stores for each layer of the model; empty if unknown.
    """

    module: fx.GraphModule
    values: dict[str, Any]
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    bound: dict[str, Bound] = field(default_factory=dict)
    layers: tuple[CacheLayer, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    @property
    def weights(self) -> dict[str, Tensor]:
        """Values of the parameters, by their qualified names."""
        return {name: self.values[node] for node, name in self.parameters.items()}

    def is_parameter(self, node: fx.Node) -> bool:
        """Return whether a node is the placeholder of a model parameter."""
        return node.op == "placeholder" and node.name in self.parameters


def copy_program(module: fx.GraphModule, example_inputs: Iterable[Any]) -> Program:
    """Copy a Dynamo graph; Dynamo uses the original again later, so it must not change."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied = graph.node_copy(node, lambda n: mapping[n])
        copied.meta.pop("grapharg", None)
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
        mapping[node] = copied
    out = fx.GraphModule(module, graph)
    out.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        out._param_name_to_source = module._param_name_to_source
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = {n.name: v for n, v in zip(placeholders, example_inputs, strict=True)}
    names = {n.name: source_name(n) for n in placeholders if isinstance(values[n.name], torch.nn.Parameter)}
    buffers = {n.name: source_name(n) for n in placeholders if "._buffers[" in _source_text(n)}
    return Program(out, values, names, {k: v for k, v in buffers.items() if k not in names})


def source_name(node: fx.Node) -> str:
    """Return the qualified name of a Dynamo placeholder: `L['self']._modules['a']...` -> `a.weight`."""
    text = _source_text(node)
    root = re.match(r"[LG]\['[^']*'\](?:\[\d+\])?", text)
    fields = _SOURCE_FIELD.findall(text[root.end() :] if root else text)
    return ".".join(next(part for part in parts if part) for parts in fields) or node.name


def _source_text(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    return _BOUND_FORWARD.sub("", str(text() if callable(text) else text))


def module_path(node: fx.Node) -> str:
    """Return the qualified name of the module in whose forward a node was traced, "" if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    text = stack[-1][0] if stack else ""
    return re.sub(r"^[LG]\['[^']*'\](?:\[\d+\])?\.?", "", _BOUND_FORWARD.sub("", str(text)))
