"""The torch.compile backend: what it rewrites, and what it runs exactly with a message."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_models import forward, with_backend
from needs import sampled
from small_models import FittedModel, found, tiny_llama, token_ids

import fhopt
from fhopt.backend.compile import last_outcome
from fhopt.plan.fingerprint import weight_prints
from fhopt.plan.latent_plan import LatentPlan


def test_torch_knows_the_backend_without_an_import() -> None:
    assert "flashhead" in torch._dynamo.list_backends()


@pytest.mark.slow
def test_without_a_plan_the_results_are_inductors() -> None:
    model, ids = tiny_llama(num_hidden_layers=1), token_ids(1, 20)
    compiled = torch.compile(model, backend="flashhead")
    with torch.no_grad():  # inductor compiles C++ for seconds; the slow tests cover gradients
        torch.testing.assert_close(forward(compiled, ids), forward(model, ids), rtol=1e-4, atol=1e-5)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.sites) == 1 and not outcome.compressed


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_weights_may_change_after_compilation() -> None:
    """No weight is folded into the graph, so new weights take effect at once."""
    model, ids = tiny_llama(), token_ids(1, 20)
    from fhopt.fitting.fit_plan import exact_plan

    plan = exact_plan(found(model)[1].sites.values())
    compiled = with_backend(model, plan=plan)
    with torch.no_grad():
        forward(compiled, ids)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(forward(compiled, ids), forward(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_a_plan_of_another_model_is_refused_by_the_compiler_too(llama: FittedModel) -> None:
    from fhopt.plan.fingerprint import fingerprint

    plan = llama.plan(4)
    own = dict(llama.model.named_parameters())
    plan = plan.with_provenance(fingerprint=fingerprint(own, [s.site for s in plan.sites]))
    ids = token_ids(1, 20)
    with torch.no_grad():
        forward(with_backend(llama.model, plan=plan), ids)
        torch._dynamo.reset()
        other = tiny_llama()
        for parameter in other.parameters():
            parameter.normal_()
        with pytest.raises(Exception, match="not fitted to"):
            forward(with_backend(other, plan=plan), ids)


def other_weights(model: Any) -> Any:
    """Return the same model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.dim() > 1):
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
    return other


def with_prints(fitted: FittedModel, plan: LatentPlan) -> LatentPlan:
    """Return the plan as `fhopt.fit` would make it, with fingerprints of each site's weights."""
    weights, sites = dict(fitted.model.named_parameters()), [s.site for s in plan.sites]
    return plan.with_provenance(weights=weight_prints(weights, sites))


@pytest.mark.usefixtures("traced_only")
def test_layers_that_share_a_graph_get_their_own_bases(llama: FittedModel) -> None:
    """Dynamo compiles one graph for all layers; their bases and bit groups differ."""
    model, plan, ids = copy.deepcopy(llama.model), with_prints(llama, llama.plan(4)), token_ids(1, 60)
    with torch.no_grad():
        expected = forward(with_backend(llama.model, plan=plan), ids)
        for layer in model.model.layers:
            layer.compile(backend="flashhead", options={"plan": plan})
        torch.testing.assert_close(forward(model, ids), expected, rtol=1e-4, atol=1e-4)
    found = fhopt.report(model)
    assert [s.how[:6] for g in found.graphs for s in g.sites] == ["latent"] * 2


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("prints", sampled([True, False], 2), ids=["of the plan", "of the first call"])
def test_weights_that_the_plan_was_not_fitted_for_run_exactly_with_a_warning(llama: FittedModel, prints: bool) -> None:
    model, ids, plan = copy.deepcopy(llama.model), token_ids(1, 60), llama.plan(4)
    compiled = with_backend(model, plan=with_prints(llama, plan) if prints else plan)
    with torch.no_grad():
        lossy = forward(compiled, ids)
        model.load_state_dict(other_weights(model).state_dict())
        with pytest.warns(RuntimeWarning, match="not those that the plan was fitted for.*'trust'"):
            found = forward(compiled, ids)
        torch.testing.assert_close(found, forward(model, ids), rtol=1e-4, atol=1e-5)
        model.load_state_dict(llama.model.state_dict())
        torch.testing.assert_close(forward(compiled, ids), lossy, rtol=0, atol=0)


@pytest.mark.usefixtures("traced_only")
def test_trusted_weights_keep_the_plan(llama: FittedModel) -> None:
    model, ids = other_weights(llama.model), token_ids(1, 60)
    compiled = with_backend(model, plan=with_prints(llama, llama.plan(4)), weights="trust")
    with torch.no_grad():
        assert float((forward(compiled, ids) - forward(model, ids)).abs().max()) > 1e-4
    outcome = last_outcome()
    assert outcome is not None and len(outcome.compressed) == 2
