"""Finding the LM head: its weight, the operations after it, and reasons for a miss."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import huggingface as zoo
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.lm_head.fitting import find_head
from fhopt.models.capture import capture
from fhopt.passes.recognize.find_lm_head import HeadSite

V, C, T = 50, 16, 5
FAMILIES = {
    "llama": ("lm_head.weight", "", False, 1.0, 0.0),
    "gemma2": ("model.embed_tokens.weight", "", True, 1.0, 30.0),
    "gpt2": ("transformer.wte.weight", "", True, 1.0, 0.0),
    "gptj": ("lm_head.weight", "lm_head.bias", False, 1.0, 0.0),
    "cohere": ("model.embed_tokens.weight", "", True, 0.0625, 0.0),
    "deepseek_v3": ("lm_head.weight", "", False, 1.0, 0.0),
    "t5": ("shared.weight", "", True, 1.0, 0.0),
    "whisper": ("model.decoder.embed_tokens.weight", "", True, 1.0, 0.0),
}
MODELS = {m.name: m for m in (*zoo.DECODERS, *zoo.ENCODER_DECODERS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_of_a_family_is_found(name: str) -> None:
    row = MODELS[name]
    model = zoo._make(row, row.implementations[-1])
    site = find_head(capture(model, (), row.inputs() | {"use_cache": False}))
    weight, bias, tied, scale, softcap = FAMILIES[name]
    assert (site.weight, site.bias, site.tied, site.scale, site.softcap) == (weight, bias, tied, scale, softcap)
    assert (site.vocabulary, site.width) == tuple(model.get_parameter(weight).shape)
    assert model.get_submodule(site.module).weight is model.get_parameter(weight)


Finish = Callable[["_Words", Tensor], Tensor]


class _Words(nn.Module):
    """A model without layers: an embedding, a norm, and `finish` from its hidden states to its output."""

    def __init__(self, finish: Finish) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(V, C), nn.LayerNorm(C)
        self.output, self.other = nn.Linear(C, V), nn.Linear(C, V, bias=False)
        self.shift, self.finish = nn.Parameter(torch.randn(V)), finish

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self, self.norm(self.embedding(ids)).tanh())


def site_of(finish: Finish) -> HeadSite:
    return find_head(capture(_Words(finish), (torch.randint(0, V, (2, T)),)))


def reason(finish: Finish) -> str:
    with pytest.raises(FhoptError, match="no head was found: ") as error:
        site_of(finish)
    return str(error.value).removeprefix("no head was found: ").partition(" Expected ")[0]


def capped(x: Tensor) -> Tensor:
    x = x / 5.0
    x.tanh_()
    return x.mul_(5.0)


SPELLINGS: dict[str, tuple[Finish, tuple[str, str, float, float]]] = {
    "linear": (lambda m, x: m.output(x), ("output.weight", "output.bias", 1.0, 0.0)),
    "functional": (lambda m, x: F.linear(x, m.embedding.weight), ("embedding.weight", "", 1.0, 0.0)),
    "matmul": (lambda m, x: x @ m.embedding.weight.t(), ("embedding.weight", "", 1.0, 0.0)),
    "einsum": (lambda m, x: torch.einsum("btc,vc->btv", x, m.embedding.weight), ("embedding.weight", "", 1.0, 0.0)),
    "added": (lambda m, x: x @ m.other.weight.T + m.shift, ("other.weight", "shift", 1.0, 0.0)),
    "scaled": (lambda m, x: m.other(x) * 0.25, ("other.weight", "", 0.25, 0.0)),
    "divided": (lambda m, x: m.output(x) / 8.0, ("output.weight", "output.bias", 0.125, 0.0)),
    "capped": (lambda m, x: capped(m.other(x)), ("other.weight", "", 1.0, 5.0)),
    "float": (lambda m, x: m.other(x).float(), ("other.weight", "", 1.0, 0.0)),
    "flat": (lambda m, x: m.other(x).view(-1, V), ("other.weight", "", 1.0, 0.0)),
    "last": (lambda m, x: m.other(x[:, -1:]), ("other.weight", "", 1.0, 0.0)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_head_is_found_in_every_spelling(name: str) -> None:
    finish, (weight, bias, scale, softcap) = SPELLINGS[name]
    site = site_of(finish)
    assert (site.weight, site.bias, site.scale, site.softcap) == (weight, bias, scale, softcap)
    assert site.tied == (weight == "embedding.weight")
    assert site.source.startswith("recognize/test_find_lm_head.py:")


def test_a_head_that_is_a_module_is_named_and_one_that_is_not_belongs_to_the_model() -> None:
    assert site_of(lambda m, x: m.output(x)).module == "output"
    assert site_of(lambda m, x: x @ m.output.weight.T).module == ""


MISSES: dict[str, tuple[Finish, str]] = {
    "two": (lambda m, x: m.output(x) + m.other(x), "logits come from 2 matmuls"),
    "none": (lambda m, x: x * m.shift[:C], "no projection leads to the logits"),
    "negative": (lambda m, x: -m.other(x), "expected a positive factor"),
    "log_softmax": (lambda m, x: m.other(x).log_softmax(-1), "differs between positions|softcap \\* tanh"),
    "relu": (lambda m, x: m.other(x).relu(), "expected a positive factor|softcap \\* tanh"),
    "masked": (lambda m, x: m.other(x).masked_fill(torch.arange(V) > 40, -torch.inf), "is not finite"),
    "part": (lambda m, x: m.other(x)[:, -1], "as of the matmul"),
    "made": (lambda m, x: F.linear(x, m.output.weight + m.other.weight), "the weight of the head is computed from"),
    "normed": (lambda m, x: F.linear(x, F.normalize(m.other.weight)), "and a stored parameter"),
    "stored": (lambda m, x: x[..., :8] @ m.embedding.weight.view(8, -1), "is stored as"),
    "constant": (lambda m, x: m.other(x) + torch.arange(V), "expected one bias"),
    "twice": (lambda m, x: m.output(x) + m.shift, "expected one bias"),
    "capped": (lambda m, x: capped(m.other(x)) + m.shift, "a bias is added to logits with a softcap"),
}


@pytest.mark.parametrize("name", MISSES)
def test_other_heads_are_not_found_with_a_reason(name: str) -> None:
    finish, why = MISSES[name]
    found = reason(finish)
    assert re.search(why, found), found


def test_a_model_without_logits_is_refused() -> None:
    class Flag(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1) > 0

    with pytest.raises(FhoptError, match="is not a matrix of logits"):
        find_head(capture(Flag(), (torch.randn(3, 4),)))


def test_a_bias_is_not_confused_with_another_parameter_of_its_shape() -> None:
    def finish(model: Any, x: Tensor) -> Tensor:
        return x @ model.other.weight.T + model.shift

    assert site_of(finish).bias == "shift"
