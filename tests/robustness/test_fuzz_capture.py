"""Random modules with attention in a random spelling: found with the same results, or not rewritten with a reason.

    Spelling (drawn) -> Drawn, a module -> captured graph -> found -> on full-width latents -> the same outputs

Each part of attention that has spellings is drawn independently, so that any two of them can meet. The surroundings may
interfere: softmaxes that are not attention, two attentions on the same projections, outputs that share memory.
Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import attention_spellings
import pytest
import torch
import torch.nn.functional as F
from attention_spellings import functions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import Entry, ZooCase, checking
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_leaves

import fhopt
from fhopt.fitting import fit_plan
from fhopt.models.capture import capture_graphs
from fhopt.passes import pipeline

WRITTEN_IN = ("robustness/test_fuzz_capture.py", "support/attention_spellings.py")
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@dataclass(frozen=True)
class Spelling:
    """The spelling of a module. Each field but the sizes names a function of a table below, or is a switch."""

    heads: int
    kv_heads: int
    size: int
    tokens: int
    batch: int
    projected: str
    bias: bool
    normed: bool
    rotated: str
    repeated: str
    scaled: str
    product: str
    capped: bool
    masked: str
    filled: str
    weighed: str
    dropped: bool
    mixed: str
    joined: str
    added: str
    decoy: str
    twice: bool
    returned: str
    spoiled: str = "not"

    @property
    def channels(self) -> int:
        """Number of channels of the module's input and output."""
        return self.heads * self.size


# --------------------------------------------------------------------------------------------------- parts

# Before attention: x [B, T, heads, D] -> the same shape.


