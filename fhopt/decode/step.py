"""Attention of one layer in a decode program: natively on a prepared cache layer, or as an ordinary call.

Letters: B sequences, H query heads, G kv heads, S new tokens, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.fx import Node

from fhopt.codegen.programs.native_step import SegmentCalls
from fhopt.decode.cache_steps import CacheStep, StepTensors, prepare_step

Attend = Callable[..., tuple[Tensor, Any]]  # an attention function of transformers' interface


class AttentionStep:
    """Cache update and attention of one layer. Segments write queries, keys and values to `tensors`.

    calls: the segments before and after it; set before the first run.
    """

    def __init__(self, node: Node, attend: Attend) -> None:
        self.call, self._attend = node.meta["attention"], attend
        operands: Any = node.args[1:]
        self.mask, self.sinks = operands[3:]
        self.tensors = StepTensors(_dense(operands[0]), _dense(operands[1]), _dense(operands[2]), _dense(node))
        named = self.tensors.query, self.tensors.keys, self.tensors.values
        self.operands: dict[Node, Tensor] = dict(zip(operands, named, strict=False))  # nodes that segments store
        self.calls: SegmentCalls = (None, None)
        options, size = self.call.options, self.tensors.query.shape
        scaling = options.get("scaling")
        self._options = {
            "scale": size[3] ** -0.5 if scaling is None else scaling,
            "softcap": options.get("softcap") or 0.0,
        }
        is_causal = options.get("is_causal", getattr(self.call.module, "is_causal", True))
        self._is_single = size[2] == 1 and bool(is_causal) and self.sinks is None and self.mask is None
        self._steps: WeakKeyDictionary[Any, CacheStep] = WeakKeyDictionary()  # by the layer of a cache
        self._recent: tuple[Any, Any] = (None, None)  # weak references to the last cache layer and its step

    def prepared(self, cache: Any, threads: int) -> CacheStep | None:
        """Return the prepared step on a cache; None if it needs an ordinary call."""
        if not self._is_single:
            return None
        layer = cache.layers[self.call.layer]
        known, of_it = self._recent
        step: CacheStep | None = of_it() if known is not None and known() is layer else self._steps.get(layer)
        if step is not None and (step.is_current(layer, threads) or step.move(layer, threads)):
            return step
        if cache.offloading:
            return None
        step = prepare_step(layer, self.calls, self.tensors, self._options, threads)
        if step is not None:
            self._steps[layer] = step
            self._recent = ref(layer), ref(step)
        return step

    def run(self, cache: Any, mask: Tensor | None, sinks: Tensor | None) -> None:
        """Update the cache and attend to it with an ordinary call."""
        tensors, call = self.tensors, self.call
        keys, values = cache.update(tensors.keys.clone(), tensors.values.clone(), call.layer)
        options = dict(call.options) if sinks is None else {**call.options, "s_aux": sinks}
        attended, _ = self._attend(call.module, tensors.query, keys, values, mask, **options)
        tensors.attended.copy_(attended)


def _dense(node: Any) -> Tensor:
    """Return a new dense tensor like the value of a node."""
    like: Tensor = node.meta["val"]
    return torch.empty(like.shape, dtype=like.dtype)
