"""Linear layers of a model with a plan by kernels, in eager mode on a CPU.

    before   y = F.linear(x, w, b)                torch brings w into an order of its own, in each call
    after    y = fhopt.codegen.linear(x, w, b)    of up to 16 rows: w is read once (fhopt/codegen/cpu/skinny_linear.py)

Decoding is bound by reading weights and cache. More rows go to a kernel where torch has only loops for their type
(fhopt/codegen/cpu/wide_linear.py), else the fastest way that torch has on this CPU (fhopt/hardware/float_products.py).
Calls that no kernel serves are torch's as before: gradients, autocast, weights that are neither plain dense tensors nor
kept in a way that a kernel reads, graphs that are being compiled (which have ways of their own,
fhopt/codegen/cpu/graph_kernels.py), and all calls until the kernels are built.

Letters: M rows, K width of the input, N width of the output.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fhopt import codegen
from fhopt.hardware import float_products


def replace_products(model: torch.nn.Module) -> None:
    """Let linear layers of `model` multiply by kernels where these are faster; none whose `forward` is not torch's."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and "forward" not in vars(module):
            vars(module)["forward"] = partial(_forward, module)  # a method would be pickled as the attribute `_forward`


def restore_products(model: torch.nn.Module) -> None:
    """Undo `replace_products`."""
    for module in model.modules():
        if is_replaced(module):
            del vars(module)["forward"]


def is_replaced(module: torch.nn.Module) -> bool:
    """Return whether the products of a module are those of `replace_products`."""
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _forward(self: torch.nn.Linear, input: Tensor) -> Tensor:
    """Compute x [..., K] w^T [K, N] + bias [N] -> [..., N]."""
    weight, bias = self.weight, self.bias
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return linear(input, weight, bias)
    return product(input, weight, bias)


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer without gradients by a kernel where one serves, else in torch's fastest way."""
    output = codegen.linear(input, weight, bias)
    return float_products.linear(input, weight, bias) if output is None else output
