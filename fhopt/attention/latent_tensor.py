"""Tensor subclass for cached keys and values: attention uses the latents, other code gets reconstructed K/V."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.manual_attention import mix, reconstructed, scores
from fhopt.errors import FhoptError


class LatentTensor(torch.Tensor):
    """Keys or values [B,G,T,D] whose quantized tokens are latents, without storage of that size.

    exact [B,G,N,D]: the exact tokens. latents: the others. is_key: True for keys, False for values. folded: batch and
    heads are one dimension, [B*G,T,D]. swapped: the last two dimensions are swapped, [B,G,D,T].
    """

    exact: Tensor
    latents: AnyLatents
    is_key: bool
    folded: bool
    swapped: bool

    @staticmethod
    def __new__(
        cls, exact: Tensor, latents: AnyLatents, is_key: bool, folded: bool = False, swapped: bool = False
    ) -> LatentTensor:
        """Make a wrapper with the shape, dtype and device of all tokens; the arguments become attributes."""
        b, g, _, d = exact.shape
        shape = [*([b * g] if folded else [b, g]), latents.length(exact), d]
        if swapped:
            shape[-2:] = shape[:-3:-1]
        self: LatentTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=exact.dtype, device=exact.device)
        self.exact, self.latents, self.is_key, self.folded, self.swapped = exact, latents, is_key, folded, swapped
        return self

    def __init__(self, *_args: object, **_options: object) -> None:
        super().__init__()

    def viewed(self, *, folded: bool | None = None, swapped: bool | None = None) -> LatentTensor:
        """Return the same keys or values with other dimensions."""
        return LatentTensor(
            self.exact, self.latents, self.is_key,
            self.folded if folded is None else folded, self.swapped if swapped is None else swapped,
        )  # fmt: skip

    def reconstruct(self) -> Tensor:
        """Reconstruct all tokens as an ordinary tensor of the same shape, with the loss of the latents."""
        side = self.latents.key if self.is_key else self.latents.value
        whole = reconstructed(self.exact, side, self.latents)
        whole = whole.flatten(0, 1) if self.folded else whole
        return whole.transpose(-1, -2) if self.swapped else whole

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        what = "key" if self.is_key else "value"
        return f"LatentTensor({what}, shape={tuple(self.shape)}, exact={self.exact.shape[2]}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on latents if it has a handler, else on reconstructed tensors."""
        kwargs, handler = kwargs or {}, _HANDLERS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            try:
                result = handler(*args, **kwargs) if handler is not None else NotImplemented
            except TypeError:  # a signature that handlers do not support
                result = NotImplemented
            return _on_reconstructed(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation that bypasses `__torch_function__` on reconstructed tensors."""
        return args[0] if func is torch.ops.aten.detach.default else _on_reconstructed(func, args, kwargs or {})


def _on_reconstructed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any operation on reconstructed tensors.

    Raises FhoptError for in-place operations, which would not change the cache.
    """
    name = getattr(func, "__name__", str(func))
    changes = (name.endswith("_") and not name.endswith("__")) or name in _CHANGING
    if (changes and args and isinstance(args[0], LatentTensor)) or isinstance(kwargs.get("out"), LatentTensor):
        raise FhoptError(
            f"the model modifies cached keys or values in place ({name}); expected read-only access, since "
            "latents cannot be updated in place. Call fhopt.unapply(model), or create the cache with "
            "absorb=False."
        )
    _warn(name)
    args, kwargs = tree_map(lambda x: x.reconstruct() if isinstance(x, LatentTensor) else x, (args, kwargs))
    return func(*args, **kwargs)


_CHANGING = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__", "__setitem__")
_warned: set[str] = set()


def _warn(operation: str) -> None:
    if operation not in _warned:
        _warned.add(operation)
        warnings.warn(
            f"{operation} has no latent implementation: fhopt reconstructs full-length keys and values on "
            "every call, which is slow; expected scaled_dot_product_attention, matmuls with queries or "
            "weights, or transformers' attention interface. Call fhopt.apply(model, plan), which sets the "
            "last.",
            RuntimeWarning,
            stacklevel=2,
        )


# --------------------------------------------------------------------------------------------------- handlers

# A handler takes its function's arguments and returns NotImplemented if it does not support them.


def _transpose(x: Tensor, dim0: int, dim1: int) -> Any:
    if isinstance(x, LatentTensor) and {dim0 % x.dim(), dim1 % x.dim()} == {x.dim() - 2, x.dim() - 1}:
        return x.viewed(swapped=not x.swapped)
    return NotImplemented


def _permute(x: Tensor, *dims: Any) -> Any:
    order = [d % x.dim() for d in (dims[0] if len(dims) == 1 else dims)]
    return _transpose(x, -2, -1) if order == [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2] else NotImplemented


def _adjoint(x: Tensor) -> Any:
    return _transpose(x, -2, -1)


def _reshape(x: Tensor, *shape: Any) -> Any:
    if not isinstance(x, LatentTensor) or x.swapped or x.folded:
        return NotImplemented
    target = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    whole = list(x.shape)
    folded = [whole[0] * whole[1], *whole[2:]]
    for sizes, answer in ((whole, x), (folded, None)):
        if len(sizes) == len(target) and all(n in (-1, s) for n, s in zip(target, sizes, strict=True)):
            return answer if answer is not None else x.viewed(folded=True)
    return NotImplemented


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return x if isinstance(x, LatentTensor) else NotImplemented


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    arguments = [*args, *kwargs.values()]
    is_same = all(
        a in (x.dtype, x.device, False, None) for a in arguments if isinstance(a, (torch.dtype, torch.device, bool))
    )
    plain = all(isinstance(a, (torch.dtype, torch.device, bool)) for a in arguments)
    return x if isinstance(x, LatentTensor) and plain and is_same else NotImplemented


def _matmul(left: Tensor, right: Tensor) -> Any:
    """Compute scores q k^T or weighted sums p v; a folded right operand needs a folded left one."""
    if not isinstance(right, LatentTensor) or isinstance(left, LatentTensor) or right.is_key != right.swapped:
        return NotImplemented
    groups, folded = right.exact.shape[1], right.folded
    if left.dim() != right.dim() or (folded and left.shape[0] != right.shape[0]):
        return NotImplemented
    if not folded and (left.shape[0] != right.shape[0] or (groups not in (1, left.shape[1]))):
        return NotImplemented
    rows = left.unflatten(0, (-1, groups)) if folded else left
    out = (scores if right.is_key else mix)(rows, right.exact, right.latents)
    return out.flatten(0, 1) if folded else out


def _baddbmm(x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _matmul(batch1, batch2)
    if product is NotImplemented:
        return NotImplemented
    return alpha * product if beta == 0 else beta * x + alpha * product  # beta 0 ignores x, even NaN


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if not isinstance(key, LatentTensor) or not isinstance(value, LatentTensor) or key.shape[:3] != value.shape[:3]:
        return NotImplemented
    if dropout_p or query.dim() != 4 or query.shape[0] != key.shape[0]:
        return NotImplemented
    groups = key.shape[1]
    if query.shape[1] % groups or not (enable_gqa or groups in (1, query.shape[1])):
        return NotImplemented
    if is_causal:  # aligned to the first key
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    elif attn_mask is None:
        attn_mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(query, key.exact, value.exact, joined_latents(key, value), attn_mask, scale=scale)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: _sdpa,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.bmm: _matmul, Tensor.bmm: _matmul,
    torch.baddbmm: _baddbmm, Tensor.baddbmm: _baddbmm,
    torch.transpose: _transpose, Tensor.transpose: _transpose, torch.swapaxes: _transpose, Tensor.swapaxes: _transpose,
    torch.permute: _permute, Tensor.permute: _permute, Tensor.mT.__get__: _adjoint,  # type: ignore[attr-defined]
    torch.reshape: _reshape, Tensor.reshape: _reshape, Tensor.view: _reshape,
    Tensor.contiguous: _same, Tensor.detach: _same, torch.detach: _same, Tensor.to: _to,
}  # fmt: skip
_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_leaf",
    )
}
_METADATA |= {getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu")}
_METADATA |= {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.ndimension, Tensor.element_size,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.numel, Tensor.get_device,
    Tensor.__hash__, Tensor.__repr__, Tensor.__format__, torch.is_complex, Tensor.is_inference,
}  # fmt: skip


def joined_latents(key: LatentTensor, value: LatentTensor) -> AnyLatents:
    """Combine latents of keys and of values, which may come from two calls of a cache layer."""
    if key.latents is value.latents:
        return key.latents
    return replace(key.latents, value=value.latents.value)
