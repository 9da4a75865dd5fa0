"""Models with weights of other libraries: quantized by torchao, with adapters by PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from latent_caches import logits
from needs import needs_compiler
from small_models import tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.latent_cache import LatentCache
from fhopt.codegen.cpu import skinny_linear, wide_linear
from fhopt.decode.programs import decode_programs
from fhopt.errors import FhoptError
from fhopt.hf.skinny_products import replace_products, restore_products
from fhopt.plan.latent_plan import LatentPlan

WIDE: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=512, head_dim=64
)  # weights large enough for fhopt's kernel


def fitted(model: Any) -> LatentPlan:
    torch.manual_seed(0)
    batches: list[dict[str, Any]] = [{"input_ids": token_ids(2, 96), "use_cache": False} for _ in range(6)]
    options: dict[str, Any] = dict(sequences=4, rate_sequences=2, sinks=4, recent=8, block=8, tokens=1024)
    return fhopt.fit(model, batches=batches, ratio=4, **options)


def in_bytes(model: Any, config: str = "Int8WeightOnlyConfig", **options: Any) -> Any:
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


@pytest.fixture(scope="module")
def quantized() -> Any:
    return in_bytes(tiny_llama(**WIDE))


@pytest.fixture(scope="module")
def plan(quantized: Any) -> LatentPlan:
    return fitted(quantized)


def test_an_int8_model_gets_a_plan_and_generates_with_it(quantized: Any, plan: LatentPlan) -> None:
    assert [p.site.name for p in plan.sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
    ids = token_ids(1, 60)
    exact = logits(quantized, fhopt_free_cache(quantized), ids, list(range(40, 60)))
    fhopt.apply(quantized, plan)
    found = logits(quantized, LatentCache(plan), ids, list(range(40, 60)))
    generated = quantized.generate(ids, max_new_tokens=3, do_sample=False)
    fhopt.unapply(quantized)
    assert generated.shape == (1, 63)
    assert float((found - exact).norm() / exact.norm()) < 0.2  # error of the plan: weights are the same


def fhopt_free_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def test_a_plan_requires_the_weights_it_was_fitted_to(plan: LatentPlan) -> None:
    other = tiny_llama(**WIDE)
    torch.nn.init.normal_(other.model.layers[0].self_attn.k_proj.weight)
    with pytest.raises(FhoptError, match="plan was not fitted to"):
        fhopt.apply(in_bytes(other), plan)


@needs_compiler
@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_multiplied_without_dequantization(
    dtype: torch.dtype, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_linear, "multiplies_by_loops", lambda dtype: loops)
    torch.manual_seed(0)
    linear: Any = torch.nn.Linear(256, 700, bias=True).to(dtype)
    model = in_bytes(torch.nn.Sequential(linear))
    taken: list[bool] = []
    before = skinny_linear.quantized

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        found = before(x, weight, bias)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(skinny_linear, "quantized", watched)
    x = torch.randn(2, 3, 256, dtype=dtype)
    weight, bias = linear.weight.dequantize().double(), linear.bias.double()
    fhopt.codegen.build_all()
    replace_products(model)
    with torch.no_grad():
        found, many = model(x), model(x.expand(9, 2, 3, 256))
        linear.weight.scale.mul_(2)  # in place: cached values are recomputed
        doubled = model(x)
    restore_products(model)
    assert taken == [True, True, True] if loops and dtype == torch.bfloat16 else taken == [True, True]
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), x.double() @ weight.T + bias, rtol=close, atol=close)
    torch.testing.assert_close(many.double(), (x.double() @ weight.T + bias).expand(many.shape), rtol=close, atol=close)
    torch.testing.assert_close(doubled.double(), 2 * x.double() @ weight.T + bias, rtol=close, atol=2 * close)


def test_integer_activations_give_no_gradient_and_are_refused_in_one_sentence() -> None:
    model = in_bytes(tiny_llama(**WIDE), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(FhoptError, match=r"no gradient flows .* before quantizing activations"):
        fitted(model)


def test_a_model_with_an_adapter_has_the_same_names_and_results() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_llama(), config).eval()
    plan = fitted(model)
    assert [p.site.name for p in plan.sites] == [f"base_model.model.model.layers.{i}.self_attn" for i in range(2)]
    ids = token_ids(1, 40)
    exact = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    fhopt.apply(model, plan)
    found = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)  # a prompt attends to itself exactly
    fhopt.unapply(model)
    assert torch.equal(found, exact)


@needs_compiler
def test_int8_layers_are_programs(plan: LatentPlan) -> None:
    """This also holds after a weight was replaced."""
    torch.manual_seed(2)
    model = in_bytes(tiny_llama(**WIDE))
    ids = token_ids(1, 60)
    for _ in range(2):
        outputs = []
        for programs in (False, True):
            fhopt.prepare(fhopt.apply(model, _of_any(plan), decode_program=programs))
            outputs.append(logits(model, LatentCache(plan), ids, list(range(40, 60))))
        state = decode_programs(model)
        assert state is not None and [program.native_calls for program in state.programs] == [1]
        assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3
        model.model.layers[0].mlp.up_proj = in_bytes(torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False)))[0]


def _of_any(plan: LatentPlan) -> LatentPlan:
    """Return the plan without the fingerprint of its model."""
    return replace(plan, provenance={k: v for k, v in plan.provenance.items() if k not in ("fingerprint", "weights")})
