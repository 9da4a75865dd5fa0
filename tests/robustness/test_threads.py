"""Several threads at once: the results of one thread, whichever thread compiles a kernel or a graph first."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from needs import sampled
from small_models import FittedModel, cached, found, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import fhopt
from fhopt.codegen import build
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan

COMPILER: Any = importlib.import_module("fhopt.codegen.compiler")
DISPATCH: Any = importlib.import_module("fhopt.codegen.dispatch")
THREADS = 4
SECONDS = 120  # timeout of threads


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Switch threads a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def traced_only() -> Iterator[None]:
    """Run graphs without inductor. Torch resolves a backend's name in one thread at a time."""
    torch._dynamo.lookup_backend("flashhead")
    inductor = "torch._inductor.compile_fx.compile_fx"
    with mock.patch(inductor, lambda module, inputs, **options: aot_eager(module, inputs)):
        yield


@pytest.fixture
def no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove compiled kernels from this process and the cache folder."""
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    build.build_kernel.cache_clear()
    yield
    build.build_kernel.cache_clear()


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """Run actions in separate threads that start together; return their results or raise their first error."""
    results: list[Any] = [None] * len(actions)
    raised: list[BaseException] = []
    start = threading.Barrier(len(actions))

    def run(index: int, action: Callable[[], Any]) -> None:
        try:
            start.wait()
            results[index] = action()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), f"threads that did not end in {SECONDS} s"
    if raised:
        raise raised[0]
    return results


def read(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return logits of a prompt and of single tokens after it, with a separate cache: [B, T, V]."""
    cache = latent_cache(model, **options)
    parts = [ids[:, :50], *ids[:, 50:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(part, **cached(cache), use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize(("options", "is_new"), [({}, True), ({"max_cache_len": 90}, False)], ids=["growing", "static"])
def test_threads_that_share_one_model_with_separate_caches_get_the_results_of_one(
    options: dict[str, Any], is_new: bool, llama: FittedModel, request: pytest.FixtureRequest
) -> None:
    if is_new:
        request.getfixturevalue("no_kernels")
    model = fhopt.apply(tiny_llama(), llama.plan(4))
    prompts = [token_ids(1 + i % 2, 55) for i in range(THREADS)]
    together = at_once(*(lambda ids=ids: read(model, ids, **options) for ids in prompts))  # kernels are built now
    alone = [read(model, ids, **options) for ids in prompts]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_threads_that_generate_concurrently_get_the_results_of_one(llama: FittedModel) -> None:
    model: Any = fhopt.apply(tiny_llama(), llama.plan(4))
    prompts = [token_ids(1, 40 + i) for i in range(THREADS)]
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ]

    def generate(ids: Tensor, way: dict[str, Any]) -> Tensor:
        made: Tensor = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **way)
        return made

    pairs = list(zip(prompts, ways, strict=True))
    together = at_once(*(lambda pair=pair: generate(*pair) for pair in pairs))
    assert all(torch.equal(made, generate(*pair)) for made, pair in zip(together, pairs, strict=True))


def test_plans_of_two_models_do_not_interfere(llama: FittedModel, gpt2: FittedModel) -> None:
    """One is applied and removed repeatedly while the other model runs."""
    first, second = fhopt.apply(tiny_llama(), llama.plan(4)), tiny_gpt2()
    ids = token_ids(1, 55)

    def change() -> list[Tensor]:
        return [read(fhopt.apply(second, gpt2.plan(4)), ids) for _ in range(2)]

    seen, made = at_once(lambda: [read(first, ids) for _ in range(2)], change)
    expected = read(first, ids), read(second, ids)
    assert all(torch.equal(x, expected[0]) for x in seen) and all(torch.equal(x, expected[1]) for x in made)


def test_a_kernel_that_threads_need_at_once_is_compiled_once(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = COMPILER._compile

    def watched(command: list[str], text: str, library: Path, links: tuple[str, ...]) -> None:
        compiled.append(library.name)
        compile_(command, text, library, links)

    monkeypatch.setattr(COMPILER, "_compile", watched)
    text = 'extern "C" int answer() { return 42; }\n'
    libraries = at_once(*(lambda: COMPILER.compile_and_load("answer", text) for _ in range(THREADS)))
    assert [library.answer() for library in libraries] == [42] * THREADS
    assert len(compiled) == 1


@pytest.mark.parametrize("is_planned", sampled([False, True], 2), ids=["exact", "by a plan"])
def test_two_threads_compile_and_run_models_concurrently(is_planned: bool, traced_only: None) -> None:
    models = [tiny_llama(), tiny_gpt2()]
    ids = token_ids(2, 20)
    sites = [found(model)[1].sites.values() for model in models]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for model in models]

    def compiled(model: Any, plan: LatentPlan) -> Tensor:
        options: dict[str, Any] = {"plan": plan} if is_planned else {"ratio": 1}
        made: Any = torch.compile(model, backend="flashhead", options=options)
        with torch.no_grad():
            logits: Tensor = made(ids, use_cache=False).logits
        assert fhopt.report(made).graphs
        return logits

    plans = [fit_plan.exact_plan(each) for each in sites]
    pairs = zip(models, plans, strict=True)
    for mine, plain in zip(at_once(*(lambda p=p: compiled(*p) for p in pairs)), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_threads_that_call_a_compiled_model_for_the_first_time_at_once_agree_with_eager(traced_only: None) -> None:
    model = tiny_llama()
    prompts = [token_ids(2, 20) for _ in range(THREADS)]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in prompts]
        compiled: Any = torch.compile(model, backend="flashhead", options={"ratio": 1})

    def call(ids: Tensor) -> Tensor:
        with torch.no_grad():  # thread-local
            logits: Tensor = compiled(ids, use_cache=False).logits
        return logits

    for mine, plain in zip(at_once(*(lambda ids=ids: call(ids) for ids in prompts)), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    assert fhopt.report(compiled).graphs


@pytest.mark.slow
def test_graphs_are_searched_in_threads_at_once(llama: FittedModel) -> None:
    """`capture` resets Dynamo; the finder does not use it."""
    from fhopt.models.capture import capture
    from fhopt.passes import pipeline
    from fhopt.passes.graph.printing import print_graph

    given = {"input_ids": token_ids(1, 16), "use_cache": False}
    programs = [capture(tiny_llama(), (), given).program for _ in range(THREADS + 1)]
    pipeline.find_attentions(programs[-1])
    at_once(*(lambda program=program: pipeline.find_attentions(program) for program in programs[:-1]))
    texts = {print_graph(program.graph) for program in programs}
    assert len(texts) == 1
