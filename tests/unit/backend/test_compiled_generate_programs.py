"""Decode steps of `torch.compile(model, backend="flashhead")` with an applied plan run as decode programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, prepared, program_runs
from latent_caches import coded, plans
from needs import needs_compiler
from small_models import cached, tiny_llama, token_ids
from torch import Tensor
from torch._dynamo.utils import counters

from fhopt.hf.apply import latent_cache

pytestmark = [needs_compiler, pytest.mark.usefixtures("traced_only")]
STEPS = 6


@pytest.fixture
def planned() -> Any:
    """Return a model with a plan, whose programs are built."""
    counters.clear()
    return prepared(tiny_llama(), coded(plans(tiny_llama, 8)))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def decoded_by(call: Any, model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """Return logits of the tokens after the prompt, decoded one by one, and the number of graphs traced for them."""
    cache = latent_cache(model)
    with torch.no_grad():
        call(ids[:, :PROMPT], **cached(cache))
        before = graphs()
        rows = [call(ids[:, i : i + 1], **cached(cache)).logits for i in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(rows, 1), graphs() - before


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_compiles_the_prompt_and_runs_programs_after_it(planned: Any, batch: int, options: Any) -> None:
    ids, options = token_ids(batch, PROMPT), {"max_new_tokens": 8, "do_sample": False, **options}
    expected = planned.generate(ids, **options)
    compiled: Any = torch.compile(planned, backend="flashhead")
    with program_runs() as ran:
        assert torch.equal(compiled.generate(ids, **options), expected)
    assert len(ran) == 7
    after_the_first = graphs()
    assert after_the_first > 0, "the prompt is compiled"
    compiled.generate(ids, **options)
    assert graphs() == after_the_first


def test_calls_of_the_wrapper_run_programs(planned: Any) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    expected, _ = decoded_by(planned, planned, ids)
    with program_runs() as ran:
        found, made = decoded_by(torch.compile(planned, backend="flashhead"), planned, ids)
    assert len(ran) == STEPS and made == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_wrappers_of_other_backends_compile_their_steps(planned: Any) -> None:
    with program_runs() as ran:
        _, made = decoded_by(torch.compile(planned, backend="eager"), planned, token_ids(1, PROMPT + STEPS))
    assert not ran and made > 0


def test_a_step_that_no_program_takes_is_compiled(planned: Any) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    expected, _ = decoded_by(planned, planned, ids)
    planned.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.0)
    with program_runs() as ran:
        found, made = decoded_by(torch.compile(planned, backend="flashhead"), planned, ids)
    assert not ran and made > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_function_around_the_model_is_traced_as_a_whole(planned: Any) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    expected, _ = decoded_by(planned, planned, ids)
    function = torch.compile(lambda x, **options: planned(x, **options), backend="flashhead", fullgraph=True)
    with program_runs() as ran:
        found, made = decoded_by(function, planned, ids)
    assert not ran and made > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_of_the_wrapper_run_once_per_call(planned: Any, kind: str) -> None:
    ids, calls = token_ids(1, PROMPT + STEPS), []
    compiled: Any = torch.compile(planned, backend="flashhead")
    if kind == "forward":
        compiled.register_forward_hook(lambda *_: calls.append(1))
    else:
        compiled.register_forward_pre_hook(lambda *_: calls.append(1))
    decoded_by(compiled, planned, ids)
    assert len(calls) == 1 + STEPS


def test_hooks_of_the_model_run_around_the_program(planned: Any) -> None:
    ids, calls = token_ids(1, PROMPT + STEPS), []
    compiled: Any = torch.compile(planned, backend="flashhead")
    planned.register_forward_hook(lambda *_: calls.append(1))
    with program_runs() as ran:
        decoded_by(compiled, planned, ids)
    assert len(calls) == 1 + STEPS and len(ran) == STEPS


def test_gradients_are_compiled(planned: Any) -> None:
    cache, ids = latent_cache(planned), token_ids(1, PROMPT + 1)
    compiled: Any = torch.compile(planned, backend="flashhead")
    with torch.no_grad():
        compiled(ids[:, :PROMPT], **cached(cache))
    with program_runs() as ran:
        logits = compiled(ids[:, PROMPT:], **cached(cache)).logits
    assert not ran and logits.requires_grad
