"""Composites, one module or function each, and what keeps one as it is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fhopt.capture import capture, from_exported
from fhopt.errors import Miss
from fhopt.passes import composites, flex
from fhopt.passes.composites import COMPOSITES, einsum
from fhopt.passes.decompose import Decompose, qualified_name
from fhopt.passes.graph import Program, copy_program, fake, op_name, print_graph
from fhopt.passes.trace import trace_composite
from fhopt.passes.verify import verify

B, H, G, S, T, D = 2, 4, 2, 5, 7, 8
E = H * D
CORES = ("softmax", "_safe_softmax", "scaled_dot_product_attention")


# --------------------------------------------------------------------------------------------------- helpers


def traced(module: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> Program:
    """Dynamo's graph of a call, in the module's own mode (`capture` is for evaluation)."""
    seen: list[Program] = []

    def keep(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(copy_program(graph_module, example_inputs))
        return graph_module.forward

    torch.compile(module, backend=keep, dynamic=dynamic, fullgraph=True)(*inputs)
    (program,) = seen
    return program


def hand_made(target: Any, *args: Any, results: tuple[Tensor, ...], **kwargs: Any) -> Program:
    """A graph of the first result of a call, on placeholders for the tensors among the arguments."""
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
    """A copy of the program after the pass, verified, and what was left alone."""
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
    verify(after, stage.name)
    known = {n.name for n in program.graph.nodes}
    new = [n for n in after.graph.nodes if n.name not in known and n.op in ("call_function", "call_method")]
    bare = {op_name(n) for n in new if fake(n) is None or n.meta.get("val") is not fake(n)}
    assert bare <= {"_enter_autocast", "_exit_autocast", "is_grad_enabled", "_set_grad_enabled"}
    return after, missed


def close(found: Any, expected: Any, largest: float = 2e-6) -> None:
    """Equal up to another order of float32 sums."""
    torch.testing.assert_close(found, expected, rtol=max(largest, 1e-6) / 2, atol=largest, equal_nan=True)


def run(program: Program, *values: Any) -> Any:
    """Results of the graph on its example values, symbols by their hints."""
    given = [v.node.hint if isinstance(v, (torch.SymInt, torch.SymFloat)) else v for v in program.values.values()]
    torch.manual_seed(3)
    return fx.Interpreter(program.module).run(*(values or given))


def check(program: Program, gradients: bool = True, **options: Any) -> Program:
    """Decompose; nothing is missed, results and gradients are the same, a core of attention is seen. Returns it."""
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
            close(b, a, 1e-5)  # squares of float32 sums
    return after


def reason(program: Program, **options: Any) -> str:
    """Why the only candidate was left alone; the graph has not changed."""
    text = print_graph(program.graph)
    after, missed = decomposed(program, **options)
    assert print_graph(after.graph) == text and len(missed) == 1
    return missed[0].reason


def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


# --------------------------------------------------------------------------------------------------- MultiheadAttention


class Attention(nn.Module):
    """nn.MultiheadAttention on one input, or on a query and other keys and values."""

    def __init__(self, weights: bool = True, average: bool = True, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(E, H, **options)
        self.call = dict(need_weights=weights, average_attn_weights=average, is_causal=causal)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, padding: Any = None, mask: Any = None) -> Any:
        out, weights = self.inner(x, k, v, key_padding_mask=padding, attn_mask=mask, **self.call)
        return out if weights is None else (out, weights)


PADDING = torch.tensor([[False] * 4 + [True], [False] * 5])
TRIANGLE = torch.ones(S, S, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    ("options", "padding", "mask"),
    [
        ({}, None, None),
        ({}, PADDING, TRIANGLE),
        ({"average": False}, None, torch.randn(B * H, S, S)),
        ({"weights": False, "causal": True}, None, TRIANGLE),
        ({"weights": False}, PADDING, TRIANGLE),
        ({"weights": False, "add_bias_kv": True}, PADDING, None),
        ({"weights": False, "add_zero_attn": True, "bias": False}, None, TRIANGLE),
        ({"batch_first": True, "add_bias_kv": True}, PADDING, None),
    ],
    ids=lambda p: ", ".join(p) if isinstance(p, dict) else "",
)
def test_multi_head_attention_shows_its_projections_and_its_core(
    options: dict[str, Any], padding: Tensor | None, mask: Tensor | None
) -> None:
    x = torch.randn(B, S, E) if options.get("batch_first") else torch.randn(S, B, E)
    after = check(traced(Attention(**options), x, x, x, padding, mask))
    assert [op_name(n) for n in after.graph.nodes].count("linear") == 2


def test_keys_and_values_of_other_widths_have_projections_of_their_own() -> None:
    module = Attention(False, kdim=12, vdim=10)
    check(traced(module, torch.randn(S, B, E), torch.randn(T, B, 12), torch.randn(T, B, 10)))


def test_inputs_without_a_batch_stay_without_one() -> None:
    x = torch.randn(S, E)
    after = check(traced(Attention(), x, x, x, None, TRIANGLE))
    assert fake(after.graph.output_node().args[0][0]).shape == (S, E)  # type: ignore[index, arg-type]


def test_static_keys_and_values_replace_the_projected_ones() -> None:
    def call(x: Tensor, w: Tensor, o: Tensor, k: Tensor, v: Tensor) -> Any:
        bare = (None, None, None, False, 0.0, o, None)
        return F.multi_head_attention_forward(x, x, x, E, H, w, *bare, static_k=k, static_v=v)

    w, o = torch.randn(3 * E, E) / 8, torch.randn(E, E) / 8
    check(traced(call, torch.randn(S, B, E), w, o, torch.randn(B * H, T, D), torch.randn(B * H, T, D)))


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_in_training_stays_dropout(weights: bool) -> None:
    x = torch.randn(S, B, E)
    after = check(traced(Attention(weights, dropout=0.4).train(), x, x, x))  # the same random numbers, one for one
    first, second = (fx.Interpreter(after.module).run(*after.values.values())[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weights", [True, False])
def test_symbolic_sizes_stay_symbolic(weights: bool) -> None:
    module, x = Attention(weights), torch.randn(S, B, E)
    program = traced(module, x, x, x, None, TRIANGLE, dynamic=True)
    after = check(program)
    longer, mask = torch.randn(9, 3, E), torch.ones(9, 9, dtype=torch.bool).triu(1)
    values: list[Any] = []
    for value in after.values.values():
        if isinstance(value, torch.SymInt):
            values.append({S: 9, B: 3}[value.node.hint])
        elif isinstance(value, nn.Parameter) or not value.dim():
            values.append(value)
        else:
            values.append(mask if value.dtype == torch.bool else longer)
    expected = module(longer, longer, longer, None, mask)
    close(run(after, *values)[0], expected[0] if weights else expected)


def test_autocast_around_a_composite_is_autocast_around_its_operations() -> None:
    class Under(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(False, add_zero_attn=True)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x, x, x)

    after = check(traced(Under(), torch.randn(S, B, E)), gradients=False)
    assert {fake(n).dtype for n in after.graph.nodes if op_name(n) == "linear"} == {torch.bfloat16}


def test_new_nodes_know_the_line_that_made_the_composite() -> None:
    x = torch.randn(S, B, E)
    program = traced(Attention(), x, x, x)
    (node,) = (n for n in program.graph.nodes if op_name(n) == "multi_head_attention_forward")
    after, _ = decomposed(program)
    (softmax,) = (n for n in after.graph.nodes if op_name(n) == "softmax")
    assert all(softmax.meta[key] == node.meta[key] for key in ("stack_trace", "nn_module_stack"))
    assert softmax.meta["example_value"] is softmax.meta["val"]


# --------------------------------------------------------------------------------------------------- the fast path


@pytest.mark.parametrize(
    ("options", "mask", "padding"),
    [
        ({}, None, None),
        ({"norm_first": True}, TRIANGLE, None),
        ({"activation": "gelu"}, None, PADDING),
        ({"activation": "gelu", "norm_first": True}, TRIANGLE, PADDING),
    ],
    ids=["norm last", "norm first, triangle", "gelu, padding", "all"],
)
def test_the_encoder_layer_of_the_fast_path_is_written_out(
    options: dict[str, Any], mask: Tensor | None, padding: Tensor | None
) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **options)
    with torch.no_grad():
        program = capture(layer.eval(), (torch.randn(B, S, E), mask, padding)).program
        assert any(op_name(n) == "_transformer_encoder_layer_fwd" for n in program.graph.nodes)
        after = check(program)
    assert [op_name(n) for n in after.graph.nodes].count("layer_norm") == 2


@pytest.mark.parametrize(
    ("inputs", "weights", "average"), [((0, 0, 0), True, True), ((0, 1, 1), True, False), ((0, 1, 2), False, True)]
)
def test_native_multi_head_attention_is_written_out(inputs: tuple[int, ...], weights: bool, average: bool) -> None:
    def call(x: Tensor, y: Tensor, z: Tensor, w: Tensor, b: Tensor, o: Tensor, p: Tensor) -> Any:
        q, k, v = ((x, y, z)[i] for i in inputs)
        out = torch._native_multi_head_attention(q, k, v, E, H, w, b, o, p, PADDING, weights, average, 1)
        return out if weights else out[0]

    weight, bias = torch.randn(3 * E, E) / 8, torch.randn(3 * E)
    check(traced(call, *torch.randn(3, B, S, E), weight, bias, torch.randn(E, E) / 8, torch.randn(E)))


def test_a_row_that_may_attend_to_nothing_is_nan_as_in_the_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True).eval()
    padding = torch.tensor([[True] * S, [False] * S])
    with torch.no_grad():
        after = check(capture(layer, (torch.randn(B, S, E), None, padding)).program)
        assert bool(run(after)[0][0].isnan().all())


# --------------------------------------------------------------------------------------------------- contractions


def all_positional(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(m, q, k.mT, beta=0.5, alpha=0.3)


def all_by_name(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(input=m[:1], batch1=q, batch2=k.mT)


def a_method(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return m.baddbmm(q, batch2=k.mT, alpha=2)


def an_aten_call(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.ops.aten.baddbmm.default(m, q, k.mT, beta=2)


def a_buffer_that_is_not_read(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(m.detach() * math.nan, q, k.mT, beta=0, alpha=0.3)


@pytest.mark.parametrize(
    ("scores", "dynamic"),
    [(all_positional, False), (all_positional, True), (all_by_name, False), (a_method, False), (an_aten_call, False),
     (a_buffer_that_is_not_read, False)],
    ids=lambda p: getattr(p, "__name__", "dynamic" if p else "static"),
)  # fmt: skip
def test_baddbmm_becomes_a_product_and_a_sum(scores: Callable[..., Tensor], dynamic: bool) -> None:
    m, q, k, v = torch.randn(3, S, T), torch.randn(3, S, D), torch.randn(3, T, D), torch.randn(3, T, D)
    inputs = [t.requires_grad_() for t in (m, q, k, v)]
    program = traced(lambda m, q, k, v: scores(m, q, k).softmax(-1) @ v, *inputs, dynamic=dynamic)
    check(program, gradients=scores is not a_buffer_that_is_not_read)


@pytest.mark.parametrize(
    "equation",
    [
        "b h s t, b h t d, h d e -> b s e",
        "bhst,bhtd,hde",
        "...st,...td,hde->...se",
        "hst,...td,hdd->...t",
        "bhst,bhtd,hde,ii->bse",
    ],
)
def test_einsum_of_many_becomes_a_chain_of_two_at_a_time(equation: str) -> None:
    shapes = {"b": B, "h": H, "s": S, "t": T, "d": D, "e": D, "i": 3}

    def operand(term: str) -> Tensor:
        batch = {4: "", 3: "h", 2: "bh"}[4 if "..." not in term else len(term.replace("...", ""))]
        return torch.randn([shapes[c] for c in term.replace("...", batch)], requires_grad=True)

    terms = equation.replace(" ", "").split("->")[0].split(",")
    operands = [operand(term) for term in terms]
    close(einsum(equation, *operands), torch.einsum(equation, *operands), 1e-4)

    def call(*operands: Tensor) -> Tensor:
        return torch.einsum(equation, operands[0].softmax(-1), *operands[1:])

    program = traced(call, *operands)
    after, missed = decomposed(program)
    found = [n for n in after.graph.nodes if op_name(n) == "einsum"]
    assert missed == [] and [len(n.args[1]) for n in found] == [2] * (len(terms) - 1)
    close(run(after)[0], run(program)[0], 1e-4)  # sums of many products


def test_einsum_of_two_is_left_alone() -> None:
    program = traced(lambda q, k: torch.einsum("bqd,bkd->bqk", q, k), *torch.randn(2, B, S, D))
    assert list(Decompose().candidates(program)) == []


def test_a_result_keeps_the_layout_that_a_view_behind_it_needs() -> None:
    def call(p: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bhst,bhtd,hde->ebs", p.softmax(-1), v, w).permute(1, 2, 0).view(B, -1)

    check(traced(call, torch.randn(B, H, S, T), torch.randn(B, H, T, D), torch.randn(H, D, E)))


# --------------------------------------------------------------------------------------------------- bodies


class Checkpointed(nn.Module):
    """A block in a checkpoint in a checkpoint."""

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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_bodies_of_nested_checkpoints_are_written_into_the_graph(dynamic: bool) -> None:
    program = traced(Checkpointed(), torch.randn(B, S, E), dynamic=dynamic)
    bodies = [m for m in program.module.modules() if isinstance(m, fx.GraphModule) and m is not program.module]
    texts = [print_graph(body.graph) for body in bodies]
    after = check(program)
    assert "checkpoint" not in print_graph(after.graph)
    assert len(texts) == 2 and [print_graph(body.graph) for body in bodies] == texts  # they are Dynamo's
    (softmax,) = (n for n in after.graph.nodes if op_name(n) == "softmax")
    assert "in core" in softmax.meta["stack_trace"]


def test_composites_in_a_checkpoint_are_found_behind_it() -> None:
    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=soft_capped)

    with torch.no_grad():
        after = check(traced(Checkpointed(inner), torch.randn(B, S, E)))
    assert any(n.target is flex.score_mod for n in after.graph.nodes)


def test_a_checkpoint_without_attention_keeps_its_memory_saving() -> None:
    program = traced(Checkpointed(lambda q, k, v: q * k + v), torch.randn(B, S, E))
    assert list(Decompose().candidates(program)) == []


def test_a_region_that_is_compiled_once_and_called_twice_is_written_twice() -> None:
    shared, x = nn.Linear(E, E), torch.randn(B, S, E, requires_grad=True)
    program = traced(lambda x: repeated(shared, repeated(shared, x)), x)
    assert [op_name(n) for n in program.graph.nodes].count("invoke_subgraph") == 2
    after = check(program, gradients=False)  # torch differentiates the original under a compiler only
    assert [op_name(n) for n in after.graph.nodes].count("softmax") == 2


@torch.compiler.nested_compile_region
def repeated(layer: nn.Module, x: Tensor) -> Tensor:
    return core(layer(x), x * 2, x) + x


class Mode(nn.Module):
    """Attention under a mode that export makes a higher-order op of."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.q, self.mode = nn.Linear(E, E), mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        with self.mode():
            z = core(self.q(y), y, y)
        return z + y


