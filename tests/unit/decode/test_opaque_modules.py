"""Modules that run as in the model: which ones, and that a recording leaves their state as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fhopt.decode.opaque_modules import StatefulError, failed_module, unchanged_state


class AttendingMixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class FailingExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FailingModule()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


class FailingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.count = nn.Buffer(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


class MixedLayer(nn.Module):
    def __init__(self, with_attention: bool) -> None:
        super().__init__()
        self.mixer = AttendingMixer() if with_attention else FailingExperts()
        self.experts = FailingExperts()

    def forward(self, x: Tensor, first: bool) -> Tensor:
        made: Tensor = (self.mixer if first else self.experts)(x)
        return made


class MixedNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MixedLayer(True), MixedLayer(False)])

    def forward(self, x: Tensor, index: int, first: bool) -> Tensor:
        made: Tensor = self.layers[index](x, first)
        return made


def _attentions(model: MixedNetwork) -> frozenset[int]:
    return frozenset(id(m) for m in model.modules() if isinstance(m, AttendingMixer))


@pytest.mark.parametrize(("index", "first", "name"), [(0, False, "layers.0.experts"), (1, True, "layers.1.mixer")])
def test_the_outermost_module_without_attention_is_opaque(index: int, first: bool, name: str) -> None:
    model = MixedNetwork()
    with pytest.raises(ValueError, match="no") as caught:
        model(torch.ones(1), index, first)
    assert failed_module(model, caught.value, _attentions(model)) is model.get_submodule(name)


def test_a_failure_outside_modules_has_none() -> None:
    assert failed_module(MixedNetwork(), ValueError("no"), frozenset()) is None


def test_a_module_that_changes_an_attribute_is_found_and_restored() -> None:
    model = MixedNetwork()
    inner: Any = model.layers[1].mixer.inner
    with (
        pytest.raises(StatefulError, match="FailingModule changes its attributes") as caught,
        unchanged_state(model, frozenset()),
    ):
        inner.state = torch.ones(1)
    assert inner.state is None
    assert failed_module(model, caught.value, _attentions(model)) is model.layers[1].mixer


def test_the_state_of_opaque_modules_is_restored() -> None:
    model = MixedNetwork()
    inner: Any = model.layers[1].mixer.inner
    with unchanged_state(model, frozenset({FailingExperts})):
        inner.state = torch.ones(1)
        inner.count.add_(1)
    assert inner.state is None and not inner.count.any()


def test_added_attributes_stay() -> None:
    model: Any = MixedNetwork()
    with unchanged_state(model, frozenset()):
        model.marked = True
    assert model.marked
