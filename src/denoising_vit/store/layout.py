"""Names of the objects in a store. What is done is read from which of them exist, so they are fixed here alone.

| object | what it is |
|---|---|
| ``manifest.json`` | what the store was made with; written last, so a folder with one is a store |
| ``ids.json`` | ids of all images, in order; an image's index is its place in this list |
| ``field/`` | zarr v3 array (N, Ry, Rx, C), one chunk an image, ``images_per_shard`` chunks a shard |
| ``staged/<index>.safetensors`` | one finished image whose shard is not sealed yet |
| ``failed/<index>.json`` | why an image could not be done |
| ``sealed/<shard>.json`` | the shard is whole: records of its images |
| ``leases/<name>.<generation>.json`` | who writes a shard |
"""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
IDS = "ids.json"
FIELD = "field"
STAGED = "staged"
FAILED = "failed"
SEALED = "sealed"
LEASES = "leases"

_NUMBERED = re.compile(r"(\d+)\.(json|safetensors)")


def staged_key(index: int) -> str:
    """Where a finished image waits for its shard."""
    return f"{STAGED}/{index:08d}.safetensors"


def failed_key(index: int) -> str:
    """Where the reason of a failed image is."""
    return f"{FAILED}/{index:08d}.json"


def sealed_key(shard: int) -> str:
    """The marker of a whole shard."""
    return f"{SEALED}/{shard:06d}.json"


def shard_folder(shard: int) -> str:
    """The zarr array's objects of one shard: zarr's default keys, chunks of a shard being along the first axis."""
    return f"{FIELD}/c/{shard}"


def shard_key(shard: int) -> str:
    """The one object that zarr writes for a shard."""
    return f"{shard_folder(shard)}/0/0/0"


def numbers(names: list[str]) -> set[int]:
    """The indices or shards in a listing of ``staged``, ``failed`` or ``sealed``; other names are not ours."""
    matches = (_NUMBERED.fullmatch(name) for name in names)
    return {int(match[1]) for match in matches if match}


def shard_lease(shard: int) -> str:
    """The name of the lease on a shard."""
    return f"shard-{shard:06d}"
