"""Decomposition of composites: contractions, and attention calls of other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from decomposed import (
    ATEN,
    SLOPES,
    B,
    D,
    E,
    G,
    H,
    S,
    T,
    check,
    close,
    decomposed,
    distance,
    hand_made,
    run,
    sageattn,
    slow,
    tokens_first,
    traced,
)
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import op_name
from fhopt.passes.prepare import composites
from fhopt.passes.prepare.composites import einsum
from fhopt.passes.prepare.decompose import Decompose

# --------------------------------------------------------------------------------------------------- contractions


def all_positional(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(m, q, k.mT, beta=0.5, alpha=0.3)


def all_by_name(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(input=m[:1], batch1=q, batch2=k.mT)


def a_method(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return m.baddbmm(q, batch2=k.mT, alpha=2)


def an_aten_call(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.ops.aten.baddbmm.default(m, q, k.mT, beta=2)


def a_buffer_that_is_not_read(m: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(m.detach() * math.nan, q, k.mT, beta=0, alpha=0.3)


@pytest.mark.parametrize(
    ("scores", "dynamic"),
    [(all_positional, False), (all_positional, True), (all_by_name, False), (a_method, False), (an_aten_call, False),
     (a_buffer_that_is_not_read, False)],
    ids=lambda p: getattr(p, "__name__", "dynamic" if p else "static"),
)  # fmt: skip
def test_baddbmm_becomes_a_matmul_and_a_sum(scores: Callable[..., Tensor], dynamic: bool) -> None:
    m, q, k, v = torch.randn(3, S, T), torch.randn(3, S, D), torch.randn(3, T, D), torch.randn(3, T, D)
    inputs = [t.requires_grad_() for t in (m, q, k, v)]
    program = traced(lambda m, q, k, v: scores(m, q, k).softmax(-1) @ v, *inputs, dynamic=dynamic)
    check(program, gradients=scores is not a_buffer_that_is_not_read)


@pytest.mark.parametrize(
    "equation",
    [
        "b h s t, b h t d, h d e -> b s e",
        "bhst,bhtd,hde",
        "...st,...td,hde->...se",
        "hst,...td,hdd->...t",
        "bhst,bhtd,hde,ii->bse",
    ],
)
def test_einsum_of_many_becomes_a_chain_of_pairs(equation: str) -> None:
    shapes = {"b": B, "h": H, "s": S, "t": T, "d": D, "e": D, "i": 3}

    def operand(term: str) -> Tensor:
        batch = {4: "", 3: "h", 2: "bh"}[4 if "..." not in term else len(term.replace("...", ""))]
        return torch.randn([shapes[c] for c in term.replace("...", batch)], requires_grad=True)

    terms = equation.replace(" ", "").split("->")[0].split(",")
    operands = [operand(term) for term in terms]
    close(einsum(equation, *operands), torch.einsum(equation, *operands), 1e-4)

    def call(*operands: Tensor) -> Tensor:
        return torch.einsum(equation, operands[0].softmax(-1), *operands[1:])

    program = traced(call, *operands)
    after, missed = decomposed(program)
    found = [n for n in after.graph.nodes if op_name(n) == "einsum"]
    assert missed == [] and [len(n.args[1]) for n in found] == [2] * (len(terms) - 1)
    close(run(after)[0], run(program)[0], 1e-4)  # sums of many terms


def test_einsum_of_two_is_not_rewritten() -> None:
    program = traced(lambda q, k: torch.einsum("bqd,bkd->bqk", q, k), *torch.randn(2, B, S, D))
    assert list(Decompose().candidates(program)) == []


def test_a_result_has_the_layout_that_a_following_view_needs() -> None:
    def call(p: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bhst,bhtd,hde->ebs", p.softmax(-1), v, w).permute(1, 2, 0).view(B, -1)

    check(traced(call, torch.randn(B, H, S, T), torch.randn(B, H, T, D), torch.randn(H, D, E)))


# --------------------------------------------------------------------------------------------------- attention calls


CAUSAL = dict(dropout_p=0.0, is_causal=True)


@pytest.mark.parametrize(
    ("target", "mask", "more"),
    [
        (ATEN._scaled_dot_product_flash_attention_for_cpu.default, "attn_mask", {}),
        (ATEN._scaled_dot_product_flash_attention, None, dict(return_debug_mask=False)),
        (ATEN._scaled_dot_product_efficient_attention.default, "attn_bias", dict(compute_log_sumexp=True)),
        (ATEN._scaled_dot_product_cudnn_attention.default, "attn_bias", dict(compute_log_sumexp=False)),
        (ATEN._scaled_dot_product_attention_math.default, "attn_mask", dict(enable_gqa=True)),
        (ATEN._scaled_dot_product_fused_attention_overrideable.default, "attn_bias", {}),
    ],
    ids=lambda p: op_name(fx.Graph().call_function(p)) if callable(p) else "",
)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "causal"])
def test_sdpa_after_dispatch_becomes_sdpa_again(
    target: Any, mask: str | None, more: dict[str, Any], masked: bool
) -> None:
    q, k, v = torch.randn(3, B, H, S, D)
    bias = torch.randn(S, S)
    given = {mask: bias} if mask and masked else CAUSAL if not masked else {}
    empty = {"attn_bias": None} if mask == "attn_bias" and not masked else {}
    expected = F.scaled_dot_product_attention(
        q, k, v, bias if mask and masked else None, is_causal=not masked, scale=0.2
    )
    program = hand_made(target, q, k, v, scale=0.2, results=(expected, q), **given, **empty, **more)
    after, missed = decomposed(program)
    assert missed == [] and op_name(list(after.graph.nodes)[-2]) == "scaled_dot_product_attention"
    close(run(after)[0], expected)


def test_the_cpu_kernel_and_its_plain_form_agree_on_grouped_heads() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)[0]
        return out

    check(traced(call, *torch.randn(3, B, H, S, D), torch.randn(S, S)))


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    steps = distance(q, k, k.shape[1] - q.shape[1])
    right = 0 if causal else window_size_right
    allowed = (steps <= (right if right >= 0 else 99)) & (
        steps >= (-window_size_left if window_size_left >= 0 else -99)
    )
    bias = 0.0 if alibi_slopes is None else -alibi_slopes[:, None, None] * steps.abs()
    return slow(q, k, v, softmax_scale, allowed, bias, softcap), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def cutlass(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, seqstart_q: Tensor | None, max_seqlen_q: int | None,
    dropout_p: float, compute_logsumexp: bool, custom_mask_type: int, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    steps = distance(query, key, key.shape[1] - query.shape[1] if custom_mask_type == 2 else 0)
    allowed = steps <= (0 if custom_mask_type else 99)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return slow(query, key, value, scale, allowed, 0.0 if bias is None else bias), query.new_zeros(0)


torch.library.custom_op(
    "flash_attn::_flash_attn_forward",
    flash,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left, "
    "int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor)",
).register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])))


torch.library.custom_op(
    "xformers::efficient_attention_forward_cutlass",
    cutlass,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? seqstart_q, int? max_seqlen_q, "
    "float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale) -> (Tensor, Tensor)",
).register_fake(lambda query, *_: (torch.empty_like(query), query.new_empty(0)))


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = flash(q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, False)
    return out if return_attn_probs else out[0]


flash_attn_func.__module__ = "flash_attn.flash_attn_interface"
torch._dynamo.allow_in_graph(flash_attn_func)

FLASH_OPTIONS: list[dict[str, Any]] = [
    dict(causal=True),
    dict(softmax_scale=0.2),
    dict(window_size=(2, 1)),
    dict(window_size=(-1, 1)),
    dict(causal=True, window_size=(1, -1)),
    dict(causal=True, softcap=3.0),
    dict(causal=True, alibi_slopes=SLOPES, window_size=(2, 2)),
]


@pytest.mark.parametrize("keys", [S, T, 3])
@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=lambda o: ", ".join(o))
def test_the_decomposition_of_flash_attn_agrees_with_it(options: dict[str, Any], keys: int) -> None:
    inputs = tokens_first(keys)
    found = composites.flash_attn_func(*inputs, **options)
    close(found, flash_attn_func(*inputs, **options))


def test_flash_attn_with_slopes_becomes_a_softmax() -> None:
    check(traced(lambda q, k, v: flash_attn_func(q, k, v, **FLASH_OPTIONS[-1]), *tokens_first()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_registered_operator_of_flash_attn_becomes_sdpa(dynamic: bool) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        q, k = (t.view(B, t.shape[1], -1, D) for t in (x, y))
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, k, 0.0, 0.3, True, -1, -1, 0.0, None, False)[0]
        return out

    check(traced(call, torch.randn(B, S, E), torch.randn(B, T, G * D), dynamic=dynamic))


@pytest.mark.parametrize("keys", [S, T, 3])
@pytest.mark.parametrize("mask_type", [0, 1, 2], ids=["no mask", "from the start", "from the end"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_the_decomposition_of_xformers_agrees_with_it(mask_type: int, biased: bool, keys: int) -> None:
    q, k, v = tokens_first(keys)
    bias = torch.randn(B, H, S, keys) if biased else None
    (found,) = composites.efficient_attention(q, k, v, bias=bias, custom_mask_type=mask_type, max_seqlen_q=S)
    expected, _ = cutlass(q, k, v, bias, None, S, 0.0, False, mask_type, None)
    close(found, expected)


def test_xformers_becomes_sdpa() -> None:
    check(traced(lambda q, k, v: xformers_call(q, k, v, mask_type=2), *tokens_first()))


def xformers_call(q: Tensor, k: Tensor, v: Tensor, seqstart: Tensor | None = None, mask_type: int = 0) -> Tensor:
    operator_ = torch.ops.xformers.efficient_attention_forward_cutlass
    out: Tensor = operator_(q, k, v, None, seqstart, S, 0.0, False, mask_type, 0.3)[0]
    return out


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_sageattn_becomes_sdpa_without_its_quantization(layout: str, causal: bool) -> None:
    q, k, v = tokens_first(S if causal else T)
    inputs = (q, k, v) if layout == "NHD" else tuple(t.transpose(1, 2) for t in (q, k, v))
    check(traced(lambda q, k, v: sageattn(q, k, v, layout, causal, smooth_k=True), *inputs))


# --------------------------------------------------------------------------------------------------- misses


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda q, k: einsum(q, [0, 1, 2, 3], k, [0, 4, 5, 3], k, [0, 4, 5, 3], [0, 1, 2, 5]), "axis numbers"),
        (lambda q, k: composites.scaled_dot_product(q, q, q, dropout_mask=q > 0), "a dropout mask is passed"),
        (lambda q, k: composites.flash_attn_func(q, k, k, return_attn_probs=True), "probabilities are requested"),
        (lambda q, k: composites.efficient_attention(q, k, k, seqstart_q=k), "seqstart_q is passed"),
        (lambda q, k: composites.efficient_attention(q[0], k[0], k[0]), "operands have rank 3"),
        (lambda q, k: composites.sageattn(q, k, k, return_lse=True), "log-sum-exp is requested"),
        (lambda q, k: composites.sageattn(q, k, k, attn_mask=q), "a mask is passed"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_options_without_a_decomposition_are_refused(call: Callable[..., Any], expected: str) -> None:
    with pytest.raises(Miss, match=expected):
        call(*tokens_first()[:2])
