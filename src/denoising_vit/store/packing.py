"""JSON objects of a store with a checksum of what they say."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "crc32"


def packed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same as it is after a way through JSON, with its checksum.

    Raises:
        TypeError, ValueError: if it is not JSON values.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))
    return {**plain, _CHECKSUM: _sum(plain)}


def unpacked(data: bytes | str) -> dict[str, Any]:
    """What a JSON object says; earlier releases wrote no checksum, and then none is compared.

    Raises:
        ValueError: if it is no JSON object, or was changed since it was written.
    """
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return checked(content)


def checked(content: dict[str, Any]) -> dict[str, Any]:
    """As :func:`unpacked`, of an object that is read already."""
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    if _CHECKSUM in content and content[_CHECKSUM] != _sum(rest):
        raise ValueError("it was changed: its checksum is not the one it was written with")
    return rest


def _sum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())
