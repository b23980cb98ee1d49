"""Export of a store's images to single files, for programs that use neither zarr nor this package."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from denoising_vit.errors import OutputError, StoreError
from denoising_vit.files import atomic_path, make_folder
from denoising_vit.store.fields import StoredField, encode
from denoising_vit.store.reading import StoreReader

ExportKind = Literal["npy", "safetensors"]

_LONGEST = 150


def export_images(
    store: StoreReader, folder: Path, kind: ExportKind, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write each finished image to its own file, atomically.

    Raises:
        StoreError: if the kind is unknown.
        OutputError: naming an existing file with other content; then nothing is written.
        OSError: if the folder cannot be written to.
    """
    if kind not in get_args(ExportKind):
        raise StoreError(f"the kind of export must be {' or '.join(get_args(ExportKind))}, got {kind!r}")
    make_folder(folder)
    names = file_names(store.ids)
    paths = {index: folder / f"{names[index]}.{kind}" for index in sorted(store.done())}
    existing = {index for index, path in paths.items() if os.path.lexists(path)}
    for index in sorted(existing):  # before anything is written
        # An .npy file has no room for a mark: only identical content shows that a file is from an earlier export.
        if not paths[index].is_file() or paths[index].read_bytes() != _content(store, index, kind):
            raise OutputError(
                f"{paths[index]} exists and has other content; export to another folder, or move the file away"
            )
    for count, (index, path) in enumerate(paths.items(), 1):
        if index not in existing:
            with atomic_path(path, new=True) as temporary:
                temporary.write_bytes(_content(store, index, kind))
        if progress is not None:
            progress(count, len(paths))
    return list(paths.values())


def _content(store: StoreReader, index: int, kind: ExportKind) -> bytes:
    """Content of an image's file, identical on every export."""
    field, record = store.read(index)
    if kind == "safetensors":
        return encode(StoredField(field), index, record)
    file = io.BytesIO()
    np.save(file, field, allow_pickle=False)
    return file.getvalue()


def file_names(ids: Sequence[str]) -> list[str]:
    """A file name for each id, in order: never a path, and unique even on case-insensitive file systems.

    An id that is a plain name is kept; any other is sanitized, and its index appended.
    """
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:_LONGEST] or "image" for name in ids]
    taken = {name.casefold() for name, original in zip(plain, ids, strict=True) if name == original}
    used: set[str] = set()
    result = []
    for index, (original, name) in enumerate(zip(ids, plain, strict=True)):
        if name != original or name.casefold() in used:
            name = f"{name}-{index}"
            while name.casefold() in taken or name.casefold() in used:
                name += "_"
        used.add(name.casefold())
        result.append(name)
    return result
