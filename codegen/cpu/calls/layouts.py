"""Structs and enumerations that Python and C++ share: written once, as classes of Python.

    @layout
    class Rows(ctypes.Structure):                     struct Rows {
        data: Annotated[int, "const void*"]   ->          const void* data;
        strides: Annotated[Any, (int, 3)]                 int64_t strides[3];
                                                      };

`layout` gives a class its fields for ctypes, `declaration` writes it in C++, and `packer` packs its fields without
making an object, which takes a quarter of the time. Every field has 8 bytes, or is made of such fields.
"""

from __future__ import annotations

import ctypes
import inspect
import struct
import textwrap
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

_NUMBERS: dict[Any, tuple[Any, str]] = {int: (ctypes.c_int64, "int64_t"), float: (ctypes.c_double, "double")}
_CODES = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_void_p: "P"}
_WIDTH = 120  # of a line
T = TypeVar("T")


@dataclass_transform()
def layout(cls: type[T]) -> type[T]:
    """Give a subclass of ctypes.Structure the fields that its annotations name: numbers, addresses, arrays, structs."""
    made: Any = cls
    made._fields_ = [(name, _ctype(hint)) for name, hint in _hints(cls).items()]
    return cls


def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _ctype(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        about = get_args(hint)[1]
        return ctypes.c_void_p if isinstance(about, str) else _ctype(about[0]) * about[1]
    if hint in _NUMBERS:
        return _NUMBERS[hint][0]
    return ctypes.c_int64 if issubclass(hint, IntEnum) else hint


def _declared(hint: Any, name: str) -> str:
    """Return the declaration of a field in C++."""
    if get_origin(hint) is Annotated:
        about = get_args(hint)[1]
        if isinstance(about, tuple):
            return f"{_declared(about[0], name)}[{about[1]}]"
        return about.replace("(*)", f"(*{name})") if "(*)" in about else f"{about} {name}"
    return f"{_NUMBERS[hint][1] if hint in _NUMBERS else hint.__name__} {name}"


def declaration(cls: type[Any]) -> str:
    """Declare a struct or an enumeration in C++, below its docstring as a comment."""
    comment = textwrap.indent(textwrap.fill(" ".join(inspect.cleandoc(cls.__doc__ or "").split()), _WIDTH - 3), "// ")
    if issubclass(cls, IntEnum):
        body = textwrap.fill(", ".join(f"{member.name} = {member.value}" for member in cls), _WIDTH - 4)
        return f"{comment}\nenum {cls.__name__} : int64_t {{\n{textwrap.indent(body, '    ')}\n}};\n"
    body = "".join(f"    {_declared(hint, name)};\n" for name, hint in _hints(cls).items())
    size = f"static_assert(sizeof({cls.__name__}) == {ctypes.sizeof(cls)});\n"
    return f"{comment}\nstruct {cls.__name__} {{\n{body}}};\n{size}"


def packer(cls: type[Any]) -> Callable[..., bytes]:
    """Return the function that packs the fields of a struct, in their order, those of structs inside it one by one."""
    return struct.Struct("@" + _codes(cls)).pack


def _codes(kind: Any) -> str:
    if kind in _CODES:
        return _CODES[kind]
    if issubclass(kind, ctypes.Array):
        return _codes(kind._type_) * kind._length_
    return "".join(_codes(field) for _, field in kind._fields_)
