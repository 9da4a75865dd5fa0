"""Ways to compiled generation: wrappers, functions, layers, `model.compile`, transformers' own configuration."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from small_models import tiny_llama, token_ids
from torch._dynamo.utils import counters
from transformers import LogitsProcessor, LogitsProcessorList

import fhopt
from fhopt.backend import compiled_generate
from fhopt.errors import FhoptError


@pytest.fixture(autouse=True)
def counted(traced_only: None) -> None:
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, max_new_tokens=6, do_sample=False)
    return found


EXACT: dict[str, Any] = {"backend": "flashhead", "options": {"ratio": 1}}


def test_generate_of_a_wrapper_runs_compiled_code_and_leaves_the_model_inside_unchanged() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    expected = generated(model, ids)
    compiled = torch.compile(model, **EXACT)
    assert torch.equal(generated(compiled, ids), expected) and graphs() > 0
    assert model._compiled_call_impl is None
    before = graphs()
    assert torch.equal(generated(model, ids), expected) and graphs() == before
    assert torch.equal(generated(compiled, ids), expected) and graphs() == before  # nothing is compiled twice


@pytest.mark.parametrize("backend", ["eager", "flashhead"])
@pytest.mark.parametrize("breaks", [False, True])
def test_dynamo_never_traces_calls_and_attributes_of_wrappers(backend: str, breaks: bool) -> None:
    """It traced them when guards read attributes of a wrapper, and raised an AssertionError for `_orig_mod`."""
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled_generate.install()
    wrapper = torch.compile(linear, backend=backend)

    def around(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        if breaks:
            torch._dynamo.graph_break()
        return torch.as_tensor(wrapper(y)) * 2

    compiled = torch.compile(around, backend="eager")
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(compiled(x), 2 * linear(x + 1))
    assert graphs() == 1 + breaks and sum(counters["graph_break"].values()) == breaks


def test_a_failing_method_leaves_the_model_unchanged() -> None:
    model = tiny_llama()
    compiled: Any = torch.compile(model, **EXACT)
    with pytest.raises(ValueError, match=r"max_new_tokens"):
        compiled.generate(max_new_tokens=-1)
    assert model._compiled_call_impl is None


def test_wrappers_of_other_backends_are_not_changed() -> None:
    compiled = torch.compile(tiny_llama(), backend="eager")
    generated(compiled, token_ids(1, 8))
    assert graphs() == 0


def test_attributes_and_methods_of_torch_pass_through() -> None:
    model = tiny_llama()
    compiled: Any = torch.compile(model, **EXACT)
    assert compiled.config is model.config and compiled.generate.__name__ == "generate"
    assert next(n for n, _ in compiled.named_parameters()).endswith("embed_tokens.weight")


def test_a_model_that_was_compiled_in_place_stays_so() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    model.compile(backend="eager")
    held = model._compiled_call_impl
    generated(torch.compile(model, **EXACT), ids)
    assert model._compiled_call_impl is held


@pytest.mark.slow
def test_methods_run_concurrently_in_threads() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    expected, compiled = generated(model, ids), torch.compile(model, **EXACT)
    generated(compiled, ids)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(generated(compiled, ids)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4 and all(torch.equal(x, expected) for x in found)
    assert model._compiled_call_impl is None


def test_two_wrappers_at_once_run_their_own_code_and_the_model_inside_runs_uncompiled() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    first: Any = torch.compile(model, **EXACT)
    second: Any = torch.compile(model, backend="eager")
    seen: list[str] = []

    class Watch(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            before = graphs()
            inside = threading.Thread(target=lambda: model(token_ids(3, 7)), daemon=True)
            inside.start()  # the model inside, in another thread
            inside.join(120)
            seen.append("compiled" if graphs() > before else "as it is")
            return scores

    first.generate(ids, max_new_tokens=2, do_sample=False, logits_processor=LogitsProcessorList([Watch()]))
    assert seen == ["as it is"] * 2 and second.generate(ids, max_new_tokens=2).shape == (1, 22)


def test_functions_layers_and_compile_in_place_are_compiled() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        function = torch.compile(lambda x: model(x).logits, **EXACT)
        torch.testing.assert_close(function(ids), expected, rtol=1e-4, atol=1e-5)
        assert fhopt.report(function).graphs
        model.compile(**EXACT)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert [s.name for s in fhopt.report(model).graphs[0].sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
        parts = tiny_llama()
        for layer in parts.model.layers:
            layer.compile(**EXACT)
        torch.testing.assert_close(parts(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert {s.name for g in fhopt.report(parts).graphs for s in g.sites} == {"self_attn"}


def test_transformers_own_configuration_of_compilation_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CompileConfig

    model, ids = tiny_llama(), token_ids(1, 20)
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation="static")
    expected = model.generate(ids, **options)
    config = CompileConfig(backend="flashhead", mode=None, options={"ratio": 1}, fullgraph=False)
    config._compile_all_devices = True  # transformers compiles only for GPUs by default
    found = model.generate(ids, **options, compile_config=config)
    assert torch.equal(found, expected) and graphs() > 0
    assert fhopt.report(model).graphs


@pytest.mark.slow
def test_reset_forgets_everything_and_the_next_call_compiles_again() -> None:
    model, ids = tiny_llama(), token_ids(1, 20)
    compiled: Any = torch.compile(model, **EXACT)
    compiled(ids)
    assert fhopt.report(compiled).graphs
    torch._dynamo.reset()  # called by torch.compiler.reset
    with pytest.raises(FhoptError, match="fhopt has not compiled LlamaForCausalLM"):
        fhopt.report(compiled)
    compiled(ids)
    assert len(fhopt.report(compiled).graphs) == 1
