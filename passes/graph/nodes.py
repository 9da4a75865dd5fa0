"""Graph nodes: called op, fake value, shape and source line; insertion of calls, constants and copies."""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fhopt.passes.graph.program import Bound, Program
from fhopt.passes.graph.transforms import transformed_nodes

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
SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
LOG_SOFTMAX = frozenset({"log_softmax", "_log_softmax"})
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------- inspection


def size_hint(number: Any) -> int:
    """Return the value of a size at tracing time, without adding a guard for a symbol."""
    hint: Any = number.node.hint if isinstance(number, torch.SymInt) else number
    return int(hint)


def op_name(node: fx.Node) -> str:
    """Return the bare name of the op that a node calls.

    The same for `torch.matmul`, `@`, `Tensor.matmul` and `aten.matmul.default`.
    """
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
    """Return an argument of a call by its position or by one of its names (a method's own tensor is position 0)."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def fake(node: fx.Node) -> Any:
    """Return the fake value that tracing left on the node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_floating(node: fx.Node) -> bool:
    """Return whether a node is a tensor of floating-point numbers."""
    value = fake(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def overflow_limit(node: fx.Node) -> float:
    """Return the largest number of a node's dtype if an input has larger ones, as before a narrowing cast; else inf."""
    types = [v.dtype for n in (node, *node.all_input_nodes) if isinstance(v := fake(n), Tensor)]
    largest = [torch.finfo(t).max for t in types if t.is_floating_point]
    is_narrower = isinstance(fake(node), Tensor) and len(largest) > 1 and types[0].is_floating_point
    return largest[0] if is_narrower and largest[0] < max(largest) else math.inf


def shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the shape of a tensor node (ints or symbols), None for anything else."""
    value = fake(node)
    return tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else None


def source_line(node: fx.Node) -> str:
    """Return `folder/file.py:line` of the user code that made the node, "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    path, line = frames[-1]
    return "/".join(path.split("/")[-2:]) + f":{line}"


def is_ours(source: str) -> bool:
    """Return whether a `source_line` is in this package, as in attention on latents."""
    return source.startswith("fhopt/")


# --------------------------------------------------------------------------------------------------- modification


def remove_dead_code(program: Program) -> None:
    """Remove calls with unused values; contexts, checks, in-place changes and function transforms stay."""
    inside = transformed_nodes(program.graph)  # such as `_set_tensor_requires_grad`, whose result is unused
    for node in reversed([n for n in program.graph.nodes if n not in inside]):
        calls = node.op in {"call_function", "call_method"} and not node.is_impure() and not is_in_place(node)
        if calls and not node.users and _is_data(fake(node)):
            program.graph.erase_node(node)


def _is_data(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return bool(parts) and all(isinstance(p, Tensor) or p is None for p in parts) and value is not None


def storage_root(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` may share, back through views and in-place results."""
    while (op_name(node) in VIEWS or is_in_place(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def call(program: Program, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value. Raises what the call raises."""
    known = fx.node.map_arg((args, dict(kwargs or {})), fake)
    with on_fakes(fake_mode(program)):
        value = target(*known[0], **known[1])
    return _described(program.graph.call_function(target, args, dict(kwargs or {})), value)


def call_method(program: Program, name: str, *args: Any) -> fx.Node:
    """Insert a tensor method call at the insertion point, with its fake value. Raises what the call raises."""
    known = fx.node.map_arg(args, fake)
    with on_fakes(fake_mode(program)):
        value = getattr(known[0], name)(*known[1:])
    return _described(program.graph.call_method(name, args), value)


def _described(node: fx.Node, value: Any) -> fx.Node:
    node.meta["example_value"] = node.meta["val"] = inheriting_gradient(node, value)
    return node


def inheriting_gradient(node: fx.Node, value: Any) -> Any:
    """Make the fake value of an inserted node, computed by `on_fakes`, require a gradient if one of its inputs does."""
    sources = [fake(n) for n in node.all_input_nodes] if op_name(node) != "detach" else []
    if any(isinstance(x, Tensor) and x.requires_grad for x in sources):
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
                tensor.requires_grad_()
    return value


def copy_node(program: Program, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> fx.Node:
    """Insert a copy of `node` with other inputs and the fake value for them; a view may copy.

    Raises what the node raises on these inputs.
    """

    def known(source: Any) -> Any:
        is_attribute = isinstance(source, fx.Node) and source.op == "get_attr"
        return operator.attrgetter(str(source.target))(program.module) if is_attribute else fake(source)

    target = _copying_view(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: mapping.get(n, n))
    values, options = fx.node.map_arg((args, kwargs), known)
    with on_fakes(fake_mode(program)):
        is_method = node.op == "call_method"
        value = getattr(values[0], target)(*values[1:], **options) if is_method else target(*values, **options)
    copied = program.graph.node_copy(node, lambda n: mapping.get(n, n))
    copied.target = target
    return _described(copied, value)


def _copying_view(node: fx.Node) -> Any:
    """Return the target of `node`, with a view replaced by a reshape, since its inputs may have other strides."""
    if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        return torch.ops.aten.reshape.default
    is_view = node.target == "view" and not any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    return "reshape" if is_view else node.target


def fake_mode(program: Program) -> FakeTensorMode | None:
    """Return the mode of the fake values that tracing left on the graph."""
    values = (fake(n) for n in program.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    """Run operations within on fake values of `mode`, without gradients; None: on the values as given.

    Composite operations are decomposed in Python, as when Dynamo traces: C++ may specialize a symbolic size (matmul did
    until torch 2.12), and the graph would be valid for that size only.
    """
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(enable_python_dispatcher())
        yield


def add_constant(program: Program, name: str, tensor: Tensor, bound: Bound | None = None) -> fx.Node:
    """Add a placeholder after the others, which inductor treats like a parameter.

    Its value is `tensor`, or the result of `bound` on other inputs, of which `tensor` is an example.
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


IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "setitem", "ifloordiv", "iand", "ior")
)


def is_in_place(node: fx.Node) -> bool:
    """Return whether running the node changes one of its inputs."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.target in IN_PLACE_OPERATORS
