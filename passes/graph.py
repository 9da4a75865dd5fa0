"""Graphs as every pass sees them: a program that can be copied, printed, searched, and run in part.

A `Program` is an fx graph whose parameters, buffers and inputs are all placeholders with real example values: the form
of Dynamo's graphs and of `torch.export`'s lifted graphs alike, so one implementation of each pass serves both.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fhopt.errors import Miss

VIEW_NAMES = (
    "t transpose permute view reshape getitem T mT contiguous to type_as chunk split cat squeeze unsqueeze "
    "numpy_T slice select detach alias"
)
VIEWS = frozenset(VIEW_NAMES.split())
SIZED_NAMES = (
    "view reshape expand getitem new_zeros new_ones new_full new_empty zeros ones full arange repeat split narrow "
    "slice unflatten _unsafe_view broadcast_to split_with_sizes chunk index_select triu tril"
)
SIZED = frozenset(SIZED_NAMES.split())  # calls whose integers may be sizes
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SOURCE_FIELD = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Bound:
    """How the value of an extra input follows from other inputs: made at call time, never baked into a graph.

    sources: placeholders that it is made of (weights, caches of the user). make: their values -> a tensor of the shape,
    dtype and device of the example. It is asked again when one of the sources is another tensor or was changed; it
    raises `errors.Stale` when nothing is right for these sources.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass
class Program:
    """One captured graph.

    module: the graph module, owned by this object (passes change it in place).
    values: real example value of each placeholder, by node name (parameters are the model's own, never changed).
    parameters: placeholder name -> qualified parameter name. buffers: likewise, for registered buffers.
    bound: of extra inputs (`add_constant`) whose values depend on others, how.
    """

    module: fx.GraphModule
    values: dict[str, Any]
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    bound: dict[str, Bound] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    @property
    def weights(self) -> dict[str, Tensor]:
        """Values of the parameters, by their qualified names."""
        return {name: self.values[node] for node, name in self.parameters.items()}

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
    buffers = {n.name: source_name(n) for n in placeholders if "._buffers[" in _source_text(n)}
    return Program(out, values, names, {k: v for k, v in buffers.items() if k not in names})


def source_name(node: fx.Node) -> str:
    """Qualified name of a Dynamo placeholder, from where Dynamo read it: `L['self']._modules['a']...` -> `a.weight`."""
    text = _source_text(node)
    root = re.match(r"[LG]\['[^']*'\](?:\[\d+\])?", text)
    fields = _SOURCE_FIELD.findall(text[root.end() :] if root else text)
    return ".".join(next(part for part in parts if part) for parts in fields) or node.name


