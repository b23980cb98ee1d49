"""What a value of a parsed line is expected to be; each check names the key and shows what came."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from denoising_vit.errors import FormatError

_T = TypeVar("_T")

#: Characters of a wrong value that are shown.
_SHOWN = 60


def required(line: Mapping[str, Any], key: str, within: str = "") -> Any:
    """The value of a key.

    Raises:
        FormatError: if it is missing.
    """
    if key not in line:
        raise FormatError(f"{within}{key} is missing; expected a line that `dvit evaluate` wrote")
    return line[key]


def value_or_none(line: Mapping[str, Any], key: str, check: Callable[[object, str], _T]) -> _T | None:
    """The checked value of a key, None where it is missing or null."""
    value = line.get(key)
    return None if value is None else check(value, key)


def mapping(value: object, name: str) -> Mapping[str, Any]:
    """An object of JSON.

    Raises:
        FormatError: if it is something else.
    """
    return value if isinstance(value, dict) else _refuse(value, name, "an object")


def listed(value: object, name: str) -> Sequence[Any]:
    """A list; null is an empty one.

    Raises:
        FormatError: if it is something else.
    """
    if value is None:
        return ()
    return value if isinstance(value, list) else _refuse(value, name, "a list")


def text(value: object, name: str) -> str:
    """A text that is not empty.

    Raises:
        FormatError: if it is something else.
    """
    return value if isinstance(value, str) and value else _refuse(value, name, "a text")


def number(value: object, name: str) -> float:
    """A finite number.

    Raises:
        FormatError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return _refuse(value, name, "a finite number")
    return float(value)


def count(value: object, name: str) -> int:
    """A whole number, 0 or more.

    Raises:
        FormatError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return _refuse(value, name, "a whole number")
    return value


def _refuse(value: object, name: str, expected: str) -> Any:
    shown = json.dumps(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise FormatError(f"{name}: expected {expected}, got {shown}")
