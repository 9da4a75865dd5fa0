"""LM-head weights of every kind, and retrieval heads fitted to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import token_ids
from torch import Tensor

from fhopt.lm_head import apply_head, fitting
from fhopt.lm_head.fitting import HeadOptions, find_head, fit_weight, site_for
from fhopt.lm_head.head import Head
from fhopt.models.capture import capture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(kind: str, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose rows are easy or hard to quantize."""
    x = torch.randn(vocabulary, width)
    if kind == "zeros":
        x.zero_()
    elif kind == "equal":
        x[:] = x[0].clone()
    elif kind == "one large":
        x[:, width // 2] *= 100
        x[vocabulary // 2] *= 5
    elif kind == "tiny":
        x *= 1e-5
    elif kind == "huge":
        x *= 1e3 if dtype == torch.float16 else 1e4
    elif kind == "sparse":
        x *= torch.rand(vocabulary, width) < 0.1
    elif kind == "nearly equal":
        x = x[:1] + 1e-3 * x
    return x.to(dtype)


def skewed(count: int, width: int) -> Tensor:
    """Hidden states as models have them: a mean, and most of the energy in few directions."""
    sizes = 3.0 / torch.arange(1, width + 1)
    return torch.randn(count, width) * sizes + torch.randn(width, generator=torch.Generator().manual_seed(5))


def made(weight: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> Head:
    """Fit a head to a weight; bits "mixed": half of the coordinates in 8 bits, the others in 4."""
    chosen: dict[str, Any] = dict(iterations=2) | options
    site = site_for(weight, bias="bias" if bias is not None else "")
    with pytest.MonkeyPatch.context() as patch:
        if chosen.get("bits") == "mixed":
            patch.setattr(fitting, "SHARES", (1 / 2,))
            chosen["bits"] = "auto"
        return fit_weight(site, weight, bias, hidden, HeadOptions(**chosen))


def applied(model: Any, **options: Any) -> tuple[Any, Head]:
    """Return the model with a head applied, fitted to its hidden states on random tokens."""
    captured = capture(model, (), {"input_ids": token_ids(1, 16), "use_cache": False})
    site = find_head(captured)
    weight = model.get_parameter(site.weight).detach()
    with torch.no_grad():
        states = model(token_ids(4, 60), output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    head = fit_weight(site, weight, None, states, HeadOptions(iterations=2))
    return apply_head(model, head, **options), head
