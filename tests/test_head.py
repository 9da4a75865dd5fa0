"""The head by search: bounds that hold, the logits of the dense head, and a model that does not notice."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

from fhopt import head as heads
from fhopt import head_codes, head_fitting, head_module
from fhopt.capture import capture
from fhopt.codegen.cpu import lm_head as cpu_lm_head
from fhopt.codegen.cpu.lm_head import Candidates, Search, search
from fhopt.codegen.cpu.skinny_linear import MOST_ROWS
from fhopt.errors import FhoptError
from fhopt.files import digest
from fhopt.head import Head
from fhopt.head_codes import balance, code_rows, decode, rounded_up, tiered
from fhopt.head_fitting import HeadOptions, find, fit_weight, site_for
from fhopt.head_module import RetrievalHead, applied_head, dense, stamp_of
from fhopt.head_sampling import log_probabilities, sample, top_k

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler on PATH"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "zeros", "equal", "one large", "tiny", "huge", "sparse", "nearly equal")


def weights(kind: str, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that are easy or hard to round."""
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
    """The head of a weight; bits "mixed": half of the coordinates in 8 bits, the others in 4."""
    chosen: dict[str, Any] = dict(iterations=2) | options
    site = site_for(weight, bias="bias" if bias is not None else "")
    with pytest.MonkeyPatch.context() as patch:
        if chosen.get("bits") == "mixed":
            patch.setattr(head_fitting, "SHARES", (1 / 2,))
            chosen["bits"] = "auto"
        return fit_weight(site, weight, bias, hidden, HeadOptions(**chosen))


