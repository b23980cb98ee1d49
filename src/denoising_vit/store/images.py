"""One image's field and record as one safetensors object, with a checksum, which safetensors itself lacks."""

from __future__ import annotations

import json
import zlib
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from denoising_vit.errors import FieldError, StoreError
from denoising_vit.files import KEY
from denoising_vit.store.manifest import Manifest
from denoising_vit.store.packing import checked, packed

FORMAT = "denoising-vit/field"
FORMAT_VERSION = 1

_TYPES = {"float16": torch.float16, "float32": torch.float32}


def compact(field: Tensor, manifest: Manifest, name: str) -> Tensor:
    """The field (Ry, Rx, C) in the store's type, checked.

    Raises:
        FieldError: naming the image, if the shape is another, or a value is not finite or does not fit.
    """
    _require_shape(field, manifest, name)
    field = field.detach().cpu()
    stored = field.to(_TYPES[manifest.dtype]).contiguous()
    if not torch.isfinite(stored).all():
        if not torch.isfinite(field).all():
            raise FieldError(f"{name}: the field has values that are not finite")
        raise FieldError(
            f"{name}: the field has values up to {float(field.abs().max()):.4g}, which {manifest.dtype} does not hold "
            f"({torch.finfo(stored.dtype).max:.6g} at most); make the store with dtype 'float32'"
        )
    return stored


def encode(stored: Tensor, index: int, record: dict[str, Any]) -> bytes:
    """The object of an image: tensor ``field`` and, as metadata, its record.

    Raises:
        StoreError: if the record is not JSON values.
    """
    try:
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "index": index,
            "crc32": zlib.crc32(stored.numpy().tobytes()),
            "record": packed(record),
        }
        metadata = {KEY: json.dumps(head, allow_nan=False, sort_keys=True)}
    except (TypeError, ValueError) as error:
        raise StoreError(f"{record.get('id')}: the record must be JSON values ({error})") from error
    return safetensors.torch.save({"field": stored}, metadata)


def decode(data: bytes, manifest: Manifest, where: str) -> tuple[Tensor, dict[str, Any]]:
    """The field as stored, and the record.

    Raises:
        StoreError: if the object is damaged, something else, or of another shape than the store's.
    """
    try:
        field = safetensors.torch.load(data)["field"]
        length = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
        record, checksum = checked(head["record"]), head["crc32"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where}: damaged, expected a safetensors object with a field ({error})") from error
    if zlib.crc32(field.numpy().tobytes()) != checksum:
        raise StoreError(f"{where}: damaged, its checksum is not the one it was written with")
    _require_shape(field, manifest, where)
    if field.dtype != _TYPES[manifest.dtype]:
        raise StoreError(f"{where}: a field of {field.dtype}, expected {manifest.dtype} as in the manifest")
    return field, record


def _require_shape(field: Tensor, manifest: Manifest, name: str) -> None:
    expected = (*manifest.field, manifest.channels)
    if tuple(field.shape) != expected:
        raise FieldError(f"{name}: a field of shape {tuple(field.shape)}, expected {expected} as in the manifest")
