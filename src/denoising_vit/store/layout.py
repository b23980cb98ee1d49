"""Names of a store's objects, and their JSON with checksums. The existing objects determine which images are done.

| object | content |
|---|---|
| ``manifest.json`` | settings of the store; written last, so a folder with a manifest is a store |
| ``ids.json`` | ids of all images; an image's index is its position in this list |
| ``field/`` | zarr v3 array (N, Ry, Rx, C), one chunk per image, ``images_per_shard`` chunks per shard |
| ``staged/<index>.safetensors`` | a finished image whose shard is not sealed yet |
| ``failed/<index>.json`` | the reason why an image failed |
| ``sealed/<shard>.json`` | marker of a complete shard, with the records of its images |
| ``leases/<name>.<generation>.json`` | lease of the process that writes a shard |
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from denoising_vit.files import parse_json

MANIFEST = "manifest.json"
IDS = "ids.json"
FIELD = "field"
STAGED = "staged"
FAILED = "failed"
SEALED = "sealed"
LEASES = "leases"

_NUMBERED = re.compile(r"(\d+)\.(json|safetensors)")
_CHECKSUM = "crc32"


def staged_key(index: int) -> str:
    """Key of a finished image whose shard is not sealed."""
    return f"{STAGED}/{index:08d}.safetensors"


def failed_key(index: int) -> str:
    """Key of the reason why an image failed."""
    return f"{FAILED}/{index:08d}.json"


def sealed_key(shard: int) -> str:
    """Key of a complete shard's marker."""
    return f"{SEALED}/{shard:06d}.json"


def shard_folder(shard: int) -> str:
    """Folder of a shard's objects, by zarr's default chunk keys: shards lie along the first axis."""
    return f"{FIELD}/c/{shard}"


def shard_key(shard: int) -> str:
    """Key of the single object that zarr writes for a shard."""
    return f"{shard_folder(shard)}/0/0/0"


def shard_lease(shard: int) -> str:
    """Name of the lease on a shard."""
    return f"shard-{shard:06d}"


def numbers(names: Iterable[str]) -> set[int]:
    """Image indices or shard numbers in a listing of ``staged``, ``failed`` or ``sealed``; other names are ignored."""
    matches = (_NUMBERED.fullmatch(name) for name in names)
    return {int(match[1]) for match in matches if match}


def packed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON returns it, with an added checksum.

    Raises:
        TypeError, ValueError: if a value is not a JSON value.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))
    return {**plain, _CHECKSUM: _checksum(plain)}


def unpacked(data: bytes | str) -> dict[str, Any]:
    """Parse and check a JSON object; objects from earlier releases have no checksum.

    Raises:
        ValueError: if it is not a JSON object, or its checksum does not match.
    """
    return checked(parse_json(data))


def checked(content: Any) -> dict[str, Any]:
    """Like :func:`unpacked`, for a parsed object."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    if _CHECKSUM in content and content[_CHECKSUM] != _checksum(rest):
        raise ValueError("its checksum does not match")
    return rest


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())
