"""Messages of a capture if Dynamo gives no graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.models.capture import capture, capture_graphs


class Disabled(nn.Module):
    """A forward pass that Dynamo must not trace."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_function_that_dynamo_skips_is_refused_with_the_reason() -> None:
    with pytest.raises(FhoptError, match=r"Disabled runs, but torch\.compile traced no graph"):
        capture_graphs(Disabled(), (torch.randn(2),))


def test_a_backend_that_fails_is_named_by_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("no program of this graph")

    monkeypatch.setattr("fhopt.models.capture.copy_program", failing)
    with pytest.raises(FhoptError, match=r"could not be captured \(ValueError: no program of this graph"):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),))


class Broken(nn.Module):
    """A linear layer followed by a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        torch._dynamo.graph_break()
        return y + 1


def test_how_often_the_forward_pass_runs_each_graph_is_counted() -> None:
    (alone,) = capture_graphs(nn.Linear(2, 2), (torch.randn(1, 2),))
    assert alone.runs == 1
    graphs = capture_graphs(nn.Sequential(Broken(), Broken()), (torch.randn(1, 2),))
    calls = [graph.runs for graph in graphs for n in graph.program.graph.nodes if n.target is nn.functional.linear]
    assert sum(calls) == 2
