"""Rewrites hold for all values: compile each program once, call it with values without effect, then with others.

Whether rewritten or not (with a reason), outputs and gradients must equal those of eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_twice import compiled_twice, explanations
from needs import sampled
from torch import Tensor, nn

B, H, T, D = 2, 4, 9, 8
LOWEST = torch.finfo(torch.float32).min
Program = Callable[..., Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * D**-0.5


def operands(seed: int = 0, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return q * size, k, v


def mask(seed: int, *sizes: int) -> Tensor:
    kept = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) > 0.4
    kept[..., 0] = True
    return kept


ONES = torch.ones(B, 1, 1, T, dtype=torch.bool)
KEEP = mask(1, B, 1, 1, T)
NUMBER = torch.float64
AFTER_SOFTMAX: dict[str, Any] = {  # program, values of the first call, of the second, reason
    "head mask": (
        lambda q, k, v, h: scores(q, k).softmax(-1) * h @ v,
        torch.ones(H, 1, 1, dtype=NUMBER), torch.tensor([1.0, 0, 1, 0], dtype=NUMBER).view(H, 1, 1), "multiplied by",
    ),
    "keep mask": (
        lambda q, k, v, w: scores(q, k).softmax(-1) * w @ v, ONES.double(), KEEP.double(), "multiplied by"
    ),
    "masked fill": (
        lambda q, k, v, w: scores(q, k).softmax(-1).masked_fill(~w, 0.0) @ v, ONES, KEEP, "replaces weights"
    ),
    "where": (
        lambda q, k, v, w: torch.where(w, scores(q, k).softmax(-1), 0.0) @ v, ONES, KEEP, "replaces weights"
    ),
    "divided": (
        lambda q, k, v, t: scores(q, k).softmax(-1) / t @ v,
        torch.ones((), dtype=NUMBER), torch.tensor(3.0, dtype=NUMBER), "divided by",
    ),
    "power": (
        lambda q, k, v, t: scores(q, k).softmax(-1) ** t @ v,
        torch.ones((), dtype=NUMBER), torch.tensor(2.0, dtype=NUMBER), "raised to",
    ),
    "added": (
        lambda q, k, v, t: (scores(q, k).softmax(-1) + t) @ v,
        torch.zeros((), dtype=NUMBER), torch.tensor(0.1, dtype=NUMBER), "pass through add",
    ),
    "weights by index": (
        lambda q, k, v, i: scores(q, k).softmax(-1)[..., i] @ v, torch.arange(T), torch.randperm(T), "gathers by"
    ),
    "keys by index": (
        lambda q, k, v, i: scores(q, k)[..., i].softmax(-1) @ v, torch.arange(T), torch.randperm(T), "gathers by"
    ),
}  # fmt: skip
IN_SCORES: dict[str, Any] = {  # program, values of the first call, of the second, reason
    "minimum of an input": (
        lambda q, k, v, c: torch.minimum(scores(q, k), c).softmax(-1) @ v,
        torch.tensor(60.0, dtype=NUMBER), torch.tensor(0.5, dtype=NUMBER), "minimum",
    ),
    "clamp": (lambda q, k, v, c: (scores(q, k) * c).clamp(-50, 50).softmax(-1) @ v, *(
        torch.tensor(x, dtype=NUMBER) for x in (1.0, 200.0)), "clips values beyond its bounds"
    ),
    "where by scores": (
        lambda q, k, v, c: torch.where(scores(q, k) * c < 40, scores(q, k) * c, 40.0).softmax(-1) @ v, *(
        torch.tensor(x, dtype=NUMBER) for x in (1.0, 200.0)), "scores"
    ),
    "relu": (lambda q, k, v, c: (scores(q, k) + c).relu().softmax(-1) @ v, *(
        torch.tensor(x, dtype=NUMBER) for x in (60.0, 0.0)), "relu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled([*AFTER_SOFTMAX, *IN_SCORES], 2))
def test_a_value_without_effect_in_the_first_call_is_not_dropped(name: str) -> None:
    program, first, second, reason = (AFTER_SOFTMAX | IN_SCORES)[name]
    sites = compiled_twice(program, (*operands(), first), (*operands(1), second), tolerance=1e-12)
    assert sites and all(site.how == "not rewritten" for site in sites), sites
    assert all(reason in text for text in explanations(sites)), sites


def test_kv_heads_by_an_input_are_gathered_in_every_call() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Tensor:
        return scores(q, k[:, :2][:, heads]).softmax(-1) @ v[:, :2][:, heads]

    sets = [(*operands(i), torch.tensor(heads)) for i, heads in enumerate(([0, 0, 1, 1], [0, 1, 0, 1]))]
    compiled_twice(program, *sets, tolerance=1e-12)


def test_kv_heads_by_literals_are_gathered_once() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = torch.arange(H) // 2
        return scores(q, k[:, :2][:, heads]).softmax(-1) @ v[:, :2][:, heads]

    sites = compiled_twice(program, operands(), operands(1), tolerance=1e-12)
    assert all(site.certificate is not None for site in sites)
    assert {dict(site.certificate.operands)["k"] for site in sites if site.certificate} == {"[2, 2, 9, 8]"}


REWRITTEN: dict[str, Program] = {
    "relu": lambda q, k, v: scores(q, k).softmax(-1).relu() @ v,
    "clamp": lambda q, k, v: scores(q, k).softmax(-1).clamp(0, 1) @ v,
    "abs": lambda q, k, v: scores(q, k).softmax(-1).abs() @ v,
    "half of it": lambda q, k, v: (scores(q, k).softmax(-1) / 2).clamp(max=0.5) * 2 @ v,
    "one": lambda q, k, v: scores(q, k).softmax(-1) * 1.0 @ v,
    "first power": lambda q, k, v: scores(q, k).softmax(-1).pow(1) @ v,
    "limits": lambda q, k, v: scores(q, k).clamp(min=torch.finfo(q.dtype).min).softmax(-1) @ v,
    "maximum": lambda q, k, v: torch.max(scores(q, k), torch.tensor(torch.finfo(q.dtype).min)).softmax(-1) @ v,
    "shift": lambda q, k, v: (scores(q, k) - scores(q, k).mean(-1, keepdim=True)).softmax(-1) @ v,
    "by hand": lambda q, k, v: by_hand(scores(q, k)) @ v,
    "detached maximum": lambda q, k, v: (scores(q, k) - scores(q, k).amax(-1, keepdim=True).detach()).softmax(-1) @ v,
    "dropout off": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5, training=False) @ v,
    "softcap": lambda q, k, v: (torch.tanh(scores(q, k) / 5) * 5).clamp(-5, 5).softmax(-1) @ v,
}


def by_hand(s: Tensor) -> Tensor:
    powers = (s - s.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", REWRITTEN)
def test_structural_identities_are_rewritten(name: str) -> None:
    sites = compiled_twice(REWRITTEN[name], operands(), operands(1, 100.0), tolerance=1e-10)
    assert sites and all(site.certificate is not None for site in sites), sites
    assert all(site.certificate.checked.draws == 3 for site in sites if site.certificate and site.certificate.checked)


def no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = scores(q, k).softmax(-1)
    return weights @ v


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


WITHOUT_GRADIENT: dict[str, Program] = {
    "weights detached": lambda q, k, v: scores(q, k).softmax(-1).detach() @ v,
    "scores detached": lambda q, k, v: scores(q, k).detach().softmax(-1) @ v,
    "no_grad": no_grad,
    "custom function": lambda q, k, v: _Doubled.apply(scores(q, k)).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_gradients_stop_where_the_model_stops_them(name: str) -> None:
    sites = compiled_twice(WITHOUT_GRADIENT[name], operands(), operands(1), gradients=True, tolerance=1e-12)
    assert all(site.how == "not rewritten" for site in sites)


def test_a_detached_tensor_is_rewritten_if_there_are_no_gradients() -> None:
    (site,) = compiled_twice(WITHOUT_GRADIENT["weights detached"], operands(), operands(1), gradients=False)
    assert site.certificate is not None


class Gated(nn.Module):
    """Weights times a parameter of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(H, 1, 1, dtype=NUMBER))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-1) * self.gate @ v


