"""Sites: names, shapes, RoPE, norms, masks and caches, found by running the graph."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from needs import covering, sampled
from small_models import MAKERS, cached, found, run, token_ids

from fhopt.models.capture import capture, from_exported
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.recognize.find_attention import rotation
from fhopt.plan.site import Rope


@covering(1, name=["llama", "gpt2"], attention=["sdpa", "eager"])
def test_every_layer_of_a_decoder_is_found_and_results_stay(name: str, attention: str) -> None:
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
    torch.testing.assert_close(run(captured), expected, rtol=1e-5, atol=1e-5)  # eager mode sums in another order


def family(name: str) -> Any:
    """Tiny decoders with different RoPE and norms of keys."""
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


@pytest.mark.parametrize(
    ("dtype", "name"),
    sampled(itertools.product([torch.bfloat16, torch.float16], ["neox", "gptj", "qwen3", "cohere", "opt", "llama"]), 5),
)
def test_in_16_bit_models_the_same_rotation_is_found(name: str, dtype: torch.dtype) -> None:
    """Most models round sines and cosines to the dtype of their weights."""

    def rope(model: Any, tokens: int) -> Any:
        return next(iter(found(model, tokens)[1].sites.values())).rope

    model = MAKERS["llama"]() if name == "llama" else family(name).eval()
    exact, short, long = rope(model, 16), rope(model.to(dtype), 16), rope(model, 60)
    if name == "opt":
        assert exact is short is long is None
        return
    for rounded, tokens in ((short, 16), (long, 60)):
        assert replace(rounded, angles=()) == replace(exact, angles=())
        assert rounded.angles == pytest.approx(exact.angles, rel=2**-8, abs=2**-7 / (tokens - 1))  # so are angles


def test_a_small_dependence_on_the_position_is_not_a_rotation() -> None:
    positions = torch.arange(64.0, dtype=torch.float64).unsqueeze(1)
    row = torch.randn(1, 16, dtype=torch.float64) + 2
    for rows in (row + 1e-4 * positions * row.flip(1), row * (1 + 1e-3 * torch.rand(64, 16)), row + 1e-3 * positions):
        assert rotation(rows[None, None], 1e-5) is None


def test_prefill_and_cached_decode_agree_on_names_and_the_cache_is_found() -> None:
    from transformers import DynamicCache

    model = MAKERS["llama"]()
    names = [s.name for s in found(model)[1].sites.values()]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(1, 5), **cached(cache))
        captured = capture(model, (), {"input_ids": token_ids(1, 1), **cached(cache)})
    outcome = pipeline.find_attentions(captured.program)
    assert [s.name for s in outcome.sites.values()] == names
    assert {s.cache for s in outcome.sites.values()} == {"cat"}


def test_an_exported_program_gives_the_same_sites(tmp_path: Any) -> None:
    model = MAKERS["llama"]()
    ids = token_ids()
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    outcome = pipeline.find_attentions(from_exported(exported).program)
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

    outcome = pipeline.find_attentions(capture(Split().eval(), (torch.randn(1, 6, 32),)).program)
    (site,) = outcome.sites.values()
    assert set(site.projections["k"]) == {"k1.weight", "k2.weight"} and not site.key_norm


def site_of(name: str) -> tuple[Any, passes_outcome.Outcome]:
    """Return the first site of a zoo entry, and the whole outcome."""
    from model_zoo.checking import entries

    case = next(e for e in entries() if e.name == name and e.step in {"forward", "prefill"}).build()
    outcome = pipeline.find_attentions(capture(case.module, case.args, case.kwargs).program)
    return next(iter(outcome.sites.values()), None), outcome


@pytest.mark.parametrize("name", ["pixtral_vision", "rope_axial"])
def test_a_rotation_by_two_coordinates_is_recognized(name: str) -> None:
    site, _ = site_of(name)
    assert site.rope is not None and site.rope.positions == "grid"
    assert len(site.rope.pairs) == site.rope.rotary_dim // 2 == len(site.rope.angles)


def test_every_channel_of_a_rotation_belongs_to_one_pair() -> None:
    for rope in (Rope("half", 12, (), 4, 3), Rope("interleaved", 8, ()), Rope("half", 8, (), 0, 2)):
        channels = [c for pair in rope.pairs for c in pair]
        assert sorted(channels) == list(range(rope.offset, rope.offset + rope.rotary_dim))


def test_a_model_that_caches_latents_is_not_rewritten_with_a_reason() -> None:
    site, outcome = site_of("deepseek_v3")
    assert site is None
    assert {m.reason for m in outcome.missed} == {
        "already latent: keys and values of 160 elements per token are expanded from 32; "
        "expected projections of the hidden states"
    }


@pytest.mark.parametrize(
    ("name", "kind", "mask"),
    sampled(
        [
            ("t5", "self", "relative"),
            ("set_transformer", "cross", "none"),
            ("mpt", "self", "alibi"),
            ("bert", "self", "padding"),
        ],
        2,
    ),
)
def test_kinds_and_masks_are_recognized(name: str, kind: str, mask: str) -> None:
    site, _ = site_of(name)
    assert (site.kind, site.mask) == (kind, mask)


def test_sinks_and_windows_are_recognized() -> None:
    _, outcome = site_of("gpt_oss")
    assert all(s.sinks for s in outcome.sites.values())
    assert {(s.mask, s.window > 0) for s in outcome.sites.values()} == {("sliding", True), ("causal", False)}


@pytest.mark.parametrize("attention", sampled(["sdpa", "eager"], 2))
def test_checks_run_on_few_tokens_for_any_length_and_agree(attention: str) -> None:
    def described(length: int) -> list[Any]:
        captured = capture(MAKERS["llama"](attention), (), {"input_ids": token_ids(1, length), "use_cache": False})
        return [replace(s, source="") for s in pipeline.find_attentions(captured.program).sites.values()]

    long, short = described(63), described(20)  # 63 tokens are more than a check runs on
    assert [(s.name, s.rope, s.mask, s.scale, s.kv_heads) for s in long] == [
        (s.name, s.rope, s.mask, s.scale, s.kv_heads) for s in short
    ]


class Reduced(torch.nn.Module):
    """Attention to tokens reduced by a convolution, with keys and values from one projection (PVT)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)
        self.reduce, self.norm = torch.nn.Conv2d(32, 32, 2, 2), torch.nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        small = self.reduce(x.transpose(1, 2).reshape(b, 32, 8, 8)).flatten(2).transpose(1, 2)
        q = self.q(x).view(b, t, 4, 8).transpose(1, 2)
        k, v = self.kv(self.norm(small)).view(b, -1, 2, 4, 8).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(b, t, 32)


def test_keys_of_reduced_tokens_are_not_latents() -> None:
    outcome = pipeline.find_attentions(capture(Reduced().eval(), (torch.randn(2, 64, 32),)).program)
    assert outcome.missed == []
    (site,) = outcome.sites.values()
    assert site.projections["k"] == site.projections["v"] == ("kv.weight",)
