"""torch.compile with the backend: exact without a plan, right with one, and explained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import CODED, shared_plan
from small_models import Fitted, cached, found, run, tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt import ops, passes
from fhopt.backend import last_outcome
from fhopt.cache import LatentCache
from fhopt.capture import Captured, capture
from fhopt.fitting import weight_prints
from fhopt.spec import LatentPlan


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd as in inductor, without the minutes that generating C++ takes."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_fx(module: Any, inputs: Any, **options: Any) -> Any:
        return aot_eager(module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


def with_backend(model: Any, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="flashhead", dynamic=dynamic, options=options or None)


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_torch_knows_the_backend_without_an_import() -> None:
    assert "flashhead" in torch._dynamo.list_backends()


def test_without_a_plan_the_numbers_are_inductors() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    compiled = torch.compile(model, backend="flashhead")
    torch.testing.assert_close(forward(compiled, ids), forward(model, ids), rtol=1e-4, atol=1e-5)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.sites) == 2 and not outcome.compressed


@pytest.mark.slow
def test_inductor_compiles_the_rewritten_graph_with_gradients(llama: Fitted) -> None:
    check_full_width(llama, "freq")


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("layout", ["freq", "identity"])
def test_full_width_latents_change_nothing_compiled_and_train(fitted: Fitted, layout: str) -> None:
    check_full_width(fitted, layout)


def check_full_width(fitted: Fitted, layout: str) -> None:
    ids = token_ids(1, 40)
    compiled = with_backend(fitted.model, plan=fitted.plan(1, layout))
    expected, found = forward(fitted.model, ids), forward(compiled, ids)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.compressed) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parameters = list(fitted.model.parameters())
    gradients = [torch.autograd.grad(x.square().mean(), parameters) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("traced_only")
def test_a_lossy_plan_gives_the_same_with_and_without_gradients(llama: Fitted) -> None:
    ids, plan = token_ids(1, 60), llama.plan(4)
    compiled = with_backend(llama.model, plan=plan)
    with torch.no_grad():
        absorbed = forward(compiled, ids)
    trained = forward(compiled, ids)
    torch.testing.assert_close(trained.detach(), absorbed, rtol=1e-3, atol=1e-3)
    assert float((absorbed - forward(llama.model, ids)).detach().abs().max()) > 1e-6
    gradient = torch.autograd.grad(trained.square().mean(), llama.model.model.layers[0].self_attn.k_proj.weight)[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_generation_with_a_latent_cache_gives_the_eager_tokens(llama: Fitted) -> None:
    model = tiny_llama()
    model.load_state_dict(llama.model.state_dict())
    fhopt.apply(model, llama.plan(4))
    assert_compiled_generation_is_eager(model, new_tokens=30, atol=1e-4)


def assert_compiled_generation_is_eager(model: Any, new_tokens: int, atol: float) -> None:
    """Greedy tokens and logits behind 40 tokens, compiled without a graph break, against the eager model's."""
    from torch._dynamo.utils import counters

    ids = token_ids(1, 40)
    options: dict[str, Any] = dict(
        max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    eager = model.generate(ids, **options)
    model.compile(backend="flashhead")
    counters.clear()
    compiled = model.generate(ids, **options)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert torch.equal(compiled.sequences, eager.sequences)
    for a, b in zip(compiled.logits, eager.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("traced_only")
def test_weights_may_change_after_compilation() -> None:
    """Nothing of a weight is folded into the graph, so the new ones count at once."""
    model, ids = tiny_llama(), token_ids(1, 20)
    from fhopt.fitting import exact_plan

    plan = exact_plan(found(model)[1].sites.values())
    compiled = with_backend(model, plan=plan)
    with torch.no_grad():
        forward(compiled, ids)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(forward(compiled, ids), forward(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_dynamic_shapes_work_with_a_plan(llama: Fitted) -> None:
    compiled = with_backend(llama.model, True, plan=llama.plan(1))
    with torch.no_grad():
        for tokens in (20, 33, 57):
            ids = token_ids(1, tokens)
            torch.testing.assert_close(forward(compiled, ids), forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_options_of_inductor_pass_through_and_a_plan_may_be_a_path(llama: Fitted, tmp_path: Path) -> None:
    path = str(llama.plan(1).save(tmp_path / "plan"))
    compiled = with_backend(llama.model, plan=path, max_autotune=False)
    with torch.no_grad():
        ids = token_ids(1, 20)
        torch.testing.assert_close(forward(compiled, ids), forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_a_plan_that_fits_nothing_warns_once_or_refuses_when_strict(llama: Fitted) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        with_backend(model, plan=llama.plan(1))(torch.randn(2, 4))  # no attention
    other = tiny_gpt2()
    with pytest.warns(RuntimeWarning, match="not in the plan"):
        forward(with_backend(other, plan=llama.plan(1)), token_ids(1, 10))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="not in the plan"):
        forward(with_backend(other, plan=llama.plan(1), strict=True), token_ids(1, 10))


def test_a_wrong_plan_option_is_one_clear_error() -> None:
    with pytest.raises(Exception, match="expected a LatentPlan or the path of one"):
        with_backend(torch.nn.Linear(2, 2), plan=3)(torch.randn(1, 2))


@pytest.mark.usefixtures("traced_only")
def test_each_pass_is_dumped_with_what_it_did(llama: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_DUMP", str(tmp_path))
    with torch.no_grad():
        forward(with_backend(llama.model, plan=llama.plan(4)), token_ids(1, 40))
    names = sorted(p.name for p in tmp_path.iterdir())
    finding = ["input", "decompose", "functionalize", "normalize", "find_attention"]
    stages = [*finding, "absorb_projection", "compress", "absorb", "lower"]
    assert names == [f"{i:02d}-{stage}.txt" for i, stage in enumerate(stages)]
    compressed, absorbed = ((tmp_path / f"{n}.txt").read_text() for n in ("06-compress", "07-absorb"))
    assert compressed.startswith("# compress: 2 sites, 2 compressed")
    assert " = decode(" in compressed and " = decode(" not in absorbed
    assert " = absorb(" in absorbed and "fhopt.latent_attention.default(" in absorbed


def test_a_cache_works_compiled_by_inductor_alone(llama: Fitted) -> None:
    """The ops are ordinary custom ops: no backend of ours is needed to be right."""
    ids, plan = token_ids(1, 40), llama.plan(4)
    fhopt.apply(llama.model, plan)
    try:
        with torch.no_grad():
            results = []
            for function in (llama.model, torch.compile(llama.model, backend="aot_eager")):
                cache = LatentCache(plan, absorb=True)
                function(ids[:, :30], **cached(cache))
                results.append(function(ids[:, 30:31], **cached(cache)).logits)
    finally:
        fhopt.unapply(llama.model)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("with_plan", [False, True])
def test_one_graph_serves_every_length(llama: Fitted, with_plan: bool) -> None:
    from torch._dynamo.utils import counters

    options = {"plan": llama.plan(1)} if with_plan else {}
    compiled = with_backend(llama.model, True, **options)
    counters.clear()
    with torch.no_grad():
        for tokens in (20, 33, 57, 41):
            forward(compiled, token_ids(1, tokens))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced_only")
def test_a_plan_of_another_model_is_refused_by_the_compiler_too(llama: Fitted) -> None:
    from fhopt.fitting import fingerprint

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
        with pytest.raises(Exception, match="another model"):
            forward(with_backend(other, plan=plan), ids)


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_keep_their_memory_saving_in_training_and_are_looked_into_otherwise(training: bool) -> None:
    from model_zoo.torch_modules import ENTRIES

    case = next(e for e in ENTRIES if e.name == "checkpointed").build()
    case.module.requires_grad_(training)
    compiled = torch.compile(case.module, backend="flashhead")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(*case.args), case.module(*case.args), rtol=1e-5, atol=1e-5)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.sites) == (0 if training else 2)
    assert any("while training" in m.reason for m in outcome.missed) is training


# ---- one latent for keys and values


def tiny_bert() -> Any:
    """BERT: 2 layers, H=G=4, D=16, bidirectional, biases and norms that are not plain."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def with_biases(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 5)
    return model


def captured_sites(model: Any, tokens: int = 96) -> tuple[Captured, passes.Outcome]:
    options = {"use_cache": False} if hasattr(model, "lm_head") else {}
    captured = capture(model, (), {"input_ids": token_ids(1, tokens), **options})
    return captured, passes.find(captured.program)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("tiers", [(), CODED * 4], ids=["uncoded", "coded"])
def test_one_latent_becomes_both_operands_of_one_node(make: Any, tiers: Any) -> None:
    model = with_biases(make())
    captured, outcome = captured_sites(model)
    plan = shared_plan(outcome, 64, tiers)
    with torch.no_grad():
        expected = run(captured)
        passes.optimize(outcome, plan)
        result = run(captured)
    assert set(outcome.compressed.values()) == {"input"} and len(outcome.compressed) == 2
    op = torch.ops.fhopt.latent_attention.default if tiers else ops.latent_attention_reference  # lowered
    far = [n.args for n in outcome.program.graph.nodes if n.target is op and n.args[1] is n.args[3]]
    assert len(far) == 2 and all(a[2] is a[4] and (a[2] is not None) == bool(tiers) for a in far)
    error = float((result - expected).norm() / expected.norm())
    assert error < 1e-5 if not tiers else 1e-5 < error < 0.3  # half of the channels have 4 bits


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_one_latent_for_keys_and_values_changes_nothing_compiled_and_trains(make: Any) -> None:
    model, ids = with_biases(make()), token_ids(1, 40)
    plan = shared_plan(captured_sites(model)[1], 64)
    expected = model(input_ids=ids)[0]
    result = with_backend(model, plan=plan)(input_ids=ids, **({"use_cache": False} if make is tiny_gpt2 else {}))[0]
    outcome = last_outcome()
    assert outcome is not None and set(outcome.compressed.values()) == {"input"}
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(x.square().mean(), others(model)) for x in (result, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def others(model: Any) -> list[Any]:
    """Parameters but those whose change would move keys and values out of the latent's span: their gradients are cut
    to it."""
    cut = ("ln_1", "c_attn", "LayerNorm", "key", "value")
    return [p for name, p in model.named_parameters() if not any(part in name for part in cut)]


@pytest.mark.usefixtures("traced_only")
def test_one_coded_latent_gives_the_same_with_and_without_gradients() -> None:
    model, ids = with_biases(tiny_gpt2()), token_ids(1, 60)
    plan = shared_plan(captured_sites(model)[1], 64, CODED * 4)
    compiled = with_backend(model, plan=plan)
    with torch.no_grad():
        absorbed = forward(compiled, ids)
    trained = forward(compiled, ids)
    torch.testing.assert_close(trained.detach(), absorbed, rtol=1e-3, atol=1e-3)  # q D and D z round differently
    gradient = torch.autograd.grad(trained.square().mean(), model.transformer.h[0].attn.c_attn.weight)[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.usefixtures("traced_only")
def test_compiled_generation_with_one_latent_and_a_window_of_codes_gives_the_eager_tokens() -> None:
    model = with_biases(tiny_gpt2())
    fhopt.apply(model, shared_plan(found(model, 96)[1], 64, window_bits=8))
    assert_compiled_generation_is_eager(model, new_tokens=12, atol=1e-3)


# --------------------------------------------------------------------------------------------------- whose weights


def other_weights(model: Any) -> Any:
    """The same model with other numbers."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.dim() > 1):
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
    return other


def with_prints(fitted: Fitted, plan: LatentPlan) -> LatentPlan:
    """The plan as `fhopt.fit` would give it: it knows the weights of each site."""
    weights, sites = dict(fitted.model.named_parameters()), [s.site for s in plan.sites]
    return plan.with_provenance(weights=weight_prints(weights, sites))


@pytest.mark.usefixtures("traced_only")
def test_layers_that_share_a_graph_get_their_own_bases(llama: Fitted) -> None:
    """Dynamo compiles one graph for all layers; their bases and tiers differ."""
    model, plan, ids = copy.deepcopy(llama.model), with_prints(llama, llama.plan(4)), token_ids(1, 60)
    with torch.no_grad():
        expected = forward(with_backend(llama.model, plan=plan), ids)
        for layer in model.model.layers:
            layer.compile(backend="flashhead", options={"plan": plan})
        torch.testing.assert_close(forward(model, ids), expected, rtol=1e-4, atol=1e-4)
    found = fhopt.report(model)
    assert [s.how[:6] for g in found.graphs for s in g.sites] == ["latent"] * 2


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("prints", [True, False], ids=["of the plan", "of the first call"])
def test_weights_that_the_plan_was_not_fitted_for_run_exactly_and_say_so(llama: Fitted, prints: bool) -> None:
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
def test_trusted_weights_keep_the_plan(llama: Fitted) -> None:
    model, ids = other_weights(llama.model), token_ids(1, 60)
    compiled = with_backend(model, plan=with_prints(llama, llama.plan(4)), weights="trust")
    with torch.no_grad():
        assert float((forward(compiled, ids) - forward(model, ids)).abs().max()) > 1e-4
    outcome = last_outcome()
    assert outcome is not None and len(outcome.compressed) == 2


@pytest.mark.usefixtures("traced_only")
def test_a_plan_stays_in_use_while_it_is_trained_with(llama: Fitted) -> None:
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
def test_gradients_that_are_turned_on_within_a_graph_are_not_lost() -> None:
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


@pytest.mark.usefixtures("traced_only")
def test_a_plan_that_changes_on_disk_is_not_mixed_with_the_one_before(llama: Fitted, tmp_path: Path) -> None:
    path = llama.plan(1).save(tmp_path / "plan")
    compiled = with_backend(llama.model, plan=str(path))
    with torch.no_grad():
        forward(compiled, token_ids(1, 40))
        llama.plan(4).save(path)
        ids = token_ids(1, 41)
        with pytest.warns(RuntimeWarning, match="has changed since it was read"):
            found = forward(compiled, ids)
        torch.testing.assert_close(found, forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_prompts_of_several_lengths_on_an_applied_plan_are_whole_graphs(llama: Fitted) -> None:
    model = copy.deepcopy(llama.model)
    fhopt.apply(model, llama.plan(1))
    compiled: Any = torch.compile(model, backend="flashhead", options={"ratio": 1}, fullgraph=True)
    with torch.no_grad():
        for tokens in (30, 41, 57):
            ids = token_ids(1, tokens)
            found = compiled(input_ids=ids, use_cache=True).logits
            torch.testing.assert_close(found, forward(llama.model, ids), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- caches of graphs


@pytest.mark.slow
def test_caches_of_compiled_graphs_know_the_plan(llama: Fitted) -> None:
    """The same plan is found again by AOTAutograd's cache; another plan of the same shapes is another graph."""
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
