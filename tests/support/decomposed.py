"""Programs before and after decomposition, and their comparison."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import fake, op_name
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.graph.program import Program, copy_program
from fhopt.passes.prepare.composites import COMPOSITES
from fhopt.passes.prepare.decompose import Decompose, qualified_name
from fhopt.passes.verify import check_invariants

B, H, G, S, T, D = 2, 4, 2, 5, 7, 8
E = H * D
CORES = ("softmax", "_safe_softmax", "scaled_dot_product_attention")


def traced(module: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> Program:
    """Return Dynamo's graph of a call, in the module's current mode (`capture` forces evaluation)."""
    seen: list[Program] = []

    def keep(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(copy_program(graph_module, example_inputs))
        return graph_module.forward

    torch.compile(module, backend=keep, dynamic=dynamic, fullgraph=True)(*inputs)
    (program,) = seen
    return program


def hand_made(target: Any, *args: Any, results: tuple[Tensor, ...], **kwargs: Any) -> Program:
    """Return a graph of the call's first result, with placeholders for its tensor arguments."""
    mode, graph = FakeTensorMode(), fx.Graph()
    values: dict[str, Any] = {}

    def node_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(values)}")
        node.meta["val"] = value if value.is_nested else mode.from_tensor(value)
        values[node.name] = value
        return node

    bound = fx.node.map_aggregate((args, kwargs), node_of)
    call = graph.call_function(target, *bound)
    call.meta["val"] = tuple(mode.from_tensor(r) for r in results)
    first = graph.call_function(operator.getitem, (call, 0))
    first.meta["val"] = call.meta["val"][0]
    graph.output((first,))
    return Program(fx.GraphModule(nn.Module(), graph), values)


def decomposed(program: Program, **options: Any) -> tuple[Program, list[Miss]]:
    """Run the pass on a copy of the program and verify it; return the copy and the misses."""
    after = copy_program(program.module, program.values.values())
    stage, missed = Decompose(**options), []
    for node in stage.candidates(after):
        try:
            found = stage.match(node, after)
        except Miss as miss:
            missed.append(miss)
            continue
        stage.rewrite(after, found)
    after.module.recompile()
    check_invariants(after, stage.name)
    known = {n.name for n in program.graph.nodes}
    new = [n for n in after.graph.nodes if n.name not in known and n.op in ("call_function", "call_method")]
    bare = {op_name(n) for n in new if fake(n) is None or n.meta.get("val") is not fake(n)}
    assert bare <= {"_enter_autocast", "_exit_autocast", "is_grad_enabled", "_set_grad_enabled"}
    return after, missed


def close(found: Any, expected: Any, largest: float = 2e-6) -> None:
    """Require equality up to the order of float32 sums."""
    torch.testing.assert_close(found, expected, rtol=max(largest, 1e-6) / 2, atol=largest, equal_nan=True)


def run(program: Program, *values: Any) -> Any:
    """Run the graph on its example values, symbols replaced by their hints."""
    given = [v.node.hint if isinstance(v, (torch.SymInt, torch.SymFloat)) else v for v in program.values.values()]
    torch.manual_seed(3)
    return fx.Interpreter(program.module).run(*(values or given))


def check(program: Program, gradients: bool = True, **options: Any) -> Program:
    """Decompose and return the program; require no misses, equal results and gradients, and a core attention."""
    after, missed = decomposed(program, **options)
    assert missed == []
    names = [op_name(n) for n in after.graph.nodes]
    assert any(name in CORES for name in names)
    assert not any(qualified_name(n) in COMPOSITES and op_name(n) != "einsum" for n in after.graph.nodes)
    old, new = run(program), run(after)
    for expected, found in zip(old, new, strict=True):
        close(found, expected)
    leaves = [v for v in program.values.values() if isinstance(v, Tensor) and v.requires_grad]
    if gradients and leaves and torch.is_grad_enabled():
        totals = [torch.stack([o.square().sum() for o in outputs if o.requires_grad]).sum() for outputs in (old, new)]
        expected, found = (torch.autograd.grad(total, leaves, allow_unused=True) for total in totals)
        for a, b in zip(expected, found, strict=True):
            close(b, a, 1e-5)  # sums of float32 squares
    return after


def reason(program: Program, **options: Any) -> str:
    """Return why the only candidate was not rewritten; require that the graph is unchanged."""
    text = print_graph(program.graph)
    after, missed = decomposed(program, **options)
    assert print_graph(after.graph) == text and len(missed) == 1
    return missed[0].reason


def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


class TwiceCheckpointed(nn.Module):
    """A block in two nested checkpoints."""

    def __init__(self, inner: Callable[..., Any] = core) -> None:
        super().__init__()
        self.q, self.k, self.core = nn.Linear(E, E), nn.Linear(E, E), inner

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in (self.q(x), self.k(x), x))
        return self.core(q, k, v).transpose(1, 2).reshape(B, S, E)

    def inner(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False) + x

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x * 2, use_reentrant=False)


SLOPES, BIAS = torch.rand(H), torch.randn(B, H, S, T)


def soft_capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.tanh(s / 5) * 5


def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + SLOPES[h] * (j - i) + BIAS[b, h, i, j]


def alternating(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (h % 2 == 0) | (b + i >= j)


def flexible(options: dict[str, Any], mask: Any = None, in_graph: bool = False) -> Callable[..., Any]:
    """A call of flex_attention; its block mask is made before or inside the graph."""

    def blocks_for(queries: int, keys: int) -> Any:
        return None if mask is None else create_block_mask(mask, B, H, queries, keys, device="cpu")

    made = None if in_graph else blocks_for(S, T)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        blocks = blocks_for(q.shape[2], k.shape[2]) if in_graph else made
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, **options)

    return call


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries stored in memory as [B, S, H, D], and keys and values of G heads."""
    q = torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2)
    return q, torch.randn(B, G, T, D, dtype=dtype), torch.randn(B, G, T, D, dtype=dtype)


ATEN = torch.ops.aten


def slow(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor, bias: Any = 0.0, softcap: float = 0.0
) -> Tensor:
    """Attention of [B, S, H, D] in plain steps; rows without a key are 0."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores + bias).masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).contiguous()


def distance(q: Tensor, k: Tensor, shift: int) -> Tensor:
    return torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + shift)


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False, **more: Any,
) -> Any:  # fmt: skip
    q, k, v = (t if tensor_layout == "NHD" else t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out = slow(q, k, v, scale, distance(q, k, 0) <= (0 if is_causal else 99))
    out = out if tensor_layout == "NHD" else out.transpose(1, 2)
    return (out, out) if return_lse else out


sageattn.__module__ = "sageattention.core"
torch._dynamo.allow_in_graph(sageattn)


def tokens_first(keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Make [B, S, H, D], [B, keys, G, D], [B, keys, G, D]."""
    return torch.randn(B, S, H, D), torch.randn(B, keys, G, D), torch.randn(B, keys, G, D)