def test_a_gate_of_ones_gets_its_gradient() -> None:
    compiled_twice(Gated(), operands(), operands(1), gradients=True, tolerance=1e-12)


# ------------------------------------------------------------------------------------------------- empty rows

NOTHING = torch.tensor([True, False]).view(B, 1, 1, 1).expand(B, 1, 1, T)
SOMETHING = mask(3, B, 1, T, T)
ROWS: dict[str, tuple[Program, str]] = {
    "filled with -inf": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m, -torch.inf).softmax(-1) @ v, "NaN"
    ),
    "added -inf": (
        lambda q, k, v, m: (scores(q, k) + torch.zeros(m.shape).masked_fill(~m, -torch.inf)).softmax(-1) @ v, "NaN"
    ),
    "filled with the lowest": (lambda q, k, v, m: scores(q, k).masked_fill(~m, LOWEST).softmax(-1) @ v, ""),
    "filled with -1e9": (lambda q, k, v, m: scores(q, k).masked_fill(~m, -1e9).softmax(-1) @ v, "the mean"),
    "filled with -1e4": (lambda q, k, v, m: torch.where(m, scores(q, k), -1e4).softmax(-1) @ v, "the mean"),
    "zeroed after": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m, LOWEST).softmax(-1).masked_fill(~m, 0.0) @ v, "zero"
    ),
    "zeroed after, -inf": (
        lambda q, k, v, m: torch.where(m, torch.where(m, scores(q, k), -torch.inf).softmax(-1), 0.0) @ v, "zero"
    ),
    "multiplied after": (
        lambda q, k, v, m: scores(q, k).masked_fill(m.logical_not(), -1e9).softmax(-1) * m.double() @ v, "zero"
    ),
    "NaN to zero": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m, -torch.inf).softmax(-1).nan_to_num(0.0) @ v, ""
    ),
    "two levels": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m, -1e4).masked_fill(future(), LOWEST).softmax(-1) @ v, "the mean"
    ),
    "own token, then future": (
        lambda q, k, v, m: by_hand(scores(q, k).masked_fill(~m, -5e4).masked_fill(future(), LOWEST)) @ v, "the mean"
    ),
}  # fmt: skip


