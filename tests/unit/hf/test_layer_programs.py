"""Decoder layers as programs: the same results as ordinary calls, which run if anything differs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from needs import covering, needs_compiler
from small_models import cached, found, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.hf import layer_programs
from fhopt.hf.bound_program import BoundProgram
from fhopt.hf.layer_programs import STATE, program_reasons

pytestmark = needs_compiler
TOKENS, STEPS = 40, 60


def tiny(name: str) -> Any:
    """A model of a family with other norms, activations, biases, rotations or layouts."""
    import transformers

    torch.manual_seed(3)
    options: dict[str, Any] = dict(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    if name == "GPTNeoX":
        del options["head_dim"], options["num_key_value_heads"]
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prepared(model: Any, plan: fhopt.LatentPlan, programs: bool = True) -> Any:
    """Apply a plan, with every kernel built."""
    return fhopt.prepare(fhopt.apply(model, plan, layer_programs=programs))


def stepwise(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Return the logits of a prompt and of single tokens after it, and the cache."""
    cache = fhopt.LatentCache(fhopt.hf.apply.applied_plan(model), model.config) if cache is None else cache
    return logits(model, cache, ids, list(range(TOKENS, ids.shape[1]))), cache


def of_both(model: Any, plan: fhopt.LatentPlan, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits computed operation by operation, and by programs."""
    expected, _ = stepwise(prepared(model, plan, False), ids)
    output, _ = stepwise(prepared(model, plan), ids)
    return expected, output


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    return float((found - expected).norm() / expected.norm()) < tolerance


@covering(
    1,
    name=["Llama", "GPTNeoX", "Qwen2", "Qwen3", "Gemma2", "Cohere", "Phi3", "Olmo2", "Granite", "Glm", "StableLm"],
    batch=[1, 3],
    bits=[8, 16],
)
def test_families_give_the_same_logits(name: str, batch: int, bits: int) -> None:
    model = tiny(name)
    plan = coded(plans(lambda: model, bits))
    expected, output = of_both(model, plan, token_ids(batch, TOKENS + STEPS))
    assert set(program_reasons(model).values()) == {""}
    assert close(output, expected, 5e-3)  # a value between two codes may round either way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_round_no_worse(dtype: torch.dtype) -> None:
    exact = tiny_llama()
    plan, ids = coded(plans(lambda: exact, 8)), token_ids(1, TOKENS + STEPS)
    wanted, _ = stepwise(prepared(exact, plan, False), ids)
    model = tiny_llama().to(dtype)
    expected, output = of_both(model, plan, ids)
    assert set(program_reasons(model).values()) == {""} and output.dtype == dtype
    errors = [float((x.float() - wanted).norm()) for x in (output, expected)]
    assert errors[0] < 1.2 * errors[1]


@pytest.fixture
def llama() -> tuple[Any, fhopt.LatentPlan]:
    """A small model and a plan for it with an 8-bit window."""
    model = tiny_llama()
    return model, coded(plans(lambda: model, 8))


def test_layers_that_the_plan_leaves_exact_are_programs_too(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    expected, output = of_both(model, replace(plan, sites=plan.sites[:1]), token_ids(2, TOKENS + STEPS))
    assert close(output, expected) and set(program_reasons(model)) == {"model.layers.0"}


def _crop(cache: Any) -> None:
    cache.crop(-13)


def _reorder(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def _repeat(cache: Any) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))


@pytest.mark.parametrize("change", [_crop, _reorder, _repeat])
def test_a_cache_changed_by_the_user_is_used_correctly(
    llama: tuple[Any, fhopt.LatentPlan], change: Callable[[Any], None]
) -> None:
    model, plan = llama
    ids, more = token_ids(2, TOKENS + 30), token_ids(2, 20)
    outputs = []
    for programs in (False, True):
        _, cache = stepwise(prepared(model, plan, programs), ids)
        change(cache)
        outputs.append(logits(model, cache, more, list(range(1, 20))))
    assert close(outputs[1], outputs[0])


def test_a_copy_of_a_cache_is_independent(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 20)
    _, cache = stepwise(prepared(model, plan), ids)
    twin, first, second = copy.deepcopy(cache), token_ids(1, 30), token_ids(1, 30)
    cuts = list(range(1, 30))
    output, other = logits(model, cache, first, cuts), logits(model, twin, second, cuts)
    assert cache.get_seq_length() == twin.get_seq_length() == TOKENS + 50
    for tokens, seen in ((first, output), (second, other)):
        expected, _ = stepwise(prepared(model, plan, False), torch.cat([ids, tokens], 1))
        assert close(seen, expected[:, -30:])


def test_hooks_and_replaced_weights_are_noticed(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 10)
    expected, output = of_both(model, plan, ids)
    assert close(output, expected)
    layer, calls = model.model.layers[0], []
    hook = layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    output, _ = stepwise(model, ids)
    assert len(calls) == 11 and close(output, expected)
    hook.remove()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(64, 96) / 8)
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(64, 64, bias=False)
    output, _ = stepwise(model, ids)
    calls.clear()
    changed, again = of_both(model, plan, ids)
    assert close(output, changed) and close(again, changed) and not close(changed, expected, 0.05)


def test_gradients_training_and_other_options_run_operation_by_operation(
    llama: tuple[Any, fhopt.LatentPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 5)
    stepwise(prepared(model, plan), ids)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program ran")

    monkeypatch.setattr(BoundProgram, "ready", refuse)
    _, cache = _filled(model, ids[:, :TOKENS])
    model(ids[:, -1:], **cached(cache)).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, -1:], **cached(cache))
    with torch.no_grad(), pytest.raises(AssertionError, match="a program ran"):
        model(ids[:, -1:], **cached(cache))


def test_an_attention_set_next_to_the_plan_runs(
    llama: tuple[Any, fhopt.LatentPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 5)
    ran: list[int] = []
    expected, _ = stepwise(prepared(model, plan), ids)
    run = BoundProgram.made_ready

    def watched(*given: Any) -> Any:
        ran.append(1)
        return run(*given)

    monkeypatch.setattr(BoundProgram, "made_ready", watched)
    for name, programs in (("sdpa", False), ("fhopt", True)):
        model.set_attn_implementation(name)
        output, _ = stepwise(model, ids)
        assert close(output, expected) and bool(ran) == programs


def _filled(model: Any, ids: Tensor) -> tuple[Any, Any]:
    cache = fhopt.hf.apply.latent_cache(model)
    with torch.no_grad():
        return model(ids, **cached(cache)), cache


def test_a_copy_of_a_model_has_its_own_programs(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 10)
    expected, _ = stepwise(prepared(model, plan), ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    output, _ = stepwise(twin, ids)
    assert close(output, expected) and vars(twin.model.layers[0])[STATE].layer is twin.model.layers[0]


def test_a_model_is_pickled_with_its_plan(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 10)
    expected, _ = stepwise(prepared(model, plan), ids)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301  # written here
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    output, _ = stepwise(twin, ids)
    assert close(output, expected) and set(program_reasons(twin).values()) == {""}
    fhopt.unapply(twin)
    assert not {"forward", STATE} & vars(twin.model.layers[0]).keys()


def test_unapply_leaves_a_wrapper_of_a_layer(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    """For example a hook of accelerate, which replaces the layer's forward and calls the previous one."""
    model, plan = llama
    ids = token_ids(1, TOKENS)
    fhopt.unapply(model.requires_grad_(False))
    expected = model(ids).logits
    layer, calls = prepared(model, plan).model.layers[0], []
    before = layer.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    layer.forward = wrapper
    fhopt.unapply(model)
    assert layer.forward is wrapper
    assert close(model(ids).logits, expected) and calls
    del layer.forward


def test_unapply_removes_programs(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    fhopt.unapply(prepared(model, plan))
    assert not program_reasons(model)
    assert all("forward" not in vars(m) and STATE not in vars(m) for m in model.modules())
    fhopt.apply(model, plan, layer_programs=False)
    assert not program_reasons(model)


def test_only_the_attention_of_a_layer_with_experts_is_a_program() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    plan = coded(plans(lambda: model, 8))
    expected, output = of_both(model, plan, token_ids(1, TOKENS + STEPS))
    reasons = program_reasons(model)
    assert "_softmax" in reasons["model.layers.0"] and reasons["model.layers.0.self_attn"] == ""
    assert close(output, expected)


def test_threads_do_not_disturb_each_other(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    prompts = [token_ids(1, TOKENS + 40) for _ in range(4)]
    prepared(model, plan)
    expected = [stepwise(model, ids)[0] for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for output, alone in zip(pool.map(lambda ids: stepwise(model, ids)[0], prompts), expected, strict=True):
                assert close(output, alone)


def test_programs_run_in_inference_mode_too(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(1, TOKENS + 8)
    expected, _ = stepwise(prepared(model, plan, False), ids)
    prepared(model, plan)
    with torch.inference_mode():
        output, _ = stepwise(model, ids)
    assert set(program_reasons(model).values()) == {""}
    assert all(vars(layer)[STATE].known.bound for layer in model.model.layers)
    assert close(output, expected)


def test_a_single_short_prompt_is_not_traced(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    prepared(model, plan)
    for tokens in (5, 6, 7):
        _filled(model, token_ids(1, tokens))
    assert not any(vars(layer)[STATE].known.bound for layer in model.model.layers)
    for _ in range(3):
        _filled(model, token_ids(1, 5))
    assert all(vars(layer)[STATE].known.bound for layer in model.model.layers)


def test_beams_and_samples_equal_those_of_operations(llama: tuple[Any, fhopt.LatentPlan]) -> None:
    model, plan = llama
    ids = token_ids(2, TOKENS)
    for options in (dict(num_beams=3), dict(do_sample=True, top_k=5), dict(prompt_lookup_num_tokens=3)):
        rows = ids[:1] if "prompt_lookup_num_tokens" in options else ids
        outputs = []
        for programs in (False, True):
            prepared(model, plan, programs)
            torch.manual_seed(0)
            outputs.append(model.generate(rows, max_new_tokens=30, **options))
        assert torch.equal(*outputs)


def test_found_sites_name_their_layers() -> None:
    model = tiny_llama()
    names = [site.name for site in found(model)[1].sites.values()]
    assert [layer_programs._layer_name(model, name) for name in names] == ["model.layers.0", "model.layers.1"]
