"""What our safetensors files have in common: the record in their metadata, its version, and how values are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from denoising_vit.errors import FormatError

T = TypeVar("T")

#: Under which the record stands in a file's metadata, as JSON.
KEY = "denoising_vit"

#: ``format`` in the record of a distilled model's weights.
DISTILLED = "denoising-vit/distilled"


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file by its beginning, whatever its name: a length, then the head as JSON.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def read_record(path: Path) -> Any:
    """The record in a file's metadata; an empty one where the file has none.

    Raises:
        SafetensorError, OSError, JSONDecodeError: if the file is none, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(KEY, "{}"))


def require_version(path: Path, head: Mapping[str, Any], known: int) -> None:
    """Refuses a file whose record tells no version of its format, or that of a later release.

    Raises:
        FormatError: saying what is wrong, or what to do.
    """
    version = head.get("format_version")
    if version is None:
        raise FormatError(f"{path}: damaged, its metadata lacks format_version")
    if not isinstance(version, int):
        raise FormatError(f"{path}: damaged, expected a number as its format_version, got {version!r}")
    if version > known:
        raise FormatError(
            f"{path}: written in format version {version}, this release reads up to {known}; upgrade denoising-vit"
        )


def compact(values: Tensor) -> Tensor:
    """Values as they are stored: float16, unless they exceed its range, as features without a final norm can."""
    values = values.detach().cpu()
    fits = not values.numel() or float(values.abs().max()) < torch.finfo(torch.float16).max
    return (values.half() if fits else values.float()).contiguous()


def below(prefix: str, tensors: dict[str, T]) -> dict[str, T]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
