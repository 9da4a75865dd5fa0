"""Codes of the head's rows, and the bounds they give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_heads import DTYPES, made, skewed, weights
from needs import needs_compiler
from torch import Tensor

from fhopt.codegen.cpu.lm_head import Candidates, search_head
from fhopt.errors import FhoptError
from fhopt.lm_head import quantize
from fhopt.lm_head.module import dense
from fhopt.lm_head.quantize import balance, dequantize, quantize_rows, rounded_up, with_bit_groups

pytestmark = needs_compiler
KINDS = ("random", "zeros", "equal", "one large", "tiny", "huge", "sparse", "nearly equal")


def largest_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: all logits in descending order, equal ones in order of the vocabulary."""
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
    found = search_head(hidden, weight, bias, head.codes, head.search(keep=keep, bounds=True))
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    assert found.bounds is not None and found.estimates is not None
    searched = found.counts >= 0
    assert bool((found.bounds.double() >= exact)[searched].all())
    assert_right(found, weight, hidden, bias, keep)
    if (kind, states) == ("random", "random"):
        assert bool(searched.all())


@pytest.mark.parametrize("bits", ["4", "8", "mixed"])
def test_estimates_and_bounds_follow_the_equations(bits: str) -> None:
    weight, states = weights("random", 300, 40), skewed(500, 40)
    head, hidden = made(weight, states, bits=bits), skewed(3, 40)
    found = search_head(hidden, weight, None, head.codes, head.search(bounds=True))
    assert found.bounds is not None and found.estimates is not None and head.codes.transform is not None
    rows, values, numbers = dequantize(head.codes)
    order = rows[rows >= 0].argsort()
    values, numbers = values[rows >= 0][order], numbers[rows >= 0][order]
    turned = hidden.double() @ head.codes.transform.double().T
    offset = (hidden.double() @ head.codes.centre.double()).unsqueeze(1)
    estimate = turned @ values.T + offset
    first, second = turned[:, : head.codes.lead].norm(dim=1), turned[:, head.codes.lead :].norm(dim=1)
    bound = first.unsqueeze(1) * numbers[:, 2] + second.unsqueeze(1) * numbers[:, 3]
    rounded = sum(  # h' in 8 bits: per coordinate, at most half a step of 1/127 of its largest magnitude
        (part.abs().amax(1) / 254 * part.shape[1] ** 0.5).unsqueeze(1) * numbers[:, 4 + i]
        for i, part in enumerate(turned.tensor_split([head.codes.lead], 1))
        if part.shape[1]
    )
    assert bool(((found.estimates - estimate).abs() <= rounded + 1e-4).all())
    assert bool((found.bounds >= estimate + bound - rounded - 1e-4).all())
    assert bool((found.bounds <= estimate + bound + 2 * rounded + 1e-3 * bound + 1e-3).all())


def test_codes_decode_to_the_rows() -> None:
    weight, states = weights("random", 77, 21), skewed(100, 21)
    head = made(weight, states, bits="8")
    rows, values, numbers = dequantize(head.codes)
    kept = rows >= 0
    assert sorted(rows[kept].tolist()) == list(range(77))
    assert head.codes.transform is not None
    back = values[kept] @ head.codes.transform.double() + head.codes.centre.double()
    lost = (back - weight[rows[kept]].double()).norm(dim=1)
    longest = torch.linalg.matrix_norm(head.codes.transform.double(), 2)
    assert bool((lost <= longest * numbers[kept][:, 2]).all())
    assert float(lost.max()) < 0.02 * float(weight.norm(dim=1).mean())


def test_the_basis_gives_hidden_states_and_rows_the_same_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SHRINKAGE", 1e-9)
    states, rows = skewed(4000, 24).double(), (weights("random", 5000, 24) * torch.rand(24)).double()
    hidden, moment = states.T @ states / len(states), rows.T @ rows / len(rows)
    found = balance(hidden, moment)
    assert found.forward is not None and found.backward is not None
    torch.testing.assert_close(found.forward.T @ found.backward, torch.eye(24).double(), rtol=0, atol=1e-9)
    of_rows = found.backward @ moment @ found.backward.T
    torch.testing.assert_close(of_rows, of_rows.diagonal().diag(), rtol=0, atol=1e-4 * float(of_rows.max()))
    of_states = found.forward @ hidden @ found.forward.T
    assert float((of_states.diagonal() / of_rows.diagonal()).log().abs().max()) < 0.05  # the rows' has 1e-6 added
    plain = float((hidden.trace() * moment.trace()).sqrt())
    assert found.gain < 0.9
    assert float((of_states.trace() * of_rows.trace()).sqrt()) == pytest.approx(found.gain * plain, rel=0.02)


def test_no_basis_is_used_without_a_gain() -> None:
    rows = weights("random", 4000, 24).double()
    assert balance(None, rows.T @ rows / len(rows)).forward is None
    assert with_bit_groups(balance(None, torch.eye(13).double()), 13, 8).rank == 16


def test_the_inverse_belongs_to_the_stored_basis() -> None:
    states, rows = skewed(400, 30).double(), weights("random", 500, 30).double()
    basis = with_bit_groups(balance(states.T @ states / 400, rows.T @ rows / 500), 30, 8)
    assert basis.transform is not None
    logits = basis.hidden(states.float()).double() @ basis.rows(rows).T
    exact = (states.float().double() @ basis.transform.double().T) @ basis.rows(rows).T
    torch.testing.assert_close(exact, states.float().double() @ rows.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, states @ rows.T, rtol=1e-4, atol=1e-4)


def test_the_recorded_error_of_codes_is_correct() -> None:
    x = torch.cat([torch.randn(50, 16), torch.zeros(2, 16)]).double()
    for bits in (4, 8):
        group = quantize_rows(x, bits)
        value = (group.values.double() - (2**bits - 1) / 2) * group.scale.double().unsqueeze(1)
        torch.testing.assert_close((x - value).norm(dim=1), group.error)
        torch.testing.assert_close(value.norm(dim=1), group.norm)
        assert float(group.error[50:].max()) == 0
        widest = x.abs().amax(1) * (2 / 2**bits) * (1 + 2**-8)  # a step without clipping, in bfloat16
        assert bool((group.error <= widest / 2 * 16**0.5 + 2**-8 * x.norm(dim=1)).all())


@given(st.floats(0, 1e30))
def test_rounding_up_never_rounds_down(x: float) -> None:
    value = torch.tensor([x], dtype=torch.float64)
    up = rounded_up(value).double()
    assert float(up) >= x and float(up) <= max(x * (1 + 2**-6), 1e-37)


# --------------------------------------------------------------------------------------------------- files


def test_weights_that_cannot_be_quantized_are_refused() -> None:
    weight = weights("random", 30, 8)
    with pytest.raises(FhoptError, match="expected float32, bfloat16 or float16"):
        made(weight.double())
    weight[3, 3] = math.nan
    with pytest.raises(FhoptError, match="non-finite values"):
        made(weight)
    with pytest.raises(FhoptError, match="bits '5' is invalid"):
        made(weights("random", 30, 8), bits="5")
    with pytest.raises(FhoptError, match="clusters is 0"):
        made(weights("random", 30, 8), clusters=0)
