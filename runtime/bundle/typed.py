"""Whether a dataclass that was read from JSON holds what its annotations say."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["check_types"]


def check_types(value: Any, kind: Any, name: str) -> None:
    """Raises TypeError naming the first value in `value` that is not of `kind`, ValueError for text that has none.

    Knows dataclasses, str, int (no bool), float (finite), None, unions, tuples and mappings with text as keys.
    """
    if is_dataclass(kind):
        _expect(type(value) is kind, name, kind, value)
        exact: Any = kind  # whose instances may have no hash; the class itself has one
        hints = _hints(exact)
        for field in fields(kind):
            check_types(getattr(value, field.name), hints[field.name], f"{name}.{field.name}")
    elif get_origin(kind) in (Union, types.UnionType):
        _check_union(value, get_args(kind), name)
    elif get_origin(kind) is tuple:
        _check_tuple(value, get_args(kind), name)
    elif get_origin(kind) is Mapping:
        _expect(isinstance(value, dict), name, kind, value)
        for key, item in value.items():
            check_types(key, str, name)
            check_types(item, get_args(kind)[1], f"{name}.{key}")
    elif kind is float:
        _expect(type(value) in (int, float) and _is_finite(value), name, kind, value)
    else:
        _expect(type(value) is kind, name, kind, value)
        if kind is str:
            value.encode()  # half of a surrogate pair is no text


def _is_finite(value: float) -> bool:
    """Also of an integer that no float can hold, which JSON has."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a class, evaluated."""
    return get_type_hints(kind)


def _check_union(value: Any, kinds: tuple[Any, ...], name: str) -> None:
    for kind in kinds:
        try:
            return check_types(value, kind, name)
        except TypeError as error:
            last = error
    raise last


def _check_tuple(value: Any, kinds: tuple[Any, ...], name: str) -> None:
    _expect(type(value) is tuple, name, tuple, value)
    if kinds[1:] == (...,):
        kinds = (kinds[0],) * len(value)
    _expect(len(value) == len(kinds), name, kinds, value)
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        check_types(item, kind, f"{name}[{index}]")


def _expect(fits: bool, name: str, kind: Any, value: Any) -> None:
    if not fits:
        raise TypeError(f"{name} is {value!r:.60}, expected {getattr(kind, '__name__', kind)}")
