"""Sites: names, shapes, rotations, norms, masks and caches, found by running the graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from small_models import MAKERS, found, run, token_ids

from fhopt import passes
from fhopt.capture import capture, from_exported


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_layer_of_a_decoder_is_found_and_its_numbers_stay(name: str, attention: str) -> None:
    model = MAKERS[name](attention)
    captured, outcome = found(model)
    assert outcome.missed == []
    parent = "model.layers.{}.self_attn" if name == "llama" else "transformer.h.{}.attn"
    assert [s.name for s in outcome.sites.values()] == [parent.format(i) for i in range(2)]
    assert {s.mask for s in outcome.sites.values()} == {"causal"}
    assert {s.kind for s in outcome.sites.values()} == {"self"}
    ids = captured.program.values[next(iter(captured.inputs))]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(captured), expected, rtol=1e-5, atol=1e-5)  # eager sums in another order


def family(name: str) -> Any:
    """Tiny decoders whose keys rotate, or are normed, in different ways."""
    import transformers as hf

    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    if name == "neox":
        return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**small, rotary_pct=0.25))
    if name == "gptj":
        config = hf.GPTJConfig(vocab_size=97, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64)
        return hf.GPTJForCausalLM(config)
    if name == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**small, num_key_value_heads=2, head_dim=16))
    if name == "cohere":
        return hf.CohereForCausalLM(hf.CohereConfig(**small, num_key_value_heads=2, pad_token_id=0))
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=97,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    )


@pytest.mark.parametrize(
    ("name", "pairing", "size", "norm"),
    [("neox", "half", 4, False), ("gptj", "interleaved", 8, False), ("qwen3", "half", 16, True),
     ("cohere", "interleaved", 16, False), ("opt", None, 0, False)],
)  # fmt: skip
def test_rotation_and_norm_are_found_by_running_not_by_spelling(
    name: str, pairing: str | None, size: int, norm: bool
) -> None:
    _, outcome = found(family(name).eval())
    (site,) = outcome.sites.values()
    assert site.key_norm is norm
    assert (site.rope.pairing, site.rope.rotary_dim) == (pairing, size) if site.rope else pairing is None


def test_the_angles_of_the_rotation_are_measured() -> None:
    _, outcome = found(MAKERS["llama"]())
    site = next(iter(outcome.sites.values()))
    assert site.rope is not None
    expected = [10000.0 ** (-2 * f / 16) for f in range(8)]
    assert site.rope.angles == pytest.approx(expected, rel=1e-4)  # cos and sin are float32


def test_prefill_and_cached_decode_agree_on_names_and_the_cache_is_seen() -> None:
    from transformers import DynamicCache

    model = MAKERS["llama"]()
    names = [s.name for s in found(model)[1].sites.values()]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(1, 5), cache=cache)
        captured = capture(model, (), {"input_ids": token_ids(1, 1), "cache": cache})
    outcome = passes.find(captured.program)
    assert [s.name for s in outcome.sites.values()] == names
    assert {s.cache for s in outcome.sites.values()} == {"cat"}


def test_an_exported_program_gives_the_same_sites(tmp_path: Any) -> None:
    model = MAKERS["llama"]()
    ids = token_ids()
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    outcome = passes.find(from_exported(exported).program)
    dynamo = found(model)[1]
    assert [s.name for s in outcome.sites.values()] == [s.name for s in dynamo.sites.values()]
    assert [s.rope for s in outcome.sites.values()] == [s.rope for s in dynamo.sites.values()]


def test_a_site_is_plain_data() -> None:
    from dataclasses import asdict

    _, outcome = found(MAKERS["gpt2"]())
    text = json.dumps([asdict(s) for s in outcome.sites.values()])
    assert "transformer.h.1.attn.c_attn.weight" in text


def test_a_key_from_two_projections_of_unequal_width_is_found() -> None:
    class Split(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(3))
            self.k1, self.k2 = torch.nn.Linear(32, 24), torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = (self.q(x), torch.cat([self.k1(x), self.k2(x)], -1), self.v(x))
            q, k, v = (y.view(1, -1, 4, 8).transpose(1, 2) for y in heads)
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(o.transpose(1, 2).reshape(x.shape))

    outcome = passes.find(capture(Split().eval(), (torch.randn(1, 6, 32),)).program)
    (site,) = outcome.sites.values()
    assert set(site.projections["k"]) == {"k1.weight", "k2.weight"} and not site.key_norm
