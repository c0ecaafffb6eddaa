"""JSON that has one meaning: no duplicate keys, no NaN, no numbers that overflow, no depth that exhausts the stack."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import BundleError

__all__ = ["parsed", "spelled"]

MOST_LEVELS = 32
"""Of lists and objects in each other. Python's own limits differ: 3.12 reads deeper than it can write."""
MOST_DIGITS = 19
"""Of an integer: 64 bits. Python before 3.10.7 takes quadratic time over a million of them."""


def parsed(content: bytes, name: str) -> dict[str, Any]:
    """The object that the document `name` holds. Raises `BundleError` if it is not JSON, or could mean two things."""
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except RecursionError:
        raise BundleError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise BundleError(f"{name} is not valid JSON ({error})") from None
    if _levels(value) > MOST_LEVELS:
        raise BundleError(f"{name} is nested too deeply")
    if not isinstance(value, dict):
        raise BundleError(f"{name} is a {type(value).__name__}, expected an object")
    return value


def spelled(content: object) -> bytes:
    """The one spelling of `content` as JSON. Raises ValueError for what has none: NaN, or half a surrogate pair."""
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")


def _levels(value: Any) -> int:
    """Of lists and objects in each other, counted to one more than are allowed."""
    level = [value] if isinstance(value, (dict, list)) else []
    for depth in range(MOST_LEVELS + 1):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for some in children for child in some if isinstance(child, (dict, list))]
        if not level:
            return depth + 1
    return MOST_LEVELS + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r:.60} stands there twice")
        content[key] = value
    return content


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:MOST_DIGITS]} is too large")
    return value
