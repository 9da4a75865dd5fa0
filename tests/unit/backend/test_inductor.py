"""Graphs in inductor's caches, and graphs with gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from compiled_models import forward, with_backend
from small_models import FittedModel, token_ids

from fhopt.backend.compile import last_outcome
from fhopt.plan.latent_plan import LatentPlan


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_save_memory_in_training_and_are_rewritten_otherwise(training: bool) -> None:
    from model_zoo.torch_modules import ENTRIES

    case = next(e for e in ENTRIES if e.name == "checkpointed").build()
    case.module.requires_grad_(training)
    compiled = torch.compile(case.module, backend="flashhead")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(*case.args), case.module(*case.args), rtol=1e-5, atol=1e-5)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.sites) == (0 if training else 2)
    assert any("while training" in m.reason for m in outcome.missed) is training


# --------------------------------------------------------------------------------------------------- whose weights


@pytest.mark.usefixtures("traced_only")
def test_a_plan_stays_in_use_during_training(llama: FittedModel) -> None:
    model, ids = copy.deepcopy(llama.model).train(), token_ids(1, 60)
    compiled = with_backend(model, plan=llama.plan(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(forward(compiled, ids)[0, :-1], ids[0, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("traced_only")
def test_gradients_enabled_within_a_graph_are_not_lost() -> None:
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y: torch.Tensor = module(x[:, -1:], x, x)[0]
        return y

    x = torch.randn(1, 300, 32)
    with torch.no_grad():
        outputs = [f(x) for f in (run, torch.compile(run, backend="flashhead", options={"ratio": 1}))]
    gradients = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in outputs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- caches of graphs


@pytest.mark.slow
def test_caches_of_compiled_graphs_know_the_plan(llama: FittedModel) -> None:
    """AOTAutograd's cache hits for the same plan, and misses for another plan of the same shapes."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    ids = token_ids(1, 60)

    def run(plan: LatentPlan) -> tuple[torch.Tensor, int, int]:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            found = forward(with_backend(llama.model, plan=plan), ids)
        seen = counters["aot_autograd"]
        assert not seen["autograd_cache_bypass"]
        return found, seen["autograd_cache_hit"], seen["autograd_cache_miss"]

    with fresh_cache():
        first, second = llama.plan(4), llama.plan(8)
        expected, hits, misses = run(first)
        assert (hits, misses) == (0, 1)
        again, hits, misses = run(first)
        assert (hits, misses) == (1, 0)
        other, hits, misses = run(second)
        assert (hits, misses) == (0, 1)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert float((other - expected).abs().max()) > 1e-4
