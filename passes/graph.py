"""Graphs as every pass sees them: a program that can be copied, printed, searched, and run in part.

A `Program` is an fx graph whose parameters, buffers and inputs are all placeholders with real example values: the form
of Dynamo's graphs and of `torch.export`'s lifted graphs alike, so one implementation of each pass serves both.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fhopt.errors import Miss

VIEW_NAMES = (
    "t transpose permute view reshape getitem T mT contiguous to type_as chunk split cat squeeze unsqueeze "
    "numpy_T slice select detach alias"
)
VIEWS = frozenset(VIEW_NAMES.split())
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SOURCE_FIELD = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")


@dataclass
class Program:
    """One captured graph.

    module: the graph module, owned by this object (passes change it in place).
    values: real example value of each placeholder, by node name (parameters are the model's own, never changed).
    parameters: placeholder name -> qualified parameter name.
    """

    module: fx.GraphModule
    values: dict[str, Any]
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    def is_parameter(self, node: fx.Node) -> bool:
        """True for a placeholder that is a parameter of the model."""
        return node.op == "placeholder" and node.name in self.parameters


def copy_program(module: fx.GraphModule, example_inputs: Iterable[Any]) -> Program:
    """A private copy of a Dynamo graph: the incoming one is re-read by Dynamo and must not change."""
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
    return Program(out, values, names)


def source_name(node: fx.Node) -> str:
    """Qualified name of a Dynamo placeholder, from where Dynamo read it: `L['self']._modules['a']...` -> `a.weight`."""
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    text = text() if callable(text) else text
    root = re.match(r"[LG]\['[^']*'\](?:\[\d+\])?", text)
    fields = _SOURCE_FIELD.findall(text[root.end() :] if root else text)
    return ".".join(next(part for part in parts if part) for parts in fields) or node.name


# --------------------------------------------------------------------------------------------------- reading nodes


def op_name(node: fx.Node) -> str:
    """Bare name of what a node calls, the same for `torch.matmul`, `@`, `Tensor.matmul` and `aten.matmul.default`."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1])
    if target is getattr:
        return str(node.args[1])
    return str(getattr(target, "__name__", target))


def fake(node: fx.Node) -> Any:
    """The fake value that tracing left on the node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of a tensor node (ints or symbols), None for anything else."""
    value = fake(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape that the example inputs give a tensor node: symbols become their hints. Nothing is run."""
    found = shape(node)
    if found is None:
        raise Miss(f"{node.name} is not a tensor", node)
    return tuple(int(d.node.hint) if isinstance(d, torch.SymInt) else int(d) for d in found)


def source_line(node: fx.Node) -> str:
    """`folder/file.py:line` of the user code that made the node, "" when unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    path, line = frames[-1]
    return "/".join(path.split("/")[-2:]) + f":{line}"


# --------------------------------------------------------------------------------------------------- running parts


class Evaluator(fx.Interpreter):
    """Runs any part of a program on its example values, each node once, on demand.

    Inputs that are not parameters are cloned first, so that in-place nodes cannot touch the caller's tensors.
    """

    def __init__(self, program: Program, given: Mapping[fx.Node, Any] | None = None, promote: bool = False) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.program = program
        self.promote = promote
        self.env = dict(given or {})

    def run_node(self, n: fx.Node) -> Any:
        """A placeholder gives its example value (SymInts their hint), any other node is run."""
        if n.op != "placeholder":
            value = super().run_node(n)
            return _promote(value) if self.promote else value
        value = self.program.values[n.name]
        if isinstance(value, Tensor):
            return value.detach() if n.name in self.program.parameters else value.detach().clone()
        return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value  # int() would guard

    @torch.no_grad()
    def value(self, node: fx.Node) -> Any:
        """Value of `node`; computes its ancestors that are not known yet."""
        for ancestor in self._needed(node):
            self.env[ancestor] = self.run_node(ancestor)
        return self.env[node]

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """Unknown ancestors of `node` and itself, inputs first."""
        order: list[fx.Node] = []
        seen: set[fx.Node] = set()
        stack = [(node, False)]
        while stack:
            current, expanded = stack.pop()
            if expanded:
                order.append(current)
            elif current not in seen and current not in self.env:
                seen.add(current)
                stack.append((current, True))
                stack.extend((source, False) for source in current.all_input_nodes)
        return order


def run_region(base: Evaluator, given: Mapping[fx.Node, Tensor], end: fx.Node, limit: int = 400) -> Tensor:
    """Value of `end` when the nodes in `given` hold other values; everything beside the path comes from `base`.

    Side inputs and every result on the way are promoted to float64, whatever dtype the region casts to. Raises
    RuntimeError when the path is longer than `limit` nodes or a node on it fails.
    """
    region = _region(given, end, limit)
    env: dict[fx.Node, Any] = dict(given)
    for node in region:
        for source in node.all_input_nodes:
            if source not in env and source not in region:
                env[source] = _promote(base.value(source))
    evaluator = Evaluator(base.program, env, promote=True)
    result = evaluator.value(end)
    if not isinstance(result, Tensor):
        raise RuntimeError(f"{end.name} is not a tensor")
    return result


def _region(given: Mapping[fx.Node, Tensor], end: fx.Node, limit: int) -> set[fx.Node]:
    """Nodes between `given` and `end`: ancestors of `end` that depend on a given node."""
    order: list[fx.Node] = []
    depends: dict[fx.Node, bool] = dict.fromkeys(given, True)
    first = min(given, key=_position)
    lowest = _position(first)
    stack = [(end, False)]
    visited: set[fx.Node] = set()
    while stack:
        node, expanded = stack.pop()
        if expanded:
            depends[node] = any(depends.get(s, False) for s in node.all_input_nodes)
            if depends[node]:
                order.append(node)
        elif node not in visited and node not in depends and _position(node) >= lowest:
            visited.add(node)
            stack.append((node, True))
            stack.extend((s, False) for s in node.all_input_nodes)
    if len(order) > limit:
        raise RuntimeError(f"{len(order)} nodes between the inputs and {end.name}, more than {limit}")
    return set(order)


def _position(node: fx.Node) -> Any:
    return node._sort_key


def _promote(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value


# --------------------------------------------------------------------------------------------------- changing


def remove_dead_code(program: Program) -> None:
    """Remove nodes without users, but none that changes a tensor in place."""
    program.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_in_place(node))


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may share: back through views and in-place results."""
    while (op_name(node) in VIEWS or is_in_place(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def changed_in_place(program: Program, given: Mapping[fx.Node, Tensor], end: fx.Node) -> fx.Node | None:
    """A node that changes a tensor on the way from `given` to `end` in place, whether or not its result is used."""
    region = {storage_root(node) for node in _region(given, end, 400)}
    writers = (n for n in program.graph.nodes if is_in_place(n) and n.all_input_nodes)
    return next((n for n in writers if storage_root(n.all_input_nodes[0]) in region), None)


def call(program: Program, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """Insert a call at the graph's insertion point, with the fake value that it makes."""
    node = program.graph.call_function(target, args, dict(kwargs or {}))
    known = fx.node.map_arg((args, dict(kwargs or {})), fake)
    with torch.no_grad(), fake_mode(program) or contextlib.nullcontext():
        node.meta["example_value"] = node.meta["val"] = target(*known[0], **known[1])
    return node


def fake_mode(program: Program) -> FakeTensorMode | None:
    """The mode of the fake values that tracing left on the graph."""
    values = (fake(n) for n in program.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def add_constant(program: Program, name: str, tensor: Tensor) -> fx.Node:
    """A new placeholder behind the others, bound to `tensor`; inductor treats it like a parameter."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    with program.graph.inserting_after(placeholders[-1]):
        node = program.graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    mode = fake_mode(program)
    value = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    node.meta["example_value"] = node.meta["val"] = value
    program.values[node.name] = tensor
    return node


# --------------------------------------------------------------------------------------------------- printing


def print_graph(graph: fx.Graph) -> str:
    """One line a node: `%name: dtype[shape] = op(args)`. The dump, the golden text and the equality of tests."""
    return "\n".join(_line(node) for node in graph.nodes) + "\n"


def _line(node: fx.Node) -> str:
    value = fake(node)
    kind = f": {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else ""
    arguments = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
    if node.op == "placeholder":
        return f"%{node.name}{kind} = input()"
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    prefix = "." if node.op == "call_method" else ""
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else op_name(node) or node.op
    return f"%{node.name}{kind} = {prefix}{name}({', '.join(arguments)})"


def _show(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        return "[" + ", ".join(_show(a) for a in argument) + "]"
    return repr(argument)


IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "setitem", "ifloordiv", "iand", "ior")
)


def is_in_place(node: fx.Node) -> bool:
    """True when running the node changes one of its inputs."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.target in IN_PLACE_OPERATORS
