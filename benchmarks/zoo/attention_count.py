"""Count of softmax attentions by observing the executed operators, independently of graph analysis.

    with Counting(parameters) as seen: model(...)
    seen.attentions                                    softmax(product of two activations), then a product with values

Every output tensor of an operator is tracked: a matmul of two activations makes scores; operators that do not mix
elements (sums with masks, views, casts) preserve scores; their softmax makes weights; a matmul with weights is an
attention. Fused attention operators are counted per call. A matmul with a bare weight makes no scores, which
distinguishes routers, poolings and mixtures from attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FUSED = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_fused",
    "_scaled_dot_product_cudnn_attention", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
)  # fmt: skip
PRODUCTS: dict[str, tuple[int, int]] = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
SOFTMAX = {"_softmax", "_safe_softmax"}
# operators that combine many elements into one
BREAK_NAMES = """
    convolution native_layer_norm native_group_norm sum mean amax amin argmax topk sort embedding var std norm cumsum
    linalg_vector_norm _log_softmax max min any all logsumexp _fused_rms_norm scatter_add index_add
"""
BREAKS = frozenset(BREAK_NAMES.split())


class Counting(TorchDispatchMode):
    """Count of the attentions of all calls inside. parameters: weights, whose matmuls are projections."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[int] = set()
        self.fused = 0
        self._fixed = {id(p) for p in parameters}  # weights, and views of them
        self._scores: dict[int, frozenset[int]] = {}
        self._weights: dict[int, frozenset[int]] = {}
        self._kept: list[Any] = [*parameters]  # no tensor is freed, so that no identity is reused
        self._events = 0

    @property
    def attentions(self) -> int:
        """Attentions so far; weights that multiply several values count once."""
        return len(self.found) + self.fused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and track its outputs."""
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._kept += [*inputs, *outputs]
        self._follow(func.overloadpacket.__name__.rstrip("_"), args, inputs, outputs)
        return result

    def _follow(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name.startswith(FUSED):
            self.fused += 1
        elif name in PRODUCTS:
            left, right = PRODUCTS[name]
            self._multiply(args[left], args[right], outputs[0])
        elif name in SOFTMAX and id(inputs[0]) in self._scores:
            self._weights[id(outputs[0])] = frozenset([self._event()])
        elif name not in BREAKS and name not in SOFTMAX:
            self._pass_on(inputs, outputs)

    def _multiply(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        weights = self._weights.get(id(left)) or self._weights.get(id(right))
        if weights:
            self.found |= weights
        elif id(left) not in self._fixed and id(right) not in self._fixed:
            self._scores[id(output)] = frozenset([self._event()])

    def _pass_on(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for marks in (self._scores, self._weights):
            carried = frozenset().union(*(marks.get(id(x), frozenset()) for x in inputs))
            if carried:
                marks.update({id(x): carried for x in outputs})
        if inputs and all(id(x) in self._fixed for x in inputs):
            self._fixed |= {id(x) for x in outputs}

    def _event(self) -> int:
        self._events += 1
        return self._events


def count(call: Any, parameters: Iterable[Tensor]) -> int:
    """Count the attentions of `call()`, without gradients."""
    with torch.no_grad(), Counting(parameters) as seen:
        call()
    return seen.attentions
