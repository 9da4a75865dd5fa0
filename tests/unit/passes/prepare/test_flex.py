"""flex_attention becomes a softmax between contractions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from decomposed import (
    BIAS,
    SLOPES,
    B,
    E,
    G,
    H,
    S,
    T,
    alternating,
    biased,
    check,
    close,
    decomposed,
    flexible,
    operands,
    reason,
    run,
    soft_capped,
    traced,
)
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.nn.attention.flex_attention import flex_attention

from fhopt.passes.graph.nodes import fake, op_name

# --------------------------------------------------------------------------------------------------- flex_attention


DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def within_documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENTS[i] == DOCUMENTS[j]) & (i > j)  # the first query is fully masked


@pytest.mark.parametrize(
    ("score", "mask", "in_graph"),
    [
        (None, None, False),
        (soft_capped, None, False),
        (None, alternating, False),
        (biased, within_documents, False),
        (biased, within_documents, True),
    ],
    ids=["plain", "soft cap", "alternating heads", "bias, documents", "mask made in the graph, dynamic"],
)
def test_flex_attention_becomes_a_softmax_between_contractions(
    score: Callable[..., Tensor] | None, mask: Callable[..., Tensor] | None, in_graph: bool
) -> None:
    program = traced(flexible(dict(score_mod=score, scale=0.3), mask, in_graph), *operands(), dynamic=in_graph)
    after = check(program)
    names = [op_name(n) for n in after.graph.nodes]
    assert names.count("score_mod") == (score is not None) and names.count("mask_mod") == (mask is not None)
    assert names.count("where") == (mask is not None)  # the block mask is gone, too
    assert "setitem" not in names and "flex_attention" not in names


def test_flex_attention_in_half_precision_computes_scores_in_float32() -> None:
    after = check(traced(flexible(dict(score_mod=biased)), *operands(torch.bfloat16)))
    (scores,) = (n for n in after.graph.nodes if op_name(n) == "score_mod")
    assert fake(scores).dtype == torch.float32


def test_statistics_of_flex_attention_are_provided_if_used() -> None:
    program = traced(flexible(dict(return_lse=True), within_documents), *operands())
    after = check(program)
    out, lse = run(after)
    assert bool((out[:, :, 0] == 0).all()) and bool((lse[:, :, 0] == -math.inf).all())
    (statistic,) = (n for n in program.graph.nodes if n.target is operator.getitem and n.args[1] == 1)
    statistic.args = (statistic.args[0], 2)  # the largest score, which CPUs do not return
    assert {"amax", "logsumexp"} & {op_name(n) for n in check(program).graph.nodes} == {"amax"}


def test_a_view_after_flex_attention_still_fits() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, enable_gqa=True).transpose(1, 2).view(B, S, E)  # laid out like its queries

    check(traced(call, *operands()))


def by_hand(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bias: Tensor) -> Tensor:
    i, j = torch.arange(S)[:, None], torch.arange(T)
    scores = q @ k.repeat_interleave(H // G, 1).mT * 0.3 + slopes[:, None, None] * (j - i) + bias
    allowed = (DOCUMENTS[:S, None] == DOCUMENTS) & (i > j)
    some = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & some, -math.inf).softmax(-1) * some
    return weights @ v.repeat_interleave(H // G, 1)


def test_gradients_reach_tensors_captured_by_score_mod() -> None:
    program, _ = decomposed(traced(flexible(dict(score_mod=biased, scale=0.3), within_documents), *operands()))
    values = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in program.values.values()]
    names = {id(SLOPES): "slopes", id(BIAS): "bias"}
    named = {names.get(id(old), name): new for (name, old), new in zip(program.values.items(), values, strict=True)}
    given = [named[name] for name in ("l_q_", "l_k_", "l_v_", "slopes", "bias")]
    expected = torch.autograd.grad(by_hand(*given).square().sum(), given)
    compiled: Any = aot_eager(program.module, values)
    for out in (program.module(*values)[0], compiled(*values)[0]):
        close(out, by_hand(*given))
        for a, b in zip(torch.autograd.grad(out.square().sum(), given), expected, strict=True):
            close(a, b, 1e-5)  # one is summed by scatter


def test_inductor_compiles_the_result() -> None:
    program = traced(flexible(dict(score_mod=soft_capped), within_documents), *operands())
    after, _ = decomposed(program)
    compiled: Any = compile_fx(after.module, list(after.values.values()))
    close(compiled(*after.values.values())[0], run(program)[0])


# --------------------------------------------------------------------------------------------------- misses


def test_symbolic_heads_of_flex_attention_are_not_rewritten() -> None:
    program = traced(flexible({}), *operands(), dynamic=True)
    (node,) = (n for n in program.graph.nodes if op_name(n) == "flex_attention")
    query = node.args[0]
    query.meta["example_value"] = fake(query).transpose(1, 2)
    assert "number of heads is symbolic" in reason(program)