def half_split(x: Tensor) -> Tensor:
    """Apply RoPE; channels f and f + D/2 are a pair."""
    cos, sin = (torch.cat([part, part], -1).unsqueeze(1) for part in angles(x))  # [T, 1, D]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def interleaved(x: Tensor) -> Tensor:
    """Apply RoPE; channels 2f and 2f + 1 are a pair."""
    cos, sin = (part.unsqueeze(1) for part in angles(x))  # [T, 1, D/2]
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, D/2]."""
    frequencies = 10.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turned = torch.arange(x.shape[1]).unsqueeze(-1) * frequencies
    return turned.cos(), turned.sin()


ROTATED: dict[str, Callable[[Tensor], Tensor]] = {
    "not": lambda x: x,
    "half": half_split,
    "interleaved": interleaved,
}

# Keys and values of all query heads: x [B, G, T, D], n = H / G -> [B, H, T, D].
REPEATED = functions(attention_spellings.REPEATED, "x, n")

# Scaled matmul of queries and keys: q [B, H, S, D], k [B, H, T, D] -> [B, H, S, T].
PRODUCTS = functions(attention_spellings.PRODUCTS, "q, k, by")

# Factors of the scale: (on q, on k, on the scores).
SCALED: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "query": lambda scale: (scale, 1.0, 1.0),
    "key": lambda scale: (1.0, scale, 1.0),
    "both": lambda scale: (scale**0.5, scale**0.5, 1.0),
    "scores": lambda scale: (1.0, 1.0, scale),
    "everywhere": lambda scale: (scale**0.5, 1.0, scale**0.5),
}

# Visible keys of a query: H, T -> bool or float, broadcastable to [B, H, T, T].
MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "causal": lambda h, t: torch.ones(t, t, dtype=torch.bool).tril(),
    "window": lambda h, t: torch.ones(t, t, dtype=torch.bool).tril().triu(-2),
    "padding": lambda h, t: (torch.arange(t) < t - 2).view(1, 1, 1, t),
    "alibi": lambda h, t: -(2.0 ** -torch.arange(1.0, h + 1)).view(h, 1, 1) * torch.arange(t - 1.0, -1, -1),
}

# Masking of scores: s [B, H, T, T], a bool mask -> s.
FILLED = functions(attention_spellings.FILLED, "s, mask")

WEIGHED = functions(attention_spellings.WEIGHED, "s")

# Weights and values: p [B, H, S, T], v [B, H, T, D] -> [B, H, S, D].
MIXED = functions(attention_spellings.MIXED, "p, v")

# Changes of scores and weights that prevent a rewrite: m, s [B, H, S, T] -> the same shape.
BEFORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "squared": lambda m, s: s.square(),
    "heads mixed": lambda m, s: torch.einsum("bhst,hg->bgst", s, m.o.weight[: s.shape[1], : s.shape[1]]),
    "scaled over keys": lambda m, s: s * m.o.weight[0, : s.shape[3]],
}
AFTER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gated": lambda m, p: p * m.o.weight[0, : p.shape[3]],
    "squared after": lambda m, p: p.square(),
    "less their mean": lambda m, p: p - p.mean(-1, keepdim=True) * 0.5,
    "turned": lambda m, p: p.mT,
}

# Concatenate heads: [B, H, T, D] -> [B, T, C].
JOINED = functions(attention_spellings.JOINED, "o")

# Additions to the output y, from the module's input x: both [B, T, C].
ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda y, x: y,
    "input": lambda y, x: x + y,
    "input, in place": lambda y, x: y.add_(x),
    "scaled": lambda y, x: torch.add(y, x, alpha=0.5),
}

# Softmaxes that are not attention: the module m, y [B, T, C] -> [B, T, C].
DECOYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda m, y: y,
    "gate": lambda m, y: y * m.o(y).softmax(-1),
    "experts": lambda m, y: y + m.o(y).softmax(-1) @ m.o.weight,
    "pooling": lambda m, y: y + (y.mean(-1, keepdim=True).softmax(1) * y).sum(1, keepdim=True),
    "channels": lambda m, y: y + (y.mT @ y).softmax(-1).sum(-1).unsqueeze(1),
}

# Return value of the module: its last output y and its input x.
RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "output": lambda y, x: y,
    "views": lambda y, x: {"rows": y.flatten(0, 1), "whole": y, "last": y[:, -1]},
    "input": lambda y, x: (y, x, x[:, :1]),
    "twice": lambda y, x: [y, y],
}


# --------------------------------------------------------------------------------------------------- modules


class Drawn(nn.Module):
    """The module of a spelling, with variance-preserving weights."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = s = spelling
        c, own = s.channels, s.kv_heads * s.size
        self.rows = [c, own, own]
        widths = [sum(self.rows)] if s.projected == "fused" else self.rows
        self.projections = nn.ModuleList(nn.Linear(c, width, bias=s.bias) for width in widths)
        self.o = nn.Linear(c, c, bias=s.bias)
        self.gain = nn.Parameter(1 + torch.rand(2, s.size))
        self.mask = nn.Buffer(MASKS[s.masked](s.heads, s.tokens)) if s.masked in MASKS else None
        for module in (*self.projections, self.o):
            nn.init.normal_(module.weight, std=c**-0.5)

    def forward(self, x: Tensor) -> Any:
        """x: [B, T, C]."""
        s = self.spelling
        heads = self.project(x)
        y = self.o(JOINED[s.joined](self.attend(*heads, s.size**-0.5)))
        if s.twice:
            y = y + JOINED[s.joined](self.attend(*heads, 0.1))
        return RETURNED[s.returned](DECOYS[s.decoy](self, ADDED[s.added](y, x)), x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, G, T, D]."""
        s = self.spelling
        parts = [projection(x) for projection in self.projections]
        parts = list(parts[0].split(self.rows, -1)) if s.projected == "fused" else parts
        q, k, v = (part.view(*x.shape[:2], -1, s.size) for part in parts)
        if s.normed:
            q, k = F.rms_norm(q, (s.size,), self.gain[0]), F.rms_norm(k, (s.size,), self.gain[1])
        q, k = (ROTATED[s.rotated](part) for part in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """-> [B, H, T, D]."""
        s = self.spelling
        if s.product == "sdpa":
            return self.attend_by_torch(q, k, v, scale)
        if s.heads != s.kv_heads:
            k, v = (REPEATED[s.repeated](part, s.heads // s.kv_heads) for part in (k, v))
        of_q, of_k, after = SCALED[s.scaled](scale)
        scores = PRODUCTS[s.product](q * of_q if of_q != 1 else q, k * of_k if of_k != 1 else k, after)
        if s.spoiled in BEFORE:
            scores = BEFORE[s.spoiled](self, scores)
        if s.capped:
            scores = torch.tanh(scores / 3.0) * 3.0
        if self.mask is not None:
            scores = FILLED[s.filled](scores, self.mask) if self.mask.dtype == torch.bool else scores + self.mask
        weights = WEIGHED[s.weighed](scores)
        if s.dropped:
            weights = F.dropout(weights, 0.2, self.training)
        if s.spoiled in AFTER:
            weights = AFTER[s.spoiled](self, weights)
        return MIXED[s.mixed](weights, v)

    def attend_by_torch(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The same by scaled_dot_product_attention, with is_causal for causal masks."""
        s = self.spelling
        causal = s.masked == "causal" and s.filled == "where"
        return F.scaled_dot_product_attention(
            q, k, v, None if causal else self.mask, is_causal=causal, scale=scale, enable_gqa=s.heads != s.kv_heads
        )


