"""The search kernel against the dense head."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lm_heads import DTYPES, made, skewed, weights
from needs import needs_compiler, sampled
from torch import Tensor

from fhopt.codegen.cpu import lm_head
from fhopt.codegen.cpu.lm_head import Search, search_head
from fhopt.lm_head.module import RetrievalHead, dense, stamp_of

pytestmark = needs_compiler


# --------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 16])
def test_with_every_row_scored_it_is_bit_identical_to_the_dense_head(dtype: torch.dtype, batch: int) -> None:
    weight, hidden = weights("random", 203, 37, dtype), torch.randn(batch, 37).to(dtype)
    head = made(weight)
    asked = head.search(keep=203, budget=203, probes=0, logits=True)
    found = search_head(hidden, weight, None, head.codes, asked)
    assert found.counts.tolist() == [203] * batch
    assert found.logits is not None and torch.equal(found.logits, dense(hidden, weight, None))


def test_with_every_cluster_probed_it_is_the_search_of_all_rows() -> None:
    weight, hidden = weights("random", 500, 32), torch.randn(5, 32)
    head = made(weight, clusters=20)
    every = search_head(hidden, weight, None, head.codes, head.search(probes=20, logits=True))
    certain = search_head(hidden, weight, None, head.codes, head.search(logits=True))
    assert every.logits is not None and certain.logits is not None and torch.equal(every.logits, certain.logits)


def test_more_clusters_find_more_of_the_largest_logits() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 24).repeat_interleave(25, 0) * 2 + torch.randn(1000, 24)
    hidden = torch.randn(300, 24)
    head = made(weight, skewed(400, 24), clusters=40, iterations=8)
    best = F.linear(hidden, weight).argmax(-1)
    shares = []
    for probes in (1, 4, 12, 40):
        found = search_head(hidden, weight, None, head.codes, head.search(probes=probes))
        shares.append(float((found.ids[:, 0] == best).double().mean()))
    assert shares == sorted(shares) and shares[0] < 0.95 and shares[2] > 0.97 and shares[3] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_clusters_that_are_not_probed_are_below_their_bounds(dtype: torch.dtype) -> None:
    weight, hidden = weights("random", 400, 24, dtype), torch.randn(4, 24).to(dtype)
    bias = 9 * torch.randn(400).to(dtype)
    head = made(weight, skewed(100, 24), bias, clusters=25)
    found = search_head(hidden, weight, bias, head.codes, head.search(probes=3, bounds=True))
    assert found.bounds is not None and found.estimates is not None
    unseen = found.estimates == -math.inf
    assert bool((unseen.sum(1) >= 300).all())
    assert bool((found.bounds >= F.linear(hidden.double(), weight.double(), bias.double())).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_hidden_states_that_cannot_be_bounded_go_to_the_dense_head(bad: float) -> None:
    weight, hidden = weights("random", 90, 16), torch.randn(3, 16)
    hidden[1, 4] = bad
    head = made(weight)
    found = search_head(hidden, weight, None, head.codes, head.search())
    assert [count < 0 for count in found.counts.tolist()] == [False, True, False]
    with torch.no_grad():
        logits = RetrievalHead(head, weight, None)(hidden)
    assert torch.equal(logits[1].nan_to_num(7.0), dense(hidden, weight, None)[1].nan_to_num(7.0))


def test_hidden_states_of_zeros_have_the_order_of_the_bias() -> None:
    weight, bias = weights("random", 64, 16), torch.randn(64)
    head = made(weight, bias=bias)
    found = search_head(torch.zeros(1, 16), weight, bias, head.codes, head.search(keep=3))
    assert found.ids[0, :3].tolist() == bias.topk(3).indices.tolist()


def test_of_equal_logits_the_first_in_the_vocabulary_comes_first() -> None:
    weight = weights("random", 300, 16)
    weight[[40, 7, 250]] = 5 * weight[100]
    hidden = weight[100:101].clone()
    head = made(weight)
    found = search_head(hidden, weight, None, head.codes, head.search(keep=2))
    assert found.ids[0, : int(found.counts[0])].tolist()[:3] == [7, 40, 250]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_logits_that_become_equal_by_rounding_are_all_computed(softcap: float) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(1, 64) + 0.02 * torch.randn(400, 64)).bfloat16()
    hidden = torch.randn(40, 64).bfloat16() / 4
    head = made(weight)
    for x in hidden.split(8):
        asked = Search(softcap=softcap, budget=400, logits=True)
        found = search_head(x, weight, None, head.codes, asked)
        assert found.logits is not None
        ours, theirs = found.logits, F.linear(x, weight)
        if softcap:
            ours, theirs = (softcap * torch.tanh(y / softcap) for y in (ours, theirs))
        searched = found.counts >= 0
        assert bool(searched.any())
        assert torch.equal(ours.argmax(-1)[searched], theirs.argmax(-1)[searched])


def test_a_margin_includes_all_logits_within_it() -> None:
    weight, hidden = weights("random", 500, 32), torch.randn(3, 32)
    head = made(weight)
    found = search_head(hidden, weight, None, head.codes, head.search(margin=2.0, budget=500, logits=True))
    exact = dense(hidden, weight, None)
    within = exact >= exact.amax(1, keepdim=True) - 2.0
    assert found.logits is not None and torch.equal(found.logits[within], exact[within])
    assert int((found.logits > -math.inf).sum()) < 1500


def test_hidden_states_that_exceed_the_row_budget_are_left_to_the_dense_head() -> None:
    weight = weights("nearly equal", 300, 16)
    head = made(weight, bits="4")
    found = search_head(torch.randn(4, 16), weight, None, head.codes, head.search(margin=1e3, budget=299))
    assert found.counts.tolist() == [-1] * 4


def test_several_threads_find_the_same() -> None:
    weight = weights("random", 5000, 64)
    hidden, head = torch.randn(16, 64), made(weight, clusters=100)
    for probes in (0, 30):
        one = search_head(hidden, weight, None, head.codes, head.search(probes=probes, logits=True))
        torch.set_num_threads(2)
        two = search_head(hidden, weight, None, head.codes, head.search(probes=probes, logits=True))
        torch.set_num_threads(1)
        assert one.logits is not None and two.logits is not None and torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("flag", sampled(["-mno-avx512f", "-mno-avx"], 2), ids=["avx2", "sse"])
def test_other_instruction_sets_find_the_same_rows(flag: str) -> None:
    other = replace(lm_head.LIBRARY, flags=(flag,)).load()
    if other is None:
        pytest.skip("this compiler has no such flags")
    weight, states = weights("random", 333, 45), skewed(100, 45)
    head, hidden = made(weight, states, bits="mixed"), torch.randn(10, 45)
    assert 0 < head.codes.lead < head.codes.rank
    wanted = head.search(keep=3, bounds=True)
    ours, theirs = (search_head(hidden, weight, None, head.codes, wanted, f) for f in (None, other))
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
            search_head(x, w, bias, head.codes, head.search())
    with pytest.raises(ValueError, match="keep=0"):
        search_head(hidden, weight, None, head.codes, head.search(keep=0))


# --------------------------------------------------------------------------------------------------- models


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
