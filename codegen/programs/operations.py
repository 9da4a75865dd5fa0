"""The torch operations that decode programs support, each with its lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fhopt.codegen.cpu.calls.caches import Code
from fhopt.codegen.programs.emitter import Emitter
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.instructions import Instruction, Value, four

Handler = Callable[[Emitter, tuple[Any, ...], dict[str, Any]], Value]
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "select", "slice", "split",
    "split_with_sizes", "unbind", "detach", "alias", "squeeze_", "unsqueeze_",
}  # fmt: skip
IN_PLACE = {"add", "sub", "mul", "div", "neg", "silu", "gelu", "relu", "sigmoid", "tanh"}


def _binary(code: Code) -> Handler:
    def handle(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or len(args) != 2:
            raise UnsupportedError("a sum with a factor, or a quotient that is rounded")
        return low.two(code, *args)

    return handle


def _unary(code: Code) -> Handler:
    def handle(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if len(args) != 1 or kwargs:
            raise UnsupportedError("a function with options")
        return low.one(code, args[0])

    return handle


def _gelu(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return low.one(Code.GELU_TANH if kwargs.get("approximate", "none") == "tanh" else Code.GELU, args[0])


def _pow(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    x, power = low.operand(args[0]), args[1]
    if power == 2:
        return low.two(Code.MULTIPLY, x, x)
    if power == 3:
        return low.two(Code.MULTIPLY, low.two(Code.MULTIPLY, x, x), x)
    if power in (0.5, -0.5):
        return low.one(Code.SQUARE_ROOT if power > 0 else Code.INVERSE_ROOT, x)
    raise UnsupportedError(f"a power of {power}")


def _reduction(code: Code) -> Handler:
    def handle(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        dims = args[1] if len(args) > 1 else None
        return low.reduce(code, args[0], dims, bool(args[2]) if len(args) > 2 else False)

    return handle


def _same(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Lower a copy or cast: to nothing, or to a copy if nodes change values in place."""
    value = low.value(args[0])
    if not value.view.is_floating_point() or not kwargs.get("dtype", torch.float32).is_floating_point:
        raise UnsupportedError("a cast from or to integers")
    value = low.in_arena(value)
    if low.changes:
        return low.emit(Instruction(Code.COPY, four(value.view.shape), low.new(value.view.shape), value))
    return value


def _clamp(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    given = (*args[1:], None, None)[:2]
    least, most = kwargs.get("min", given[0]), kwargs.get("max", given[1])
    value = low.operand(args[0])
    for code, bound in ((Code.MAXIMUM, least), (Code.MINIMUM, most)):
        if bound is not None:
            value = low.two(code, value, bound)
    return value


def _layer_norm(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    x, shape, weight, bias, epsilon = args
    if len(shape) != 1:
        raise UnsupportedError("a norm over several dimensions")
    value = low.operand(x)
    centred = low.two(Code.SUBTRACT, value, low.reduce(Code.MEAN, value, -1, True))
    square = low.reduce(Code.MEAN, low.two(Code.MULTIPLY, centred, centred), -1, True)
    value = low.two(Code.MULTIPLY, centred, low.one(Code.INVERSE_ROOT, low.two(Code.ADD, square, float(epsilon))))
    value = value if weight is None else low.two(Code.MULTIPLY, value, weight)
    return value if bias is None else low.two(Code.ADD, value, bias)


def _matrix_product(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return low.linear(args[0], _transposed(low.value(args[1])), None)


def _matrix_product_and_bias(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise UnsupportedError("a product with factors")
    return low.linear(args[1], _transposed(low.value(args[2])), args[0])


def _transposed(value: Value) -> Value:
    return Value(value.view.t(), value.buffer, value.external)


def _linear_kernel(low: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    x, weight, *others = args
    return low.linear(x, low.value(weight), *others)


_OF_TWO = {
    "add": Code.ADD, "sub": Code.SUBTRACT, "mul": Code.MULTIPLY, "div": Code.DIVIDE, "maximum": Code.MAXIMUM,
    "minimum": Code.MINIMUM,
}  # fmt: skip
_OF_ONE = {
    "neg": Code.NEGATE, "abs": Code.ABSOLUTE, "sqrt": Code.SQUARE_ROOT, "rsqrt": Code.INVERSE_ROOT,
    "reciprocal": Code.INVERSE, "exp": Code.EXPONENTIAL, "tanh": Code.TANH, "sigmoid": Code.SIGMOID, "silu": Code.SILU,
    "relu": Code.RELU, "cos": Code.COSINE, "sin": Code.SINE,
}  # fmt: skip
HANDLERS: dict[str, Handler] = {
    **{name: _binary(code) for name, code in _OF_TWO.items()}, "clamp": _clamp, "clamp_min": _clamp,
    "rsub": lambda low, args, kwargs: _binary(Code.SUBTRACT)(low, (args[1], args[0], *args[2:]), kwargs),
    **{name: _unary(code) for name, code in _OF_ONE.items()}, "gelu": _gelu, "pow": _pow,
    "mean": _reduction(Code.MEAN), "sum": _reduction(Code.SUM),
    "clone": _same, "_to_copy": _same,
    "cat": lambda low, args, kwargs: low.cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)),
    "stack": lambda low, args, kwargs: low.stack(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)),
    "native_layer_norm": _layer_norm, "mm": _matrix_product, "addmm": _matrix_product_and_bias,
    "fhopt::linear_kernel": _linear_kernel,
}  # fmt: skip