def largest_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The slow, obvious way: all logits, the largest first, equal ones in order of the vocabulary."""
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    return values, ids


def assert_right(found: Candidates, weight: Tensor, hidden: Tensor, bias: Tensor | None, keep: int) -> None:
    values, ids = largest_first(dense(hidden, weight, bias))
    for m, count in enumerate(found.counts.tolist()):
        if count < 0:
            continue
        assert count >= keep
        assert torch.equal(found.ids[m, :keep].long(), ids[m, :keep])
        assert torch.equal(found.values[m, :keep], values[m, :keep])


# --------------------------------------------------------------------------------------------------- bounds


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 150), st.integers(1, 45),
    st.integers(1, 5), st.sampled_from(["4", "8", "mixed"]), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_no_logit_exceeds_its_bound_and_the_largest_are_found(
    kind: str, states: str, dtype: torch.dtype, vocabulary: int, width: int, rows: int, bits: str, has_bias: bool,
    has_basis: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    weight, hidden = weights(kind, vocabulary, width, dtype), weights(states, rows, width, dtype)
    bias = torch.randn(vocabulary).to(dtype) if has_bias else None
    head = made(weight, skewed(64, width) if has_basis else None, bias, bits=bits)
    keep = int(torch.randint(1, min(vocabulary, 5) + 1, ()))
    found = search(hidden, weight, bias, head.codes, head.search(keep=keep, bounds=True))
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    assert found.bounds is not None and found.estimates is not None
    searched = found.counts >= 0
    assert bool((found.bounds.double() >= exact)[searched].all())
    assert_right(found, weight, hidden, bias, keep)
    if (kind, states) == ("random", "random"):
        assert bool(searched.all())


@pytest.mark.parametrize("bits", ["4", "8", "mixed"])
def test_estimates_and_bounds_are_those_of_the_equations(bits: str) -> None:
    weight, states = weights("random", 300, 40), skewed(500, 40)
    head, hidden = made(weight, states, bits=bits), skewed(3, 40)
    found = search(hidden, weight, None, head.codes, head.search(bounds=True))
    assert found.bounds is not None and found.estimates is not None and head.codes.transform is not None
    rows, values, numbers = decode(head.codes)
    order = rows[rows >= 0].argsort()
    values, numbers = values[rows >= 0][order], numbers[rows >= 0][order]
    turned = hidden.double() @ head.codes.transform.double().T
    offset = (hidden.double() @ head.codes.centre.double()).unsqueeze(1)
    estimate = turned @ values.T + offset
    first, second = turned[:, : head.codes.lead].norm(dim=1), turned[:, head.codes.lead :].norm(dim=1)
    bound = first.unsqueeze(1) * numbers[:, 2] + second.unsqueeze(1) * numbers[:, 3]
    rounded = sum(  # of h' in 8 bits: at most half a step of 1/127 of its largest magnitude, in each coordinate
        (part.abs().amax(1) / 254 * part.shape[1] ** 0.5).unsqueeze(1) * numbers[:, 4 + i]
        for i, part in enumerate(turned.tensor_split([head.codes.lead], 1))
        if part.shape[1]
    )
    assert bool(((found.estimates - estimate).abs() <= rounded + 1e-4).all())
    assert bool((found.bounds >= estimate + bound - rounded - 1e-4).all())
    assert bool((found.bounds <= estimate + bound + 2 * rounded + 1e-3 * bound + 1e-3).all())


def test_what_is_coded_decodes_to_the_rows() -> None:
    weight, states = weights("random", 77, 21), skewed(100, 21)
    head = made(weight, states, bits="8")
    rows, values, numbers = decode(head.codes)
    kept = rows >= 0
    assert sorted(rows[kept].tolist()) == list(range(77))
    assert head.codes.transform is not None
    back = values[kept] @ head.codes.transform.double() + head.codes.centre.double()
    lost = (back - weight[rows[kept]].double()).norm(dim=1)
    longest = torch.linalg.matrix_norm(head.codes.transform.double(), 2)
    assert bool((lost <= longest * numbers[kept][:, 2]).all())
    assert float(lost.max()) < 0.02 * float(weight.norm(dim=1).mean())


def test_the_basis_gives_hidden_states_and_rows_the_same_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_codes, "SHRINKAGE", 1e-9)
    states, rows = skewed(4000, 24).double(), (weights("random", 5000, 24) * torch.rand(24)).double()
    hidden, moment = states.T @ states / len(states), rows.T @ rows / len(rows)
    found = balance(hidden, moment)
    assert found.forward is not None and found.backward is not None
    torch.testing.assert_close(found.forward.T @ found.backward, torch.eye(24).double(), rtol=0, atol=1e-9)
    of_rows = found.backward @ moment @ found.backward.T
    torch.testing.assert_close(of_rows, of_rows.diagonal().diag(), rtol=0, atol=1e-4 * float(of_rows.max()))
    of_states = found.forward @ hidden @ found.forward.T
    assert float((of_states.diagonal() / of_rows.diagonal()).log().abs().max()) < 0.05  # 1e-6 is added to the rows'
    plain = float((hidden.trace() * moment.trace()).sqrt())
    assert found.gain < 0.9
    assert float((of_states.trace() * of_rows.trace()).sqrt()) == pytest.approx(found.gain * plain, rel=0.02)


def test_no_basis_is_used_where_there_is_nothing_to_gain() -> None:
    rows = weights("random", 4000, 24).double()
    assert balance(None, rows.T @ rows / len(rows)).forward is None
    assert tiered(balance(None, torch.eye(13).double()), 13, 8).rank == 16


def test_the_inverse_belongs_to_the_basis_as_it_is_kept() -> None:
    states, rows = skewed(400, 30).double(), weights("random", 500, 30).double()
    basis = tiered(balance(states.T @ states / 400, rows.T @ rows / 500), 30, 8)
    assert basis.transform is not None
    logits = basis.hidden(states.float()).double() @ basis.rows(rows).T
    exact = (states.float().double() @ basis.transform.double().T) @ basis.rows(rows).T
    torch.testing.assert_close(exact, states.float().double() @ rows.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, states @ rows.T, rtol=1e-4, atol=1e-4)


def test_codes_lose_what_they_say() -> None:
    x = torch.cat([torch.randn(50, 16), torch.zeros(2, 16)]).double()
    for bits in (4, 8):
        tier = code_rows(x, bits)
        value = (tier.codes.double() - (2**bits - 1) / 2) * tier.scale.double().unsqueeze(1)
        torch.testing.assert_close((x - value).norm(dim=1), tier.error)
        torch.testing.assert_close(value.norm(dim=1), tier.norm)
        assert float(tier.error[50:].max()) == 0
        widest = x.abs().amax(1) * (2 / 2**bits) * (1 + 2**-8)  # a step without clipping, as bfloat16
        assert bool((tier.error <= widest / 2 * 16**0.5 + 2**-8 * x.norm(dim=1)).all())


@given(st.floats(0, 1e30))
def test_rounding_up_never_rounds_down(x: float) -> None:
    value = torch.tensor([x], dtype=torch.float64)
    up = rounded_up(value).double()
    assert float(up) >= x and float(up) <= max(x * (1 + 2**-6), 1e-37)


# --------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 16])
def test_with_every_row_scored_it_is_the_dense_head_bit_for_bit(dtype: torch.dtype, batch: int) -> None:
    weight, hidden = weights("random", 203, 37, dtype), torch.randn(batch, 37).to(dtype)
    head = made(weight)
    asked = head.search(keep=203, budget=203, probes=0, logits=True)
    found = search(hidden, weight, None, head.codes, asked)
    assert found.counts.tolist() == [203] * batch
    assert found.logits is not None and torch.equal(found.logits, dense(hidden, weight, None))


def test_with_every_cluster_probed_it_is_the_search_of_all_rows() -> None:
    weight, hidden = weights("random", 500, 32), torch.randn(5, 32)
    head = made(weight, clusters=20)
    every = search(hidden, weight, None, head.codes, head.search(probes=20, logits=True))
    certain = search(hidden, weight, None, head.codes, head.search(logits=True))
    assert every.logits is not None and certain.logits is not None and torch.equal(every.logits, certain.logits)


def test_more_clusters_find_more_of_the_largest_logits() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 24).repeat_interleave(25, 0) * 2 + torch.randn(1000, 24)
    hidden = torch.randn(300, 24)
    head = made(weight, skewed(400, 24), clusters=40, iterations=8)
    best = F.linear(hidden, weight).argmax(-1)
    shares = []
    for probes in (1, 4, 12, 40):
        found = search(hidden, weight, None, head.codes, head.search(probes=probes))
        shares.append(float((found.ids[:, 0] == best).double().mean()))
    assert shares == sorted(shares) and shares[0] < 0.95 and shares[2] > 0.97 and shares[3] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_clusters_that_are_not_probed_are_below_their_bounds(dtype: torch.dtype) -> None:
    weight, hidden = weights("random", 400, 24, dtype), torch.randn(4, 24).to(dtype)
    bias = 9 * torch.randn(400).to(dtype)
    head = made(weight, skewed(100, 24), bias, clusters=25)
    found = search(hidden, weight, bias, head.codes, head.search(probes=3, bounds=True))
    assert found.bounds is not None and found.estimates is not None
    unseen = found.estimates == -math.inf
    assert bool((unseen.sum(1) >= 300).all())
    assert bool((found.bounds >= F.linear(hidden.double(), weight.double(), bias.double())).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_hidden_states_that_cannot_be_bounded_go_to_the_dense_head(bad: float) -> None:
    weight, hidden = weights("random", 90, 16), torch.randn(3, 16)
    hidden[1, 4] = bad
    head = made(weight)
    found = search(hidden, weight, None, head.codes, head.search())
    assert [count < 0 for count in found.counts.tolist()] == [False, True, False]
    with torch.no_grad():
        logits = RetrievalHead(head, weight, None)(hidden)
    assert torch.equal(logits[1].nan_to_num(7.0), dense(hidden, weight, None)[1].nan_to_num(7.0))


def test_hidden_states_of_zeros_have_the_order_of_the_bias() -> None:
    weight, bias = weights("random", 64, 16), torch.randn(64)
    head = made(weight, bias=bias)
    found = search(torch.zeros(1, 16), weight, bias, head.codes, head.search(keep=3))
    assert found.ids[0, :3].tolist() == bias.topk(3).indices.tolist()


def test_of_equal_logits_the_first_in_the_vocabulary_comes_first() -> None:
    weight = weights("random", 300, 16)
    weight[[40, 7, 250]] = 5 * weight[100]
    hidden = weight[100:101].clone()
    head = made(weight)
    found = search(hidden, weight, None, head.codes, head.search(keep=2))
    assert found.ids[0, : int(found.counts[0])].tolist()[:3] == [7, 40, 250]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_logits_that_become_equal_by_rounding_are_all_computed(softcap: float) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(1, 64) + 0.02 * torch.randn(400, 64)).bfloat16()
    hidden = torch.randn(40, 64).bfloat16() / 4
    head = made(weight)
    for x in hidden.split(8):
        asked = Search(softcap=softcap, budget=400, logits=True)
        found = search(x, weight, None, head.codes, asked)
        assert found.logits is not None
        ours, theirs = found.logits, F.linear(x, weight)
        if softcap:
            ours, theirs = (softcap * torch.tanh(y / softcap) for y in (ours, theirs))
        searched = found.counts >= 0
        assert bool(searched.any())
        assert torch.equal(ours.argmax(-1)[searched], theirs.argmax(-1)[searched])


def test_a_margin_brings_all_logits_within_it() -> None:
    weight, hidden = weights("random", 500, 32), torch.randn(3, 32)
    head = made(weight)
    found = search(hidden, weight, None, head.codes, head.search(margin=2.0, budget=500, logits=True))
    exact = dense(hidden, weight, None)
    within = exact >= exact.amax(1, keepdim=True) - 2.0
    assert found.logits is not None and torch.equal(found.logits[within], exact[within])
    assert int((found.logits > -math.inf).sum()) < 1500


def test_hidden_states_that_need_more_rows_than_the_budget_are_left_to_the_dense_head() -> None:
    weight = weights("nearly equal", 300, 16)
    head = made(weight, bits="4")
    found = search(torch.randn(4, 16), weight, None, head.codes, head.search(margin=1e3, budget=299))
    assert found.counts.tolist() == [-1] * 4


def test_several_threads_find_the_same() -> None:
    weight = weights("random", 5000, 64)
    hidden, head = torch.randn(16, 64), made(weight, clusters=100)
    for probes in (0, 30):
        one = search(hidden, weight, None, head.codes, head.search(probes=probes, logits=True))
        torch.set_num_threads(2)
        two = search(hidden, weight, None, head.codes, head.search(probes=probes, logits=True))
        torch.set_num_threads(1)
        assert one.logits is not None and two.logits is not None and torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx",)], ids=["avx2", "sse"])
def test_other_vector_units_find_the_same_rows(flags: tuple[str, ...]) -> None:
    other = cpu_lm_head.compiled(*flags)
    if other is None:
        pytest.skip("this compiler has no such flags")
    weight, states = weights("random", 333, 45), skewed(100, 45)
    head, hidden = made(weight, states, bits="mixed"), torch.randn(10, 45)
    assert 0 < head.codes.lead < head.codes.rank
    wanted = head.search(keep=3, bounds=True)
    ours, theirs = (search(hidden, weight, None, head.codes, wanted, f) for f in (None, other))
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.ids[:, :3], theirs.ids[:, :3])
    assert ours.estimates is not None and theirs.estimates is not None
    torch.testing.assert_close(ours.estimates, theirs.estimates, rtol=1e-4, atol=1e-4)  # sums in another order


def test_operands_that_do_not_fit_are_refused() -> None:
    weight, head = weights("random", 64, 16), made(weights("random", 64, 16))
    hidden = torch.randn(2, 16)
    refused: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (hidden[:, :8], weight, None),
        (hidden, weight[:60], None),
        (hidden.double(), weight.double(), None),
        (hidden.bfloat16(), weight, None),
        (hidden, weight, torch.randn(5)),
        (hidden, weight.t().contiguous().t(), None),
    ]
    for x, w, bias in refused:
        with pytest.raises(ValueError):
            search(x, w, bias, head.codes, head.search())
    with pytest.raises(ValueError, match="keep=0"):
        search(hidden, weight, None, head.codes, head.search(keep=0))


# --------------------------------------------------------------------------------------------------- models


def applied(model: Any, **options: Any) -> tuple[Any, Head]:
    """The model with a head of its own applied, coded for the hidden states that it has on random tokens."""
    captured = capture(model, (), {"input_ids": token_ids(1, 16), "use_cache": False})
    site = find(captured)
    weight = model.get_parameter(site.weight).detach()
    with torch.no_grad():
        states = model(token_ids(4, 60), output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    head = fit_weight(site, weight, None, states, HeadOptions(iterations=2))
    return heads.apply(model, head, **options), head


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_is_that_of_the_dense_head(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    prompt = token_ids(3, 12)
    options: dict[str, Any] = dict(max_new_tokens=25, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, **options)
    applied(model)
    assert torch.equal(model.generate(prompt, **options), expected)
    told = heads.report(model)
    assert told.rows >= 60 and told.certified > 0.9 and told.dense_rows == round((1 - told.certified) * told.rows)
    heads.unapply(model)
    assert type(model.get_output_embeddings()) is nn.Linear and torch.equal(model.generate(prompt, **options), expected)


def test_sampling_among_the_largest_is_that_of_the_dense_head() -> None:
    model, prompt = tiny_llama(), token_ids(2, 12)
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, top_k=10, top_p=0.9, temperature=1.3)
    torch.manual_seed(7)
    expected = model.generate(prompt, **options)
    applied(model, keep=10)
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_stand_below_the_certain_logits_and_close_to_their_own(dtype: torch.dtype) -> None:
    weight, hidden = weights("random", 400, 64, dtype), torch.randn(6, 64).to(dtype)
    head = made(weight, bits="8")
    logits = RetrievalHead(head, weight, None, keep=3, estimates=True)(hidden)
    exact = dense(hidden, weight, None)
    assert torch.equal(logits.topk(3).indices, exact.topk(3).indices)
    assert torch.equal(logits.topk(3).values, exact.topk(3).values)
    assert bool(logits.isfinite().all())
    assert float((logits - exact).float().abs().max()) < 0.03 * float(exact.float().std() * 4)
    normalisers = logits.float().logsumexp(-1) - exact.float().logsumexp(-1)
    assert float(normalisers.abs().max()) < 0.03


def test_beams_with_estimates_are_those_of_the_dense_head() -> None:
    model, prompt = tiny_llama(), token_ids(1, 12)
    options: dict[str, Any] = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    expected = model.generate(prompt, **options)
    applied(model, keep=6, estimates=True)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert heads.report(model).rows >= 8 * 3 - 2


@torch.no_grad()
@pytest.mark.parametrize("batch", [*range(1, 6), 16, 17, 40])
def test_any_batch_has_the_logits_of_the_dense_head(batch: int) -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None, keep=4), torch.randn(batch, 1, 24)
    logits, exact = module(hidden), F.linear(hidden, weight)
    assert logits.shape == exact.shape
    assert torch.equal(logits.topk(4).indices, exact.topk(4).indices)
    known = logits > -math.inf
    torch.testing.assert_close(logits[known], exact[known], rtol=1e-5, atol=1e-6)  # sums in another order
    told = module.report()
    assert told.rows == (batch if batch <= MOST_ROWS else 0)


@torch.no_grad()
def test_a_compiled_graph_has_the_same_logits_and_counts() -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None), torch.randn(3, 24)
    expected = module(hidden)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(hidden), expected) and module.report().rows == 6


def test_a_model_compiled_whole_generates_the_same() -> None:
    model, prompt = tiny_llama(), token_ids(1, 12)
    with torch.no_grad():
        expected = model(prompt).logits[:, -1].argmax(-1)
        applied(model)
        compiled: Any = torch.compile(model, fullgraph=True)
        found = compiled(prompt, logits_to_keep=1).logits[:, -1].argmax(-1)
    assert torch.equal(found, expected) and applied_head(model).report().rows == 1


def test_the_op_is_sound() -> None:
    weight = weights("random", 40, 16)
    module = RetrievalHead(made(weight), weight, None)
    codes, wanted = module.head.codes, module.search
    arguments = (
        torch.randn(2, 16), weight, None, module.codes, None, module.centre, module.centroids, module.radii,
        module.counts, [codes.rank, codes.lead], [codes.transform_norm, codes.largest],
        [wanted.keep, wanted.probes, wanted.budget, 0], [wanted.margin, wanted.spread, wanted.softcap],
        stamp_of(weight),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fhopt.head_logits.default, arguments)


def test_gradients_go_through_the_dense_head() -> None:
    layer, x = nn.Linear(24, 97, bias=False), torch.randn(2, 24, requires_grad=True)
    module = RetrievalHead(made(layer.weight.detach()), layer.weight, None)
    module(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, -1))


@torch.no_grad()
def test_a_weight_that_has_changed_is_read_densely() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module, hidden = RetrievalHead(made(weight.detach()), weight, None), torch.randn(2, 24)
    module(hidden)
    weight.mul_(-1)
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().dense_rows == 2
    assert torch.equal(top_k(module, hidden, 3)[1], F.linear(hidden, weight).topk(3).indices)


@torch.no_grad()
def test_other_numbers_in_the_same_parameter_are_noticed() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module, hidden = RetrievalHead(made(weight.detach()), weight, None), torch.randn(2, 24)
    weight.data = torch.randn(97, 24)  # which keeps the version
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().dense_rows == 2


@torch.no_grad()
def test_a_model_of_another_type_is_read_densely_and_its_codes_stay_as_they_are() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module = RetrievalHead(made(weight.detach(), skewed(50, 24)), weight, None).to(torch.bfloat16)
    hidden = torch.randn(2, 24).bfloat16()
    assert torch.equal(module(hidden), dense(hidden, module.weight, None)) and module.report().dense_rows == 2
    assert module.centre.dtype == module.radii.dtype == torch.float32
    moved = RetrievalHead(made(weights("random", 97, 24)), nn.Parameter(weights("random", 97, 24)), None).to("cpu")
    assert moved.is_fresh()


@torch.no_grad()
def test_without_a_compiler_the_head_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None), torch.randn(2, 24)
    monkeypatch.setattr(cpu_lm_head, "library", lambda: None)
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().certified == 0


def test_a_head_of_other_weights_is_refused() -> None:
    model, other = tiny_llama(), tiny_llama(vocab_size=98)
    _, head = applied(model)
    with pytest.raises(FhoptError, match=r"coded for another lm_head\.weight"):
        heads.apply(other, head)
    with pytest.raises(FhoptError, match=r"parameter lm_head\.weight, which Linear has not"):
        heads.apply(nn.Linear(2, 2), head)
    with pytest.raises(FhoptError, match="no head is applied"):
        heads.report(other)


Finish = Callable[["Words", Tensor], Tensor]


class Words(nn.Module):
    """A model that makes its logits in its own forward."""

    def __init__(self, finish: Finish) -> None:
        super().__init__()
        self.embedding, self.finish = nn.Embedding(60, 16), finish
        self.shift = nn.Parameter(torch.randn(60))

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self, self.embedding(ids).tanh())


WRITTEN: dict[str, Finish] = {
    "functional": lambda m, x: F.linear(x, m.embedding.weight),
    "with a bias": lambda m, x: F.linear(x, m.embedding.weight, bias=m.shift),
    "product": lambda m, x: x @ m.embedding.weight.T,
    "matmul": lambda m, x: torch.matmul(x, m.embedding.weight.transpose(0, 1)),
    "flat": lambda m, x: torch.mm(x.flatten(0, 1), m.embedding.weight.t()).unflatten(0, x.shape[:2]),
    "addmm": lambda m, x: torch.addmm(m.shift, x.flatten(0, 1), m.embedding.weight.t()).unflatten(0, x.shape[:2]),
    "einsum": lambda m, x: torch.einsum("btc,vc->btv", x, m.embedding.weight),
    "einsum, turned": lambda m, x: torch.einsum("vc, ...c -> ...v", m.embedding.weight, x),
    "capped": lambda m, x: 5 * torch.tanh(0.5 * (x @ m.embedding.weight.mT) / 5),
}


def written(name: str, **options: Any) -> tuple[Words, Words, Head]:
    """(a model, the same with its head applied, that head)."""
    model = Words(WRITTEN[name]).requires_grad_(False)
    site = find(capture(model, (torch.randint(0, 60, (1, 4)),)))
    head = fit_weight(site, model.embedding.weight, model.shift if site.bias else None)
    plain = copy.deepcopy(model)
    heads.apply(model, head, **options)
    return plain, model, head


@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_a_head_that_is_written_out_is_searched(name: str) -> None:
    plain, model, _ = written(name, keep=3)
    ids = torch.randint(0, 60, (2, 5))
    logits, expected = model(ids), plain(ids)
    assert torch.equal(logits.topk(3).indices, expected.topk(3).indices)
    known = logits > logits.amin()
    assert 30 <= int(known.sum()) < known.numel()
    torch.testing.assert_close(logits[known], expected[known], rtol=1e-5, atol=1e-5)
    assert heads.report(model).rows == 10 and model.state_dict().keys() == plain.state_dict().keys()
    heads.unapply(model)
    assert torch.equal(model(ids), expected)


@torch.no_grad()
def test_a_watched_head_leaves_everything_else_alone() -> None:
    """Products elsewhere, what comes after an error, copies, which have weights of their own, and another weight."""
    plain, model, _ = written("product")
    ids = torch.randint(0, 60, (1, 3))
    with pytest.raises(IndexError):
        model(ids + 60)
    x = torch.randn(3, 16)
    assert torch.equal(x @ model.embedding.weight.T, x @ plain.embedding.weight.T) and heads.report(model).rows == 0
    twin = copy.deepcopy(model)
    twin.embedding.weight.zero_()
    assert not twin(ids).any() and heads.report(model).rows == 0
    heads.unapply(twin)
    assert bool((model(ids) == -math.inf).any()) and heads.report(model).rows == 3
    assert not (twin(ids) == -math.inf).any()
    replaced = nn.Parameter(torch.zeros(60, 16), requires_grad=False)
    model.embedding.weight = replaced
    assert not model(ids).any() and heads.report(model).rows == 3


def test_watched_heads_search_in_several_threads() -> None:
    plain, model, _ = written("einsum")
    prompts = [torch.randint(0, 60, (1, 4)) for _ in range(16)]

    def best(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).argmax(-1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(best, prompts))
    assert all(torch.equal(a, plain(ids).argmax(-1)) for a, ids in zip(found, prompts, strict=True))
    assert heads.report(model).rows == 64


@torch.no_grad()
def test_a_watched_head_is_dense_in_compiled_graphs() -> None:
    plain, model, _ = written("functional")
    ids = torch.randint(0, 60, (1, 4))
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids), plain(ids), rtol=1e-5, atol=1e-6)
    assert heads.report(model).rows == 0


@torch.no_grad()
def test_a_product_that_is_not_watched_is_told(caplog: pytest.LogCaptureFixture) -> None:
    head_module._warn_of_spelling.cache_clear()
    model = Words(lambda m, x: (x.unsqueeze(-2) * m.embedding.weight).sum(-1)).requires_grad_(False)
    site = find(capture(Words(WRITTEN["product"]), (torch.randint(0, 60, (1, 4)),)))
    heads.apply(model, fit_weight(site, model.embedding.weight))
    with caplog.at_level(logging.WARNING, "fhopt"):
        for _ in range(2):
            model(torch.randint(0, 60, (1, 4)))
    assert len([r for r in caplog.records if "that head is dense" in r.message]) == 1


def test_a_bias_that_is_added_behind_the_layer_is_refused_with_the_cure() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(60, 16), nn.Linear(16, 60, bias=False)
            self.shift = nn.Parameter(torch.randn(60))

        def forward(self, ids: Tensor) -> Tensor:
            return self.output(self.embedding(ids).tanh()) + self.shift

    model = Behind()
    site = find(capture(model, (torch.randint(0, 60, (1, 4)),)))
    head = fit_weight(site, model.output.weight.detach(), model.shift.detach())
    with pytest.raises(FhoptError, match=r"shift is added to what output gives.*Expected it as the bias"):
        heads.apply(model, head)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 9, "budget": 8}, {"margin": -1.0}, {"probes": 99}])
def test_searches_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    weight = weights("random", 97, 24)
    with pytest.raises(FhoptError, match=next(iter(options))):
        RetrievalHead(made(weight), weight, None, **options)


# --------------------------------------------------------------------------------------------------- sampling


def module_for(softcap: float = 0.0, scale: float = 1.0) -> tuple[RetrievalHead, Tensor, Tensor]:
    """(head of 800 rows, hidden states [4, 32], their finished logits in float64)."""
    weight, hidden = weights("random", 800, 32), 0.5 * torch.randn(4, 32)
    head = made(weight)
    head = replace(head, site=replace(head.site, softcap=softcap, scale=scale))
    logits = scale * F.linear(hidden.double(), weight.double())
    return RetrievalHead(head, weight, None), hidden, softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (5.0, 1.0), (0.0, 0.25), (5.0, 2.0)])
def test_the_largest_logits_are_finished(softcap: float, scale: float) -> None:
    module, hidden, exact = module_for(softcap, scale)
    logits, ids = top_k(module, hidden, 5)
    assert torch.equal(ids, exact.topk(5).indices)
    torch.testing.assert_close(logits.double(), exact.topk(5).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (5.0, 2.0)])
def test_log_probabilities_are_within_their_bounds(softcap: float, scale: float) -> None:
    module, hidden, exact = module_for(softcap, scale)
    for tokens in (exact.argmax(-1), torch.tensor([0, 100, 200, 799])):
        log_p = exact.log_softmax(-1)[torch.arange(4), tokens]
        low, high = log_probabilities(module, hidden, tokens)
        assert bool((low <= log_p + 1e-5).all()) and bool((log_p <= high + 1e-5).all())
        equal = log_probabilities(module, hidden, tokens, exact=True)
        assert torch.equal(*equal)
        torch.testing.assert_close(equal[0].double(), log_p, rtol=1e-5, atol=1e-5)


def test_what_is_missing_is_at_most_what_is_said() -> None:
    module, hidden, exact = module_for()
    for temperature in (0.7, 1.0, 1.5):
        found = sample(module, hidden, temperature)
        computed = search(hidden, module.weight, None, module.head.codes, module.wanted(keep=64, budget=800))
        p = (exact / temperature).softmax(-1)
        for m, count in enumerate(computed.counts.tolist()):
            outside = 1 - float(p[m, computed.ids[m, :count].long()].sum())
            assert 0 <= outside <= float(found.missing[m]) + 1e-6


def test_samples_have_the_probabilities_of_the_dense_head() -> None:
    module, hidden, exact = module_for()
    generator = torch.Generator().manual_seed(0)
    draws = [sample(module, hidden[:1], top_k=4, top_p=0.95, generator=generator) for _ in range(2000)]
    best = exact[0].topk(4)
    p = best.values.softmax(-1)
    kept = int((p.cumsum(-1) < 0.95).sum()) + 1
    p = p[:kept] / p[:kept].sum()
    ids = torch.cat([d.ids for d in draws])
    shares = torch.stack([(ids == token).double().mean() for token in best.indices[:kept]])
    assert float(shares.sum()) == pytest.approx(1.0)
    assert bool(((shares - p).abs() <= 4 * (p * (1 - p) / 2000).sqrt() + 1e-9).all())  # 4 standard errors
    drawn = {int(d.ids): float(d.log_probabilities) for d in draws}
    for token, probability in zip(best.indices[:kept].tolist(), p.tolist(), strict=True):
        if token in drawn:
            assert drawn[token] == pytest.approx(math.log(probability), abs=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    module, hidden, _ = module_for()
    with pytest.raises(FhoptError, match="expected a positive temperature"):
        sample(module, hidden, **options)


# --------------------------------------------------------------------------------------------------- files


def test_a_head_that_was_saved_is_the_same(tmp_path: Path) -> None:
    weight, bias = weights("random", 97, 24), torch.randn(97)
    head = made(weight, skewed(50, 24), bias)
    back = Head.load(head.save(tmp_path / "head"))
    assert back.site == head.site and back.about == json.loads(json.dumps(head.about))
    assert (back.fingerprint, back.probes, back.spread, back.dtype) == (
        head.fingerprint, head.probes, head.spread, head.dtype,
    )  # fmt: skip
    hidden = torch.randn(3, 24)
    ours, theirs = (search(hidden, weight, bias, h.codes, h.search(logits=True)) for h in (head, back))
    assert ours.logits is not None and theirs.logits is not None
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.logits, theirs.logits)


def damage(folder: Path, change: Any, signed: bool) -> None:
    """Change a head; signed: as who knows how to make its digest."""
    from safetensors.torch import load_file, save_file

    tensors, content = load_file(folder / "head.safetensors"), json.loads((folder / "head.json").read_text())
    change(tensors, content)
    if signed:
        content.pop("digest")
        content["digest"] = digest(content, tensors)
    save_file(tensors, folder / "head.safetensors")
    (folder / "head.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, c: t.pop("codes"), "is damaged"),
        (lambda t, c: t.update(codes=t["codes"][:, :-1].contiguous()), "codes is torch.uint8"),
        (lambda t, c: t.update(codes=torch.zeros_like(t["codes"])), "do not hold every row once"),
        (lambda t, c: t["codes"][:, -256:-64].fill_(255), "not finite"),
        (lambda t, c: t["transform"].fill_(math.nan), "not finite"),
        (lambda t, c: t.update(radii=t["radii"].double()), "radii is torch.float64"),
        (lambda t, c: c.update(version=9), "has version 9, expected 2"),
        (lambda t, c: c["codes"].update(lead=3), "is damaged"),
        (lambda t, c: c.update(probes=10**6), "probes 1000000"),
        (lambda t, c: c.pop("fingerprint"), "is damaged"),
    ],
)
def test_a_damaged_head_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    folder = made(weights("random", 97, 24), skewed(50, 24)).save(tmp_path / "head")
    damage(folder, change, signed=True)
    with pytest.raises(FhoptError, match=why):
        Head.load(folder)


def test_a_head_of_which_a_number_was_changed_is_refused(tmp_path: Path) -> None:
    folder = made(weights("random", 97, 24), skewed(50, 24)).save(tmp_path / "head")
    damage(folder, lambda t, c: t["centroids"][0, 0].add_(1), signed=False)
    with pytest.raises(FhoptError, match=r"its content is not what was written.*Make the head again"):
        Head.load(folder)


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="cannot read"):
        Head.load(tmp_path / "nothing")
    (tmp_path / "head.json").write_text("{")
    (tmp_path / "head.safetensors").write_text("")
    with pytest.raises(FhoptError, match="is damaged"):
        Head.load(tmp_path)


def test_weights_that_cannot_be_coded_are_refused() -> None:
    weight = weights("random", 30, 8)
    with pytest.raises(FhoptError, match="expected float32, bfloat16 or float16"):
        made(weight.double())
    weight[3, 3] = math.nan
    with pytest.raises(FhoptError, match="not finite"):
        made(weight)
    with pytest.raises(FhoptError, match="bits '5' is not possible"):
        made(weights("random", 30, 8), bits="5")
    with pytest.raises(FhoptError, match="clusters is 0"):
        made(weights("random", 30, 8), clusters=0)


def test_the_kernel_is_the_same_text_every_time() -> None:
    assert cpu_lm_head.render() == cpu_lm_head.render()
    module = importlib.import_module("fhopt.codegen.cpu.lm_head")
    assert "$" not in module.render()