def future() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("name", sampled(ROWS, 2))
def test_a_row_without_keys_gives_the_same_as_the_model(name: str) -> None:
    program, rows = ROWS[name]
    sets = [(*operands(i), m.expand(B, 1, T, T)) for i, m in enumerate((ONES, NOTHING, SOMETHING))]
    sites = compiled_twice(program, *sets, tolerance=1e-12)
    assert sites and all(site.certificate is not None for site in sites), sites
    assert all(site.certificate.rows.startswith(rows) for site in sites if site.certificate), sites


def test_another_mask_after_the_softmax_is_not_confused_with_the_one_before() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~before, -torch.inf).softmax(-1).masked_fill(~after, 0.0) @ v

    sites = compiled_twice(program, (*operands(), KEEP, KEEP), (*operands(1), KEEP, SOMETHING), tolerance=1e-12)
    assert all(site.how == "not rewritten" for site in sites)


# --------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("assume", [False, True])
def test_scores_that_overflow_are_rewritten_only_on_request(assume: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        powers = scores(q, k).exp()
        return powers / powers.sum(-1, keepdim=True) @ v

    options: Any = {"assume_finite": True} if assume else {}
    sites = compiled_twice(program, operands(), operands(1), tolerance=1e-12, options=options)
    assert all((site.certificate is not None) == assume for site in sites)
    if assume:
        assert all("no overflow" in site.certificate.summary for site in sites if site.certificate)
        return
    assert all("assume_finite" in text for text in explanations(sites))
    compiled_twice(program, operands(), operands(1, 1e4), gradients=False)


def test_scores_in_float16_keep_their_nan() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.half() @ k.half().mT).softmax(-1) @ v.half()

    sites = compiled_twice(program, operands(), operands(1, 1e4), gradients=False)
    assert "float16" in explanations(sites)[0]


# ------------------------------------------------------------------------------------------------------ sizes


def test_a_scale_by_a_symbolic_size_is_computed_in_every_call() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = torch.full((), k.shape[2], dtype=q.dtype)
        return (scores(q, k) * lengths.log()).softmax(-1) @ v

    sets = [tuple(x[:, :, :n] for x in operands(n)) for n in (9, 5, 7)]
    compiled_twice(program, *sets, dynamic=True, tolerance=1e-12)


def test_a_certificate_names_every_node_and_its_rule() -> None:
    (site,) = compiled_twice(
        lambda q, k, v, m: scores(q, k).masked_fill(~m, -torch.inf).softmax(-1) @ v,
        (*operands(), KEEP), (*operands(1), ONES), gradients=False,
    )  # fmt: skip
    assert site.certificate is not None
    rules = {step.operation: step.rule.partition(":")[0] for step in site.certificate.steps}
    assert rules.pop("mT") == "movement"
    assert rules == {"matmul": "analytic", "mul": "analytic", "masked_fill": "selection", "softmax": "analytic"}
    assert all("test_validity.py" in step.source for step in site.certificate.steps)
    text = site.certificate.lines("attention")
    assert text[0] == "attention: q [2, 4, 9, 8], k [2, 4, 9, 8], v [2, 4, 9, 8]"
    assert "rows without keys give NaN" in text[-2] and text[-1].startswith("  5 sets of random values")
