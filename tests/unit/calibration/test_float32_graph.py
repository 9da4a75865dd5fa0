"""16-bit graphs run in float32, as a float32 model with the same weights would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from needs import covering
from small_models import numbered
from torch import Tensor, nn

from fhopt.calibration import float32_graph
from fhopt.calibration.loss_check import PlanAttention
from fhopt.calibration.probe import ProbedGraph
from fhopt.models.capture import Captured, capture
from fhopt.passes import pipeline

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
}


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **sizes, intermediate_size=96, **FAMILIES[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    captured = capture(model, (), batch)
    outcome = pipeline.find_attentions(captured.program)
    return ProbedGraph(captured, outcome).run(batch, PlanAttention(None))


@covering(1, kind=list(FAMILIES), dtype=[torch.bfloat16, torch.float16])
def test_a_16_bit_graph_gives_float32_logits(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_graph, "PART", 640)  # several parts per weight
    model, batch = small(kind).to(dtype), {"input_ids": numbered(1)[0][1]["input_ids"] % 97}
    wanted = copy.deepcopy(model).float()(**batch).logits
    rounded = model(**batch).logits.float()
    found = run(model, batch)
    assert found.dtype == torch.float32
    error, of_16_bits = (float((x - wanted).norm() / wanted.norm()) for x in (found, rounded))
    assert error < 1e-5 < 0.1 * of_16_bits


def test_a_float32_graph_runs_unchanged() -> None:
    model, batch = small("llama"), {"input_ids": numbered(1)[0][1]["input_ids"] % 97}
    torch.testing.assert_close(run(model, batch), model(**batch).logits)


class Stack(nn.Module):
    """Weights that are moved and sliced before use, a write to a tensor derived from them, and a requested dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16) @ self.weights[1].transpose(0, 1)
        y = torch.zeros(x.shape, dtype=torch.bfloat16)
        y += x + self.bias
        return (y.bfloat16() * self.weights.unbind(0)[2][:1]).to(self.bias.dtype)


def captured_stack(model: nn.Module, x: Tensor) -> Captured:
    return capture(model.eval().requires_grad_(False), (), {"x": x})


def test_parts_of_weights_and_dtypes_by_name() -> None:
    model, x = Stack().to(torch.bfloat16), torch.randn(5, 8)
    captured = captured_stack(model, x)
    graph, values = captured.program.graph, captured.program.values
    assert float32_graph.is_widened(graph, values.values())
    (found, *_) = float32_graph.Float32Interpreter(captured.program.module).run(*values.values())
    weights = model.weights.float()
    wanted = (x @ weights[1].T + model.bias.float()) * weights[2][:1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


class _Written(Stack):
    """A table with an in-place write to a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        part = self.weights[1:2]
        part[:, 0] = 0.0
        return x.to(torch.bfloat16) @ part[0]


class Autocast(Stack):
    """Matmuls that autocast rounds again."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x.to(torch.bfloat16) @ self.weights[0]


class Stacked(Stack):
    """A batched matmul with the weights of several experts."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.to(torch.bfloat16).expand(3, -1, -1), self.weights.transpose(1, 2))


@pytest.mark.parametrize("kind", [_Written, Autocast])
def test_graphs_that_float32_would_change_are_left_unchanged(kind: type[Stack]) -> None:
    captured = captured_stack(kind().to(torch.bfloat16), torch.randn(5, 8))
    assert not float32_graph.is_widened(captured.program.graph, captured.program.values.values())


@pytest.mark.parametrize(("large", "is_widened"), [(192, True), (191, False)])
def test_large_weights_of_other_matmuls_are_not_copied(
    monkeypatch: pytest.MonkeyPatch, large: int, is_widened: bool
) -> None:
    monkeypatch.setattr(float32_graph, "LARGE", large)
    captured = captured_stack(Stacked().to(torch.bfloat16), torch.randn(5, 8))
    assert float32_graph.is_widened(captured.program.graph, captured.program.values.values()) == is_widened


class _Doubled(Tensor):
    """A tensor subclass whose values are not those it stores."""


def test_tensor_subclass_weights_are_left_unchanged() -> None:
    captured = captured_stack(Stack().to(torch.bfloat16), torch.randn(5, 8))
    graph, values = captured.program.graph, list(captured.program.values.values())
    assert float32_graph.is_widened(graph, values)
    other = [v.as_subclass(_Doubled) if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for v in values]
    assert not float32_graph.is_widened(graph, other)


@torch.library.custom_op("fhopt_test::halves", mutates_args=())
def halves(x: Tensor) -> Tensor:
    """Accept only bfloat16."""
    assert x.dtype == torch.bfloat16
    return x * 2


@halves.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(Stack):
    """A model with a custom operator."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = halves(super().forward(x))
        return result


def test_custom_functions_are_left_unchanged() -> None:
    captured = captured_stack(Custom().to(torch.bfloat16), torch.randn(5, 8))
    assert not float32_graph.is_widened(captured.program.graph, captured.program.values.values())
