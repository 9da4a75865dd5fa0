"""Functionalization of writes: results, gradients and final inputs stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functionalized import (
    CacheNetwork,
    assembled,
    fresh,
    functionalized,
    input_read_again,
    input_returned,
    inputs,
    multiplied,
    observe,
    program_of,
)
from small_models import VOCABULARY, tiny_llama
from torch import Tensor

from fhopt.models.capture import capture, from_exported
from fhopt.passes.graph.nodes import op_name
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.functionalize import Functionalize, written


def exported(core: Callable[..., Any], **options: Any) -> Program:
    return from_exported(torch.export.export(CacheNetwork(core), inputs(), **options)).program


# --------------------------------------------------------------------------------------------------- forms of a write


def masked(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.masked_fill_(cache > 0, -1e9).softmax(-1)


def by_operators(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y += 1.0
    y -= cache
    y *= 2.0
    y /= 3.0
    count //= 2
    count |= 4
    count &= 5
    count %= 4
    return y


def clamped_and_negated(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return y.clamp_(-1, 1).neg_().tanh_()


def by_function(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    return torch.relu_(y), F.leaky_relu_(y + 1, 0.2), F.elu_(y - 1)


def asked_by_keyword(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    F.hardtanh(y, inplace=True)
    return F.dropout(y.exp() + y, 0.5, True, True)


def filled(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = torch.empty_like(y).fill_(2.0)
    return y * z.clone(), z.zero_(), y.fill_(0.5)


def into_out(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = cache * 2
    torch.add(cache, 1.0, out=z)
    torch.mul(cache[1:], 2.0, out=z[1:])
    return z.mul(y)


def boolean_index(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y[:, cache[0] > 0] = -1.0
    return y.exp()


def through_views(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    early = y.view(2, 2, 8).transpose(0, 1)
    early.mul_(3)
    y.view(-1).add_(1)
    return early, y


def read_by_another_view(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    other = y.reshape(2, 16)[0]
    y.mul_(2)
    return other.exp(), y.t()


def items_of_a_split(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = y.detach() * 1.0  # autograd refuses writes to one of several views
    a, b = z.chunk(2, -1)
    a.add_(1)
    b.copy_(a)
    c, *_ = z.unbind(0)
    c += 5
    _, e = z.split([1, 3])
    return a, e.mul_(2) * y[1:], z


def views_that_are_copies_or_not(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    same, copied = y.contiguous(), y.t().contiguous()
    flat, changed = y.flatten(), y.t().reshape(-1)
    kept, cast = y.to(torch.float32), y.to(torch.float64)
    y.add_(1.0)
    return same, copied, flat, changed, kept, cast


def random_numbers(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.empty(3).uniform_()  # unused, but it advances the random generator
    z = torch.empty(4, 8).uniform_()
    z[:2].normal_()
    z[2:].bernoulli_(0.3)
    return y * z


def named_by_packet(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.ops.aten.mul_(y, 2.0)
    torch.ops.aten.add_.Tensor(cache, y.detach(), alpha=2)
    return y * cache


def copied_over(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = torch.empty(4, 8)
    z.copy_(y)
    y.copy_(cache)  # gradients of zero, but present
    return z, y.add_(1)


def scattered(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    at = torch.tensor([0, 2])
    y.index_put_((at,), cache[:2]).index_copy_(0, at, cache[2:]).index_add_(0, at, cache[:2], alpha=2)
    return y.scatter_(1, torch.tensor([[1], [2]]), 7.0)


def complex_numbers(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    torch.view_as_complex(y.view(4, 4, 2)).mul_(2j)
    return y


def input_through_an_alias(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    count.to(torch.int64).add_(1)
    cache.to("cpu")[0].mul_(2)
    return y + count


def inputs_exchanged(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    before = cache.clone()
    cache.copy_(y.detach())
    y = y + before
    cache[0].copy_(before[1])
    return y


WRITES = [
    multiplied, masked, by_operators, clamped_and_negated, by_function, asked_by_keyword, filled, into_out,
    boolean_index, through_views, read_by_another_view, items_of_a_split, views_that_are_copies_or_not, random_numbers,
    named_by_packet,
    copied_over, scattered, complex_numbers, input_read_again, input_returned, input_through_an_alias,
    inputs_exchanged, assembled,
]  # fmt: skip


@pytest.mark.parametrize("core", WRITES, ids=lambda f: f.__name__)
def test_every_form_of_a_write_becomes_a_value_with_the_same_results_and_gradients(core: Callable[..., Any]) -> None:
    program = program_of(core)
    assert Functionalize().candidates(program)
    assert functionalized(program, gradients=True).left == ()


@pytest.mark.parametrize("core", [through_views, scattered, boolean_index, input_returned, assembled, filled])
def test_exported_aten_graphs_are_supported_as_well(core: Callable[..., Any]) -> None:
    program = exported(core)
    assert functionalized(program).left == ()


# ------------------------------------------------------------------------------------------------------ whole models


def tiny_mistral() -> Any:
    """Mistral with a window of 4 tokens: its static cache rolls."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def tiny_deepseek() -> Any:
    """DeepSeek-V3: keys are written into an empty tensor, the cache stores latents."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(1)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize(("make", "states"), [(tiny_llama, 3), (tiny_mistral, 2), (tiny_deepseek, 3)])
def test_decoding_with_a_static_cache_gives_the_same_cache(make: Callable[[], Any], states: int) -> None:
    from transformers import StaticCache

    model = make()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.randint(1, VOCABULARY, (1, 6)), past_key_values=cache)
        token = torch.randint(1, VOCABULARY, (1, 1))
        program = capture(model, (), {"input_ids": token, "past_key_values": cache}).program
        assert Functionalize().candidates(program)
        assert functionalized(program).left == ()
    written_back = {n.args[0] for n in program.graph.nodes if op_name(n) == "copy_"}
    assert len(written_back) == states * 2  # keys, values and sometimes the length, of two layers


@pytest.mark.slow
def test_a_compiled_graph_gives_the_same_results() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        cache[1:].copy_(y[1:].detach())
        keys = assembled(y, cache, count)
        y.view(2, -1)[0].mul_(2)
        return keys, y, cache.t()

    from torch._inductor.compile_fx import compile_fx

    program = program_of(core)
    with torch.no_grad():
        expected = observe(program)
        functionalized(program)
        given = fresh(program)
        compiled: Any = compile_fx(program.module, list(program.values.values()))
        outputs = compiled(*given)
    for one, other in zip([*outputs, *given], [*expected.outputs, *expected.inputs], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # fused arithmetic rounds differently


@pytest.mark.parametrize("base", [torch.zeros(2, 3), torch.zeros(1, 3).expand(2, 3), torch.zeros(2, 6)[:, ::2]])
def test_a_write_to_a_copy_does_not_change_its_base(base: Tensor) -> None:
    result = written(base, (("t", (), {}), ("operator.getitem", (0,), {})), "add_", (1.0,))
    assert base.sum() == 0
    assert result.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_written_writes_through_a_reshape_that_would_copy_a_base_of_these_strides() -> None:
    base = torch.randn(2, 3, 4).transpose(1, 2)
    result = written(base, (("flatten", (1,), {}), ("operator.getitem", ((..., slice(2)),), {})), "zero_")
    assert torch.equal(result.flatten(1)[:, 2:], base.flatten(1)[:, 2:])
    assert not result.flatten(1)[:, :2].any()


def test_written_raises_for_a_path_that_copies() -> None:
    with pytest.raises(RuntimeError, match="zero_ writes to a copy"):
        written(torch.randn(2, 3, 4), (("transpose", (1, 2), {}), ("flatten", (1,), {})), "zero_")