def case_of(spelling: Spelling) -> ZooCase:
    torch.manual_seed(2)
    return ZooCase(Drawn(spelling).eval(), (torch.randn(spelling.batch, spelling.tokens, spelling.channels),))


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    names = {
        "projected": ["apart", "fused"], "rotated": ROTATED, "repeated": REPEATED, "scaled": SCALED,
        "product": [*PRODUCTS, "sdpa"], "masked": ["not", *MASKS], "filled": FILLED, "weighed": WEIGHED,
        "mixed": MIXED, "joined": JOINED, "added": ADDED, "decoy": DECOYS, "returned": RETURNED,
    }  # fmt: skip
    chosen: dict[str, Any] = {field: draw(st.sampled_from(list(table))) for field, table in names.items()}
    chosen |= {field: draw(st.booleans()) for field in ("bias", "normed", "capped", "dropped", "twice")}
    chosen |= {"heads": kv_heads * draw(st.sampled_from([1, 2])), "kv_heads": kv_heads}
    sizes: dict[str, list[int]] = {"size": [4, 6, 8], "tokens": [5, 7, 12], "batch": [1, 2]}
    chosen |= {field: draw(st.sampled_from(values)) for field, values in sizes.items()}
    return Spelling(**chosen)


# --------------------------------------------------------------------------------------------------- properties


def entry_of(spelling: Spelling, sites: int) -> Entry:
    return Entry(
        "drawn", "drawn", lambda: case_of(spelling), sites,
        heads=spelling.heads, kv_heads=spelling.kv_heads, head_dim=spelling.size,
    )  # fmt: skip


@pytest.mark.slow
@settings(FUZZ, max_examples=40)
@given(spelling=spellings())
def test_attention_of_any_spelling_is_found_with_the_same_results_and_gradients(spelling: Spelling) -> None:
    result = checking.check(entry_of(spelling, sites=1 + spelling.twice))
    assert result.failures == [], [missed.reason for missed in result.missed]


@pytest.mark.slow
@settings(FUZZ, max_examples=25)
@given(
    spelling=spellings().filter(lambda s: s.product != "sdpa" and s.heads > 1),  # with one head, mixing has no effect
    spoiled=st.sampled_from([*BEFORE, *AFTER]),
)
def test_look_alikes_are_not_rewritten_and_are_reported(spelling: Spelling, spoiled: str) -> None:
    result = checking.check(entry_of(replace(spelling, spoiled=spoiled), sites=0))
    assert result.failures == []
    assert len([m for m in result.missed if m.source.startswith(WRITTEN_IN)]) > spelling.twice


@pytest.mark.slow
@settings(FUZZ, max_examples=25)
@given(spelling=spellings())
def test_full_width_latents_give_the_same_results_in_every_spelling(spelling: Spelling) -> None:
    case = case_of(spelling)
    (captured,) = capture_graphs(case.module, case.args)
    before = checking._Run(captured.program)
    outcome = pipeline.find_attentions(captured.program)
    pipeline.optimize(outcome, fit_plan.exact_plan(outcome.sites.values()))
    assert len(outcome.compressed) == 1 + spelling.twice
    after = checking._Run(captured.program)
    assert checking._largest_difference(before, after) <= checking.TOLERANCE


@pytest.mark.slow
@settings(FUZZ, max_examples=15)
@given(spelling=spellings())
def test_the_backend_agrees_with_eager_mode_in_every_spelling(spelling: Spelling) -> None:
    case = case_of(spelling)
    torch._dynamo.reset()
    inductor = "torch._inductor.compile_fx.compile_fx"  # the graph runs without it
    with torch.no_grad(), mock.patch(inductor, lambda module, inputs, **_: aot_eager(module, inputs)):
        expected = tree_leaves(case.module(*(x.clone() for x in case.args)))
        compiled = torch.compile(case.module, backend="flashhead", options={"ratio": 1})
        found = tree_leaves(compiled(*case.args))
    (graph,) = fhopt.report(compiled).graphs
    assert len([site for site in graph.sites if site.how != "not rewritten"]) == 1 + spelling.twice
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)  # float32 sums in another order
