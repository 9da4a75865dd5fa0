"""flex_attention in ATen operations, for `decompose`.

    before                                          after
    o, lse, max = flex_attention(q, k, v, f,        s = matmul(q, k.transpose(-2, -1)) * c
        (..., m), c, options, f_buffers,            s = score_mod(s, f, *f_buffers)          unless f is the identity
        m_buffers)                                  a = mask_mod(m, B, H, S, T, *m_buffers)  unless m allows all
                                                    s = where(a, s, -inf)
                                                    o = matmul(softmax(s), v)

f and m are graphs over one score and one index each of batch, head, query and key; `score_mod` and `mask_mod` below
run them over the whole grid, are pure, and differentiable. Kv heads are repeated for the query heads; a query without
allowed keys gives 0 (Dong et al., 2024, "Flex Attention", arXiv:2412.05496).

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import fake, is_in_place, op_name, storage_root
from fhopt.passes.graph.program import Program

FIELDS = ("query", "key", "value", "score_mod", "block_mask", "scale", "options", "score_buffers", "mask_buffers")
EXACT = (torch.float32, torch.float64)  # other dtypes are widened for the scores
CONSTANTS = frozenset({"new_ones", "new_full", "ones_like", "full_like"})  # ignore the values of their input


# --------------------------------------------------------------------------------------------------- mod functions


def score_mod(scores: Tensor, body: Callable[..., Tensor], *buffers: Any) -> Tensor:
    """Compute `body(score, b, h, q, k, *buffers)` for every element of scores [B, H, S, T]."""
    over_grid = _over_grid(lambda score, *index: body(score, *index, *buffers), (0,))
    index = (torch.arange(size, device=scores.device) for size in scores.shape)
    with _tensor_indices():
        return over_grid(scores, *index)


def mask_mod(
    body: Callable[..., Tensor], batch: int, heads: int, queries: int, keys: int, device: torch.device, *buffers: Any
) -> Tensor:
    """Compute `body(b, h, q, k, *buffers)` for every index: bool [B, H, S, T], True = may attend."""
    over_grid = _over_grid(lambda *index: body(*index, *buffers), ())
    with _tensor_indices():
        return over_grid(*(torch.arange(size, device=device) for size in (batch, heads, queries, keys)))


def _over_grid(function: Callable[..., Tensor], leading: tuple[int, ...]) -> Callable[..., Tensor]:
    """Map a function over key, query, head and batch by vmap, key innermost."""
    for axis in (3, 2, 1, 0):
        index_axes = tuple(0 if i == axis else None for i in range(4))
        function = torch.vmap(function, in_dims=(*leading, *index_axes))
    return function


def _tensor_indices() -> Any:
    """Make `buffer[q]` index by a scalar tensor instead of converting it to a Python number."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


# --------------------------------------------------------------------------------------------------- plain graph


def plain_flex(node: fx.Node, program: Program) -> fx.Graph:
    """Build the plain graph of a flex_attention node; placeholders in the order of `node.all_input_nodes`."""
    fields: dict[str, Any] = dict(zip(FIELDS, node.args, strict=False)) | dict(node.kwargs)
    used = {user.args[1] for user in node.users if user.target is operator.getitem}
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {n: fx.Proxy(graph.placeholder(n.name), tracer) for n in node.all_input_nodes}

    def proxy(field: str) -> Any:
        known: Callable[[fx.Node], Any] = proxies.__getitem__
        return fx.node.map_arg(fields[field], known)

    plain = _contract(fields, proxy)
    scores = _modify(fields, proxy, plain, tracer, program)
    weights = torch.softmax(scores, -1) if scores is plain else torch._safe_softmax(scores, -1)
    value = _per_query_head(fields, "value", proxy)
    dtype = fake(fields["query"]).dtype
    output = torch.matmul(weights if dtype in EXACT else weights.to(dtype), value)
    results = (output, *_statistics(scores, fields["options"], used))
    graph.output(fx.node.map_aggregate(results, lambda r: r.node if isinstance(r, fx.Proxy) else r))
    return graph


def _contract(fields: dict[str, Any], proxy: Callable[[str], Any]) -> Any:
    """Compute scale q k^T [B, H, S, T] in at least float32."""
    query, key = proxy("query"), _per_query_head(fields, "key", proxy)
    dtype = fake(fields["query"]).dtype
    if dtype not in EXACT:
        query, key = query.to(torch.float32), key.to(torch.float32)
    scale = _constant(fake(fields["scale"]) if isinstance(fields["scale"], fx.Node) else fields["scale"])
    return torch.matmul(query, key.transpose(-2, -1)) * (proxy("scale") if scale is None else scale)


