"""Checkpoints of DeepSeek's class: the logits of the model with the plan in its projections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_export import ROUNDING, VLLM, difference, exported, sites_of, tiny, with_tiers
from small_models import Fitted, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.export import mla
from fhopt.fitting import fit_plan
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan


def rows_of(z: Tensor, pair: tuple[int, int], dim: int) -> Tensor:
    """A complex combination [G] of one frequency as two real rows [2, G*dim] on keys."""
    rows = torch.zeros(2, len(z), dim)
    rows[0, :, pair[0]], rows[0, :, pair[1]] = z.real, -z.imag
    rows[1, :, pair[0]], rows[1, :, pair[1]] = z.imag, z.real
    return rows.flatten(1)


def random_plan(sites: list[AttentionSite], still: int = 5, values: int = 12, shared: int = 20) -> LatentPlan:
    """One random complex latent for each frequency, `still` for keys that do not rotate, `values` for values.

    Sites without rotation get the layout `input` with `shared` channels.
    """
    return LatentPlan(tuple(random_site(site, still, values, shared) for site in sites), 0, 1, 1)


def random_site(site: AttentionSite, still: int, values: int, shared: int) -> SitePlan:
    heads, dim = site.kv_heads, site.key_dim
    if site.rope is None:
        encode = torch.randn(1, shared, heads * (dim + site.value_dim)) / 8
        key, value = (SidePlan(encode, torch.randn(heads, dim, shared) / 4, ()) for dim in (dim, site.value_dim))
        return SitePlan(site, "input", key, SidePlan(encode[:, :, :0], value.decode, ()))
    encoders, decoders = [], []
    for pair in site.rope.pairs:
        inward, outward = (torch.randn(heads, dtype=torch.complex64) for _ in range(2))
        encoders.append(rows_of(inward, pair, dim))
        decoders.append(rows_of(outward.conj(), pair, dim))
    quiet = [c for c in range(dim) if c not in {c for pair in site.rope.pairs for c in pair}]
    if quiet:
        for made in (encoders, decoders):
            rows = torch.zeros(still, heads, dim)
            rows[:, :, quiet] = torch.randn(still, heads, len(quiet)) / 3
            made.append(rows.flatten(1))
    encode, decode = torch.cat(encoders), torch.cat(decoders)  # [R, G*D]
    key = SidePlan(encode.unsqueeze(0), decode.T.unflatten(0, (heads, dim)).contiguous(), ())
    value = SidePlan(
        torch.randn(1, values, heads * site.value_dim) / 6, torch.randn(heads, site.value_dim, values) / 4, ()
    )
    return SitePlan(site, "freq", key, value)


@torch.no_grad()
def projected(model: Any, plan: LatentPlan) -> Any:
    """The model with what its plan does to keys and values in their projections: rotation commutes with it."""
    for layer, site in zip(model.model.layers, plan.sites, strict=True):
        key, value = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        if site.is_shared:
            heads, dim = site.site.kv_heads, site.site.key_dim
            both = torch.cat([key.unflatten(0, (heads, dim)), value.unflatten(0, (heads, -1))], 1).flatten(0, 1)
            latent = site.key.encode[0] @ both
            key.copy_(site.key.decode.flatten(0, 1) @ latent)
            value.copy_(site.value.decode.flatten(0, 1) @ latent)
        else:
            for weight, side in ((key, site.key), (value, site.value)):
                weight.copy_(side.decode.flatten(0, 1) @ (side.encode[0] @ weight))
    return model


# --------------------------------------------------------------------------------------------------- logits


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("Llama"),
    "llama, one kv head, tied": lambda: tiny("Llama", num_key_value_heads=1, tie_word_embeddings=True),
    "eps of the class": lambda: tiny("Llama", rms_norm_eps=1e-6, tie_word_embeddings=True),
    "mistral, other head size and base": lambda: tiny(
        "Mistral", head_dim=24, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "half of the channels rotate, side by side": lambda: tiny("Glm", attention_bias=False),
    "one layer without rotation": lambda: tiny("SmolLM3", no_rope_layers=[1, 0]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_class_has_the_logits_of_the_model_with_the_plan_in_its_projections(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    plan = random_plan(sites_of(model))
    made = exported(model, plan, tmp_path / "out")
    assert type(made).__name__ == "DeepseekV2ForCausalLM"
    assert difference(made, model) > 0.05  # it is another model
    assert difference(made, projected(model, plan)) < ROUNDING


def test_a_model_with_one_kv_head_is_exported_exactly_and_generates_the_same(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=1)
    made = exported(model, fit_plan.exact_plan(sites_of(model)), tmp_path / "out")
    assert difference(made, model) < ROUNDING
    ids = token_ids(1, 10)
    tokens, cached = (m.generate(ids, max_new_tokens=20, do_sample=False) for m in (model, made))
    assert torch.equal(tokens, cached)
    assert "computes what the original does" in (tmp_path / "out" / "README.md").read_text()


def test_vllm_gets_the_widths_of_its_kernels_and_the_same_logits(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = random_plan(sites_of(model))
    made = exported(model, plan, tmp_path / "out", VLLM)
    assert (made.config.kv_lora_rank, made.config.qk_rope_head_dim) == (512, 64)
    assert difference(made, projected(model, plan)) < ROUNDING


def test_a_tied_head_is_written_since_an_engine_does_not_tie_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny("Llama", num_key_value_heads=1, tie_word_embeddings=True)
    made = exported(model, fit_plan.exact_plan(sites_of(model)), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], model.model.embed_tokens.weight.data)
    assert not made.config.tie_word_embeddings
    assert difference(made, model) < ROUNDING


# --------------------------------------------------------------------------------------------------- refusals


def test_a_cache_that_gets_larger_is_refused_unless_forced(tmp_path: Path) -> None:
    model, said = tiny("Llama", num_key_value_heads=1), []
    plan, announce = fit_plan.exact_plan(sites_of(model)), lambda *bytes_of_a_token: said.append(bytes_of_a_token)
    with pytest.raises(FhoptError, match=r"2,304 bytes \(512 \+ 64 .*original's takes 128: .*larger.*--force"):
        exported(model, plan, tmp_path / "out", VLLM, force=False, announce=announce)
    assert not list(tmp_path.iterdir()) and said == []
    exported(model, plan, tmp_path / "out", VLLM, announce=announce)
    exported(model, plan, tmp_path / "any", force=False, announce=announce)
    assert said == [(2304, 128), (128, 128)]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "biases": (lambda: tiny("Qwen2", num_key_value_heads=1), "k_proj.bias and .* more .*engines read no biases"),
    "normed keys": (lambda: tiny("Qwen3", num_key_value_heads=1), "normalizes its keys"),
    "scaled rotation": (
        lambda: tiny("Llama", num_key_value_heads=1, rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        "rope_type 'llama3'",
    ),
    "multipliers": (
        lambda: tiny("Granite", num_key_value_heads=1, residual_multiplier=0.3), "GraniteForCausalLM computes more"
    ),
    "other activation": (lambda: tiny("Llama", num_key_value_heads=1, hidden_act="gelu"), "gated SiLU"),
    "several kv heads": (lambda: tiny("Llama"), "keeps 2 complex numbers .*--kv-lora-rank"),
    "another family": (tiny_gpt2, "not built like Llama"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_engines_have_no_place_for_is_refused(why: str, tmp_path: Path) -> None:
    make, message = REFUSED[why]
    model = make()
    with pytest.raises(FhoptError, match=message):
        exported(model, fit_plan.exact_plan(sites_of(model)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_plans_that_are_no_latent_attention_are_refused(llama: Fitted, tmp_path: Path) -> None:
    cut = mla.truncate(fit_plan.fit(llama.statistics, ratio=1, layout="freq"), 24)

    def refused(plan: LatentPlan, message: str, **options: Any) -> None:
        with pytest.raises(FhoptError, match=message):
            exported(llama.model, plan, tmp_path / "out", **options)

    refused(with_tiers(cut, 4), "channels of 4 bits.*--ratio 1")
    assert exported(llama.model, with_tiers(cut, 16), tmp_path / "halves") is not None
    mixing = SidePlan(torch.randn(1, 20, 32), torch.randn(2, 16, 20), ())
    bare = [SitePlan(s.site, "band", mixing, mixing) for s in cut.sites]
    refused(LatentPlan(tuple(bare), 0, 1, 1), "of different rotary frequencies")
    refused(LatentPlan(cut.sites[:1], 0, 1, 1), "1 of 2 layers")
    refused(cut, "float16 is too small", dtype=torch.float16)
    with pytest.raises(FhoptError, match="layout 'band'"):
        mla.truncate(LatentPlan(tuple(bare), 0, 1, 1), 8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(cut, "holds other things")
