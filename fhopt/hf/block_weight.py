"""Weights that stay quantized in GGUF blocks, as tensors for linear layers and embeddings.

A `BlockWeight` has the shape [N, K] and dtype of the dequantized weight and holds the blocks of the file. Skinny GEMMs
run on the blocks (fhopt/codegen/cpu/gguf_blocks.py). Larger GEMMs, as in prefill, dequantize a slice of rows at a time,
and an embedding only the rows it looks up. Any other operation gets a dequantized copy, freed after the operation.

Letters: N rows of the weight, K elements per row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fhopt import codegen
from fhopt.codegen.cpu import gguf_blocks, skinny_linear
from fhopt.codegen.cpu.skinny_linear import BlockedWeight
from fhopt.hf.skinny_products import product

PART = 1 << 21  # elements of a weight dequantized at once
_NOT_WRITTEN = "{} would write to a block-quantized GGUF weight; expected read-only use. Load the file dequantized."
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_aten = torch.ops.aten


class _Memory(threading.local):
    """Per-thread buffer for dequantized rows: PART elements, 4 bytes each.

    Reused because page faults of new memory take longer than dequantization.
    """

    bytes: Tensor | None = None

    def of(self, dtype: torch.dtype) -> Tensor | None:
        """Return a buffer [PART] of `dtype`; None for dtypes that kernels do not support."""
        if dtype not in skinny_linear.DTYPES:
            return None
        if self.bytes is None or self.bytes.numel() != 4 * PART:
            made = torch.empty(4 * PART, dtype=torch.uint8, device="cpu")
            if type(made) is not Tensor:  # under a mode, such as fake tensors
                return None
            self.bytes = made
        return self.bytes.view(dtype)[:PART]


_memory = _Memory()


class BlockWeight(Tensor):
    """A weight [N, K] in GGUF blocks; `dtype` is the dtype it dequantizes to.

    gguf_blocks: the blocks, rearranged by `gguf_blocks.arranged`. Raises ValueError for bytes of another layout.
    Read-only: an operation that would write to it raises RuntimeError.
    """

    gguf_blocks: BlockedWeight

    @staticmethod
    def __new__(cls, blocks: BlockedWeight, dtype: torch.dtype) -> BlockWeight:
        """Wrap blocks as a weight."""
        values, numbers = blocks.values, gguf_blocks.FORMATS.get(blocks.format, (0, 0))[0]
        if not numbers or blocks.width % numbers or not values.is_cpu:
            raise ValueError(
                f"a weight of width {blocks.width} in GGUF format {blocks.format} on {values.device} is not "
                f"supported; expected a format of {sorted(gguf_blocks.FORMATS)}, whole blocks, and the CPU. "
                "Load the file dequantized."
            )
        size = gguf_blocks.blocked_row_bytes(blocks.format, blocks.width)
        if values.dtype != torch.uint8 or values.dim() != 2 or values.shape[1] != size or not values.is_contiguous():
            shape = tuple(values.shape)
            raise ValueError(
                f"blocks are {values.dtype} {shape}; expected contiguous torch.uint8 [N, {size}]. Load the file "
                "dequantized."
            )
        made: BlockWeight = Tensor._make_wrapper_subclass(cls, blocks.shape, dtype=dtype, device=values.device)
        made.gguf_blocks = blocks
        return made

    def __init__(self, blocks: BlockedWeight, dtype: torch.dtype) -> None:
        """See `__new__`."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape, dtype and format."""
        return f"BlockWeight({tuple(self.shape)}, dtype={self.dtype}, format={self.gguf_blocks.format})"

    def dequantize(self) -> Tensor:
        """Dequantize the weight to a plain tensor."""
        return rows_of(self.gguf_blocks, self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the weight as the blocks of the file."""
        in_file = torch.from_numpy(gguf_blocks.as_in_file(self.gguf_blocks))
        return _made_of_file, (in_file, *_about(self), _is_parameter(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockWeight:
        """Return a weight with a copy of the blocks."""
        found: BlockWeight | None = memo.get(id(self))
        if found is None:
            about = _about(self)
            found = memo[id(self)] = _made(self.gguf_blocks.values.clone(), *about, is_parameter=_is_parameter(self))
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute linear layers and embeddings on the blocks; setting `data` replaces the blocks."""
        own = _OWN.get(func)
        if own is not None:
            return own(*args, **(kwargs or {}))
        if func == _SET_DATA:  # `__set__` is a new object on each access
            if not isinstance(args[1], BlockWeight):
                raise RuntimeError(_NOT_WRITTEN.format("setting data"))
            args[0].gguf_blocks = args[1].gguf_blocks
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run any other operation on the dequantized weight; aliases and casts to floating dtypes keep the blocks."""
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(args[0].gguf_blocks, args[0].dtype)
        if func is _aten._to_copy.default and _is_cast(kwargs):
            return cls(args[0].gguf_blocks, kwargs.get("dtype") or args[0].dtype)
        if func is _aten.clone.default:
            return _made(args[0].gguf_blocks.values.clone(), *_about(args[0]))
        if func._schema.is_mutable:
            raise RuntimeError(_NOT_WRITTEN.format(func))
        args, kwargs = tree_map_only(BlockWeight, lambda weight: weight.dequantize(), (args, kwargs))
        return func(*args, **kwargs)


def _about(weight: BlockWeight) -> tuple[int, int, torch.dtype]:
    return weight.gguf_blocks.format, weight.gguf_blocks.width, weight.dtype


def _made(values: Tensor, format: int, width: int, dtype: torch.dtype, is_parameter: bool = False) -> Any:
    made = BlockWeight(BlockedWeight(values, format, width), dtype)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made


def _made_of_file(values: Tensor, format: int, width: int, dtype: torch.dtype, is_parameter: bool) -> Any:
    arranged = gguf_blocks.interleave_rows(values.numpy(), format, width)
    return _made(arranged.values, format, width, dtype, is_parameter)


def _is_parameter(weight: BlockWeight) -> bool:
    return isinstance(weight, torch.nn.Parameter)


def _is_cast(kwargs: dict[str, Any]) -> bool:
    """Return whether a copy stays on CPU and in a floating dtype."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    on_cpu = device is None or torch.device(device).type == "cpu"
    return on_cpu and (dtype is None or dtype.is_floating_point)


def rows_of(
    blocks: BlockedWeight, dtype: torch.dtype, first: int = 0, end: int | None = None, which: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dequantize rows [first, end) of a weight, or the rows `which`. Raises IndexError for a row out of range.

    memory: a buffer of the dtype, as of `gguf_blocks.unpack`; the next call overwrites the rows.
    """
    unpacked = dtype if dtype in skinny_linear.DTYPES else torch.float32
    found = gguf_blocks.unpack_rows(blocks, unpacked, first, end, which, memory)
    if found is None:  # no compiler
        import gguf

        rows = gguf_blocks.as_in_file(blocks)
        rows = rows[first:end] if which is None else rows[which.numpy()]
        numbers = gguf.dequantize(rows, gguf.GGMLQuantizationType(blocks.format))
        found = torch.from_numpy(numbers)
    return found.to(dtype)


def block_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x [..., K] w^T + bias [N] -> [..., N] with a `BlockWeight`; only x gets a gradient."""
    blocks, needed = getattr(weight, "gguf_blocks", None), (input, bias)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needed)
    others = any(isinstance(t, BlockWeight) for t in needed)
    if blocks is None or needs_gradient or others or torch.is_autocast_enabled("cpu"):
        plain = [t.dequantize() if isinstance(t, BlockWeight) else t for t in (input, weight, bias)]
        return torch.nn.functional.linear(*plain)  # type: ignore[arg-type]
    found = codegen.dispatch_linear(input, weight, bias)
    if found is not None:
        return found
    output = input.new_empty((*input.shape[:-1], blocks.shape[0]))
    step = max(gguf_blocks.EIGHT, PART // blocks.width // gguf_blocks.EIGHT * gguf_blocks.EIGHT)
    memory = _memory.of(input.dtype)
    for first in range(0, blocks.shape[0], step):
        part = slice(first, first + step)
        rows = rows_of(blocks, input.dtype, first, first + step, memory=memory)
        output[..., part] = product(input, rows, None if bias is None else bias[part])
    return output


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Dequantize the rows of a `BlockWeight` at the indices `input` -> [..., K]."""
    blocks: BlockedWeight | None = getattr(weight, "gguf_blocks", None)
    if blocks is None or max_norm is not None:
        raise RuntimeError(
            "an embedding with a block-quantized weight supports only plain row indices without max_norm. Load "
            "the file dequantized."
        )
    which = input.reshape(-1)
    if gguf_blocks.LIBRARY.load() is None or weight.dtype not in skinny_linear.DTYPES:
        rows = rows_of(blocks, weight.dtype, which=which)
    else:  # an operator, which captures of a graph see
        rows = torch.ops.fhopt.unpack_rows(blocks.values, blocks.format, blocks.width, which, weight.dtype)
    return rows.view(*input.shape, blocks.width)


_OWN: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: block_linear, torch.nn.functional.embedding: embedding,
}  # fmt: skip
