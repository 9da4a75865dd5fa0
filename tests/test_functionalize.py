"""Graphs that change tensors in place, against what the pass makes of them: numbers, aliases and gradients agree."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_llama
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fhopt.capture import capture, from_exported
from fhopt.passes.functionalize import Functionalize, Functionalized, written
from fhopt.passes.graph import Program, copy_program, fake, op_name, print_graph
from fhopt.passes.verify import verify

# ----------------------------------------------------------------------------------------------- running and comparing


def fresh(program: Program, gradients: bool = False) -> list[Any]:
    """Example inputs of their own, strides and all; with gradients, parameters are leaves that need one."""
    inputs: list[Any] = []
    for name, value in program.values.items():
        if isinstance(value, Tensor):
            place = (value.storage_offset(), value.shape, value.stride())
            value = torch.empty(0, dtype=value.dtype).set_(value.detach().untyped_storage().clone(), *place)
        inputs.append(value.requires_grad_() if gradients and name in program.parameters else value)
    return inputs


@dataclass
class Seen:
    """All that a caller can see of one run."""

    outputs: list[Tensor]
    inputs: list[Tensor]  # afterwards
    shared: list[list[bool]]  # which of these tensors start at the same place in memory
    strides: list[tuple[int, ...]]
    gradients: list[Tensor | None]


def observe(program: Program, gradients: bool = False) -> Seen:
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
    return Seen(
        [t.detach().clone() for t in outputs], [t.detach().clone() for t in inputs],
        [[a == b for a in places] for b in places], [t.stride() for t in outputs], found,
    )  # fmt: skip


def assert_same(before: Seen, after: Seen, atol: float) -> None:
    """The same operations on the same numbers are exact. Gradients are summed in another order (float32: 1e-5)."""
    torch.testing.assert_close([*after.outputs, *after.inputs], [*before.outputs, *before.inputs], rtol=0, atol=atol)
    assert (after.shared, after.strides) == (before.shared, before.strides)
    torch.testing.assert_close(after.gradients, before.gradients, rtol=1e-5, atol=1e-5)


def functionalized(program: Program, gradients: bool = False, atol: float = 0.0) -> Functionalized:
    """Run the pass, and check all that must hold whatever it did."""
    before, known = observe(program, gradients), set(program.graph.nodes)
    result = Functionalize().run(program)
    program.module.recompile()
    verify(program, "functionalize")
    assert_same(before, observe(program, gradients), atol)
    assert [miss.node for miss in result.left] == Functionalize().candidates(program)
    text = print_graph(program.graph)
    assert Functionalize().run(program).changed == 0
    assert print_graph(program.graph) == text
    assert all(fake(node) is not None for node in program.graph.nodes if node not in known)
    return result


class Network(nn.Module):
    """`core(y, cache, count)` behind a projection, so that y needs a gradient."""

    def __init__(self, core: Callable[..., Any]) -> None:
        super().__init__()
        self.core, self.linear = core, nn.Linear(6, 8)

    def forward(self, x: Tensor, cache: Tensor, count: Tensor) -> Any:
        return self.core(self.linear(x), cache, count)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 6), torch.randn(4, 8), torch.tensor(2)


def program_of(core: Callable[..., Any]) -> Program:
    return capture(Network(core), inputs()).program


def exported(core: Callable[..., Any], **options: Any) -> Program:
    return from_exported(torch.export.export(Network(core), inputs(), **options)).program


def names(program: Program) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if op_name(node)]


# --------------------------------------------------------------------------------------------------- forms of a write


def multiplied(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.mul_(2.0).sum() + y.sum()


def masked(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.masked_fill_(cache > 0, -1e9).softmax(-1)


def by_operators(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y += 1.0
    y -= cache
    y *= 2.0
    y /= 3.0
    count //= 2
    count |= 4
    count &= 5
    count %= 4
    return y


def clamped_and_negated(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.clamp_(-1, 1).neg_().tanh_()


def by_function(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return torch.relu_(y), F.leaky_relu_(y + 1, 0.2), F.elu_(y - 1)


def asked_by_keyword(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    F.hardtanh(y, inplace=True)
    return F.dropout(y.exp() + y, 0.5, True, True)


def filled(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = torch.empty_like(y).fill_(2.0)
    return y * z.clone(), z.zero_(), y.fill_(0.5)


def into_out(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = cache * 2
    torch.add(cache, 1.0, out=z)
    torch.mul(cache[1:], 2.0, out=z[1:])
    return z.mul(y)


def boolean_index(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y[:, cache[0] > 0] = -1.0
    return y.exp()


def through_views(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    early = y.view(2, 2, 8).transpose(0, 1)
    early.mul_(3)
    y.view(-1).add_(1)
    return early, y


def read_by_another_view(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    other = y.reshape(2, 16)[0]
    y.mul_(2)
    return other.exp(), y.t()


def items_of_a_split(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = y.detach() * 1.0  # autograd refuses writes to one of several views
    a, b = z.chunk(2, -1)
    a.add_(1)
    b.copy_(a)
    c, *_ = z.unbind(0)
    c += 5
    _, e = z.split([1, 3])
    return a, e.mul_(2) * y[1:], z


def views_that_are_copies_or_not(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    same, copied = y.contiguous(), y.t().contiguous()
    flat, changed = y.flatten(), y.t().reshape(-1)
    kept, cast = y.to(torch.float32), y.to(torch.float64)
    y.add_(1.0)
    return same, copied, flat, changed, kept, cast


def random_numbers(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.empty(3).uniform_()  # not read, but later numbers depend on it
    z = torch.empty(4, 8).uniform_()
    z[:2].normal_()
    z[2:].bernoulli_(0.3)
    return y * z


def named_by_packet(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.ops.aten.mul_(y, 2.0)
    torch.ops.aten.add_.Tensor(cache, y.detach(), alpha=2)
    return y * cache


def copied_over(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = torch.empty(4, 8)
    z.copy_(y)
    y.copy_(cache)  # gradients of zero, but gradients
    return z, y.add_(1)


def scattered(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    at = torch.tensor([0, 2])
    y.index_put_((at,), cache[:2]).index_copy_(0, at, cache[2:]).index_add_(0, at, cache[:2], alpha=2)
    return y.scatter_(1, torch.tensor([[1], [2]]), 7.0)


def complex_numbers(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.view_as_complex(y.view(4, 4, 2)).mul_(2j)
    return y


def input_read_again(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    cache.index_copy_(0, count + torch.arange(1), y[:1].detach())
    count.add_(1)
    return (y @ cache.t()).softmax(-1), count


def input_returned(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    view = cache[1:]
    cache.mul_(2)
    view += 1
    return y, cache, view, cache.t()


def input_through_an_alias(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    count.to(torch.int64).add_(1)
    cache.to("cpu")[0].mul_(2)
    return y + count


def inputs_exchanged(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    before = cache.clone()
    cache.copy_(y.detach())
    y = y + before
    cache[0].copy_(before[1])
    return y


def assembled(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    keys = y.new_empty(4, 12)
    keys[..., :8].copy_(y)
    keys[..., 8:].copy_(cache[:, :1].expand(-1, 4))
    return keys.exp()


WRITES = [
    multiplied, masked, by_operators, clamped_and_negated, by_function, asked_by_keyword, filled, into_out,
    boolean_index, through_views, read_by_another_view, items_of_a_split, views_that_are_copies_or_not, random_numbers,
    named_by_packet,
    copied_over, scattered, complex_numbers, input_read_again, input_returned, input_through_an_alias,
    inputs_exchanged, assembled,
]  # fmt: skip


@pytest.mark.parametrize("core", WRITES, ids=lambda f: f.__name__)
def test_every_form_of_a_write_becomes_a_value_with_the_same_numbers_and_gradients(core: Callable[..., Any]) -> None:
    program = program_of(core)
    assert Functionalize().candidates(program)
    assert functionalized(program, gradients=True).left == ()


@pytest.mark.parametrize("core", [through_views, scattered, boolean_index, input_returned, assembled, filled])
def test_exported_graphs_of_aten_ops_are_served_alike(core: Callable[..., Any]) -> None:
    program = exported(core)
    assert functionalized(program).left == ()


# --------------------------------------------------------------------------------------------------- before and after


def test_a_write_that_nothing_else_sees_becomes_the_plain_operation() -> None:
    program = program_of(lambda y, cache, count: torch.relu_(y.mul_(2.0)) + 1)
    functionalized(program)
    assert names(program) == ["linear", "mul", "relu", "add"]


def test_a_written_view_of_which_only_the_view_is_read_needs_no_copy() -> None:
    program = program_of(lambda y, cache, count: y.view(2, 2, 8).transpose(1, 2).mul_(0.5).exp())
    functionalized(program)
    assert names(program) == ["linear", "view", "transpose", "mul", "exp"]


def test_a_part_of_a_tensor_is_written_on_a_copy_and_its_views_are_made_again() -> None:
    program = program_of(assembled)
    functionalized(program)
    lines = [line for line in print_graph(program.graph).splitlines() if "written" in line or "exp(" in line]
    first = "[['operator.getitem', [[Ellipsis, slice(None, 8, None)]], {}]]"
    assert f"written(%keys, {first}, 'copy_', [%y], {{}})" in lines[0].replace("%linear", "%y")
    assert lines[-1].endswith(".exp(%written_1)")


def test_an_input_is_read_in_its_new_version_and_written_back_once_at_the_end() -> None:
    program = program_of(input_read_again)
    functionalized(program)
    text = print_graph(program.graph)
    assert "%t: float32[8, 4] = .t(%index_copy)" in text
    assert [n for n in names(program) if n.endswith("_")] == ["copy_", "copy_"]
    assert names(program)[-2:] == ["copy_", "copy_"]


def test_views_of_an_input_in_the_output_are_views_of_the_input() -> None:
    program = program_of(input_returned)
    functionalized(program)
    *_, copy, view, transposed, output = program.graph.nodes
    assert [n.args[0] for n in (copy, view, transposed)] == [copy.args[0]] * 3
    assert copy.args[0].op == "placeholder"
    assert output.args[0][1:] == (view, transposed)  # Dynamo itself returns the input


def test_an_input_in_the_output_is_the_input() -> None:
    def build(graph: fx.Graph) -> Any:
        (cache,) = graph.nodes
        return (cache, graph.call_method("add_", (cache, 1.0)), graph.call_method("exp", (cache,)))

    program = node_by_node(build, torch.zeros(2))
    functionalized(program)
    cache, total, exponential, _, output = program.graph.nodes
    assert output.args[0] == (cache, cache, exponential)
    assert exponential.args == (total,)


def test_new_nodes_know_the_line_of_the_user_code_they_come_from() -> None:
    program = program_of(multiplied)
    functionalized(program)
    (product,) = [n for n in program.graph.nodes if op_name(n) == "mul"]
    assert "y.mul_(2.0)" in product.meta["stack_trace"]
    assert tuple(product.meta["example_value"].shape) == tuple(product.meta["val"].shape) == (4, 8)


def test_copies_into_inputs_at_the_end_are_no_candidates() -> None:
    program = program_of(lambda y, cache, count: (cache.copy_(y.detach() * 2), y)[1])
    assert Functionalize().candidates(program) == []
    assert functionalized(program) == Functionalized(0, ())


def test_graphs_without_writes_do_not_change() -> None:
    program = program_of(lambda y, cache, count: (y > 0) & (cache > 0) | (y < -1))
    before = print_graph(program.graph)
    assert functionalized(program) == Functionalized(0, ())
    assert print_graph(program.graph) == before


def test_nodes_that_only_keep_an_order_stay_where_they_are() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(y, cache)
            y.mul_(2)
        with torch.no_grad():
            limit = y.amax()
        y.sub_(limit)
        torch._check(y.shape[0] == 4)
        return y.float()

    program = program_of(core)
    assert functionalized(program, gradients=True).left == ()
    modes = ["_enter_autocast", "linear", "written", "_exit_autocast", "_set_grad_enabled", "amax", "_set_grad_enabled"]
    assert names(program)[1:8] == modes


def test_sizes_may_be_symbols() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Tensor:
        half = y.view(2, y.shape[0] // 2, 8)
        half[:, : cache.shape[0] - 2].add_(1)
        return half + y.mul_(2).view(2, -1, 8)

    programs: list[Program] = []

    def keep(module: fx.GraphModule, example: list[Any]) -> Any:
        programs.append(copy_program(module, example))
        return module

    torch.compile(Network(core), backend=keep, dynamic=True)(*inputs())
    (program,) = programs
    program.values = {k: v.node.hint if isinstance(v, torch.SymInt) else v for k, v in program.values.items()}
    assert "s" in str(fake(next(n for n in program.graph.nodes if op_name(n) == "linear")).shape[0])
    assert functionalized(program, gradients=True).left == ()


# ------------------------------------------------------------------------------------------------- what must stay


def node_by_node(build: Callable[[fx.Graph], Any], *values: Tensor) -> Program:
    """A program made by hand: `build` returns the output; fake values are those of running it."""
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


@torch.library.custom_op("fhopt_test::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


def by_custom_op(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    cache.add_(1)
    torch.ops.fhopt_test.double_(cache)
    return y + cache


def changed_form(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = y * 2
    z.unsqueeze_(0)
    return z.add_(1)


def several_at_once(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    a, b = y * 1, y * 2
    torch._foreach_add_([a, b], 1.0)
    return a + b


def without_gradient(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    with torch.no_grad():
        y.mul_(2)
    return y.exp()


def strided(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    part = y.as_strided((2, 2), (8, 1))
    y.mul_(2)
    return part + 1


def past_autograd(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y.data.mul_(2)
    return y + 1


def running_statistics(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    mean, variance = torch.zeros(8), torch.ones(8)
    mean.add_(1)
    y = F.batch_norm(y, mean, variance, training=True)
    return y + mean


def second_argument(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    _, wide = torch.broadcast_tensors(y, cache[:1])
    cache.add_(1)
    return y + wide


def looked_through(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    row = y.view(-1).view_as(cache)
    row.add_(1)
    cache.add_(1)
    return y


STAYS = {
    by_custom_op: "the custom op fhopt_test.double_",
    changed_form: "unsqueeze_ changes what the tensor is",
    several_at_once: "several tensors at once",
    without_gradient: "another gradient mode",
    strided: "the view part cannot be made again",
    past_autograd: "cannot be made again",
    running_statistics: "running statistics",
    second_argument: "an argument that is not its first",
    looked_through: "the view row cannot be made again",
}


@pytest.mark.parametrize("core", STAYS, ids=lambda f: f.__name__)
def test_a_write_that_cannot_be_replaced_stays_and_says_why(core: Callable[..., Any]) -> None:
    program = program_of(core)
    result = functionalized(program)
    assert result.left
    assert all(STAYS[core] in miss.reason for miss in result.left), [miss.reason for miss in result.left]


def test_a_parameter_is_written_in_place() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x.mul(self.seen).add_(1)

    program = capture(Counting(), (torch.ones(3),)).program
    result = functionalized(program)
    assert result.changed == 1
    assert ["is a parameter" in miss.reason for miss in result.left] == [True]


def test_code_that_is_not_in_the_graph_keeps_its_tensors() -> None:
    def body(y: Tensor) -> Tensor:
        return y.mul_(2) + 1

    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        z = y.detach() * 2
        z.add_(1)
        return torch.utils.checkpoint.checkpoint(body, z, use_reentrant=False) + z

    program = program_of(core)
    result = functionalized(program)
    assert [miss.reason for miss in result.left] == ["tag_activation_checkpoint changes its inputs inside"]


def test_inputs_that_share_memory_are_written_in_place() -> None:
    memory = torch.zeros(4)

    def build(graph: fx.Graph) -> Any:
        first, second = graph.nodes
        return (graph.call_method("add_", (first, 1.0)), graph.call_function(operator.mul, (second, 2.0)))

    program = node_by_node(build, memory[:2], memory[2:])
    assert ["neither as a view" in m.reason for m in Functionalize().run(program).left] == [True]
    program = node_by_node(build, torch.zeros(2), torch.zeros(2))
    program.values = {"input_0": memory[:2], "input_1": memory[2:]}
    assert ["another input shares" in m.reason for m in Functionalize().run(program).left] == [True]


def halves() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(4)
    return memory[:2], memory


def test_memory_that_two_results_of_an_op_share_is_written_in_place() -> None:
    def build(graph: fx.Graph) -> Any:
        pair = graph.call_function(halves)
        one, two = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        graph.call_method("add_", (one, 1.0))
        return (graph.call_function(operator.mul, (two, 2.0)),)

    result = functionalized(node_by_node(build))
    assert ["neither as a view" in miss.reason for miss in result.left] == [True]


def test_functions_without_a_public_name_are_called_where_they_are() -> None:
    def shift_(x: Tensor) -> Tensor:
        return x.add_(1)

    def build(graph: fx.Graph) -> Any:
        (first,) = graph.nodes
        graph.call_function(shift_, (first,))
        return (graph.call_function(operator.mul, (first, 2.0)),)

    result = functionalized(node_by_node(build, torch.zeros(2)))
    assert ["cannot be called by name" in miss.reason for miss in result.left] == [True]


@pytest.mark.parametrize("forgotten", ["view", "scores"])
def test_without_a_fake_value_nothing_is_assumed(forgotten: str) -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        scores = y * 2
        view = scores.view(-1)
        scores.add_(1)
        return view + 1

    program = program_of(core)
    (node,) = [n for n in program.graph.nodes if n.name == forgotten]
    node.meta.pop("example_value")
    reasons = [miss.reason for miss in Functionalize().run(program).left]
    assert reasons == [
        {"view": "what view returns is not known", "scores": "the memory of scores is not known"}[forgotten]
    ]


def test_other_tensors_are_still_replaced_beside_one_that_stays() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        by_custom_op(y, cache, count)
        y.mul_(2)
        return y.add_(cache)

    result = functionalized(program_of(core))
    assert (result.changed, len(result.left)) == (2, 2)


# ------------------------------------------------------------------------------------------------------ whole models


def tiny_mistral() -> Any:
    """Mistral with a window of 4 tokens: its static cache rolls."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def tiny_deepseek() -> Any:
    """DeepSeek-V3: keys are assembled in an empty tensor, the cache holds latents."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(1)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize(("make", "states"), [(tiny_llama, 3), (tiny_mistral, 2), (tiny_deepseek, 3)])
def test_decoding_with_a_static_cache_leaves_the_same_cache(make: Callable[[], Any], states: int) -> None:
    from transformers import StaticCache

    model = make()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.randint(1, VOCABULARY, (1, 6)), past_key_values=cache)
        token = torch.randint(1, VOCABULARY, (1, 1))
        program = capture(model, (), {"input_ids": token, "past_key_values": cache}).program
        assert Functionalize().candidates(program)
        assert functionalized(program).left == ()
    written_back = {n.args[0] for n in program.graph.nodes if op_name(n) == "copy_"}
    assert len(written_back) == states * 2  # keys, values and sometimes the length, of two layers


def test_a_compiled_graph_gives_the_same_results() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        cache[1:].copy_(y[1:].detach())
        keys = assembled(y, cache, count)
        y.view(2, -1)[0].mul_(2)
        return keys, y, cache.t()

    from torch._inductor.compile_fx import compile_fx

    program = program_of(core)
    with torch.no_grad():
        expected = observe(program)
        functionalized(program)
        given = fresh(program)
        compiled: Any = compile_fx(program.module, list(program.values.values()))
        outputs = compiled(*given)
    for one, other in zip([*outputs, *given], [*expected.outputs, *expected.inputs], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # fused arithmetic rounds differently


@pytest.mark.parametrize("base", [torch.zeros(2, 3), torch.zeros(1, 3).expand(2, 3), torch.zeros(2, 6)[:, ::2]])
def test_a_written_copy_leaves_its_base_alone(base: Tensor) -> None:
    result = written(base, (("t", (), {}), ("operator.getitem", (0,), {})), "add_", (1.0,))
    assert base.sum() == 0
    assert result.tolist() == [[1, 0, 0], [1, 0, 0]]


# -------------------------------------------------------------------------------------------------- random programs


VIEWS = ("reshape", "transpose", "slice", "chunk", "select", "flatten", "unsqueeze", "to", "contiguous", "detach")
WAYS = ("method", "operator", "setitem", "mask", "copy", "function", "inplace", "fill")


class Writer:
    """Draws a program of views, writes and reads, in which every call is valid."""

    def __init__(self, data: st.DataObject, values: list[Tensor]) -> None:
        self.data, self.graph, self.mode = data, fx.Graph(), FakeTensorMode()
        self.nodes: list[fx.Node] = []
        for position, value in enumerate(values):
            self.nodes.append(self.graph.placeholder(f"input_{position}"))
            self.nodes[-1].meta["example_value"] = self.mode.from_tensor(value)

    def pick(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))

    def call(self, target: Any, *args: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args)
        known = fx.node.map_arg(args, fake)
        with self.mode:
            value = getattr(known[0], target)(*known[1:]) if op == "call_method" else target(*known)
        node.meta["example_value"] = value
        return node

    def view(self, x: fx.Node) -> fx.Node:
        shape, size = fake(x).shape, fake(x).numel()
        dim = self.pick(range(len(shape)))
        choice = self.pick(VIEWS)
        match choice:
            case "reshape":
                return self.call(
                    "reshape", x, self.pick([(size,), (1, -1), (-1, 1), (2, -1) if size % 2 == 0 else (-1,)])
                )
            case "transpose":
                return self.call("transpose", x, dim, self.pick(range(len(shape))))
            case "slice":
                part = self.pick(
                    [slice(0, max(1, shape[dim] // 2)), slice(shape[dim] // 2, None), slice(None, None, 2)]
                )
                return self.call(operator.getitem, x, (*[slice(None)] * dim, part))
            case "chunk":
                pieces = self.call(torch.chunk, x, 2, dim)
                return self.call(operator.getitem, pieces, self.pick(range(len(fake(pieces)))))
            case "select":
                return self.call("select", x, dim, 0) if len(shape) > 1 else self.call("unsqueeze", x, 0)
            case "unsqueeze":
                return self.call("unsqueeze", x, dim)
            case "to":
                return self.call("to", x, torch.float64)
        return self.call(choice, x)

    def write(self, x: fx.Node) -> fx.Node:
        number = self.call("mean", self.pick(self.nodes))
        match self.pick(WAYS):
            case "method":
                return self.call(self.pick(["add_", "mul_", "sub_"]), x, number)
            case "operator":
                return self.call(self.pick([operator.iadd, operator.imul, operator.isub]), x, number)
            case "setitem":
                self.call(operator.setitem, x, self.pick([0, slice(1, None), Ellipsis]), self.pick([number, 0.5]))
                return x
            case "mask":
                return self.call("masked_fill_", x, self.call(operator.gt, x, 0.1), -0.5)
            case "copy":
                return self.call("copy_", x, self.call(self.pick(["sin", "clone"]), x))
            case "function":
                return self.call(torch.relu_, x)
            case "inplace":
                return self.call(F.leaky_relu, x, 0.1, True)
        return self.call("fill_", x, 0.75)

    def program(self, values: list[Tensor]) -> Program:
        for _ in range(self.pick(range(3, 14))):
            x = self.pick(self.nodes)
            make = self.pick([self.view, self.view, self.write, self.write, lambda x: self.call("cos", x)])
            self.nodes.append(make(x))
        self.graph.output(tuple(self.pick(self.nodes) for _ in range(3)))
        module = fx.GraphModule(nn.Module(), self.graph)
        return Program(module, {f"input_{position}": value for position, value in enumerate(values)})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_program_of_views_writes_and_reads_gives_the_same_numbers(data: st.DataObject) -> None:
    torch.manual_seed(0)
    values = [torch.randn(4, 4).double(), torch.randn(6).double(), torch.randn(4, 6).double()[:, :3]]
    program = Writer(data, values).program(values)
    assert functionalized(program, atol=1e-10).left == ()  # a mean over other strides adds in another order