def _per_query_head(fields: dict[str, Any], field: str, proxy: Callable[[str], Any]) -> Any:
    """Repeat kv heads for the query heads: [B, G, T, D] -> [B, H, T, D]."""
    heads, groups = (_constant(fake(fields[name]).shape[1]) for name in ("query", field))
    if not heads or not groups:
        raise Miss("the number of heads is symbolic; expected a number")
    return proxy(field) if heads == groups else torch.repeat_interleave(proxy(field), int(heads // groups), 1)


def _modify(
    fields: dict[str, Any], proxy: Callable[[str], Any], scores: Any, tracer: fx.proxy.TracerBase, program: Program
) -> Any:
    """Apply the score and mask graphs to the scores, unless they change nothing."""
    body = body_of(fields["score_mod"], program)
    if not _is_identity(body.graph):
        arguments = (scores, proxy("score_mod"), *proxy("score_buffers"))
        scores = tracer.create_proxy("call_function", score_mod, arguments, {})
    mask = body_of(fields["block_mask"][-1], program)
    if _allows_all(mask):
        return scores
    arguments = (proxy("block_mask")[-1], *_grid(fields, proxy, mask), *proxy("mask_buffers"))
    allowed: Any = tracer.create_proxy("call_function", mask_mod, arguments, {})
    return torch.where(allowed, scores, -math.inf)


def _grid(fields: dict[str, Any], proxy: Callable[[str], Any], mask: fx.GraphModule) -> tuple[Any, ...]:
    """Return (B, H, S, T, device) for `mask_mod`; batch and head are 1 if the mask does not depend on them."""
    query, key = fake(fields["query"]), fake(fields["key"])
    batch, head = [n for n in mask.graph.nodes if n.op == "placeholder"][:2]
    axes = (("query", 0, bool(batch.users)), ("query", 1, bool(head.users)), ("query", 2, True), ("key", 2, True))
    known = [_constant((query if field == "query" else key).shape[axis]) for field, axis, _ in axes]
    sizes = [
        (proxy(field).size(axis) if size is None else size) if used else 1
        for (field, axis, used), size in zip(axes, known, strict=True)
    ]
    return (*sizes, query.device)


def _constant(number: Any) -> int | float | None:
    """Return a number unchanged, a constant symbol as its value, any other symbol as None."""
    if isinstance(number, (torch.SymInt, torch.SymFloat)):
        result: int | float | None = (
            number.node.maybe_as_int() if isinstance(number, torch.SymInt) else number.node.maybe_as_float()
        )
        return result
    return number


def _statistics(scores: Any, options: dict[str, Any], used: set[Any]) -> list[Any]:
    """Return (log-sum-exp, largest score) of each query if used; in base 2 unless the backend is FLASH."""
    unit = 1.0 if options.get("BACKEND") == "FLASH" else math.log(2)
    lse = torch.logsumexp(scores, -1) / unit if 1 in used else None
    return [lse, torch.amax(scores, -1) / unit if 2 in used else None]


# --------------------------------------------------------------------------------------------------- bodies


def body_of(node: Any, program: Program) -> fx.GraphModule:
    """Return the graph module that a get_attr node names. Raises Miss if it is something else."""
    result = graph_at(node, program)
    if result is None:
        raise Miss(f"{node} is not a graph of the program", node if isinstance(node, fx.Node) else None)
    return result


def graph_at(node: Any, program: Program) -> fx.GraphModule | None:
    """Return the graph module that a get_attr node names, None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    result: Any = program.module
    for name in str(node.target).split("."):
        result = getattr(result, name, None)
    return result if isinstance(result, fx.GraphModule) else None


def _is_identity(graph: fx.Graph) -> bool:
    """Return whether a graph returns its first argument unchanged."""
    return graph.output_node().args[0] is next(n for n in graph.nodes if n.op == "placeholder")


def _allows_all(body: fx.GraphModule) -> bool:
    """Return whether a mask graph allows everything: it uses no value of an argument, and running it gives True."""
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    if any(op_name(user) not in CONSTANTS for n in placeholders for user in n.users):
        return False
    devices = (value.device if isinstance(value := fake(n), Tensor) else None for n in placeholders)
    return bool(body(*(torch.zeros((), dtype=torch.int64, device=device) for device in devices)))


# --------------------------------------------------------------------------------------------------- cleanup


def remove_makers(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Remove unused `nodes` and all nodes used only to compute them, including in-place writes to their own tensors."""
    region: set[fx.Node] = set()
    stack = [n for n in nodes if not n.users]
    while stack:
        current = stack.pop()
        if current in region or current.op in ("placeholder", "get_attr"):
            continue
        region.add(current)
        stack += [*current.all_input_nodes, *(u for u in current.users if is_in_place(u))]
    for node in sorted(region - _needed_outside(region), key=_position, reverse=True):
        graph.erase_node(node)


def _needed_outside(region: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes of `region` needed outside, directly or through memory that they write."""
    needed: set[fx.Node] = set()
    while True:
        memory = {storage_root(n) for n in needed}
        more = {
            n
            for n in region - needed
            if any(u in needed or u not in region for u in n.users)
            or (is_in_place(n) and (storage_root(n) in memory or storage_root(n) not in region))
        }
        if not more:
            return needed
        needed |= more


def _position(node: fx.Node) -> Any:
    return node._sort_key
