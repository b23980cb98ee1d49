"""The field of one image: in the store's precision, as a staged object, and as a chunk of the zarr array."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from denoising_vit.errors import FieldError, StoreError
from denoising_vit.files import KEY, parse_json
from denoising_vit.store import layout
from denoising_vit.store.layout import checked, packed
from denoising_vit.store.manifest import Manifest
from denoising_vit.store.objects import Objects

FORMAT = "denoising-vit/field"
FORMAT_VERSION = 1

#: Minimum cosine of an int8 patch to the same patch in float16.
LEAST_COSINE = 0.999

#: Number of patches to quantize at once.
_BLOCK = 256

#: Fill value of missing int8 chunks; quantized values are at least -127. Missing float chunks are NaN.
_MISSING = -128

#: Offset and length of a missing chunk, in a shard's index.
_NO_CHUNK = (2**64 - 1, 2**64 - 1)


@dataclass(frozen=True, eq=False)
class StoredField:
    """A field in the store's precision."""

    values: np.ndarray  #: (Ry, Rx, C) in the store's dtype
    scale: np.ndarray | None = None  #: (C,) float32, factors for int8 values; None for floats

    @property
    def floats(self) -> np.ndarray:
        """The field as floats: as stored, or float32 for int8."""
        return self.values if self.scale is None else self.values * self.scale

    @property
    def exists(self) -> bool:
        """False if the values are the fill values that zarr returns for a missing chunk."""
        return bool((self.values != _MISSING).all() if self.scale is not None else np.isfinite(self.values).all())


def stored_field(field: Tensor, manifest: Manifest, name: str) -> StoredField:
    """Convert a field (Ry, Rx, C) to the store's precision and check it.

    int8 is symmetric with one scale per channel, ``max |F| / 127``.

    Raises:
        FieldError: naming the image, if the shape differs from the store's, a value is not finite or out of range, or
            the cosine of a patch to its int8 value is below :data:`LEAST_COSINE`.
    """
    _require_shape(tuple(field.shape), manifest, name)
    field = field.detach()  # converted on its device, which is faster on an accelerator
    dtype = torch.float32 if manifest.dtype == "float32" else torch.float16
    largest = torch.stack(field.aminmax()).abs().amax()  # NaN if any value is NaN
    if not torch.isfinite(largest.to(dtype)):
        if not torch.isfinite(largest):
            raise FieldError(f"{name}: the field has values that are not finite")
        limit = torch.finfo(dtype).max
        raise FieldError(
            f"{name}: the field has values up to {float(largest):.4g}, expected at most {limit:.6g} for "
            f"{manifest.dtype}; create the store with dtype 'float32'"
        )
    stored = field.to(dtype)
    if manifest.dtype == "int8":
        return _quantized(stored, name)
    return StoredField(stored.cpu().contiguous().numpy())


def _quantized(field: Tensor, name: str) -> StoredField:
    """Quantize a float16 field (Ry, Rx, C) to int8, a few patches at a time so that they fit in the CPU cache."""
    patches = field.flatten(0, 1).contiguous()  # (Ry Rx, C)
    scale = torch.maximum(patches.amax(0), -patches.amin(0)).float() / 127  # (C,)
    inverse = scale.where(scale > 0, 1.0).reciprocal()
    values = torch.empty_like(patches, dtype=torch.int8)
    cosines = []
    for start in range(0, len(patches), _BLOCK):
        exact = patches[start : start + _BLOCK].float()
        rounded = (exact * inverse).round_()
        values[start : start + _BLOCK] = rounded
        norms = exact.norm(dim=1) * rounded.mul_(scale).norm(dim=1)
        cosine = (exact * rounded).sum(1) / norms  # NaN if either norm is 0
        cosines.append(cosine.nan_to_num(0.0).where(exact.any(1), 1.0))
    least = float(torch.cat(cosines).min())
    if least < LEAST_COSINE:
        raise FieldError(
            f"{name}: the int8 values of a patch have a cosine of {least:.4f} to float16, expected at least "
            f"{LEAST_COSINE}; use a store with precision 'float16'"
        )
    return StoredField(values.view(field.shape).cpu().numpy(), scale.cpu().numpy())


def encode(stored: StoredField, index: int, record: dict[str, Any]) -> bytes:
    """A safetensors object with ``field`` (and ``scale``) and, as metadata, the record (JSON values) and a checksum."""
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "index": index,
        "crc32": _checksum(stored),
        "record": packed(record),
    }
    metadata = {KEY: json.dumps(head, allow_nan=False, sort_keys=True)}
    arrays = {"field": stored.values} | ({} if stored.scale is None else {"scale": stored.scale})
    return safetensors.torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, metadata)


