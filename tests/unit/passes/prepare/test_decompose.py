"""Decomposition of composites and bodies: results and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from decomposed import B, D, E, H, S, T, TwiceCheckpointed, check, close, core, decomposed, run, soft_capped, traced
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import flex_attention

from fhopt.models.capture import capture, from_exported
from fhopt.passes.graph.nodes import fake, op_name, size_hint
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.prepare import flex
from fhopt.passes.prepare.decompose import Decompose

# --------------------------------------------------------------------------------------------------- MultiheadAttention


class _Attention(nn.Module):
    """nn.MultiheadAttention on one input, or on a query and separate keys and values."""

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
    after = check(traced(_Attention(**options), x, x, x, padding, mask))
    assert [op_name(n) for n in after.graph.nodes].count("linear") == 2


def test_keys_and_values_of_other_widths_have_separate_projections() -> None:
    module = _Attention(False, kdim=12, vdim=10)
    check(traced(module, torch.randn(S, B, E), torch.randn(T, B, 12), torch.randn(T, B, 10)))


def test_inputs_without_a_batch_stay_without_one() -> None:
    x = torch.randn(S, E)
    after = check(traced(_Attention(), x, x, x, None, TRIANGLE))
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
    after = check(
        traced(_Attention(weights, dropout=0.4).train(), x, x, x)
    )  # the same random numbers in the same order
    first, second = (fx.Interpreter(after.module).run(*after.values.values())[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weights", [True, False])
def test_symbolic_sizes_stay_symbolic(weights: bool) -> None:
    module, x = _Attention(weights), torch.randn(S, B, E)
    program = traced(module, x, x, x, None, TRIANGLE, dynamic=True)
    after = check(program)
    longer, mask = torch.randn(9, 3, E), torch.ones(9, 9, dtype=torch.bool).triu(1)
    values: list[Any] = []
    for value in after.values.values():
        if isinstance(value, torch.SymInt):
            values.append({S: 9, B: 3}[size_hint(value)])
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
            self.inner = _Attention(False, add_zero_attn=True)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x, x, x)

    after = check(traced(Under(), torch.randn(S, B, E)), gradients=False)
    assert {fake(n).dtype for n in after.graph.nodes if op_name(n) == "linear"} == {torch.bfloat16}


def test_new_nodes_have_the_line_that_made_the_composite() -> None:
    x = torch.randn(S, B, E)
    program = traced(_Attention(), x, x, x)
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
def test_the_encoder_layer_of_the_fast_path_is_decomposed(
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
def test_native_multi_head_attention_is_decomposed(inputs: tuple[int, ...], weights: bool, average: bool) -> None:
    def call(x: Tensor, y: Tensor, z: Tensor, w: Tensor, b: Tensor, o: Tensor, p: Tensor) -> Any:
        q, k, v = ((x, y, z)[i] for i in inputs)
        out = torch._native_multi_head_attention(q, k, v, E, H, w, b, o, p, PADDING, weights, average, 1)
        return out if weights else out[0]

    weight, bias = torch.randn(3 * E, E) / 8, torch.randn(3 * E)
    check(traced(call, *torch.randn(3, B, S, E), weight, bias, torch.randn(E, E) / 8, torch.randn(E)))


def test_a_fully_masked_row_is_nan_as_in_the_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True).eval()
    padding = torch.tensor([[True] * S, [False] * S])
    with torch.no_grad():
        after = check(capture(layer, (torch.randn(B, S, E), None, padding)).program)
        assert bool(run(after)[0][0].isnan().all())


# --------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_bodies_of_nested_checkpoints_are_inlined(dynamic: bool) -> None:
    program = traced(TwiceCheckpointed(), torch.randn(B, S, E), dynamic=dynamic)
    bodies = [m for m in program.module.modules() if isinstance(m, fx.GraphModule) and m is not program.module]
    texts = [print_graph(body.graph) for body in bodies]
    after = check(program)
    assert "checkpoint" not in print_graph(after.graph)
    assert len(texts) == 2 and [print_graph(body.graph) for body in bodies] == texts  # the bodies belong to Dynamo
    (softmax,) = (n for n in after.graph.nodes if op_name(n) == "softmax")
    assert "in core" in softmax.meta["stack_trace"]


def test_composites_in_a_checkpoint_are_found() -> None:
    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=soft_capped)

    with torch.no_grad():
        after = check(traced(TwiceCheckpointed(inner), torch.randn(B, S, E)))
    assert any(n.target is flex.score_mod for n in after.graph.nodes)


def test_a_checkpoint_without_attention_still_saves_memory() -> None:
    program = traced(TwiceCheckpointed(lambda q, k, v: q * k + v), torch.randn(B, S, E))
    assert list(Decompose().candidates(program)) == []


def test_a_region_compiled_once_and_called_twice_is_inlined_twice() -> None:
    shared, x = nn.Linear(E, E), torch.randn(B, S, E, requires_grad=True)
    program = traced(lambda x: repeated(shared, repeated(shared, x)), x)
    assert [op_name(n) for n in program.graph.nodes].count("invoke_subgraph") == 2
    after = check(program, gradients=False)  # torch differentiates the original only under a compiler
    assert [op_name(n) for n in after.graph.nodes].count("softmax") == 2


@torch.compiler.nested_compile_region
def repeated(layer: nn.Module, x: Tensor) -> Tensor:
    return core(layer(x), x * 2, x) + x


class Mode(nn.Module):
    """Attention under a mode, which export turns into a higher-order op."""

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
def test_a_body_under_its_own_mode_keeps_the_mode(mode: Callable[[], Any]) -> None:
    program = from_exported(torch.export.export(Mode(mode), (torch.randn(B, S, E),))).program
    assert any(op_name(n).startswith("wrap_with") for n in program.graph.nodes)
    after = check(program)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        run(after)
        assert not torch.is_grad_enabled()
