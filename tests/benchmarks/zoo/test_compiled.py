"""Compiled models agree with eager ones: results, gradients, graphs and breaks, compared with inductor's.

Dynamo and, for our graphs, AOTAutograd run as usual, but no C++ is generated; `benchmarks/zoo/compiled.py` runs all
tasks, with inductor itself. It samples at random; here the selection is fixed, so that every mode and every family has
its test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo import compiled, compiled_results, compiled_tasks
from benchmarks.zoo.compiled_results import CompilerResult, ZooTask
from fhopt.backend.compile import last_outcome
from fhopt.ops import attention

TASKS = compiled_tasks.tasks()
SMALL = [t for t in TASKS if t.entry.family != "huggingface"]
EVERY = 45  # share of the small tasks
FAST = """
    gpt2-eager-prefill/train mpt-eager-prefill/train gpt_oss-eager-decode_static/no_grad
    llama-eager-prefill/layers gpt2-eager-prefill/left_padding softcap-forward/batches
"""
SLOW = """
    llama-eager-prefill/static_cache gemma2-eager-prefill/dynamic_cache bloom-eager-prefill/lengths
    mpt-eager-prefill/growing deepseek_v3-eager-prefill/long_dynamic gpt_oss-eager-prefill/long_static
    t5-eager-prefill/train bert-eager-forward/autocast gpt2-eager-prefill/bfloat16 gemma2-eager-prefill/checkpoints
    gpt2-eager-prefill/layers_decode bloom-eager-prefill/weights swin-eager-forward/train
"""


def chosen(labels: str) -> list[ZooTask]:
    """Select tasks by their labels, separated by spaces."""
    known = {task.label: task for task in TASKS}
    return [known[label] for label in labels.split()]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace inductor by Dynamo's graphs: the minimum number of graphs, with eager results."""
    monkeypatch.setitem(compiled.COMPILERS, "inductor", {"backend": "eager"})
    with compiled.traced():
        yield


def check(task: ZooTask) -> None:
    result = compiled.check(task)
    if result.excuse:
        pytest.skip(result.excuse)
    assert not result.failures


@pytest.mark.slow
@pytest.mark.parametrize("task", [*SMALL[::EVERY], *chosen(FAST)], ids=lambda t: t.label)
def test_a_compiled_model_agrees_in_no_more_graphs_than_inductor_needs(task: ZooTask) -> None:
    check(task)


@pytest.mark.slow
@pytest.mark.parametrize("task", chosen(SLOW), ids=lambda t: t.label)
def test_so_does_every_kind_of_model_in_every_mode(task: ZooTask) -> None:
    check(task)


def test_every_mode_of_the_benchmark_has_a_test() -> None:
    assert {t.mode for t in (*SMALL[::EVERY], *chosen(FAST + SLOW))} == {t.mode for t in TASKS}
    assert {t.entry.family for t in SMALL[::EVERY]} == {t.entry.family for t in SMALL}


@pytest.mark.parametrize(("mode", "is_fused"), [("train", True), ("left padding", False)])
def test_training_is_fused_unless_a_mask_input_may_hide_whole_rows(mode: str, is_fused: bool) -> None:
    """On CPU, the fused call's gradients of such rows are T times too large, and must not be used."""
    (task,) = chosen(f"gpt2-eager-prefill/{mode.replace(' ', '_')}")
    case = task.build()
    torch.compile(case.module, backend="flashhead", options={"ratio": 1})(*case.args, **case.kwargs)
    outcome = last_outcome()
    assert outcome is not None
    calls = [n for n in outcome.program.graph.nodes if n.target is attention.attention_reference]
    assert len(calls) == 2 and all(n.kwargs.get("fused", True) is is_fused for n in calls)


# ---- faults that the benchmark must notice


def broken(task: ZooTask, monkeypatch: pytest.MonkeyPatch, backend: Any) -> list[str]:
    """Return the failures of a task with `backend` instead of ours."""
    ours = {"flashhead": {"backend": backend}}
    monkeypatch.setattr(compiled, "COMPILERS", {**compiled.COMPILERS, **ours})
    return compiled.check(task).failures


def a_task(mode: str = "train") -> ZooTask:
    return next(t for t in SMALL if t.label == f"softcap-forward/{mode}")


def test_a_wrong_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, inputs: Any) -> Any:
        return lambda *given: tuple(1.001 * x for x in module(*given))

    failures = broken(a_task(), monkeypatch, wrong)
    assert len(failures) == 2 and failures[0].startswith("max_error 1.0e-03")
    assert failures[1].startswith("max_gradient_error 1.0e-03")


def test_a_compiler_that_specializes_a_size_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager_for_one_size(module: Any, inputs: Any) -> Any:
        for value in inputs:
            if isinstance(value, torch.SymInt):
                int(value)  # a guard: the next size needs another graph
        return module

    failures = broken(a_task("batches"), monkeypatch, eager_for_one_size)
    assert failures == ["2 graphs, inductor has 1"]


def test_an_abandoned_graph_is_noticed() -> None:
    seen = {name: CompilerResult([torch.ones(2)], graphs=1) for name in compiled.COMPILERS}
    assert compiled_results.CompiledResult(a_task(), seen).failures == []
    seen["flashhead"] = replace(seen["flashhead"], given_up=["fhopt left a graph to inductor: ..."], breaks=1)
    assert compiled_results.CompiledResult(a_task(), seen).failures == [
        "fhopt left a graph to inductor: ...",
        "1 breaks, inductor has 0",
    ]


def test_a_failure_of_torch_itself_is_an_excuse_with_a_reason() -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("no")

    task = replace(a_task(), run=refuse)
    assert compiled.check(task).excuse == "eager: RuntimeError: no"
    assert isinstance(task.build().module, nn.Module)
