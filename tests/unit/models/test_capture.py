"""What a capture says where Dynamo gives no graph."""

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
    with pytest.raises(FhoptError, match=r"Disabled runs, but torch\.compile traced no graph of it"):
        capture_graphs(Disabled(), (torch.randn(2),))


def test_a_backend_that_fails_is_named_by_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("no program of this graph")

    monkeypatch.setattr("fhopt.models.capture.copy_program", failing)
    with pytest.raises(FhoptError, match=r"could not be captured \(ValueError: no program of this graph"):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),))
