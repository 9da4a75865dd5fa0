"""Interception of the product with the head's weight in a module's forward pass."""

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


# --------------------------------------------------------------------------------------------------- products


class Products(TorchFunctionMode):
    """While it is entered, products of hidden states with the weight of a head are searched, however they are spelled.

    linear(x, W, b), x @ W.T, mm, matmul, addmm(b, x, W.T) and einsum. `seen`: that there was one.
    """

    def __init__(self, after: RetrievalHead) -> None:
        super().__init__()
        self.after, self.seen = after, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The search in place of the product; everything else as it is."""
        kwargs = kwargs or {}
        spelled = _SPELLINGS.get(func)
        hidden = None if spelled is None else spelled(self, *args, **kwargs)
        if hidden is None:
            return func(*args, **kwargs)
        self.seen = True
        with torch._C.DisableTorchFunction():
            if self.after.codes.device != hidden.device:  # the model was moved, and nobody told the head
                self.after.to(hidden.device)
            return self.after(hidden)

    def is_weight(self, x: Any, turned: bool = False) -> bool:
        """True for the weight, or for a view of it with its axes exchanged."""
        weight = self.after.weight
        if x is weight:
            return not turned
        if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype != weight.dtype or x.data_ptr() != weight.data_ptr():
            return False
        shape, strides = (weight.shape[::-1], weight.stride()[::-1]) if turned else (weight.shape, weight.stride())
        return x.shape == shape and x.stride() == strides


def _by_linear(mode: Products, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return input if mode.is_weight(weight) and bias is mode.after.bias else None


def _by_product(mode: Products, left: Tensor, right: Tensor, **others: Any) -> Tensor | None:
    return left if not others and mode.after.bias is None and mode.is_weight(right, turned=True) else None


def _by_addmm(mode: Products, bias: Tensor, left: Tensor, right: Tensor, **others: Any) -> Tensor | None:
    return left if not others and mode.after.bias is bias and mode.is_weight(right, turned=True) else None


def _by_einsum(mode: Products, equation: Any, *operands: Any) -> Tensor | None:
    if mode.after.bias is not None or len(operands) != 2 or not isinstance(equation, str):
        return None
    written, _, result = equation.replace(" ", "").partition("->")
    names, at = written.split(","), 0 if mode.is_weight(operands[0]) else 1
    if len(names) != 2 or not mode.is_weight(operands[at]) or len(names[at]) != 2:
        return None
    rows, word, channel = names[1 - at], names[at][0], names[at][1]
    fits = rows.endswith(channel) and word not in rows and result == rows[:-1] + word
    return operands[1 - at] if fits else None


_SPELLINGS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _by_linear,
    torch.matmul: _by_product, Tensor.matmul: _by_product, Tensor.__matmul__: _by_product,
    torch.mm: _by_product, Tensor.mm: _by_product,
    torch.addmm: _by_addmm,
    torch.einsum: _by_einsum,
}  # fmt: skip


class HeadHooks:
    """A head in the forward of a module: hooks enter `Products` around it. In graphs of torch.compile it is dense."""

    def __init__(self, owner: nn.Module, name: str, after: RetrievalHead) -> None:
        self.name, self.after, self.entered = name, after, threading.local()
        self.handles = (
            owner.register_forward_pre_hook(self.before),
            owner.register_forward_hook(self.behind, always_call=True),
        )

    def before(self, owner: nn.Module, args: Any) -> None:
        """Enter, unless this is a copy of the model, which has weights of its own."""
        if torch.compiler.is_compiling():
            return
        stack = self.entered.__dict__.setdefault("stack", [])
        stack.append(Products(self.after) if owner.get_parameter(self.name) is self.after.weight else None)
        if stack[-1] is not None:
            stack[-1].__enter__()

    def behind(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Leave, after an error too."""
        if torch.compiler.is_compiling():
            return
        mode = self.entered.stack.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
            if not mode.seen:
                _warn_of_spelling(type(owner).__name__)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHooks:
        made = object.__new__(HeadHooks)
        memo[id(self)] = made
        made.name, made.entered = self.name, threading.local()
        made.after, made.handles = copy.deepcopy((self.after, self.handles), memo)
        return made


@functools.cache
def _warn_of_spelling(name: str) -> None:
    """Once for each class."""
    log.warning(
        "A forward of %s made its logits in a way that is not watched: that head is dense. Call "
        "fhopt.lm_head.RetrievalHead there, or write linear(hidden, weight).", name,
    )  # fmt: skip
