"""A change of the model between two steps takes effect in the next one, whatever it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, decoded, distance, filled, prepared, program_runs
from latent_caches import coded, plans
from layered_models import four_layers
from needs import needs_compiler
from small_models import token_ids

pytestmark = needs_compiler
STEPS = 12
Undo = Callable[[], Any] | None


def _weight_written(model: Any) -> Undo:
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    return None


def _weight_replaced(model: Any) -> Undo:
    layer = model.model.layers[1].self_attn
    layer.o_proj.weight = torch.nn.Parameter(1.5 * layer.o_proj.weight.detach())
    return None


def _weight_moved(model: Any) -> Undo:
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = 1.5 * weight.data
    return None


def _buffer_replaced(model: Any) -> Undo:
    model.model.rotary_emb.inv_freq = 0.5 * model.model.rotary_emb.inv_freq
    return None


def _embedding_replaced(model: Any) -> Undo:
    weight = model.model.embed_tokens.weight.detach()
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(1.5 * weight.flip(-1))
    return None


def _head_replaced(model: Any) -> Undo:
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    return None


def _dtype_changed(model: Any) -> Undo:
    model.model.norm.to(torch.float64).to(torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, model.config.hidden_size))
    return None


def _part_replaced(model: Any) -> Undo:
    layer = model.model.layers[3].mlp
    other = torch.nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    with torch.no_grad():
        other.weight.copy_(1.5 * layer.up_proj.weight)
    layer.up_proj = other
    return None


def _activation_replaced(model: Any) -> Undo:
    model.model.layers[2].mlp.act_fn = torch.nn.ReLU()
    return None


def _layer_replaced(model: Any) -> Undo:
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    return None


def _layers_reordered(model: Any) -> Undo:
    model.model.layers[2].mlp, model.model.layers[3].mlp = model.model.layers[3].mlp, model.model.layers[2].mlp
    return None


def _fewer_layers(model: Any) -> Undo:
    model.config.num_hidden_layers = 2
    return None


def _class_replaced(model: Any) -> Undo:
    class Calls(type(model.model.layers[2])):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) + torch.arange(64) / 16

    model.model.layers[2].__class__ = Calls
    return None


def _method_of_a_class_replaced(model: Any) -> Undo:
    kind = type(model.model.layers[2].mlp)
    run = kind.forward
    kind.forward = lambda self, x: 1.5 * run(self, x)
    return lambda: setattr(kind, "forward", run)


def _forward_replaced(model: Any) -> Undo:
    part = model.model.layers[2].mlp.down_proj
    run = part.forward
    part.forward = lambda x: 1.5 * run(x)
    return None


def _number_changed(model: Any) -> Undo:
    model.model.norm.variance_epsilon = 10.0
    return None


def _setting_changed(model: Any) -> Undo:
    model.model.layers[2].self_attn.scaling *= 3
    return None


def _configuration_changed(model: Any) -> Undo:
    model.config._attn_implementation = "sdpa"
    model.model.norm.weight.data.mul_(torch.linspace(0.5, 2, model.config.hidden_size))
    return None


def _hooked(model: Any) -> Undo:
    return model.model.layers[1].register_forward_hook(lambda module, args, output: 1.5 * output + 1).remove


def _hooked_inside(model: Any) -> Undo:
    return model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 1.5 * output).remove


def _hooked_before(model: Any) -> Undo:
    hook = lambda module, args: (1 + 1.5 * args[0], *args[1:])  # noqa: E731
    return model.model.layers[2].register_forward_pre_hook(hook).remove


def _hooked_at_the_end(model: Any) -> Undo:
    return model.model.layers[-1].register_forward_hook(lambda module, args, output: output.roll(1, -1)).remove


def _hook_of_the_model(model: Any) -> Undo:
    def hook(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits.roll(1, -1)
        return output

    return model.register_forward_hook(hook).remove


def _hooked_globally(model: Any) -> Undo:
    def hook(module: Any, args: Any, output: Any) -> None:
        if module is model.model.layers[2]:
            output.mul_(torch.linspace(0.5, 2, output.shape[-1]))

    return torch.nn.modules.module.register_module_forward_hook(hook).remove


def _dictionary_of_hooks_replaced(model: Any) -> Undo:
    layer = model.model.layers[1]
    layer._forward_hooks = type(layer._forward_hooks)()
    return _hooked(model)


CHANGES = [
    _weight_written, _weight_replaced, _weight_moved, _buffer_replaced, _embedding_replaced, _head_replaced,
    _dtype_changed, _part_replaced, _activation_replaced, _layer_replaced, _layers_reordered, _fewer_layers,
    _class_replaced, _method_of_a_class_replaced, _forward_replaced, _number_changed, _setting_changed,
    _configuration_changed, _hooked, _hooked_inside, _hooked_before, _hooked_at_the_end, _hook_of_the_model,
    _hooked_globally, _dictionary_of_hooks_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.strip("_") for change in CHANGES])
def test_a_change_between_two_steps_takes_effect(change: Callable[[Any], Undo]) -> None:
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    plan = coded(plans(four_layers, 8))
    for programs, is_changed in ((False, True), (True, True), (False, False)):
        model = prepared(four_layers(), plan, programs)
        cache = filled(model, ids[:, :PROMPT])
        with program_runs() as ran, ExitStack() as stack:
            before = decoded(model, ids[:, : PROMPT + 3], cache, PROMPT)
            assert len(ran) == 3 * programs
            if is_changed:
                undo = change(model)
                stack.callback(undo or (lambda: None))
                torch.manual_seed(0)
            outputs.append(torch.cat([before, decoded(model, ids, cache, PROMPT + 3)], 1))
    assert distance(outputs[1], outputs[0]) < 2e-3
    assert distance(outputs[0][:, 3:], outputs[2][:, 3:]) > 0.02


def test_a_program_runs_again_after_weights_were_replaced() -> None:
    model, ids = prepared(four_layers(), coded(plans(four_layers, 8))), token_ids(1, PROMPT + 20)
    cache = filled(model, ids[:, :PROMPT])
    with program_runs() as ran:
        decoded(model, ids[:, : PROMPT + 10], cache, PROMPT)
        _weight_replaced(model)
        decoded(model, ids, cache, PROMPT + 10)
    assert len(ran) == 20 and ran[9] is not ran[10]


def test_a_hook_that_is_removed_lets_the_program_run_again() -> None:
    model, ids = prepared(four_layers(), coded(plans(four_layers, 8))), token_ids(1, PROMPT + 20)
    cache = filled(model, ids[:, :PROMPT])
    with program_runs() as ran:
        decoded(model, ids[:, : PROMPT + 5], cache, PROMPT)
        undo = _hooked(model)
        decoded(model, ids[:, : PROMPT + 10], cache, PROMPT + 5)
        assert undo is not None and len(ran) == 5
        undo()
        decoded(model, ids, cache, PROMPT + 10)
    assert len(ran) == 15 and len(set(map(id, ran))) == 1
