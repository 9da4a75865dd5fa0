"""Interception of matmuls with the head's weight in a module's forward pass."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fhopt.lm_head.module import RetrievalHead

log = logging.getLogger(__name__)


class ProductMode(TorchFunctionMode):
    """Torch function mode that computes matmuls of hidden states with a head's weight by the retrieval head.

    It recognizes linear(x, W, b), x @ W.T, mm, matmul, addmm(b, x, W.T) and einsum. `seen`: whether it recognized one.
    """

    def __init__(self, head: RetrievalHead) -> None:
        super().__init__()
        self.head, self.seen = head, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the search instead of a matmul with the weight; call any other function unchanged."""
        kwargs = kwargs or {}
        hidden_of = _SPELLINGS.get(func)
        hidden = None if hidden_of is None else hidden_of(self, *args, **kwargs)
        if hidden is None:
            return func(*args, **kwargs)
        self.seen = True
        with torch._C.DisableTorchFunction():
            if self.head.codes.device != hidden.device:  # the model was moved; the head is not a submodule
                self.head.to(hidden.device)
            return self.head(hidden)

    def is_weight(self, x: Any, transposed: bool = False) -> bool:
        """Return whether x is the weight, or a transposed view of it."""
        weight = self.head.weight
        if x is weight:
            return not transposed
        if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype != weight.dtype or x.data_ptr() != weight.data_ptr():
            return False
        shape, strides = (weight.shape[::-1], weight.stride()[::-1]) if transposed else (weight.shape, weight.stride())
        return x.shape == shape and x.stride() == strides


def _hidden_of_linear(mode: ProductMode, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return input if mode.is_weight(weight) and bias is mode.head.bias else None


def _hidden_of_product(mode: ProductMode, left: Tensor, right: Tensor, **others: Any) -> Tensor | None:
    return left if not others and mode.head.bias is None and mode.is_weight(right, transposed=True) else None


def _hidden_of_addmm(mode: ProductMode, bias: Tensor, left: Tensor, right: Tensor, **others: Any) -> Tensor | None:
    return left if not others and mode.head.bias is bias and mode.is_weight(right, transposed=True) else None


def _hidden_of_einsum(mode: ProductMode, equation: Any, *operands: Any) -> Tensor | None:
    if mode.head.bias is not None or len(operands) != 2 or not isinstance(equation, str):
        return None
    written, _, result = equation.replace(" ", "").partition("->")
    names, at = written.split(","), 0 if mode.is_weight(operands[0]) else 1
    if len(names) != 2 or not mode.is_weight(operands[at]) or len(names[at]) != 2:
        return None
    rows, word, channel = names[1 - at], names[at][0], names[at][1]
    fits = rows.endswith(channel) and word not in rows and result == rows[:-1] + word
    return operands[1 - at] if fits else None


_SPELLINGS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _hidden_of_linear,
    torch.matmul: _hidden_of_product, Tensor.matmul: _hidden_of_product, Tensor.__matmul__: _hidden_of_product,
    torch.mm: _hidden_of_product, Tensor.mm: _hidden_of_product,
    torch.addmm: _hidden_of_addmm,
    torch.einsum: _hidden_of_einsum,
}  # fmt: skip


class HeadHooks:
    """Hooks that enter `ProductMode` around the forward of a module. In graphs of torch.compile the head is dense."""

    def __init__(self, owner: nn.Module, name: str, head: RetrievalHead) -> None:
        self.name, self.head, self.entered = name, head, threading.local()
        self.handles = (
            owner.register_forward_pre_hook(self.enter),
            owner.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, owner: nn.Module, args: Any) -> None:
        """Enter the mode, unless `owner` belongs to a copy of the model with other weights."""
        if torch.compiler.is_compiling():
            return
        stack = self.entered.__dict__.setdefault("stack", [])
        stack.append(ProductMode(self.head) if owner.get_parameter(self.name) is self.head.weight else None)
        if stack[-1] is not None:
            stack[-1].__enter__()

    def leave(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Leave the mode, also after an error."""
        if torch.compiler.is_compiling():
            return
        mode = self.entered.stack.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
            if not mode.seen:
                _warn_unrecognized(type(owner).__name__)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHooks:
        copied = object.__new__(HeadHooks)
        memo[id(self)] = copied
        copied.name, copied.entered = self.name, threading.local()
        copied.head, copied.handles = copy.deepcopy((self.head, self.handles), memo)
        return copied


@functools.cache
def _warn_unrecognized(name: str) -> None:
    """Warn, once per class, that its matmul with the weight was not recognized."""
    log.warning(
        "%s computed its logits with an unknown operation, so its head stays dense. Call "
            "fhopt.lm_head.RetrievalHead there, or write linear(hidden, weight).", name,
    )  # fmt: skip