def _source_text(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    return str(text() if callable(text) else text)


def module_path(node: fx.Node) -> str:
    """Qualified name of the module in whose forward a node was traced, "" where tracing did not tell."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    text = stack[-1][0] if stack else ""
    return re.sub(r"^[LG]\['[^']*'\](?:\[\d+\])?\.?", "", str(text))


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


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by one of its names (a method's own tensor is position 0)."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def fake(node: fx.Node) -> Any:
    """The fake value that tracing left on the node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of a tensor node (ints or symbols), None for anything else."""
    value = fake(node)
    return tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else None


_smaller: ContextVar[Mapping[int, int]] = ContextVar("smaller", default=MappingProxyType({}))


@contextlib.contextmanager
def smaller(sizes: Mapping[int, int]) -> Iterator[None]:
    """Within, everything that is run on numbers has these sizes in place of the example's: 40 tokens say as much as
    8,192. Where a size means two things at once, the run fails, and has to be done at full size."""
    token = _smaller.set(sizes)
    try:
        yield
    finally:
        _smaller.reset(token)


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape that the example inputs give a tensor node (see `smaller`): symbols become their hints. Nothing is run."""
    found = shape(node)
    if found is None:
        raise Miss(f"{node.name} is not a tensor", node)
    sizes = _smaller.get()
    full = (int(d.node.hint) if isinstance(d, torch.SymInt) else int(d) for d in found)
    return tuple(sizes.get(d, d) for d in full)


def source_line(node: fx.Node) -> str:
    """`folder/file.py:line` of the user code that made the node, "" when unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    path, line = frames[-1]
    return "/".join(path.split("/")[-2:]) + f":{line}"


def is_ours(source: str) -> bool:
    """True for a `source_line` in this package: what attention on latents consists of."""
    return source.startswith("fhopt/")


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

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it; where numbers are promoted, a cast to another float type is one to float64, a view may copy."""
        if self.promote and target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            target = torch.ops.aten.reshape.default
        name = str(getattr(target, "__name__", target)).partition(".")[0]
        return super().call_function(target, *(self.sized(name, args, kwargs) if self.promote else (args, kwargs)))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Likewise."""
        if not self.promote:
            return super().call_method(target, args, kwargs)
        name = "double" if target in {"float", "half", "bfloat16"} else target
        name = "reshape" if name == "view" and not any(isinstance(a, torch.dtype) for a in args) else name
        return super().call_method(name, *self.sized(name, args, kwargs))

    @staticmethod
    def sized(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with float types promoted and sizes made `smaller`."""
        sizes = _smaller.get() if name in SIZED else {}

        def widen(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value in FLOATS:
                return torch.float64
            if type(value) is int:
                return sizes.get(value, value)
            if isinstance(value, slice):
                return slice(widen(value.start), widen(value.stop), value.step)
            return type(value)(widen(v) for v in value) if type(value) in (tuple, list) else value

        return tuple(widen(a) for a in args), {k: widen(v) for k, v in kwargs.items()}

    def example(self, node: fx.Node) -> Any:
        """Value of `node`; of a tensor, as much as `example_shape` says."""
        value = self.value(node)
        if type(value) is int:
            return _smaller.get().get(value, value)
        if not isinstance(value, Tensor) or not _smaller.get():
            return value
        for axis, size in enumerate(example_shape(node)):
            value = value.narrow(axis, 0, size)
        return value

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


class Region:
    """The nodes between some nodes and one that depends on them: a function that can be run on other values.

    given: where values are put in. end: what comes out. nodes: in graph order. sides: what else flows in. Raises
    RuntimeError when there are more than `limit` nodes.
    """

    def __init__(self, base: Evaluator, given: Iterable[fx.Node], end: fx.Node, limit: int = 600) -> None:
        self.base, self.end = base, end
        self.given = tuple(dict.fromkeys(given))
        self.nodes = _between(self.given, end)
        if len(self.nodes) > limit:
            raise RuntimeError(f"{len(self.nodes)} nodes between the inputs and {end.name}, more than {limit}")
        inside = {*self.nodes, *self.given}
        self.sides = tuple(dict.fromkeys(s for n in self.nodes for s in n.all_input_nodes if s not in inside))

    def run(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """Value of `end` for these values of the given nodes, and of any sides; other sides have their example value.

        Everything is promoted to float64, whatever dtype the region casts to. Raises what a node raises, and
        RuntimeError when the result is no tensor.
        """
        env: dict[fx.Node, Any] = dict(values)
        for side in self.sides:
            if side not in env:
                env[side] = _promote(self.base.example(side))
        evaluator = Evaluator(self.base.program, env, promote=True)
        with torch.no_grad():
            for node in self.nodes:
                evaluator.env[node] = evaluator.run_node(node)
        result = evaluator.env[self.end] if self.end in evaluator.env else evaluator.value(self.end)
        if not isinstance(result, Tensor):
            raise RuntimeError(f"{self.end.name} is not a tensor")
        return result


def signature(region: Region, tell: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """What a region computes, in terms that two layers of one model share.

    Equal for two regions that do the same to inputs of the same shapes, where `tell` says what matters about a side.
    """
    places = {node: index for index, node in enumerate((*region.given, *region.sides, *region.nodes))}

    def place(node: fx.Node) -> str:
        return f"%{places[node]}"

    calls = [
        (n.op, str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), lambda m: _Place(place(m)))))
        for n in region.nodes
    ]
    shapes = tuple((example_shape(n), str(fake(n).dtype)) for n in region.given)
    return (tuple(calls), shapes, tuple(tell(side) for side in region.sides))


class _Place(str):
    """Prints as it is, so that it can stand in for a node."""

    def __repr__(self) -> str:
        return str(self)


def run_region(base: Evaluator, given: Mapping[fx.Node, Tensor], end: fx.Node) -> Tensor:
    """Value of `end` when the nodes in `given` hold other values; see Region.run."""
    return Region(base, given, end).run(given)


def window(first: fx.Node, last: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Edges of data flow among the nodes from `first` to `last` in graph order: a part small enough to search."""
    edges: list[tuple[fx.Node, fx.Node]] = []
    lowest, node = _position(first), last
    while _position(node) > lowest:
        edges.extend((source, node) for source in node.all_input_nodes if _position(source) >= lowest)
        node = node.prev
    return edges


def _between(given: tuple[fx.Node, ...], end: fx.Node) -> list[fx.Node]:
    """Nodes on a path from a given node to `end` (which is one of them), in graph order."""
    fixed = set(given)
    if end in fixed:
        return []
    first = min(given, key=_position)
    flow: nx.DiGraph = nx.DiGraph((u, v) for u, v in window(first, end) if v not in fixed)
    if end not in flow:
        return []
    flow.add_edges_from(("start", node) for node in fixed)
    found = nx.descendants(flow, "start") & (nx.ancestors(flow, end) | {end})
    return sorted(found - fixed, key=_position)


def random_like(node: fx.Node, seed: int = 0) -> Tensor:
    """Random float64 numbers of the shape of `node`, on its device."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(example_shape(node), generator=generator, dtype=torch.float64)
    return value.to(fake(node).device)


def _position(node: fx.Node) -> Any:
    return node._sort_key


def _promote(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value


# --------------------------------------------------------------------------------------------------- changing


def remove_dead_code(program: Program) -> None:
    """Remove calls whose values nobody takes; what acts otherwise (contexts, checks, changes in place) stays."""
    for node in reversed(program.graph.nodes):
        calls = node.op in {"call_function", "call_method"} and not node.is_impure() and not is_in_place(node)
        if calls and not node.users and _is_data(fake(node)):
            program.graph.erase_node(node)


def _is_data(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return bool(parts) and all(isinstance(p, Tensor) or p is None for p in parts) and value is not None


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may share: back through views and in-place results."""
    while (op_name(node) in VIEWS or is_in_place(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def call(program: Program, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """Insert a call at the graph's insertion point, with the fake value that it makes."""
    node = program.graph.call_function(target, args, dict(kwargs or {}))
    known = fx.node.map_arg((args, dict(kwargs or {})), fake)
    with on_fakes(fake_mode(program)):
        node.meta["example_value"] = node.meta["val"] = target(*known[0], **known[1])
    return node


def call_method(program: Program, name: str, *args: Any) -> fx.Node:
    """Insert a call of a tensor's method at the graph's insertion point, with the fake value that it makes."""
    node = program.graph.call_method(name, args)
    known = fx.node.map_arg(args, fake)
    with on_fakes(fake_mode(program)):
        node.meta["example_value"] = node.meta["val"] = getattr(known[0], name)(*known[1:])
    return node


def copy_node(program: Program, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> fx.Node:
    """Insert a copy of `node` with other inputs, with the fake value that it makes of them."""
    copied = program.graph.node_copy(node, lambda n: mapping.get(n, n))

    def known(source: fx.Node) -> Any:
        is_attribute = source.op == "get_attr"
        return operator.attrgetter(str(source.target))(program.module) if is_attribute else fake(source)

    args, kwargs = fx.node.map_arg((copied.args, copied.kwargs), known)
    with on_fakes(fake_mode(program)):
        target: Any = copied.target
        value = getattr(args[0], target)(*args[1:], **kwargs) if copied.op == "call_method" else target(*args, **kwargs)
    copied.meta["example_value"] = copied.meta["val"] = value
    return copied


def fake_mode(program: Program) -> FakeTensorMode | None:
    """The mode of the fake values that tracing left on the graph."""
    values = (fake(n) for n in program.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    """The state in which operations run on fake values, without gradients; `mode` None: on whatever values there are.

    Composite operations are decomposed in Python, as when Dynamo traces: C++ may ask for a size as a number (matmul did
    until torch 2.12), and the graph would be for that size alone.
    """
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(enable_python_dispatcher())
        yield


def add_constant(program: Program, name: str, tensor: Tensor, bound: Bound | None = None) -> fx.Node:
    """A new placeholder behind the others; inductor treats it like a parameter.

    Its value is `tensor`, or what `bound` makes of other inputs, of which `tensor` is an example.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    with program.graph.inserting_after(placeholders[-1]):
        node = program.graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    mode = fake_mode(program)
    value = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    node.meta["example_value"] = node.meta["val"] = value
    program.values[node.name] = tensor
    if bound is not None:
        program.bound[node.name] = bound
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
