"""Graphs differentiated in segments: the same gradients as in one pass, with less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import MAKERS, numbered, tiny_llama
from torch import Tensor, nn

from fhopt.calibration import probe, segments
from fhopt.calibration.probed_attention import OnGradients
from fhopt.models.capture import Captured, capture
from fhopt.passes import pipeline
from fhopt.passes.outcome import Outcome

Seen = dict[str, tuple[Tensor, ...]]


def watched(model: nn.Module, inputs: dict[str, Any]) -> tuple[Captured, Outcome]:
    captured = capture(model, (), inputs)
    return captured, pipeline.find_attentions(captured.program)


def gradients(captured: Captured, outcome: Outcome, batches: Any) -> Seen:
    """Return keys, values and their gradients at every site, in the order of visits."""
    seen: Seen = {}

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        assert name not in seen
        return lambda dk, dv: seen.update({name: (k, v, dk, dv)})

    probe.run_probed(captured, outcome, batches, (2, 3), 0, see, lambda number: None)
    return seen


@pytest.mark.parametrize("make", [functools.partial(tiny_llama, num_hidden_layers=5), MAKERS["gpt2"]])
def test_the_gradients_are_those_of_the_whole_graph(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = numbered(1)
    captured, outcome = watched(make(), {**batches[0][1], "use_cache": False})
    whole = gradients(captured, outcome, batches)
    monkeypatch.setattr(probe, "ACTIVATION_BYTES", 0)
    in_segments = gradients(captured, outcome, batches)
    assert list(in_segments) == list(whole) == [site.name for site in reversed(outcome.sites.values())]
    for name, tensors in whole.items():
        assert all(map(torch.equal, tensors, in_segments[name])), name


def test_a_transformer_is_cut_where_only_its_residual_stream_is_live() -> None:
    captured, outcome = watched(tiny_llama(num_hidden_layers=4), {**numbered(1)[0][1], "use_cache": False})
    graph = captured.program.graph
    result: Any = graph.output_node().args[0][captured.result]  # type: ignore[index]
    parts = segments.split_graph(graph, outcome.sites, result)
    assert len(parts) == 4
    assert [len(part.variables) for part in parts] == [0, 1, 1, 1]
    assert parts[-1].outputs == (result,)


class Skips(nn.Module):
    """Attention whose result is used two blocks later, in slices, and a mask that all blocks use."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        first = None
        for projection in self.maps:
            q, k, v = projection(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + mixed.transpose(1, 2).flatten(-2)
            first = x.chunk(2, -1) if first is None else first
        return x + torch.cat(first[::-1], -1)  # type: ignore[index]


def test_tensors_that_pass_over_segments_have_the_sum_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 12, 16)
    captured, outcome = watched(Skips().eval(), {"x": x})
    assert len(outcome.sites) == 3
    whole = gradients(captured, outcome, [(0, {"x": x})])
    monkeypatch.setattr(probe, "ACTIVATION_BYTES", 0)
    in_segments = gradients(captured, outcome, [(0, {"x": x})])
    for name, tensors in whole.items():
        for a, b in zip(tensors, in_segments[name], strict=True):
            torch.testing.assert_close(a, b)  # sums in another order


class Changes(nn.Module):
    """Attention blocks with an in-place change between them, by a custom call that functionalization leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.maps:
            q, k, v = projection(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = nn.functional.relu(x + mixed.transpose(1, 2).flatten(-2), inplace=True)
        return x


def test_a_graph_that_changes_tensors_in_place_is_left_whole() -> None:
    captured, outcome = watched(Changes().eval(), {"x": torch.randn(1, 12, 16)})
    graph = captured.program.graph
    result: Any = graph.output_node().args[0][captured.result]  # type: ignore[index]
    in_place = [node for node in graph.nodes if segments.changes_inputs(node)]
    assert len(segments.split_graph(graph, outcome.sites, result)) == (1 if in_place else 2)
    node = next(n for n in graph.nodes if n.name in outcome.sites)
    with graph.inserting_after(node):
        graph.call_method("add_", (node, 1))
    assert len(segments.split_graph(graph, outcome.sites, result)) == 1


def test_only_one_segment_has_its_activations_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd saves at once: about an eighth of those of eight layers."""
    batches = numbered(1)
    captured, outcome = watched(tiny_llama(num_hidden_layers=8), {**batches[0][1], "use_cache": False})

    def most() -> int:
        held = {"now": 0, "most": 0}

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                held["now"] += self.bytes
                held["most"] = max(held["most"], held["now"])

            def __del__(self) -> None:
                held["now"] -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradients(captured, outcome, batches)
        return held["most"]

    whole = most()
    monkeypatch.setattr(probe, "ACTIVATION_BYTES", 0)
    assert most() < whole / 4


@pytest.mark.slow
def test_activations_are_counted_from_the_first_attention_on() -> None:
    """Each further layer adds the same: at least its input, its MLP's three tensors and its queries, in float32."""
    inputs: dict[str, Any] = {**numbered(1)[0][1], "use_cache": False}
    counts = []
    for layers in (2, 3, 4):
        captured, outcome = watched(tiny_llama(num_hidden_layers=layers), inputs)
        counts.append(segments.activation_bytes(captured.program.graph, outcome.sites))
        assert segments.activation_bytes(captured.program.graph, ()) == 0
    tokens = inputs["input_ids"].numel()
    assert counts[2] - counts[1] == counts[1] - counts[0] >= 4 * tokens * (64 + 3 * 96 + 64)
