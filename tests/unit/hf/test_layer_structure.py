"""Layers of equal structure: recognized, given their own weights, and distinguished if they differ."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from needs import needs_compiler
from small_models import tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.codegen.layers.trace import UnsupportedError
from fhopt.hf import layer_programs, layer_trace
from fhopt.hf.apply import latent_cache
from fhopt.hf.layer_programs import STATE, program_reasons
from fhopt.hf.layer_structure import structure_of, twin_of, weight_places, weights_at
from fhopt.hf.layer_trace import Weight

ARGUMENTS: tuple[Any, ...] = ((torch.ones(1, 1, 64),), {"position_ids": torch.ones(1, 1), "use_cache": True})


def layers() -> list[Any]:
    return list(tiny_llama(num_hidden_layers=3).model.layers)


def test_layers_of_a_model_differ_only_in_their_index() -> None:
    structures = {structure_of(layer, *ARGUMENTS) for layer in layers()}
    assert len(structures) == 1


def _other_option(layer: Any) -> None:
    layer.self_attn.scaling *= 2


def _other_object(layer: Any) -> None:
    layer.self_attn.config = copy.copy(layer.self_attn.config)


def _other_class(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.GELU()


def _other_shape(layer: Any) -> None:
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.ones(97, 64))


def _other_dtype(layer: Any) -> None:
    layer.mlp.up_proj.half()


def _more_weights(layer: Any) -> None:
    layer.mlp.up_proj.bias = torch.nn.Parameter(torch.ones(96))


def _more_modules(layer: Any) -> None:
    layer.mlp.dropout = torch.nn.Dropout()


@pytest.mark.parametrize(
    "change", [_other_option, _other_object, _other_class, _other_shape, _other_dtype, _more_weights, _more_modules]
)
def test_any_other_difference_is_noticed(change: Callable[[Any], None]) -> None:
    one, other, _ = layers()
    change(other)
    assert structure_of(one, *ARGUMENTS) != structure_of(other, *ARGUMENTS)


@pytest.mark.parametrize(
    "args,kwargs",
    [
        ((torch.ones(2, 1, 64),), ARGUMENTS[1]),
        ((torch.ones(1, 1, 64, dtype=torch.bfloat16),), ARGUMENTS[1]),
        (ARGUMENTS[0], {"position_ids": torch.ones(1, 1), "use_cache": False}),
        (ARGUMENTS[0], {"position_ids": None, "use_cache": True}),
        (ARGUMENTS[0], {"use_cache": True}),
    ],
)
def test_other_arguments_are_noticed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer = layers()[0]
    assert structure_of(layer, args, kwargs) != structure_of(layer, *ARGUMENTS)


def test_weights_are_in_the_same_places() -> None:
    one, other, _ = layers()
    holder = one.mlp.up_proj._parameters
    weights = {7: Weight(holder, "weight", one.mlp.up_proj.weight, one.mlp.up_proj.weight.data_ptr())}
    (found,) = weights_at(other, weight_places(one, weights)).values()
    assert found.tensor is other.mlp.up_proj.weight and found.address == found.tensor.data_ptr()
    assert found.holder is other.mlp.up_proj._parameters and found.is_current()


# --------------------------------------------------------------------------------------------------- in a model


def three_layers() -> Any:
    return tiny_llama(num_hidden_layers=3)


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the layers that are traced."""
    seen: list[Any] = []
    rehearse = layer_trace.rehearse

    def watched(layer: Any, *rest: Any) -> Any:
        seen.append(layer)
        return rehearse(layer, *rest)

    monkeypatch.setattr(layer_programs, "rehearse", watched)
    return seen


def decoded(model: Any, ids: Tensor, programs: bool = True) -> Any:
    fhopt.prepare(fhopt.apply(model, coded(plans(three_layers, 8)), layer_programs=programs))
    return logits(model, latent_cache(model), ids, list(range(40, 60)))


@needs_compiler
def test_one_layer_is_traced_for_all(rehearsals: list[Any]) -> None:
    model, ids = three_layers(), token_ids(1, 60)
    expected, output = decoded(three_layers(), ids, False), decoded(model, ids)
    assert set(rehearsals) == {model.model.layers[0]} and set(program_reasons(model).values()) == {""}
    assert float((output - expected).norm() / expected.norm()) < 1e-3


@needs_compiler
def test_a_layer_that_uses_its_index_differently_is_traced_separately(
    rehearsals: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its outputs show the difference."""
    model = three_layers()
    kind = type(model.model.layers[0])
    forward = kind.forward

    def by_number(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (1.0 if self.self_attn.layer_idx != 1 else 3.0)

    monkeypatch.setattr(kind, "forward", by_number)
    ids = token_ids(1, 60)
    expected, output = decoded(three_layers(), ids, False), decoded(model, ids)
    assert set(rehearsals) == set(model.model.layers)
    assert float((output - expected).norm() / expected.norm()) < 1e-3


@needs_compiler
def test_a_layer_with_other_outputs_than_its_equals_is_traced_separately(
    rehearsals: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its attributes nor its index show the difference."""
    model, ids, odd = three_layers(), token_ids(1, 60), weakref.WeakSet[Any]()
    kind = type(model.model.layers[0])
    forward = kind.forward

    def by_object(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (3.0 if self in odd else 1.0)

    monkeypatch.setattr(kind, "forward", by_object)
    other = three_layers()
    odd.update([model.model.layers[1], other.model.layers[1]])
    expected, output = decoded(other, ids, False), decoded(model, ids)
    first, second, third = model.model.layers
    assert set(rehearsals) == {first, second} and vars(second)[STATE].known.unlike
    assert not vars(third)[STATE].known.unlike
    assert float((output - expected).norm() / expected.norm()) < 1e-3


def test_a_copy_with_another_index_shares_the_weights() -> None:
    layer = layers()[2]
    twin: Any = twin_of(layer, True)
    assert twin.self_attn.layer_idx == 0 and layer.self_attn.layer_idx == 2
    assert type(twin) is type(layer) and twin.self_attn is not layer.self_attn
    assert twin.mlp.up_proj.weight is layer.mlp.up_proj.weight
    same: Any = twin_of(layer, False)
    assert same.self_attn.layer_idx == 2
    x = torch.randn(1, 3, 64)
    assert torch.equal(twin.mlp(x), layer.mlp(x)) and torch.equal(same.mlp(x), layer.mlp(x))


def test_a_weight_that_programs_do_not_support_is_refused() -> None:
    one, other, _ = layers()
    holder = one.mlp.up_proj._parameters
    places = weight_places(one, {7: Weight(holder, "weight", one.mlp.up_proj.weight, 0)})

    class Strange(torch.nn.Parameter):
        """A parameter subclass that stores its values differently."""

    other.mlp.up_proj.weight = Strange(torch.ones(96, 64))
    with pytest.raises(UnsupportedError, match="Strange"):
        weights_at(other, places)
