"""Writes to buffers in every spelling."""

from __future__ import annotations

import copy

import pytest
import torch
from buffered_decoder import (
    CLOSE,
    SLOTS,
    SPELLINGS,
    D,
    G,
    LatentReference,
    caches,
    call,
    coded_plan,
    compiled_with,
    decoder,
    exact_plan,
    words,
)
from needs import sampled

from fhopt.backend.compile import last_outcome
from fhopt.cache import module_buffers

pytestmark = pytest.mark.usefixtures("traced_only")


def compressed() -> dict[str, str]:
    outcome = last_outcome()
    assert outcome is not None
    return outcome.compressed


def caches_in_graph() -> list[str]:
    """Return the caches that the last graph reads or writes."""
    outcome = last_outcome()
    assert outcome is not None
    inputs = [n for n in outcome.program.graph.nodes if n.name in outcome.program.buffers]
    assert len([n for n in inputs if "cache" in n.name]) == 2 * len(outcome.sites)
    return [n.name for n in inputs if n.users]


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def is_by_number(spelling: str) -> bool:
    return spelling.partition(",")[0] in ("slice", "copy_")


# --------------------------------------------------------------------------------------------------- unquantized


@pytest.mark.slow
@pytest.mark.parametrize("spelling", sampled(SPELLINGS, 2))
def test_any_spelling_of_a_write_agrees_with_the_module(spelling: str) -> None:
    from torch._dynamo.utils import counters

    is_common, by_number = spelling in ("index", "slice"), is_by_number(spelling)
    model, last = decoder(spelling, layers=2 if is_common else 1), 80 if is_common else 32
    plain, ids, plan = copy.deepcopy(model), words(90), exact_plan(model)
    compiled = compiled_with(model, plan)
    counters.clear()
    names = []
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, last)), (last, last + 10)]:
        new = ids[:, start:stop]
        found = call(compiled, new, start, by_number)
        torch.testing.assert_close(found, call(plain, new, start, by_number), **CLOSE)
        names.append(tuple(compressed()))
    assert set(names) == {tuple(f"layers.{i}" for i in range(len(model.layers)))} and not caches_in_graph()
    count, exact = graphs(), torch.compile(plain, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for start, stop in [(0, 20), (20, 21), (21, 22), (22, 23), (80, 90)]:
        call(exact, ids[:, start:stop], start, by_number)
    assert count <= graphs() + 1
    assert all(cache.untyped_storage().nbytes() < cache.nbytes / 40 for cache in caches(model))


@pytest.mark.parametrize("read", ["some", "no mask"])
def test_attention_may_use_a_buffer_up_to_its_newest_token(read: str) -> None:
    model = decoder("slice", read)
    plain, ids = copy.deepcopy(model), words(60)
    compiled = compiled_with(model, exact_plan(decoder("slice", "some")))
    first = 20 if read == "some" else 1
    for start, stop in [(0, first), *((t, t + 1) for t in range(first, 40)), *([(40, 60)] if first > 1 else [])]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start, True), call(plain, new, start, True), **CLOSE)
    assert compressed()


def test_a_cache_may_be_a_plain_attribute() -> None:
    model = decoder()
    plan = exact_plan(model)
    for layer in model.layers:
        del layer._buffers["k_cache"], layer._buffers["v_cache"]
        layer.k_cache, layer.v_cache = torch.zeros(2, G, SLOTS, D), torch.zeros(2, G, SLOTS, D)
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, plan), words(30)
    for start, stop in [(0, 20), (20, 21), (21, 22)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)
    assert compressed() and module_buffers.is_released(model.layers[0].k_cache)


def test_inference_mode_gives_the_same() -> None:
    model = decoder()
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, exact_plan(model)), words(30)
    with torch.inference_mode():
        for start, stop in [(0, 20), (20, 21), (21, 22)]:
            new, at = ids[:, start:stop], torch.arange(start, stop)
            torch.testing.assert_close(compiled(new, at, 0), plain(new, at, 0), **CLOSE)


# --------------------------------------------------------------------------------------------------- quantized


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_gives_the_same() -> None:
    model, ids = decoder(), words(60)
    plan = coded_plan(model)
    reference, compiled = LatentReference(copy.deepcopy(model), plan), compiled_with(model, plan)
    for start, stop in [(0, 40), (40, 41), (41, 42)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(reference, new, start), rtol=1e-3, atol=1e-3)
