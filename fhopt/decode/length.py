"""The number of cached tokens while a decode step is captured: an integer that reports what depends on it.

length + 1, max(0, length - 511)      an integer of the same kind; comparisons become guards of the program
length * 2, length // 8               refused: a program knows only lengths plus a number
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from fhopt.codegen.programs.errors import UnsupportedError

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "__lt__": int.__lt__, "__le__": int.__le__, "__gt__": int.__gt__, "__ge__": int.__ge__, "__eq__": int.__eq__,
    "__ne__": int.__ne__,
}  # fmt: skip


@dataclass(frozen=True)
class LengthGuard:
    """A comparison of the length plus `added` with a number, and its result."""

    comparison: str
    added: int
    number: int
    result: bool

    @property
    def gap(self) -> int:
        """What is added to the length, minus the number that it is compared with."""
        return self.added - self.number

    def holds(self, length: int) -> bool:
        """Return whether the comparison has the same result for another length."""
        return _COMPARE[self.comparison](length + self.added, self.number) is self.result


class CacheLength(int):
    """A cache length plus `added`, in `guards`, which collects the comparisons made with it."""

    added: int
    guards: list[LengthGuard]

    @staticmethod
    def of(value: int, guards: list[LengthGuard], added: int = 0) -> CacheLength:
        """Return a length with this value."""
        made = CacheLength(value)
        made.added, made.guards = added, guards
        return made

    def _plus(self, number: Any) -> Any:
        if type(number) is not int and type(number) is not bool:
            return NotImplemented if not isinstance(number, CacheLength) else _refuse()
        return CacheLength.of(int(self) + number, self.guards, self.added + number)

    def __add__(self, number: Any) -> Any:
        return self._plus(number)

    def __radd__(self, number: Any) -> Any:
        return self._plus(number)

    def __sub__(self, number: Any) -> Any:
        if isinstance(number, CacheLength):
            return self.added - number.added
        return self._plus(-number) if isinstance(number, int) else NotImplemented

    def _compare(self, comparison: str, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if isinstance(other, CacheLength):
            return _COMPARE[comparison](self.added, other.added)
        if not isinstance(other, int):
            _refuse()
        result = _COMPARE[comparison](int(self), int(other))
        self.guards.append(LengthGuard(comparison, self.added, int(other), result))
        return result

    def __bool__(self) -> bool:
        return bool(self._compare("__ne__", 0))


def _refuse(*_: Any) -> NoReturn:
    raise UnsupportedError("it computes with the cache length")


for _name in ("mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod", "pow", "rsub", "neg"):
    setattr(CacheLength, f"__{_name}__", _refuse)
for _name in _COMPARE:
    setattr(CacheLength, _name, functools.partialmethod(CacheLength._compare, _name))
