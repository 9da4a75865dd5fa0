"""Operations of decode programs: each one, on inputs, results and weights, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowered_functions import CapturedFunction, expect_close, gated_mlp, mlp_weights
from needs import needs_compiler
from quantized_blocks import random_rows
from torch import Tensor
from torch.nn import functional as F

from fhopt.codegen.cpu import gguf_blocks, graph_kernels
from fhopt.codegen.programs.lowering import LoweringError, base_name
from fhopt.codegen.programs.operations import HANDLERS, IN_PLACE, VIEWS

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATMULS = {"mm", "addmm", "fhopt::linear_kernel"}  # with tests of their own
aten = torch.ops.aten

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: aten.add.Tensor(x, y),
    "sub": lambda x, y: aten.sub.Tensor(x, y[:, :1]),
    "rsub": lambda x, y: aten.rsub.Scalar(x, 2.5) * aten.rsub.Tensor(x, y),
    "mul": lambda x, y: aten.mul.Tensor(aten.mul.Scalar(x, 3), y[..., :1]),
    "div": lambda x, y: aten.div.Tensor(x, y.abs() + 1),
    "maximum": lambda x, y: aten.maximum(x, y),
    "minimum": lambda x, y: aten.minimum(x, y),
    "neg": lambda x, y: aten.neg(x),
    "abs": lambda x, y: aten.abs(x),
    "sqrt": lambda x, y: aten.sqrt(x.abs()),
    "rsqrt": lambda x, y: aten.rsqrt(x.abs() + 1),
    "reciprocal": lambda x, y: aten.reciprocal(x.abs() + 1),
    "exp": lambda x, y: aten.exp(x),
    "tanh": lambda x, y: aten.tanh(x),
    "sigmoid": lambda x, y: aten.sigmoid(x * 8),
    "silu": lambda x, y: aten.silu(x * 8),
    "relu": lambda x, y: aten.relu(x),
    "cos": lambda x, y: aten.cos(x),
    "sin": lambda x, y: aten.sin(x),
    "gelu": lambda x, y: aten.gelu(x) + aten.gelu(y * 2, approximate="tanh"),
    "pow": lambda x, y: x.pow(3) + y.pow(2) + y.abs().pow(0.5) + (x.abs() + 1).pow(-0.5),
    "clamp": lambda x, y: aten.clamp(x, -0.5, 0.5) + aten.clamp.Tensor(y, x, x + 1) + aten.clamp(x, max=0.1),
    "clamp_min": lambda x, y: aten.clamp_min(x, 0.1),
    "mean": lambda x, y: aten.mean.dim(x, [-1], True) * aten.mean.dim(y, [2]).unsqueeze(-1) + aten.mean(y[0, 0]),
    "sum": lambda x, y: aten.sum.dim_IntList(x * y, [-1], True) + x.sum(2)[..., None] + y[1, 1].sum(),
    "clone": lambda x, y: aten.clone(x.transpose(0, 1), memory_format=torch.contiguous_format) + 1,
    "_to_copy": lambda x, y: aten._to_copy(x.float() * 2, dtype=x.dtype),
    "cat": lambda x, y: aten.cat([x, -y, x[:, :2]], 1) + 1,
    "stack": lambda x, y: aten.stack([x, y], -1) + aten.stack([y, x], 3),
    "native_layer_norm": lambda x, y: aten.native_layer_norm(x + 3, [64], y[0, 0], y[0, 1], 1e-5)[0],
}
# Views of [3, 5, 64].
REORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: aten.view(x, [3, 5, 4, 16]),
    "_unsafe_view": lambda x: aten._unsafe_view(x, [3, 5, 8, 8]),
    "t": lambda x: aten.t(x[1]),
    "transpose": lambda x: aten.transpose(x, 0, 2),
    "permute": lambda x: aten.permute(x, [2, 0, 1]),
    "unsqueeze": lambda x: aten.unsqueeze(x, 1),
    "squeeze": lambda x: aten.squeeze.dim(aten.squeeze(x[:, :1])[:, None], 1),
    "expand": lambda x: aten.expand(x[:, :1, None], [3, 2, 4, 64]),
    "select": lambda x: aten.select(x, 1, 2),
    "slice": lambda x: aten.slice(x, 2, 3, 60, 5),
    "split": lambda x: aten.split(x, 24, -1)[1] * aten.split(x, 24, -1)[0],
    "split_with_sizes": lambda x: aten.split_with_sizes(x, [10, 44, 10], 2)[1],
    "unbind": lambda x: aten.unbind(x, 1)[4],
    "detach": lambda x: aten.detach(x),  # traced as alias
    "alias": lambda x: aten.alias(x),
    "squeeze_": lambda x: aten.squeeze_.dim(aten.unsqueeze(x, 0), 0),
    "unsqueeze_": lambda x: aten.unsqueeze_(aten.alias(x), -1),
}


def test_every_operation_is_tested() -> None:
    assert set(OPERATIONS) | MATMULS == set(HANDLERS) and set(REORDERED) == VIEWS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_agrees_with_torch(name: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)
    captured = CapturedFunction(OPERATIONS[name], [x, y])
    assert name in map(base_name, captured.segment[0])
    expect_close(captured.run(), OPERATIONS[name](x.double(), y.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_and_weights_in_another_order(name: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(5, 64, 3).to(dtype).permute(2, 0, 1), torch.randn(64, 3, 10).to(dtype).permute(1, 2, 0)[:, ::2]
    exact = OPERATIONS[name](x.double(), y.double())
    expect_close(CapturedFunction(OPERATIONS[name], [x], [y]).run(), exact, dtype)
    expect_close(CapturedFunction(OPERATIONS[name], [x, y]).run(), exact, dtype)


@pytest.mark.parametrize("order", ["dense", "transposed"])
@pytest.mark.parametrize("of", ["an input", "a result", "a weight"])
@pytest.mark.parametrize("name", REORDERED)
def test_a_view_agrees_with_torch(name: str, of: str, order: str) -> None:
    x = torch.randn(3, 5, 64) if order == "dense" else torch.randn(3, 64, 5).transpose(1, 2)

    def function(x: Tensor) -> Tensor:
        return REORDERED[name](x + 1 if of == "a result" else x) * 2

    captured = CapturedFunction(function, [], [x]) if of == "a weight" else CapturedFunction(function, [x])
    for node in captured.graph.find_nodes(op="call_function", target=aten.alias.default):
        node.target = getattr(aten, name).default if name == "detach" else node.target
    assert name in map(base_name, captured.segment[0])
    expect_close(captured.run(), function(x.double()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_an_operation_in_place_changes_its_operand(name: str, dtype: torch.dtype) -> None:
    operation = getattr(aten, f"{name}_")

    def function(x: Tensor, y: Tensor) -> Tensor:
        before, x = x.clone(), x * 1
        changed = operation(x, y.abs() + 1) if name in ("add", "sub", "mul", "div") else operation(x)
        return torch.cat([x, changed * 2, before])

    x, y = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)
    captured = CapturedFunction(function, [x, y])
    assert f"{name}_" in map(base_name, captured.segment[0])
    expect_close(captured.run(), function(x.double(), y.double()), dtype)


def test_an_operation_in_place_changes_a_part() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x = x + 0
        before, half = x.clone(), x.float()
        x[..., :7].mul_(3)
        half[:, 1].relu_()
        return x + half + before * y

    x, y = torch.randn(3, 5, 64).bfloat16(), torch.randn(3, 5, 64).bfloat16()
    expect_close(CapturedFunction(function, [x, y]).run(), function(x.double(), y.double()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1])
def test_the_default_epsilon_is_the_one_of_torch(scale: float, dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).mul(scale).to(dtype)
    for function in (lambda x: F.rms_norm(x, (64,)), lambda x: F.layer_norm(x, (64,))):
        captured = CapturedFunction(function, [x])
        torch.testing.assert_close(captured.run(), captured.results[0], rtol=0.01, atol=1e-5)


EXTREME = torch.tensor([-float("inf"), -1e30, -100, -1e-30, -0.0, 0, 1e-30, 1, 100, 1e30, float("inf"), float("nan")])


@pytest.mark.parametrize(
    "name", ["neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "tanh", "sigmoid", "relu", "silu"]
)
def test_extreme_values_agree_with_torch(name: str) -> None:
    captured = CapturedFunction(getattr(aten, name), [EXTREME])
    torch.testing.assert_close(captured.run(), captured.results[0], equal_nan=True)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum"])
def test_extreme_pairs_agree_with_torch(name: str) -> None:
    captured = CapturedFunction(getattr(aten, name), [EXTREME[:, None] * 1, EXTREME])
    torch.testing.assert_close(captured.run(), captured.results[0], equal_nan=True)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "_softmax": (lambda x: x.softmax(-1), "the operation _softmax"),
    "bmm": (lambda x: torch.bmm(x[None], x[None]), "the operation bmm"),
    "mean": (lambda x: x.mean(0, keepdim=True), "other dimensions"),
    "sum": (lambda x: x.sum(), "other dimensions"),
    "pow": (lambda x: x.pow(1.7), "a power of 1.7"),
    "add": (lambda x: torch.add(x, x, alpha=2), "with a factor"),
    "rsub": (lambda x: torch.rsub(x, 1, alpha=2), "with a factor"),
    "div": (lambda x: torch.div(x, 2, rounding_mode="floor"), "that is rounded"),
    "clamp": (lambda x: torch.clamp(x, min=True), "an operand True"),
    "_to_copy": (lambda x: x.long(), "from or to integers"),
    "view": (lambda x: x.half().view(torch.bfloat16), "a view of another type"),
    "native_layer_norm": (lambda x: F.layer_norm(x, (4, 4)), "several dimensions"),
    "<built-in function getitem>": (lambda x: aten.native_layer_norm(x, [4], None, None, 1e-5)[1], "result 1"),
    "add_": (lambda x: x.add_(1), "on an input or a weight"),
    "mm": (lambda x: x @ x, "that is not a weight"),
    "addmm": (lambda x: aten.addmm(x[0], x, x, beta=2), "with factors"),
    "clone": (lambda x: x.view(2, 2, 2, 2, 1)[..., None].expand(2, 2, 2, 2, 1, 2).clone(), "5 dimensions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_is_refused_by_name(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(LoweringError, match=reason) as caught:
        CapturedFunction(function, [torch.rand(4, 4)]).lowered()
    assert base_name(caught.value.node) == name


# --------------------------------------------------------------------------------------------------- parts of models


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as written in transformers."""
    long = x.to(torch.float32) if x.dtype != torch.float64 else x
    long = long * torch.rsqrt(long.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * long.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighboring channels."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [rotated, rotated_pairs])
def test_norms_and_rotations_of_models(rotate: Callable[..., Tensor], dtype: torch.dtype) -> None:
    def layer(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        heads = rms_norm(x, weight).view(2, 1, 4, 16).transpose(1, 2)
        return rotate(heads, cos.unsqueeze(1), sin.unsqueeze(1)).transpose(1, 2).reshape(2, 1, 64)

    inputs = [torch.randn(2, 1, n).to(dtype) for n in (64, 16, 16)]
    weight = torch.randn(64).to(dtype)
    expect_close(
        CapturedFunction(layer, inputs, [weight]).run(), layer(*[x.double() for x in (*inputs, weight)]), dtype
    )


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row and column": lambda x, y: x.mean(-1, keepdim=True) * y + x[:, :1],
    "transposed": lambda x, y: (x.transpose(0, 1) + y.transpose(0, 1)).transpose(0, 1).reshape(-1) * 2,
    "heads": lambda x, y: (x.view(3, 5, 4, 16).transpose(1, 2) * y.view(3, 5, 4, 16).transpose(1, 2)).flatten(1),
    "expanded": lambda x, y: x[:, :, None].expand(3, 5, 2, 64).reshape(3, 10, 64) - 1,
    "tensor as a number": lambda x, y: x * x[0, 0, 0] + y[2, 2, 2],
    "split": lambda x, y: x.split(32, -1)[1] * y.chunk(2, -1)[0],
    "angles": lambda x, y: torch.cat([x[..., :32, None] * y[:, :, None, :2]] * 2, -1).cos() * 0.5,
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False) * 1,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_in_sequence_agree_with_torch(name: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)
    expect_close(CapturedFunction(FUNCTIONS[name], [x, y]).run(), FUNCTIONS[name](x.double(), y.double()), dtype)


# --------------------------------------------------------------------------------------------------- matmuls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 5, 48), (2, 20, 48), (48,)])
def test_matmuls_agree_with_torch(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    weights, x = mlp_weights(dtype, bias), torch.randn(shape).to(dtype)
    captured = CapturedFunction(gated_mlp, [x], weights)
    assert ("addmm" if bias else "mm") in map(base_name, captured.segment[0])
    expect_close(captured.run(), gated_mlp(x.double(), *[w.double() for w in weights]), dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 12])
def test_matmuls_of_one_input_are_shared_between_threads(rows: int, threads: int) -> None:
    """Shares begin and end within weights, none of which is a multiple of the tile size."""
    weights, x = [torch.randn(columns, 300) / 17 for columns in (1003, 77, 530)], torch.randn(1, rows, 300)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([F.linear(x, weight) for weight in weights], -1)

    torch.set_num_threads(threads)
    found = CapturedFunction(layer, [x], weights).run()
    expect_close(found, layer(x.double(), *[w.double() for w in weights]), torch.float32)


@pytest.mark.parametrize(
    "reorder",
    [lambda x: x[0, ::2], lambda x: x.transpose(0, 1)[1], lambda x: x[..., 3:51], lambda x: x[:1, 0].expand(3, 60)],
)
def test_matmuls_take_inputs_in_any_order(reorder: Callable[[Tensor], Tensor]) -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        x = reorder(x + 1)
        return F.linear(x, weight[:, : x.shape[-1]])

    x, weight = torch.randn(2, 4, 60), torch.randn(40, 60)
    expect_close(CapturedFunction(layer, [x], [weight]).run(), layer(x.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmuls_with_quantized_weights_agree_with_their_kernel(dtype: torch.dtype) -> None:
    assert graph_kernels.serve_blocks()
    linear, x = torch.ops.fhopt.linear_kernel, torch.randn(2, 256).to(dtype)
    plain, bias = torch.randn(40, 256).to(dtype), torch.randn(40).to(dtype)
    signed, scale = torch.randint(-127, 128, (40, 256), dtype=torch.int8), torch.rand(40) / 100
    blocks = gguf_blocks.interleave_rows(random_rows(8, 40, 256), 8, 256).values
    for function, weights in (
        (lambda x, w, b: linear(x, w, b), [plain, bias]),
        (lambda x, w, b, s: linear(x, w, b, s), [signed, bias, scale]),
        (lambda x, w: linear(x, w, None, None, 8), [blocks]),
    ):
        captured = CapturedFunction(function, [x], weights)
        (expected,) = captured.results
        assert captured.run().dtype == dtype
        torch.testing.assert_close(captured.run(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


REFUSED_MATMULS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "weight of a slice": (lambda x, w, b: x @ w[2:].t(), "that is not a weight"),
    "transposed weight": (lambda x, w, b: x @ w, "stored transposed"),
    "bias of two dimensions": (lambda x, w, b: torch.addmm(w, x, w.t()), "a bias that is not a weight"),
    "computed bias": (lambda x, w, b: torch.addmm(b + 1, x, w.t()), "a bias that is not a weight"),
    "bias with a stride": (lambda x, w, b: torch.addmm(w[:, 0], x, w.t()), "a bias that is not contiguous"),
}


@pytest.mark.parametrize("name", REFUSED_MATMULS)
def test_a_matmul_is_refused(name: str) -> None:
    function, reason = REFUSED_MATMULS[name]
    with pytest.raises(LoweringError, match=reason):
        CapturedFunction(function, [torch.rand(4, 4)], [torch.rand(4, 4), torch.rand(4)]).lowered()