@pytest.mark.parametrize(
    "mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "autocast"]
)
def test_a_body_under_a_mode_of_its_own_keeps_the_mode(mode: Callable[[], Any]) -> None:
    program = from_exported(torch.export.export(Mode(mode), (torch.randn(B, S, E),))).program
    assert any(op_name(n).startswith("wrap_with") for n in program.graph.nodes)
    after = check(program)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        run(after)
        assert not torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------- flex_attention


SLOPES, BIAS = torch.rand(H), torch.randn(B, H, S, T)
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def soft_capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.tanh(s / 5) * 5


def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + SLOPES[h] * (j - i) + BIAS[b, h, i, j]


def within_documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENTS[i] == DOCUMENTS[j]) & (i > j)  # the first query sees nothing


def alternating(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (h % 2 == 0) | (b + i >= j)


def flexible(options: dict[str, Any], mask: Any = None, in_graph: bool = False) -> Callable[..., Any]:
    """A call of flex_attention; its block mask is made beforehand, or in the graph."""

    def blocks_for(queries: int, keys: int) -> Any:
        return None if mask is None else create_block_mask(mask, B, H, queries, keys, device="cpu")

    made = None if in_graph else blocks_for(S, T)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        blocks = blocks_for(q.shape[2], k.shape[2]) if in_graph else made
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, **options)

    return call


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with the heads behind the tokens in memory, keys and values of G heads."""
    q = torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2)
    return q, torch.randn(B, G, T, D, dtype=dtype), torch.randn(B, G, T, D, dtype=dtype)


@pytest.mark.parametrize(
    ("score", "mask", "in_graph"),
    [
        (None, None, False),
        (soft_capped, None, False),
        (None, alternating, False),
        (biased, within_documents, False),
        (biased, within_documents, True),
    ],
    ids=["plain", "soft cap", "alternating heads", "bias, documents", "mask made in the graph, dynamic"],
)
def test_flex_attention_becomes_a_softmax_between_contractions(
    score: Callable[..., Tensor] | None, mask: Callable[..., Tensor] | None, in_graph: bool
) -> None:
    program = traced(flexible(dict(score_mod=score, scale=0.3), mask, in_graph), *operands(), dynamic=in_graph)
    after = check(program)
    names = [op_name(n) for n in after.graph.nodes]
    assert names.count("score_mod") == (score is not None) and names.count("mask_mod") == (mask is not None)
    assert names.count("where") == (mask is not None)  # nothing is left of the block mask either
    assert "setitem" not in names and "flex_attention" not in names


def test_flex_attention_in_half_precision_keeps_its_scores_in_float32() -> None:
    after = check(traced(flexible(dict(score_mod=biased)), *operands(torch.bfloat16)))
    (scores,) = (n for n in after.graph.nodes if op_name(n) == "score_mod")
    assert fake(scores).dtype == torch.float32


def test_statistics_of_flex_attention_are_given_where_they_are_used() -> None:
    program = traced(flexible(dict(return_lse=True), within_documents), *operands())
    after = check(program)
    out, lse = run(after)
    assert bool((out[:, :, 0] == 0).all()) and bool((lse[:, :, 0] == -math.inf).all())
    (statistic,) = (n for n in program.graph.nodes if n.target is operator.getitem and n.args[1] == 1)
    statistic.args = (statistic.args[0], 2)  # the largest score, which this device gives to nobody
    assert {"amax", "logsumexp"} & {op_name(n) for n in check(program).graph.nodes} == {"amax"}


def test_a_view_behind_flex_attention_still_fits() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, enable_gqa=True).transpose(1, 2).view(B, S, E)  # as its queries lie in memory

    check(traced(call, *operands()))


def by_hand(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bias: Tensor) -> Tensor:
    i, j = torch.arange(S)[:, None], torch.arange(T)
    scores = q @ k.repeat_interleave(H // G, 1).mT * 0.3 + slopes[:, None, None] * (j - i) + bias
    allowed = (DOCUMENTS[:S, None] == DOCUMENTS) & (i > j)
    some = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & some, -math.inf).softmax(-1) * some
    return weights @ v.repeat_interleave(H // G, 1)


def test_gradients_reach_what_score_mod_captured() -> None:
    program, _ = decomposed(traced(flexible(dict(score_mod=biased, scale=0.3), within_documents), *operands()))
    values = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in program.values.values()]
    names = {id(SLOPES): "slopes", id(BIAS): "bias"}
    named = {names.get(id(old), name): new for (name, old), new in zip(program.values.items(), values, strict=True)}
    given = [named[name] for name in ("l_q_", "l_k_", "l_v_", "slopes", "bias")]
    expected = torch.autograd.grad(by_hand(*given).square().sum(), given)
    compiled: Any = aot_eager(program.module, values)
    for out in (program.module(*values)[0], compiled(*values)[0]):
        close(out, by_hand(*given))
        for a, b in zip(torch.autograd.grad(out.square().sum(), given), expected, strict=True):
            close(a, b, 1e-5)  # one is summed by scattering


def test_inductor_compiles_the_result() -> None:
    program = traced(flexible(dict(score_mod=soft_capped), within_documents), *operands())
    after, _ = decomposed(program)
    compiled: Any = compile_fx(after.module, list(after.values.values()))
    close(compiled(*after.values.values())[0], run(program)[0])


# --------------------------------------------------------------------------------------------------- attention calls


ATEN = torch.ops.aten
CAUSAL = dict(dropout_p=0.0, is_causal=True)


@pytest.mark.parametrize(
    ("target", "mask", "more"),
    [
        (ATEN._scaled_dot_product_flash_attention_for_cpu.default, "attn_mask", {}),
        (ATEN._scaled_dot_product_flash_attention, None, dict(return_debug_mask=False)),
        (ATEN._scaled_dot_product_efficient_attention.default, "attn_bias", dict(compute_log_sumexp=True)),
        (ATEN._scaled_dot_product_cudnn_attention.default, "attn_bias", dict(compute_log_sumexp=False)),
        (ATEN._scaled_dot_product_attention_math.default, "attn_mask", dict(enable_gqa=True)),
        (ATEN._scaled_dot_product_fused_attention_overrideable.default, "attn_bias", {}),
    ],
    ids=lambda p: op_name(fx.Graph().call_function(p)) if callable(p) else "",
)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "causal"])
def test_what_dispatch_made_of_sdpa_becomes_sdpa_again(
    target: Any, mask: str | None, more: dict[str, Any], masked: bool
) -> None:
    q, k, v = torch.randn(3, B, H, S, D)
    bias = torch.randn(S, S)
    given = {mask: bias} if mask and masked else CAUSAL if not masked else {}
    empty = {"attn_bias": None} if mask == "attn_bias" and not masked else {}
    expected = F.scaled_dot_product_attention(
        q, k, v, bias if mask and masked else None, is_causal=not masked, scale=0.2
    )
    program = hand_made(target, q, k, v, scale=0.2, results=(expected, q), **given, **empty, **more)
    after, missed = decomposed(program)
    assert missed == [] and op_name(list(after.graph.nodes)[-2]) == "scaled_dot_product_attention"
    close(run(after)[0], expected)


def test_the_cpu_kernel_and_its_plain_form_agree_on_grouped_heads() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)[0]
        return out

    check(traced(call, *torch.randn(3, B, H, S, D), torch.randn(S, S)))


def slow(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor, bias: Any = 0.0, softcap: float = 0.0
) -> Tensor:
    """Attention of [B, S, H, D], one obvious step after another; rows without a key are 0."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores + bias).masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).contiguous()


