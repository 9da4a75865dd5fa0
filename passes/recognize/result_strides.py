"""Whether a user of an attention's result depends on its strides, and the order of its axes in memory.

    o = weights @ v                                     o = in_order(fhopt.attention(q, k, v), [0, 1, 2, 3])
    y = o.view(B, -1)                                   y = o.view(B, -1)

Each implementation of attention has its own memory layout: matmuls give [B, H, S, E], fused kernels [B, S, H, E].
Usually a copy or a matmul follows, and the layout does not matter. A `view` fails on the other layout, though, and the
strides of a graph's outputs are part of its result. Random values are drawn in memory order, so that dropout in the
other layout drops other elements. Running the downstream nodes on fake tensors of each layout shows which case
applies; the original order is preserved if it matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from fhopt.passes.graph.nodes import fake, fake_mode, on_fakes, op_name, size_hint
from fhopt.passes.graph.program import Program

LAYOUTS = ((0, 1, 2, 3), (0, 2, 1, 3))  # of [B, H, S, E] in memory: from matmuls and from fused kernels
REACH = 100  # max downstream nodes to run; beyond that, strides are assumed to matter
PLAIN = frozenset({"aten", "prims"})  # namespaces of operators that accept any layout
MEMORY = frozenset({"stride", "data_ptr", "untyped_storage", "is_contiguous", "resize_", "set_"})  # depend on memory


def in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Return the tensor with its axes in this memory order, outermost first; without a copy if they are already."""
    inverse = [list(order).index(axis) for axis in range(len(order))]
    return tensor.permute(list(order)).contiguous().permute(inverse)


def memory_order(tensor: Tensor) -> list[int]:
    """Return the axes of a tensor by stride, outermost first; symbols by their hints."""
    strides = [size_hint(n) for n in tensor.stride()]
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def is_layout_seen(program: Program, node: fx.Node, layouts: Sequence[Tensor]) -> bool:
    """Return whether `node` in one of these layouts would change output strides of the program, or make it fail.

    layouts: fake tensors of the node's shape.
    """
    expected = fake(node)
    return any(not _has_strides(layout, expected) and _is_seen(program, node, layout) for layout in layouts)


def _is_seen(program: Program, node: fx.Node, layout: Tensor) -> bool:
    """Run the nodes downstream of `node` with another layout, as far as strides differ from the traced ones."""
    changed: dict[fx.Node, Any] = {node: layout}
    waiting = set(node.users)
    for _ in range(REACH):
        if not waiting:
            return False
        current = min(waiting)
        waiting.remove(current)
        known = fake(current)
        if current.op == "output" or not _reads_any_layout(current):
            return True
        if not any(isinstance(part, Tensor) for part in _parts(known)):
            continue  # sizes and numbers
        try:
            value = _run_again(program, current, changed)
        except Exception:  # a view that this layout does not allow, or random numbers
            return True
        if not _have_strides(_parts(value), _parts(known)):
            changed[current] = value
            waiting.update(current.users)
    return True


def _run_again(program: Program, node: fx.Node, changed: dict[fx.Node, Any]) -> Any:
    """Run a node with the changed layouts. Raises what the node raises, and RuntimeError if it draws random values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: changed.get(n, fake(n)))
    target: Any = node.target
    with on_fakes(fake_mode(program)), _WithoutRandom():
        return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


class _WithoutRandom(TorchDispatchMode):
    """Prohibition of random draws, which would follow the memory order.

    Attention is exempt: it draws for its weights, which it computes in its own order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
            raise RuntimeError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _reads_any_layout(node: fx.Node) -> bool:
    """Return whether a node is a torch operation that gives the same values in any layout, or fails."""
    target: Any = node.target
    if "as_strided" in op_name(node) or op_name(node) in MEMORY:
        return False
    if node.op == "call_method":
        return True
    if isinstance(target, torch._ops.HigherOrderOperator) or node.op != "call_function":
        return False
    packet = getattr(target, "overloadpacket", target)
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return packet._qualified_op_name.partition("::")[0] in PLAIN
    return True


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _have_strides(values: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    pairs = [(a, b) for a, b in zip(values, known, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(_has_strides(a, b) for a, b in pairs)


def _has_strides(value: Tensor, known: Tensor) -> bool:
    """Return whether strides are equal on all axes larger than 1."""
    sizes = [size_hint(n) for n in known.shape]
    pairs = zip(sizes, value.stride(), known.stride(), strict=True)
    return 0 in sizes or all(size == 1 or size_hint(a) == size_hint(b) for size, a, b in pairs)
