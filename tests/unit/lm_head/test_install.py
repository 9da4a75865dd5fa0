"""Installing a head in a model, and refusals."""

from __future__ import annotations

import pytest
import torch
from lm_heads import applied
from needs import needs_compiler
from small_models import tiny_llama
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.lm_head import apply_head, head_report
from fhopt.lm_head.fitting import find_head, fit_weight
from fhopt.models.capture import capture

pytestmark = needs_compiler


def test_a_head_of_other_weights_is_refused() -> None:
    model, other = tiny_llama(), tiny_llama(vocab_size=98)
    _, head = applied(model)
    with pytest.raises(FhoptError, match=r"fitted for another lm_head\.weight"):
        apply_head(other, head)
    with pytest.raises(FhoptError, match=r"parameter lm_head\.weight, which Linear does not have"):
        apply_head(nn.Linear(2, 2), head)
    with pytest.raises(FhoptError, match="no head is applied"):
        head_report(other)


def test_a_bias_added_after_the_layer_is_refused_with_a_fix() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(60, 16), nn.Linear(16, 60, bias=False)
            self.shift = nn.Parameter(torch.randn(60))

        def forward(self, ids: Tensor) -> Tensor:
            return self.output(self.embedding(ids).tanh()) + self.shift

    model = Behind()
    site = find_head(capture(model, (torch.randint(0, 60, (1, 4)),)))
    head = fit_weight(site, model.output.weight.detach(), model.shift.detach())
    with pytest.raises(FhoptError, match=r"shift is added to the output of output.*expected it as the bias"):
        apply_head(model, head)