def distance(q: Tensor, k: Tensor, shift: int) -> Tensor:
    return torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + shift)


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    steps = distance(q, k, k.shape[1] - q.shape[1])
    right = 0 if causal else window_size_right
    allowed = (steps <= (right if right >= 0 else 99)) & (
        steps >= (-window_size_left if window_size_left >= 0 else -99)
    )
    bias = 0.0 if alibi_slopes is None else -alibi_slopes[:, None, None] * steps.abs()
    return slow(q, k, v, softmax_scale, allowed, bias, softcap), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def cutlass(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, seqstart_q: Tensor | None, max_seqlen_q: int | None,
    dropout_p: float, compute_logsumexp: bool, custom_mask_type: int, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    steps = distance(query, key, key.shape[1] - query.shape[1] if custom_mask_type == 2 else 0)
    allowed = steps <= (0 if custom_mask_type else 99)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return slow(query, key, value, scale, allowed, 0.0 if bias is None else bias), query.new_zeros(0)


torch.library.custom_op(
    "flash_attn::_flash_attn_forward",
    flash,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left, "
    "int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor)",
).register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])))
torch.library.custom_op(
    "xformers::efficient_attention_forward_cutlass",
    cutlass,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? seqstart_q, int? max_seqlen_q, "
    "float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale) -> (Tensor, Tensor)",
).register_fake(lambda query, *_: (torch.empty_like(query), query.new_empty(0)))


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = flash(q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, False)
    return out if return_attn_probs else out[0]


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False, **more: Any,
) -> Any:  # fmt: skip
    q, k, v = (t if tensor_layout == "NHD" else t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out = slow(q, k, v, scale, distance(q, k, 0) <= (0 if is_causal else 99))
    out = out if tensor_layout == "NHD" else out.transpose(1, 2)
    return (out, out) if return_lse else out


flash_attn_func.__module__, sageattn.__module__ = "flash_attn.flash_attn_interface", "sageattention.core"
for function in (flash_attn_func, sageattn):
    torch._dynamo.allow_in_graph(function)


def tokens_first(keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D], [B, keys, G, D], [B, keys, G, D]."""
    return torch.randn(B, S, H, D), torch.randn(B, keys, G, D), torch.randn(B, keys, G, D)


FLASH_OPTIONS: list[dict[str, Any]] = [
    dict(causal=True),
    dict(softmax_scale=0.2),
    dict(window_size=(2, 1)),
    dict(window_size=(-1, 1)),
    dict(causal=True, window_size=(1, -1)),
    dict(causal=True, softcap=3.0),
    dict(causal=True, alibi_slopes=SLOPES, window_size=(2, 2)),
]


@pytest.mark.parametrize("keys", [S, T, 3])
@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda o: ", ".join(o))
def test_the_plain_form_of_flash_attn_has_its_numbers(options: dict[str, Any], keys: int) -> None:
    inputs = tokens_first(keys)
    found = composites.flash_attn_func(*inputs, **options)
    close(found, flash_attn_func(*inputs, **options))


def test_flash_attn_with_slopes_becomes_a_softmax() -> None:
    check(traced(lambda q, k, v: flash_attn_func(q, k, v, **FLASH_OPTIONS[-1]), *tokens_first()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_registered_operator_of_flash_attn_becomes_sdpa(dynamic: bool) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        q, k = (t.view(B, t.shape[1], -1, D) for t in (x, y))
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, k, 0.0, 0.3, True, -1, -1, 0.0, None, False)[0]
        return out

    check(traced(call, torch.randn(B, S, E), torch.randn(B, T, G * D), dynamic=dynamic))


@pytest.mark.parametrize("keys", [S, T, 3])
@pytest.mark.parametrize("mask_type", [0, 1, 2], ids=["no mask", "from the start", "from the end"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_the_plain_form_of_xformers_has_its_numbers(mask_type: int, biased: bool, keys: int) -> None:
    q, k, v = tokens_first(keys)
    bias = torch.randn(B, H, S, keys) if biased else None
    (found,) = composites.efficient_attention(q, k, v, bias=bias, custom_mask_type=mask_type, max_seqlen_q=S)
    expected, _ = cutlass(q, k, v, bias, None, S, 0.0, False, mask_type, None)
    close(found, expected)


def test_xformers_becomes_sdpa() -> None:
    check(traced(lambda q, k, v: xformers_call(q, k, v, mask_type=2), *tokens_first()))


def xformers_call(q: Tensor, k: Tensor, v: Tensor, seqstart: Tensor | None = None, mask_type: int = 0) -> Tensor:
    operator_ = torch.ops.xformers.efficient_attention_forward_cutlass
    out: Tensor = operator_(q, k, v, None, seqstart, S, 0.0, False, mask_type, 0.3)[0]
    return out


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_sageattn_becomes_sdpa_without_its_rounding(layout: str, causal: bool) -> None:
    q, k, v = tokens_first(S if causal else T)
    inputs = (q, k, v) if layout == "NHD" else tuple(t.transpose(1, 2) for t in (q, k, v))
    check(traced(lambda q, k, v: sageattn(q, k, v, layout, causal, smooth_k=True), *inputs))


# --------------------------------------------------------------------------------------------------- one for each Miss


def test_nested_tensors_are_left_alone() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    weights = (torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E))
    target = ATEN._native_multi_head_attention.default
    program = hand_made(target, nested, nested, nested, E, H, *weights, results=(torch.randn(B, 3, E), torch.ones(1)))
    assert "takes nested tensors" in reason(program)


def test_attention_in_a_checkpoint_is_left_alone_on_demand() -> None:
    program = traced(Checkpointed(), torch.randn(B, S, E))
    found = reason(program, inline_checkpoints=False)
    assert found == "attention inside a checkpointed block is left alone while training"


def test_attention_in_a_branch_is_left_alone() -> None:
    def call(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, lambda x: core(x, x * 2, x), lambda x: x + 1, (x,))
        return out

    assert reason(traced(call, torch.randn(B, S, E))) == "attention inside cond is left alone"


def test_a_body_with_other_arguments_is_left_alone() -> None:
    program = traced(Checkpointed(), torch.randn(B, S, E))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "tag_activation_checkpoint")
    node.args = node.args[:-1]
    assert "arguments to a body of" in reason(program)


def test_a_body_that_is_no_graph_is_left_alone() -> None:
    program = traced(flexible({}, alternating), *operands())
    (node,) = (n for n in program.graph.nodes if op_name(n) == "flex_attention")
    node.args = (*node.args[:3], node.args[0], *node.args[4:])
    assert "is not a graph of the program" in reason(program)


def test_results_that_leave_as_one_tuple_are_left_alone() -> None:
    q, k, v = torch.randn(3, B, H, S, D)
    program = hand_made(ATEN._scaled_dot_product_attention_math.default, q, k, v, results=(q, q))
    output = program.graph.output_node()
    output.args = (output.args[0][0].args[0],)  # type: ignore[index, union-attr]
    program.graph.eliminate_dead_code()
    assert "used as one tuple" in reason(program)


def test_a_second_result_in_use_is_left_alone() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    found = reason(traced(call, *torch.randn(3, B, H, S, D)))
    assert (
        found
        == "result 1 of _scaled_dot_product_flash_attention_for_cpu is used, which its plain operations do not give"
    )


def test_a_graph_without_fake_values_is_left_alone() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    for node in program.graph.nodes:
        node.meta.pop("example_value", None)
    assert "has no fake values" in reason(program)


def test_a_call_that_its_own_code_refuses_is_left_alone() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    node.kwargs = {"out_dtype": torch.float64}
    assert "baddbmm could not be traced (TypeError" in reason(program)


def test_a_result_of_another_dtype_is_left_alone() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    node.meta["example_value"] = fake(node).double()
    assert reason(program) == "baddbmm gives torch.float64, its plain operations torch.float32"


def test_a_composite_that_makes_a_constant_is_left_alone() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    with pytest.raises(Miss, match="makes a constant tensor"):
        trace_composite(lambda m, q, k: m + torch.tensor([1.0] * S), node, program)


def test_symbolic_heads_of_flex_attention_are_left_alone() -> None:
    program = traced(flexible({}), *operands(), dynamic=True)
    (node,) = (n for n in program.graph.nodes if op_name(n) == "flex_attention")
    query = node.args[0]
    query.meta["example_value"] = fake(query).transpose(1, 2)
    assert "number of heads is a symbol" in reason(program)


def test_the_reason_of_a_composite_says_which_it_is() -> None:
    program = traced(lambda q, k, v: sageattn(q, k, v, "NHD", is_causal=True), *tokens_first())
    assert reason(program) == "sageattn: causal with 5 queries on 7 keys; expected as many"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda q, k: einsum(q, [0, 1, 2, 3], k, [0, 4, 5, 3], k, [0, 4, 5, 3], [0, 1, 2, 5]), "axis numbers"),
        (lambda q, k: composites.scaled_dot_product(q, q, q, dropout_mask=q > 0), "a dropout mask is given"),
        (lambda q, k: composites.flash_attn_func(q, k, k, return_attn_probs=True), "probabilities are asked for"),
        (lambda q, k: composites.efficient_attention(q, k, k, seqstart_q=k), "seqstart_q is given"),
        (lambda q, k: composites.efficient_attention(q[0], k[0], k[0]), "operands of rank 3"),
        (lambda q, k: composites.sageattn(q, k, k, return_lse=True), "log-sum-exp is asked for"),
        (lambda q, k: composites.sageattn(q, k, k, attn_mask=q), "a mask is given"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_options_without_a_plain_form_are_refused(call: Callable[..., Any], expected: str) -> None:
    with pytest.raises(Miss, match=expected):
        call(*tokens_first()[:2])
