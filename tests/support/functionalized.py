"""Programs with in-place writes, before and after functionalization, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fhopt.models.capture import capture
from fhopt.passes.graph.nodes import fake
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.functionalize import Functionalize, Functionalized
from fhopt.passes.verify import check_invariants


def fresh(program: Program, gradients: bool = False) -> list[Any]:
    """Return copies of the example inputs, strides included; with gradients, parameters are leaves that require one."""
    inputs: list[Any] = []
    for name, value in program.values.items():
        if isinstance(value, Tensor):
            place = (value.storage_offset(), value.shape, value.stride())
            value = torch.empty(0, dtype=value.dtype).set_(value.detach().untyped_storage().clone(), *place)
        inputs.append(value.requires_grad_() if gradients and name in program.parameters else value)
    return inputs


@dataclass
class Observed:
    """Everything a caller can observe of one run."""

    outputs: list[Tensor]
    inputs: list[Tensor]  # after the run
    shared: list[list[bool]]  # which of these tensors start at the same address
    strides: list[tuple[int, ...]]
    gradients: list[Tensor | None]


def observe(program: Program, gradients: bool = False) -> Observed:
    """Run the graph on its example inputs."""
    torch.manual_seed(0)
    inputs = fresh(program, gradients)
    outputs = [t for t in fx.Interpreter(program.module).run(*inputs) if isinstance(t, Tensor)]
    inputs = [t for t in inputs if isinstance(t, Tensor)]
    places = [(t.untyped_storage()._cdata, t.storage_offset()) for t in (*outputs, *inputs)]
    found: list[Tensor | None] = []
    if gradients:
        weighted = [(t * torch.arange(1.0, 1 + t.numel()).view_as(t)).sum() for t in outputs if t.requires_grad]
        total = torch.stack(weighted).sum()
        found += torch.autograd.grad(total, [t for t in inputs if t.requires_grad], allow_unused=True)
    return Observed(
        [t.detach().clone() for t in outputs], [t.detach().clone() for t in inputs],
        [[a == b for a in places] for b in places], [t.stride() for t in outputs], found,
    )  # fmt: skip


def assert_same(before: Observed, after: Observed, atol: float) -> None:
    """Require exact equality, except for gradients (float32: 1e-5), which are summed in another order."""
    torch.testing.assert_close([*after.outputs, *after.inputs], [*before.outputs, *before.inputs], rtol=0, atol=atol)
    assert (after.shared, after.strides) == (before.shared, before.strides)
    torch.testing.assert_close(after.gradients, before.gradients, rtol=1e-5, atol=1e-5)


def functionalized(program: Program, gradients: bool = False, atol: float = 0.0) -> Functionalized:
    """Run the pass and check its invariants, whatever it rewrote."""
    before, known = observe(program, gradients), set(program.graph.nodes)
    result = Functionalize().run(program)
    program.module.recompile()
    check_invariants(program, "functionalize")
    assert_same(before, observe(program, gradients), atol)
    assert [miss.node for miss in result.left] == Functionalize().candidates(program)
    text = print_graph(program.graph)
    assert Functionalize().run(program).changed == 0
    assert print_graph(program.graph) == text
    assert all(fake(node) is not None for node in program.graph.nodes if node not in known)
    return result


class CacheNetwork(nn.Module):
    """`core(y, cache, count)` after a projection, so that y requires a gradient."""

    def __init__(self, core: Callable[..., Any]) -> None:
        super().__init__()
        self.core, self.linear = core, nn.Linear(6, 8)

    def forward(self, x: Tensor, cache: Tensor, count: Tensor) -> Any:
        return self.core(self.linear(x), cache, count)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 6), torch.randn(4, 8), torch.tensor(2)


def program_of(core: Callable[..., Any]) -> Program:
    return capture(CacheNetwork(core), inputs()).program


def multiplied(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.mul_(2.0).sum() + y.sum()


def input_read_again(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    cache.index_copy_(0, count + torch.arange(1), y[:1].detach())
    count.add_(1)
    return (y @ cache.t()).softmax(-1), count


def input_returned(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    view = cache[1:]
    cache.mul_(2)
    view += 1
    return y, cache, view, cache.t()


def assembled(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    keys = y.new_empty(4, 12)
    keys[..., :8].copy_(y)
    keys[..., 8:].copy_(cache[:, :1].expand(-1, 4))
    return keys.exp()


def node_by_node(build: Callable[[fx.Graph], Any], *values: Tensor) -> Program:
    """Build a program by hand: `build` returns the output; fake values come from running it."""
    graph, mode = fx.Graph(), FakeTensorMode()
    for position, value in enumerate(values):
        graph.placeholder(f"input_{position}").meta["example_value"] = mode.from_tensor(value)
    output = build(graph)
    for node in graph.nodes:
        if node.op.startswith("call_"):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake)
            with mode:
                target = node.target
                made = getattr(args[0], target)(*args[1:]) if node.op == "call_method" else target(*args, **kwargs)
            node.meta["example_value"] = made
    graph.output(output)
    module = fx.GraphModule(nn.Module(), graph)
    return Program(module, {f"input_{position}": value for position, value in enumerate(values)})
