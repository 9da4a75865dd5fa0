"""Operations of layer programs: each one, in every layout, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from needs import needs_compiler
from torch import Tensor, nn
from torch.nn import functional as F
from traced_functions import Products, Traced

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as written in transformers."""
    long = x.to(torch.float32)
    long = long * torch.rsqrt(long.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * long.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighboring channels."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "number first": lambda x, y: 2.5 - x,
    "divide": lambda x, y: x / (y.abs() + 1),
    "number": lambda x, y: x * 0.5 + 3,
    "row and column": lambda x, y: x.mean(-1, keepdim=True) * y + x[:, :1],
    "sum": lambda x, y: (x * y).sum(-1),
    "silu": lambda x, y: F.silu(x) * y,
    "gelu": lambda x, y: F.gelu(x),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "relu": lambda x, y: F.relu(x),
    "squared relu": lambda x, y: F.relu(x).pow(2),
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "tanh": lambda x, y: torch.tanh(x / 5) * 5,
    "exp": lambda x, y: torch.exp(-x.abs()),
    "roots": lambda x, y: x.abs().sqrt() + (y.abs() + 1).rsqrt() + (y.abs() + 1).reciprocal(),
    "powers": lambda x, y: x.pow(3) + y.abs().pow(0.5),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5) + y.clamp(min=0.1),
    "larger": lambda x, y: torch.maximum(x, y) - torch.minimum(x, y),
    "transposed": lambda x, y: (x.transpose(0, 1) + y.transpose(0, 1)).transpose(0, 1).reshape(-1) * 2,
    "heads": lambda x, y: (x.view(3, 5, 4, 16).transpose(1, 2) * y.view(3, 5, 4, 16).transpose(1, 2)).flatten(1),
    "split": lambda x, y: x.split(32, -1)[1] * y.chunk(2, -1)[0],
    "expanded": lambda x, y: x[:, :, None].expand(3, 5, 2, 64).reshape(3, 10, 64) - 1,
    "cat": lambda x, y: torch.cat([x, -y], 1),
    "stack": lambda x, y: torch.stack([x, y], -1).flatten(-2),
    "in place": lambda x, y: (x * 1).add_(y).mul_(2),
    "in place on a part": lambda x, y: _changed_part(x + 0, y),
    "layer norm": lambda x, y: F.layer_norm(x, (64,), eps=1e-5),
    "rms norm": lambda x, y: F.rms_norm(x, (64,)),
    "cast": lambda x, y: (x.float() * 2).to(x.dtype),
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False) * 1,
}


def _changed_part(x: Tensor, y: Tensor) -> Tensor:
    kept = x.clone()
    x[..., :7].mul_(3)
    return x + kept * y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_agree_with_torch(name: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)
    traced = Traced(FUNCTIONS[name], [x, y], nn.Module())
    exact = FUNCTIONS[name](x.double(), y.double())
    assert traced.run().dtype == traced.result.dtype
    _expect_close(traced.run(), exact, traced.result.dtype)


def _expect_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert tuple(found.shape) == tuple(exact.shape)
    error, size = (found.double() - exact).abs().max(), exact.abs().max()
    assert float(error) <= (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * float(size) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [rotated, rotated_pairs])
def test_norms_and_rotations_of_models(rotate: Callable[..., Tensor], dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(64).to(dtype))

    def layer(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        heads = rms_norm(x, weight.to(x.dtype) if x.dtype == torch.float64 else weight)
        heads = heads.view(2, 1, 4, 16).transpose(1, 2)
        return rotate(heads, cos.unsqueeze(1), sin.unsqueeze(1)).transpose(1, 2).reshape(2, 1, 64)

    inputs = [torch.randn(2, 1, 64).to(dtype), torch.randn(2, 1, 16).to(dtype), torch.randn(2, 1, 16).to(dtype)]
    found = Traced(layer, inputs, module).run()
    _expect_close(found, layer(*[x.double() for x in inputs]).detach(), dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 12])
def test_matmuls_of_one_input_are_shared_between_threads(rows: int, threads: int) -> None:
    """Shares begin and end within weights, none of which is a multiple of the tile size."""
    module, x = nn.ModuleList(nn.Linear(300, columns) for columns in (1003, 77, 530)), torch.randn(1, rows, 300)

    def layer(x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in module], -1)

    torch.set_num_threads(threads)
    found = Traced(layer, [x], module).run()
    _expect_close(found, torch.cat([product.double()(x.double()) for product in module], -1).detach(), torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 5, 48), (48,)])
def test_matmuls_agree_with_torch(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    module, x = Products(dtype, bias), torch.randn(shape).to(dtype)
    traced = Traced(module, [x], module)
    found = traced.run()
    _expect_close(found, module.double()(x.double()).detach(), dtype)
