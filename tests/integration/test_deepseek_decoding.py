"""DeepSeek decodes on the latents in its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from absorbed_latents import Absorbing, B, C, E, H, Mla, N, P, R, T, inputs, plain
from needs import sampled
from small_models import VOCABULARY
from torch import Tensor, nn

NORMS = 1e-5  # norms and eager softmax of these models round float64 to float32; logits reach 5


def deepseek(version: str = "v3", attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    import transformers

    torch.manual_seed(1)
    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=C, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=H, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=R, qk_rope_head_dim=P,
        qk_nope_head_dim=N, v_head_dim=E, max_position_embeddings=128, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2, attn_implementation=attention,
    )  # fmt: skip
    name = f"Deepseek{version.upper()}"
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)


def filled(model: Any, kind: str, ids: Tensor, mask: Tensor | None = None) -> Any:
    """Make a cache of these tokens."""
    from transformers import DynamicCache, StaticCache

    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
def decoded(model: Any, kind: str, backend: Any, steps: int = 4, width: int = 1, padded: bool = False) -> Tensor:
    """Return the logits of decode steps after a prefill without the backend."""
    ids = torch.randint(1, VOCABULARY, (B, T + steps * width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    step = torch.compile(model, backend=backend) if backend is not None else model
    cache = filled(model, kind, ids[:, :T], mask[:, :T] if padded else None)
    rows = []
    for start in range(T, ids.shape[1], width):
        stop = start + width
        given = dict(attention_mask=mask[:, :stop]) if padded else {}
        rows.append(step(ids[:, start:stop], past_key_values=cache, **given).logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize(
    ("version", "kind", "attention"),  # pairwise combinations
    sampled(
        [("v2", "dynamic", "sdpa"), ("v2", "static", "eager"), ("v3", "dynamic", "eager"), ("v3", "static", "sdpa")], 3
    ),
)
def test_deepseek_decodes_on_its_latents(version: str, kind: str, attention: str) -> None:
    model, backend = deepseek(version, attention), Absorbing()
    result = decoded(model, kind, backend)
    torch.testing.assert_close(result, decoded(model, kind, None), rtol=0, atol=NORMS)
    assert set(backend.absorbed) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert len(backend.outcomes) <= 2  # one graph, and one for any number of tokens
    assert not backend.expanded()
    assert not any(outcome.missed for outcome in backend.outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_stays_masked(kind: str) -> None:
    model, backend = deepseek(), Absorbing()
    result = decoded(model, kind, backend, padded=True)
    torch.testing.assert_close(result, decoded(model, kind, None, padded=True), rtol=0, atol=NORMS)
    assert len(backend.absorbed) >= 2 and not backend.expanded()


@pytest.mark.parametrize(("dtype", "tolerance"), sampled([(torch.bfloat16, 0.15), (torch.float32, 1e-4)], 2))
def test_the_latents_have_the_dtype_of_the_model(dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 (8 bits), absorbed queries are rounded instead of keys; logits reach 5."""
    model, backend = deepseek(dtype=dtype), Absorbing()
    result = decoded(model, "static", backend)
    torch.testing.assert_close(result, decoded(model, "static", None), rtol=0, atol=tolerance)
    assert result.dtype == dtype and len(backend.absorbed) == 2
    bound = backend.outcomes[0].program
    assert {bound.values[name].dtype for name in bound.bound} == {dtype}


def test_weights_changed_after_compilation_take_effect() -> None:
    model, backend = deepseek(), Absorbing()
    before = decoded(model, "static", backend)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(1.5).add_(0.1)
    after = decoded(model, "static", backend)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, decoded(model, "static", None), rtol=0, atol=NORMS)


def test_another_model_of_the_same_class_uses_its_own_weights() -> None:
    def step(module: nn.Module, x: Tensor, cache: Tensor) -> Any:
        return module(x, cache)

    backend = Absorbing()
    compiled = torch.compile(step, backend=backend)
    for module in (Mla(plain).double() for _ in range(3)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(module, *inputs()), module(*inputs()), rtol=0, atol=1e-10)


def test_a_prefill_is_not_rewritten() -> None:
    model, backend = deepseek(), Absorbing()
    ids = torch.randint(1, VOCABULARY, (B, T))
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        result = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(result, model(ids, use_cache=False).logits, rtol=0, atol=NORMS)
    assert not backend.absorbed and backend.expanded()
    assert backend.reasons == {
        f"attention on latents would be slower: {T} queries, {T} tokens; expected fewer queries than tokens"
    }
    assert any(m.reason.startswith("already latent") for m in backend.outcomes[0].missed)


def test_many_queries_on_a_cache_are_not_rewritten() -> None:
    model, backend = deepseek(), Absorbing()
    result = decoded(model, "dynamic", backend, steps=1, width=30)
    torch.testing.assert_close(result, decoded(model, "dynamic", None, steps=1, width=30), rtol=0, atol=NORMS)
    assert not backend.absorbed and len(backend.reasons) == 1 and "expected fewer" in backend.reasons.pop()