def decode(data: bytes, manifest: Manifest, where: str) -> tuple[StoredField, dict[str, Any]]:
    """The stored field, and its record.

    Raises:
        StoreError: if the object is damaged, of another type, or of another shape than the store's.
    """
    try:
        tensors = {name: tensor.numpy() for name, tensor in safetensors.torch.load(data).items()}
        stored = StoredField(tensors["field"], tensors["scale"] if manifest.dtype == "int8" else None)
        length = int.from_bytes(data[:8], "little")
        head = parse_json(parse_json(data[8 : 8 + length])["__metadata__"][KEY])
        record, checksum = checked(head["record"]), head["crc32"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where}: damaged, expected a safetensors object with a field ({error})") from error
    if _checksum(stored) != checksum:
        raise StoreError(f"{where}: damaged: its checksum does not match")
    _require_shape(stored.values.shape, manifest, where)
    if stored.values.dtype != manifest.dtype:
        raise StoreError(f"{where}: expected a field of {manifest.dtype} as in the manifest, got {stored.values.dtype}")
    return stored, record


def encode_scale(scale: np.ndarray) -> str:
    """A scale (C,) as text for a shard's marker: base64 of little-endian float32."""
    return base64.b64encode(scale.astype("<f4").tobytes()).decode()


def decode_scale(text: str) -> np.ndarray:
    """The scale (C,) of :func:`encode_scale`.

    Raises:
        ValueError: if it is damaged.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").copy()  # writable, for torch


def _checksum(stored: StoredField) -> int:
    checksum = zlib.crc32(stored.values.data)
    return checksum if stored.scale is None else zlib.crc32(stored.scale.data, checksum)


def _require_shape(shape: tuple[int, ...], manifest: Manifest, name: str) -> None:
    expected = (*manifest.field, manifest.channels)
    if shape != expected:
        raise FieldError(f"{name}: expected a field of shape {expected} as in the manifest, got {shape}")


class FieldArray:
    """The zarr array (N, Ry, Rx, C) of a store: one chunk with a checksum per image, several images per object."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self._objects, self._manifest = objects, manifest
        self._opened: Any = None  # zarr's annotations include types that are not arrays
        self._pid = os.getpid()

    @property
    def missing(self) -> float:
        """Fill value of images without a chunk."""
        return _MISSING if self._manifest.dtype == "int8" else float("nan")

    @property
    def _array(self) -> Any:
        """The zarr array, opened on first use; connections do not survive a fork."""
        import zarr

        if self._opened is None or self._pid != os.getpid():
            self._opened = zarr.open_array(self._objects.zarr(layout.FIELD, read_only=True), mode="r")
            self._pid = os.getpid()
        return self._opened

    @staticmethod
    def create(objects: Objects, manifest: Manifest) -> None:
        """Write the array's metadata."""
        import zarr
        from zarr.codecs import Crc32cCodec

        chunk = (*manifest.field, manifest.channels)
        zarr.create_array(
            objects.zarr(layout.FIELD, read_only=False),
            shape=(manifest.count, *chunk),
            chunks=(1, *chunk),
            shards=(manifest.images_per_shard, *chunk),
            dtype=manifest.dtype,
            fill_value=FieldArray(objects, manifest).missing,
            compressors=(Crc32cCodec(),),  # features hardly compress: 10 % smaller, but much slower
            dimension_names=("image", "y", "x", "channel"),
            overwrite=True,
        )
        objects.settle(f"{layout.FIELD}/zarr.json")

    def read(self, index: int) -> np.ndarray:
        """Read one image, (Ry, Rx, C), with two ranged reads: the shard's index and the chunk.

        Raises:
            Exception: from zarr, if the shard is damaged or the checksum does not match.
        """
        return np.asarray(self._array[index])

    def write_shard(self, shard: int, fields: Mapping[int, np.ndarray]) -> None:
        """Replace a shard with its images' fields (Ry, Rx, C) in one put; without any, the shard object is deleted.

        The bytes equal those that zarr would write (``sharding_indexed`` with the index at the end), but zarr copies
        every chunk several times.

        Raises:
            OSError: if it cannot be written.
        """
        # A shard object without a marker may be damaged; its chunks must not be kept.
        self._objects.delete_below(layout.shard_folder(shard))
        if fields:
            parts = shard_parts(fields, self._manifest.images_of(shard).start, self._manifest.images_per_shard)
            self._objects.write(layout.shard_key(shard), parts)


def shard_parts(fields: Mapping[int, np.ndarray], start: int, count: int) -> list[bytes]:
    """A zarr v3 shard of ``count`` chunks from image ``start``: chunks with CRC-32C, then the index with its own."""
    from google_crc32c import value as crc32c

    index = np.full((count, 2), _NO_CHUNK, "<u8")  # offset and length of each chunk
    parts: list[bytes] = []
    offset = 0
    for image in sorted(fields):
        values = fields[image]
        chunk = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        parts += [chunk, crc32c(chunk).to_bytes(4, "little")]
        index[image - start] = offset, len(chunk) + 4
        offset += len(chunk) + 4
    return [*parts, index.tobytes(), crc32c(index.tobytes()).to_bytes(4, "little")]
