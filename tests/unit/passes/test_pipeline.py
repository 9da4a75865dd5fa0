"""A failure at one attention does not affect others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.passes.recognize.normalize import Normalize

H, D = 2, 8


class _Block(nn.Module):
    """Two attentions in one graph, in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(nn.Linear(H * D, H * D) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for projections in (self.first, self.second):
            q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in projections)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("step", ["match", "rewrite"])
def test_a_pass_that_fails_at_one_attention_skips_it_and_finds_the_other(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(Normalize, step), []

    def failing(self: Normalize, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("view size is not compatible\nwith much more")
        return original(self, *arguments)

    monkeypatch.setattr(Normalize, step, failing)
    module, x = _Block().eval(), torch.randn(1, 5, H * D)
    captured = capture(module, (x,))
    outcome = pipeline.find_attentions(captured.program)
    assert len(outcome.sites) == 1
    (missed,) = outcome.missed
    assert "pass normalize failed here" in missed.reason and "view size is not compatible)" in missed.reason
    assert "test_pipeline.py:" in missed.source
    found = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())[0]
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-6)
