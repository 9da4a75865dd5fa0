"""Spellings of attention whose form is checked, and look-alikes that must not be rewritten; more are in the zoo."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fhopt.models.capture import Captured, capture
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.graph.printing import print_graph

H, G, D, T = 4, 2, 8, 12


class _Block(nn.Module):
    """q, k, v, o projections around a spelling `core(q, k, v) -> o`, all [B, heads, T, D]."""

    def __init__(self, core: Callable[..., Tensor], kv_heads: int = H) -> None:
        super().__init__()
        self.core, self.kv_heads = core, kv_heads
        self.q, self.o = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)
        self.k, self.v = nn.Linear(H * D, kv_heads * D), nn.Linear(H * D, kv_heads * D)
        self.register_buffer("triangle", torch.ones(T, T, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(self.core(self, q, k, v).transpose(1, 2).reshape(b, t, H * D))


def sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_with_positional_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, m.triangle, 0.0, False, scale=0.3)


def scale_after(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) * 0.25).softmax(-1) @ v


def where(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(m.triangle, (q @ k.mT) * 0.25, -1e30).softmax(-1) @ v


def scores_in_float64(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q.double() @ k.double().mT * 0.3).softmax(-1).to(v.dtype) @ v


def keys_first(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = (2.0 ** -torch.arange(1.0, H + 1)).view(H, 1, 1)
    return ((k @ q.mT).mT * 0.25 + slopes * torch.arange(-T + 1.0, 1.0)).softmax(-1) @ v


def as_the_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).type_as(q) + torch.zeros(T, T).masked_fill(~m.triangle, -1e9)
    return scores.to(q).float().softmax(-1).type_as(v) @ v


def decomposed_positions(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of an image of 3 x 4 positions, with a bias of rows and columns computed from the queries (SAM)."""
    rows, columns = (m.o.weight[:n, :D].expand(n, n, D) for n in (3, 4))
    image = q.reshape(-1, 3, 4, D)
    bias_rows = torch.einsum("bhwc,hkc->bhwk", image, rows)[..., None]
    bias_columns = torch.einsum("bhwc,wkc->bhwk", image, columns)[..., None, :]
    scores = (q.flatten(0, 1) * 0.25 @ k.flatten(0, 1).mT).view(-1, 3, 4, 3, 4) + bias_rows + bias_columns
    return (scores.view(-1, T, T).softmax(-1) @ v.flatten(0, 1)).view(q.shape)


PLAIN = [as_the_queries, decomposed_positions, keys_first, sdpa, sdpa_with_positional_mask, scale_after, where]


