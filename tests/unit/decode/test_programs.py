"""Decode steps as programs: the logits of the original forward, in every mode of generation."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, decoded, distance, filled, of_both, prepared, program_runs, stepwise
from generation import MODES, batch_of, generate
from latent_caches import coded, plans
from needs import covering, needs_compiler
from small_models import cached, tiny_llama, token_ids

import fhopt
from fhopt.decode.programs import STATE, DecodePrograms, decode_programs

pytestmark = needs_compiler
STEPS = 60
Planned = tuple[Any, fhopt.LatentPlan]


def tiny(name: str) -> Any:
    """Return a model of a family with other norms, activations, biases, rotations or layouts."""
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


@covering(
    1,
    name=["Llama", "GPTNeoX", "Qwen2", "Qwen3", "Gemma2", "Cohere", "Phi3", "Olmo2", "Granite", "Glm", "StableLm"],
    batch=[1, 3],
    bits=[8, 16],
)
def test_families_give_the_same_logits(name: str, batch: int, bits: int) -> None:
    model = tiny(name)
    plan = coded(plans(lambda: model, bits))
    expected, output = of_both(model, plan, token_ids(batch, PROMPT + STEPS))
    state = decode_programs(model)
    assert state is not None and [program.native_calls for program in state.programs] == [1]
    assert distance(output, expected) < 5e-3  # a value between two codes may round either way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_round_no_worse(dtype: torch.dtype) -> None:
    exact = tiny_llama()
    plan, ids = coded(plans(lambda: exact, 8)), token_ids(1, PROMPT + STEPS)
    wanted = stepwise(prepared(exact, plan, False), ids)
    expected, output = of_both(tiny_llama().to(dtype), plan, ids)
    assert output.dtype == dtype
    assert distance(output, wanted) < 1.2 * distance(expected, wanted)


@pytest.fixture(scope="module")
def plan_of_llama() -> fhopt.LatentPlan:
    """Return a plan with an 8-bit window for `tiny_llama()`."""
    return coded(plans(tiny_llama, 8))


@pytest.fixture
def llama(plan_of_llama: fhopt.LatentPlan) -> Planned:
    """Return a small model and a plan for it."""
    return tiny_llama(), plan_of_llama


def test_layers_without_a_site_are_in_the_program(llama: Planned) -> None:
    model, plan = llama
    expected, output = of_both(model, replace(plan, sites=plan.sites[:1]), token_ids(2, PROMPT + STEPS))
    assert distance(output, expected) < 1e-3


def _crop(cache: Any) -> None:
    cache.crop(-13)


def _reorder(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def _repeat(cache: Any) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))


@pytest.mark.parametrize("change", [_crop, _reorder, _repeat])
def test_a_cache_changed_by_the_user_is_used_correctly(llama: Planned, change: Callable[[Any], None]) -> None:
    model, plan = llama
    ids, more = token_ids(2, PROMPT + 30), token_ids(2, 20)
    outputs = []
    for programs in (False, True):
        cache = filled(prepared(model, plan, programs), ids[:, :PROMPT])
        decoded(model, ids, cache, PROMPT)
        change(cache)
        outputs.append(decoded(model, more, cache))
    assert distance(outputs[1], outputs[0]) < 1e-3


def test_alternating_caches_and_their_copies_get_their_own_tokens(llama: Planned) -> None:
    model, plan = llama
    ids, (first, second) = token_ids(1, PROMPT + 20), (token_ids(1, 30), token_ids(1, 30))
    outputs = []
    for programs in (False, True):
        cache = filled(prepared(model, plan, programs), ids)
        twin = copy.deepcopy(cache)
        rows = []
        for i in range(30):
            rows += [decoded(model, first[:, i : i + 1], cache), decoded(model, second[:, i : i + 1], twin)]
        assert cache.get_seq_length() == twin.get_seq_length() == PROMPT + 50
        outputs.append(torch.cat(rows, 1))
    assert distance(outputs[1], outputs[0]) < 1e-3


def test_gradients_training_and_autocast_run_the_original_forward(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 5)
    cache = filled(prepared(model, plan), ids[:, :PROMPT])
    with program_runs() as ran:
        model(ids[:, :1], **cached(cache)).logits.sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(ids[:, -1:], **cached(cache))
        assert model.model.layers[0].mlp.up_proj.weight.grad is not None and not ran
        decoded(model.train(), ids[:, -1:], cache)
        assert not ran
        decoded(model.eval(), ids[:, -1:], cache)
    assert len(ran) == 1


def test_another_attention_implementation_runs_the_original_forward(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 5)
    expected, _ = of_both(model, plan, ids)
    for name, steps in (("sdpa", 0), ("fhopt", 5)):
        model.set_attn_implementation(name)
        with program_runs() as ran:
            output = stepwise(model, ids)
        assert distance(output, expected) < 1e-3 and len(ran) == steps


@pytest.mark.parametrize("mode", MODES)
def test_generation_gives_the_same_tokens(llama: Planned, mode: str) -> None:
    model, plan = llama
    ids = token_ids(batch_of(mode), PROMPT)
    outputs = [generate(prepared(model, plan, programs), MODES[mode], ids) for programs in (False, True)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_inference_mode_runs_a_program(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 8)
    expected = stepwise(prepared(model, plan, False), ids)
    with torch.inference_mode(), program_runs() as ran:
        output = stepwise(prepared(model, plan), ids)
    assert len(ran) == 8 and distance(output, expected) < 1e-3


def test_short_prompts_are_captured_only_if_they_recur(llama: Planned) -> None:
    model, plan = llama
    cache = filled(prepared(model, plan), token_ids(1, PROMPT))
    with program_runs() as ran, torch.no_grad():
        for tokens in (5, 6, 7):
            model(token_ids(1, tokens), **cached(cache))
        assert not ran
        for _ in range(3):
            model(token_ids(1, 5), **cached(cache))
    assert ran


def test_embeddings_run_a_program(llama: Planned) -> None:
    model, plan = llama
    ids, outputs = token_ids(1, PROMPT + 8), []
    for programs in (False, True):
        cache = filled(prepared(model, plan, programs), ids[:, :PROMPT])
        with torch.no_grad(), program_runs() as ran:
            x = model.get_input_embeddings()(ids[:, PROMPT:])
            rows = [model(inputs_embeds=x[:, i : i + 1], **cached(cache)).logits for i in range(8)]
        assert len(ran) == 8 * programs
        outputs.append(torch.cat(rows, 1))
    assert distance(outputs[1], outputs[0]) < 1e-3


def test_hidden_states_are_those_of_the_original_forward(llama: Planned) -> None:
    model, plan = llama
    ids, outputs = token_ids(1, PROMPT + 3), []
    for programs in (False, True):
        cache = filled(prepared(model, plan, programs), ids[:, :PROMPT])
        with torch.no_grad(), program_runs() as ran:
            for i in range(3):
                last = model(ids[:, PROMPT + i : PROMPT + i + 1], output_hidden_states=True, **cached(cache))
        assert len(ran) == 3 * programs
        outputs.append(last.hidden_states)
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        assert distance(found, expected) < 1e-3


def test_results_are_not_overwritten_by_the_next_step(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 3)
    cache = filled(prepared(model, plan), ids[:, :PROMPT])
    with torch.no_grad():
        found = [model(ids[:, PROMPT + i :][:, :1], output_hidden_states=True, **cached(cache)) for i in range(3)]
    for one, other in itertools.pairwise(found):
        assert not torch.equal(one.logits, other.logits)
        assert all(not torch.equal(x, y) for x, y in zip(one.hidden_states, other.hidden_states, strict=True))


def test_threads_have_their_own_programs(llama: Planned) -> None:
    model, plan = llama
    prompts = [token_ids(1, PROMPT + 30) for _ in range(4)]
    prepared(model, plan)
    expected = [stepwise(model, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for output, single in zip(pool.map(lambda ids: stepwise(model, ids), prompts), expected, strict=True):
                assert distance(output, single) < 1e-3


# ----------------------------------------------------------------------------------------------- life of a model


def test_a_copy_of_a_model_has_its_own_programs(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 10)
    expected, _ = of_both(model, plan, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with program_runs() as ran:
        output = stepwise(twin, ids)
    assert distance(output, expected) < 1e-3 and len(ran) == 10
    assert vars(twin)[STATE].model is twin


def test_a_model_is_pickled_with_its_plan(llama: Planned) -> None:
    model, plan = llama
    ids = token_ids(1, PROMPT + 10)
    expected, _ = of_both(model, plan, ids)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301  # written here
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with program_runs() as ran:
        output = stepwise(twin, ids)
    assert distance(output, expected) < 1e-3 and len(ran) == 10
    fhopt.unapply(twin)
    assert not {"forward", STATE} & vars(twin).keys()


def test_unapply_removes_programs(llama: Planned) -> None:
    model, plan = llama
    fhopt.unapply(prepared(model, plan))
    assert decode_programs(model) is None
    assert all("forward" not in vars(m) and STATE not in vars(m) for m in model.modules())
    fhopt.apply(model, plan, decode_program=False)
    assert decode_programs(model) is None


def test_unapply_leaves_a_wrapper_of_the_forward(llama: Planned) -> None:
    """For example a hook of accelerate, which replaces a model's forward and calls the previous one."""
    model, plan = llama
    ids, calls = token_ids(1, PROMPT), []
    expected = model.requires_grad_(False)(ids).logits
    before = prepared(model, plan).forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    model.forward = wrapper
    fhopt.unapply(model)
    assert model.forward is wrapper
    assert distance(model(ids).logits, expected) < 1e-3 and calls
    del model.forward


def test_a_replaced_forward_is_left(llama: Planned) -> None:
    model, plan = llama
    model.forward = type(model).forward.__get__(model)
    expected, ids = model.forward, token_ids(1, PROMPT + 3)
    with program_runs() as ran:
        stepwise(prepared(model, plan), ids)
    assert model.forward is expected and not ran
    del model.forward


def test_the_signature_of_the_forward_is_kept(llama: Planned) -> None:
    import inspect

    model, plan = llama
    names = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(prepared(model, plan).forward).parameters) == names


def test_experts_run_as_in_the_model_between_native_calls() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    plan = coded(plans(lambda: model, 8))
    expected, output = of_both(model, plan, token_ids(1, PROMPT + STEPS))
    (program,) = _state(model).programs
    assert program.reasons() == ["MixtralSparseMoeBlock runs as in the model"] and program.native_calls == 3
    assert distance(output, expected) < 1e-3


def _state(model: Any) -> DecodePrograms:
    state = decode_programs(model)
    assert state is not None
    return state
