"""The signature of a captured call: which other calls its program may run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fhopt.decode.arguments import Path, leaf, leaves
from fhopt.decode.recording_cache import is_cache, is_mask

_CONSTANT, _TENSOR, _MASK, _OTHER = range(4)  # argument kinds


class CallSignature:
    """What the arguments of a call must be: numbers by value, tensors by shape, strides and type, others by class.

    A mask has one element more than the cache has tokens.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> None:
        self._count, self._names = len(args), tuple(kwargs)
        self._containers = _containers(args, kwargs)
        self._arguments: list[tuple[Path, int, Any]] = [
            (path, *_expected(x, length)) for path, x in leaves(args, kwargs)
        ]

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> bool:
        """Return whether a call with `length` cached tokens has this signature."""
        if len(args) != self._count or tuple(kwargs) != self._names or _containers(args, kwargs) != self._containers:
            return False
        try:
            return all(_is_as_expected(leaf(args, kwargs, path), kind, x, length) for path, kind, x in self._arguments)
        except (IndexError, KeyError, TypeError):  # an argument of another structure
            return False


def _containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[type, int]]:
    """Return class and length of tuples, lists and dictionaries among the arguments."""
    return [(type(x), len(x)) for x in (*args, *kwargs.values()) if type(x) in (tuple, list, dict)]


def _expected(x: Any, length: int) -> tuple[int, Any]:
    """Return the kind of an argument, and what a call must pass for it."""
    if isinstance(x, Tensor):
        if is_mask(x, length):
            return _MASK, (type(x), x.shape[:-1], x.dtype, x.device)
        return _TENSOR, (type(x), x.shape, x.stride(), x.dtype, x.device)
    if x is None or isinstance(x, (bool, int, float, str)):
        return _CONSTANT, (type(x), x)
    return _OTHER, type(x)


def _is_as_expected(x: Any, kind: int, expected: Any, length: int) -> bool:
    if kind == _CONSTANT:
        return type(x) is expected[0] and x == expected[1]
    if kind == _OTHER:
        return type(x) is expected
    if type(x) is not expected[0]:
        return False
    if kind == _MASK:
        return (x.shape[:-1], x.dtype, x.device) == expected[1:] and x.shape[-1] == length + 1
    return (x.shape, x.stride(), x.dtype, x.device) == expected[1:]


def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the cache among the arguments of a call; None without one."""
    return next((x for _, x in leaves(args, kwargs) if is_cache(x)), None)