def scaled_after_repetition(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    k = (0.5 * k).flatten(0, 1) / 3
    scores = torch.bmm(q.flatten(0, 1), k.mT).unflatten(0, q.shape[:2])
    return torch.tanh(scores).softmax(-1) @ v


GROUPED = [scaled_after_repetition, scores_in_float64]


def outcome(module: nn.Module, x: Tensor) -> tuple[Captured, passes_outcome.Outcome]:
    captured = capture(module, (x,))
    return captured, pipeline.find_attentions(captured.program)


def assert_same_results(captured: Captured, module: nn.Module, x: Tensor) -> None:
    """Compare the graph with the module."""
    output = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())[0]
    torch.testing.assert_close(output, module(x), rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("core", PLAIN + GROUPED, ids=lambda f: f.__name__)
def test_every_spelling_becomes_one_canonical_node_with_the_same_results(core: Callable[..., Tensor]) -> None:
    kv_heads = G if core in GROUPED else H
    module, x = _Block(core, kv_heads).eval(), torch.randn(2, T, H * D)
    captured, result = outcome(module, x)
    assert [m.reason for m in result.missed] == []
    (site,) = result.sites.values()
    assert (site.heads, site.kv_heads, site.key_dim) == (H, kv_heads, D)
    targets = [str(n.target) for n in captured.program.graph.nodes]
    assert targets.count("fhopt.attention.default") == 1
    assert not any("softmax" in t or "scaled_dot" in t for t in targets)
    assert_same_results(captured, module, x)


def folded_weights(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1).flatten(0, 1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, q.shape[:2])


@pytest.mark.parametrize("heads", [1, H])
def test_with_batch_size_one_an_axis_of_batch_and_heads_is_recognized(heads: int) -> None:
    def core(m: Any, *heads_of: Tensor) -> Tensor:
        return folded_weights(m, *(t[:, :heads] for t in heads_of)).repeat(1, H // heads, 1, 1)

    module, x = _Block(core).eval(), torch.randn(1, T, H * D)
    captured, result = outcome(module, x)
    assert [m.reason for m in result.missed] == []
    (site,) = result.sites.values()
    assert site.heads == heads
    assert_same_results(captured, module, x)


@pytest.mark.parametrize(
    ("core", "kind"),
    [(sdpa, "causal"), (sdpa_with_positional_mask, "causal"), (where, "causal"), (scale_after, "none")],
)
def test_causality_is_determined_from_the_value_of_the_mask(core: Callable[..., Tensor], kind: str) -> None:
    _, result = outcome(_Block(core).eval(), torch.randn(1, T, H * D))
    assert [s.mask for s in result.sites.values()] == [kind]


def scaled_after_a_view(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).flatten(0, 1) * m.o.bias[0]
    return scores.view(-1, H, T, T).softmax(-1) @ v


def weights_skewed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Skew the weights of overlapping chunks as Longformer does."""
    weights = torch.nn.functional.pad((q @ k.mT).softmax(-1), (0, T))
    return weights.flatten(2)[..., :-T].unflatten(2, (T, 2 * T - 1))[..., :T] @ v


def sum_that_misses(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / (2 + e.sum(-1, keepdim=True))) @ v


BOTH, FIRST = "softmax, both matmuls", "softmax, query-key matmul"
REFUSED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "between channels": (
        lambda m, q, k, v: ((q.mT @ k * 0.25).softmax(-1) @ v.mT).mT,
        "runs over channels, as in cross-covariance", BOTH,
    ),
    "softmax over heads": (lambda m, q, k, v: (q @ k.mT).softmax(1) @ v, "does not run over the keys", BOTH),
    "scores squared": (lambda m, q, k, v: ((q @ k.mT) ** 2).softmax(-1) @ v, "computed by pow; expected scale", BOTH),
    "bias before softcap": (
        lambda m, q, k, v: torch.tanh(q @ k.mT + m.o.bias[:T]).softmax(-1) @ v,
        "computed by add, tanh; expected scale", BOTH,
    ),
    "scaled over keys": (
        lambda m, q, k, v: (q @ k.mT * m.o.bias[:T]).softmax(-1) @ v,
        "expected scale \\* q k \\+ mask", BOTH,
    ),
    "scaled after a view": (scaled_after_a_view, "after their axes were changed", BOTH),
    "heads mixed": (
        lambda m, q, k, v: torch.einsum("bhst,hg->bgst", q @ k.mT, m.o.weight[:H, :H]).softmax(-1) @ v,
        "pass through the weight o.weight, which mixes heads", "softmax",
    ),
    "heads mixed after": (  # as in the re-attention of DeepViT
        lambda m, q, k, v: torch.einsum("bhst,hg->bgst", (q @ k.mT).softmax(-1), m.o.weight[:H, :H]) @ v,
        "multiplied by a parameter before the second matmul", FIRST,
    ),
    "weights without values": (
        lambda m, q, k, v: (q @ k.mT).softmax(-1).sum(-1, keepdim=True) * v,
        "no matmul of the weights and values", FIRST,
    ),
    "weights skewed": (weights_skewed, "pass through pad before the second matmul", FIRST),
    "weights gated": (
        lambda m, q, k, v: ((q @ k.mT).softmax(-1) * m.o.bias[:T]) @ v,
        "the weights are multiplied by getitem", f"{BOTH}, scores, layout",
    ),
    "summed over queries": (lambda m, q, k, v: (q @ k.mT).softmax(-1).mT @ v, "does not sum over the keys only", BOTH),
    "over a projection": (
        lambda m, q, k, v: (q @ m.o.weight[:D, :T]).softmax(-1) @ v,
        "over the projection by o.weight", "softmax",
    ),
    "logarithm kept": (
        lambda m, q, k, v: torch.log_softmax(q @ k.mT, -1) @ v,
        "log_softmax without an exponential", "",
    ),
    "sum that misses": (sum_that_misses, "are not a softmax", ""),
    "sigmoid weights": (
        lambda m, q, k, v: (q @ k.mT).sigmoid() @ v,
        "computed by sigmoid; expected a softmax", "scores, both matmuls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unrecognized_spellings_are_not_rewritten_with_a_reason(case: str) -> None:
    core, reason, reached = REFUSED[case]
    module, x = _Block(core).eval(), torch.randn(1, T, H * D)
    captured, result = outcome(module, x)
    assert not result.sites
    found = [m for m in result.missed if re.search(reason, m.reason)]
    assert found and found[0].reached == reached, result.missed
    assert all("test_normalize.py:" in m.source for m in result.missed)
    output = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())[0]
    assert torch.equal(output, module(x))


def test_a_mixture_of_experts_router_is_not_attention() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.gate(x).softmax(-1) @ self.experts
            return mixed

    _, result = outcome(Router().eval(), torch.randn(2, 5, 16))
    assert not result.sites
    assert "over the projection by gate.weight; expected a matmul of queries and keys" in result.missed[0].reason


def test_attention_without_projections_is_not_a_site() -> None:
    class Pooling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    _, result = outcome(Pooling(), torch.randn(1, 2, 5, 8))
    assert not result.sites
    assert "no projection of the queries" in result.missed[0].reason


def test_normalizing_twice_changes_nothing_more() -> None:
    captured, first = outcome(_Block(where).eval(), torch.randn(1, T, H * D))
    text = print_graph(captured.program.graph)
    second = pipeline.find_attentions(captured.program)
    assert print_graph(captured.program.graph) == text
    assert [s.name for s in second.sites.values()] == [s.name for s in first.sites.values()]


def masked_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(~m.triangle, float("-inf"))  # the result is unused: softmax takes `scores`
    return scores.softmax(-1) @ v


def masked_by_assignment(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, :, 5:] = float("-inf")
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("core", [masked_in_place, masked_by_assignment], ids=lambda f: f.__name__)
def test_a_mask_written_in_place_is_recognized_although_its_result_is_unused(core: Callable[..., Tensor]) -> None:
    module, x = _Block(core).eval(), torch.randn(1, T, H * D)
    captured, result = outcome(module, x)
    (site,) = result.sites.values()
    assert site.mask != "none"
    assert_same_results(captured, module, x)


def test_in_place_changes_elsewhere_in_the_graph_survive() -> None:
    class Beside(_Block):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            y.mul_(3)
            return super().forward(x) + y

    module, x = Beside(sdpa).eval(), torch.randn(1, T, H * D)
    captured, result = outcome(module, x)
    assert len(result.sites) == 1
    assert_same_results(captured, module, x)


def biased(scale: float) -> Callable[..., Tensor]:
    return lambda m, q, k, v: F.dropout(((q @ k.mT + m.late) * scale).softmax(-1), 0.1, m.training) @ v


def tempered(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) / m.late).softmax(-1) @ v


@pytest.mark.parametrize(
    ("core", "late"),
    [(biased(0.5), torch.zeros(T, T)), (biased(1.0), torch.zeros(T, T)), (tempered, torch.ones(H, 1, 1))],
    ids=["scaled bias", "bias", "temperature"],
)
def test_a_parameter_without_effect_in_the_traced_call_is_not_dropped(
    core: Callable[..., Tensor], late: Tensor
) -> None:
    module, x = _Block(core).eval(), torch.randn(1, T, H * D)
    module.late = nn.Parameter(late.clone())
    captured, result = outcome(module, x)
    assert len(result.sites) == 1
    with torch.no_grad():
        module.late.uniform_(1, 3)
    assert_same_results(captured, module, x)


def test_two_attentions_of_one_module_have_different_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = _Block(sdpa), _Block(sdpa)
            self.second.load_state_dict(self.first.state_dict())
            self.second.q = self.first.q

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.first(x)) + self.second(x)

    _, result = outcome(Twice().eval(), torch.randn(1, T, H * D))
    names = [s.name for s in result.sites.values()]
    assert len(names) == len(set(names)) == 3 and "first#2" in names


def test_attention_to_a_single_key_is_not_rewritten_with_a_reason() -> None:
    _, result = outcome(_Block(scale_after).eval(), torch.randn(2, 1, H * D))
    assert not result.sites
    assert "only one key, whose weight is always 1" in result.missed[0].reason


LONG = 72  # tokens: more than the check by execution runs on


def padded_at_the_end(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = F.pad(torch.zeros(LONG - 20), (0, 20), value=torch.finfo(torch.float32).min)
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def weighed_down_at_the_end(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.where(torch.arange(LONG) < LONG - 20, 0.0, -2.0)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@pytest.mark.parametrize("core", [padded_at_the_end, weighed_down_at_the_end])
def test_a_mask_that_begins_after_the_checked_tokens_is_not_dropped(core: Callable[..., Tensor]) -> None:
    """It is zero on the first tokens, as in a text padded to whole blocks."""
    torch.manual_seed(0)
    block, x = _Block(core), torch.randn(2, LONG, H * D)
    expected = block(x)
    captured, found = outcome(block, x)
    assert len(found.sites) == 1
    pipeline.lower_program(found)
    captured.program.module.recompile()
    result = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())
    torch.testing.assert_close(result[0], expected, rtol=1e-5, atol=1e-5)


def masked_by_vmap(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = torch.arange(T), torch.arange(T)
    allowed = torch.vmap(lambda i: torch.vmap(lambda j: (i >= j) & (i - j < 4))(columns))(rows)
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def test_a_mask_computed_by_vmap_is_classified() -> None:
    """The nodes that enter and leave a traced `vmap` have no data flow, so its parts cannot run separately."""
    found = outcome(_Block(masked_by_vmap), torch.randn(1, T, H * D))[1]
    assert [(site.mask, site.window) for site in found.sites.values()] == [("sliding", 4)], found.missed
