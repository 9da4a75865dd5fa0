"""Linear layers of a model with a plan on fhopt's GEMM kernels, in eager mode on CPU.

    before   y = F.linear(x, w, b)                torch repacks w in each call
    after    y = fhopt.codegen.linear(x, w, b)    up to 16 rows: one pass over w (fhopt/codegen/cpu/skinny_linear.py)

Decoding is bound by the memory traffic of weights and cache. For more rows a kernel is used if torch has no native GEMM
for the dtype (fhopt/codegen/cpu/wide_linear.py), otherwise torch's fastest way on this CPU
(fhopt/hardware/float_products.py). torch computes calls without a kernel as before: gradients, autocast, weights that
are neither plain contiguous tensors nor in a supported quantized format, graphs under compilation (which use
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
    """Use kernels for linear layers of `model` when they are faster; skips modules with a replaced `forward`."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and "forward" not in vars(module):
            vars(module)["forward"] = partial(_forward, module)  # pickle looks a method up as attribute `_forward`


def restore_products(model: torch.nn.Module) -> None:
    """Undo `replace_products`."""
    for module in model.modules():
        if is_replaced(module):
            del vars(module)["forward"]


def is_replaced(module: torch.nn.Module) -> bool:
    """Return whether `replace_products` replaced the forward of a module."""
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _forward(self: torch.nn.Linear, input: Tensor) -> Tensor:
    """Compute x [..., K] w^T [K, N] + bias [N] -> [..., N]."""
    weight, bias = self.weight, self.bias
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return linear(input, weight, bias)
    return product(input, weight, bias)


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer without gradients by a kernel if one applies, else in torch's fastest way."""
    output = codegen.dispatch_linear(input, weight, bias)
    return float_products.fastest_linear(input, weight, bias) if output is None else output
