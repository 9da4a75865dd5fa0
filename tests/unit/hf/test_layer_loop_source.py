"""Loops that only call layers are recognized by their source, others are not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from fhopt.hf.layer_loop import CallLoop, call_loop


class Loops:
    """Forward methods that loop over `blocks`."""

    blocks: Any
    norm: Any
    masks: Any

    def plain(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x

    def counted(self, x: Any, mask: Any, **options: Any) -> Any:
        for i, block in enumerate(self.blocks[:3]):
            x = block(x, mask[self.masks[i]], kind=block.kind, **options)
        return self.norm(x)

    def has_options(self, x: Any, mask: Any, **options: Any) -> Any:
        for _, block in enumerate(self.blocks[: self.masks.count]):
            x = block(x, mask, scale=self.masks.scale, **options)
        return x

    def names_its_layer(self, x: Any, mask: Any) -> Any:
        for block in self.blocks:
            x = block(x, mask[block.kind])
        return x

    def gives_it_twice(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x, residual=x)
        return x

    def keeps_the_last_number(self, x: Any) -> Any:
        for i, block in enumerate(self.blocks):  # noqa: B007
            x = block(x)
        return x, i

    def first_of_several(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)[0]
        return x

    def collects(self, x: Any) -> Any:
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return seen

    def changes(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x + 1)
        return x

    def keeps(self, x: Any) -> Any:
        y = x
        for block in self.blocks:
            y = block(x)
        return y

    def computes(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x, self.norm(x))
        return x

    def names_it_elsewhere(self, x: Any) -> Any:
        last = self.blocks[-1]
        for block in self.blocks:
            x = block(x)
        return last, x

    def calls_another(self, x: Any) -> Any:
        for _ in self.blocks:
            x = self.norm(x)
        return x

    def walks_twice(self, x: Any) -> Any:
        for block in self.blocks[:2]:
            x = block(x)
        x += 1
        for block in self.blocks[2:]:
            x = block(x)
        return x

    def walks_again(self, x: Any) -> Any:
        for _ in range(3):
            for block in self.blocks:
                x = block(x)
        return x

    def leaves_some_out(self, x: Any) -> Any:
        for block in (b for b in self.blocks if b not in self.masks):
            x = block(x)
        return x

    def walks_with_others(self, x: Any) -> Any:
        for block, other in zip(self.blocks, self.masks, strict=True):
            x = other(x, block)
        return x

    def compares(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x, last=block is self.norm)
        return x

    def has_more(self, x: Any) -> Any:
        for block in self.blocks + self.masks:
            x = block(x)
        return x

    def calls_before_each(self, x: Any) -> Any:
        for block in self.norm(self.blocks):
            x = block(x)
        return x

    def hands_itself_on(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.norm(self, x)

    def calls_above(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return super().__init__() or x

    def adds_up(self, x: Any, y: Any) -> Any:
        for block in self.blocks:
            x = block(x, y + 1)
        return x

    def has_an_end(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        else:
            x = self.norm(x)
        return x

    def without(self, x: Any) -> Any:
        return self.norm(x)


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("plain", True),
        ("first_of_several", True),
        ("has_options", True),
        ("counted", False),
        ("names_its_layer", False),
        ("gives_it_twice", False),
        ("keeps_the_last_number", False),
    ],
)
def test_a_loop_that_only_calls_layers_is_recognized_by_its_source(name: str, alike: bool) -> None:
    assert call_loop(getattr(Loops, name), "blocks") == CallLoop(alike)
    assert not call_loop(getattr(Loops, name), "layers")


@pytest.mark.parametrize(
    "name",
    [
        "collects",
        "changes",
        "keeps",
        "computes",
        "names_it_elsewhere",
        "calls_another",
        "walks_twice",
        "walks_again",
        "leaves_some_out",
        "walks_with_others",
        "compares",
        "has_more",
        "calls_before_each",
        "hands_itself_on",
        "calls_above",
        "adds_up",
        "has_an_end",
        "without",
    ],
)
def test_a_loop_that_does_more_is_not_recognized(name: str) -> None:
    assert not call_loop(getattr(Loops, name), "blocks")


def test_a_method_without_source_is_not_recognized() -> None:
    assert not call_loop(str.join, "blocks")
    made: dict[str, Any] = {}
    exec("def run(self, x):\n    for block in self.blocks:\n        x = block(x)\n    return x", made)
    assert not call_loop(made["run"], "blocks")


def test_a_wrapped_method_is_not_judged_by_the_source_of_the_original() -> None:
    @functools.wraps(Loops.plain)
    def adds(self: Any, x: Any) -> Any:
        for block in self.blocks:
            x = block(x).add_(1)
        return x

    assert not call_loop(adds, "blocks")
    assert call_loop(torch.no_grad()(Loops.plain), "blocks")


def test_the_loop_of_a_transformers_model_is_recognized() -> None:
    assert call_loop(LlamaModel.forward, "layers") == CallLoop(alike=True)
