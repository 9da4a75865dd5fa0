"""Throughput over contexts: measurements, their order, and their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_caches import coded, plans
from layered_models import four_layers
from needs import needs_compiler
from small_models import FittedModel, tiny_llama
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.evaluation.throughput import WARM_TOKENS, measure_throughput
from fhopt.evaluation.throughput_options import ThroughputOptions

OPTIONS = ThroughputOptions((40, 96), decode=8, rounds=2)


def test_each_cache_is_filled_up_to_the_context(llama: FittedModel) -> None:
    found = list(measure_throughput(llama.model, {"exact": None, "4x": llama.plan(4)}, OPTIONS))
    assert [[(r.context, r.batch, r.cache) for r in case] for case in found] == [
        [(40, 1, "exact"), (40, 1, "4x")], [(96, 1, "exact"), (96, 1, "4x")],
    ]  # fmt: skip
    for exact, plan in found:
        assert exact.cache_bytes == exact.exact_cache_bytes == plan.exact_cache_bytes == 512 * exact.context
        assert plan.cache_bytes < exact.cache_bytes / 2
        assert min(exact.prefill_rate, exact.decode_rate, plan.prefill_rate, plan.decode_rate) > 0
    assert not hasattr(llama.model, "_fhopt_applied")


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])
def test_the_parts_of_a_step_are_those_of_the_median_round(batch: int) -> None:
    options = ThroughputOptions((200,), (batch,), decode=20, rounds=3)
    ((exact, plan),) = measure_throughput(four_layers(), {"exact": None, "4x": coded(plans(four_layers, 8))}, options)
    assert exact.parts is None and plan.parts is not None
    assert plan.parts.total == pytest.approx(1e3 * batch / plan.decode_rate)


def test_rounds_are_interleaved_and_all_use_the_same_prompt(llama: FittedModel) -> None:
    seen: list[tuple[str, Tensor]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > 1:
            seen.append(("plan" if hasattr(module, "_fhopt_applied") else "exact", ids))

    hook = llama.model.register_forward_pre_hook(note, with_kwargs=True)
    options = ThroughputOptions((96,), (3,), decode=8, rounds=2, seed=5)
    try:
        list(measure_throughput(llama.model, {"exact": None, "4x": llama.plan(4)}, options))
    finally:
        hook.remove()
    warm, measured = seen[:2], [(name, ids) for name, ids in seen[2:] if ids.shape[1] > WARM_TOKENS]
    assert [name for name, _ in warm] == ["exact", "plan"] and [name for name, _ in measured] == ["exact", "plan"] * 2
    assert all(ids.shape == (3, 88) and torch.equal(ids, measured[0][1]) for _, ids in measured)
    assert not torch.equal(measured[0][1][0], measured[0][1][1])


def test_progress_reaches_its_end() -> None:
    shown: list[tuple[str, int, int]] = []
    list(measure_throughput(tiny_llama(), {"exact": None}, OPTIONS, lambda *now: shown.append(now)))
    assert shown[0] == ("bench", 0, 64) and shown[-1] == ("bench", 64, 64)
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)


def test_out_of_memory_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(), list[int]()
    forward = model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:  # after the warm-up
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: fail(*args, **kwargs))
    with pytest.raises(FhoptError, match="a context of 40 tokens at batch size 1 does not fit"):
        list(measure_throughput(model, {"exact": None}, OPTIONS))
