"""A store's images as single files, for programs that know neither zarr nor this package."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from denoising_vit.errors import OutputError, StoreError
from denoising_vit.files import atomic_path
from denoising_vit.store.images import encode

if TYPE_CHECKING:
    from denoising_vit.store.store import FeatureStore

ExportKind = Literal["npy", "safetensors"]

_LONGEST = 150


def export_images(
    store: FeatureStore, folder: Path, kind: ExportKind, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Writes one file an image that is finished, each whole or not at all.

    Raises:
        StoreError: if the kind is unknown.
        OutputError: if there is a file with other content, by name; nothing is written then.
        OSError: if the folder cannot be written to.
    """
    if kind not in get_args(ExportKind):
        raise StoreError(f"export writes {' or '.join(get_args(ExportKind))}, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(store.ids)
    paths = {index: folder / f"{names[index]}.{kind}" for index in sorted(store.done())}
    there = {index for index, path in paths.items() if os.path.lexists(path)}
    for index in sorted(there):  # before anything is written
        _require_same(paths[index], _content(store, index, kind))
    for count, (index, path) in enumerate(paths.items(), 1):
        if index not in there:
            with atomic_path(path, new=True) as temporary:
                temporary.write_bytes(_content(store, index, kind))
        if progress is not None:
            progress(count, len(paths))
    return list(paths.values())


def _content(store: FeatureStore, index: int, kind: ExportKind) -> bytes:
    """The file of an image, which is the same whenever it is written."""
    field, record = store.read(index)
    if kind == "safetensors":
        return encode(torch.from_numpy(field), index, record)
    file = io.BytesIO()
    np.save(file, field, allow_pickle=False)
    return file.getvalue()


def _require_same(path: Path, content: bytes) -> None:
    """Refuses a file that an earlier export of the same store has not written; an .npy file has no room for a mark.

    Raises:
        OutputError: naming it.
    """
    if not path.is_file() or path.read_bytes() != content:
        raise OutputError(
            f"{path} exists and holds something else than would be written; export to another folder, or move it away"
        )


def file_names(ids: Sequence[str]) -> list[str]:
    """A file name for each id, in order: never a path, and unique even where upper and lower case are one.

    An id that is a plain name keeps it; of any other, what is left of it is followed by its index.
    """
    plain = [_plain(name) for name in ids]
    taken = {name.casefold() for name, original in zip(plain, ids, strict=True) if name == original}
    return list(_unique(ids, plain, taken))


def _unique(ids: Sequence[str], plain: list[str], taken: set[str]) -> Iterator[str]:
    given: set[str] = set()
    for index, (original, name) in enumerate(zip(ids, plain, strict=True)):
        if name != original or name.casefold() in given:
            name = f"{name}-{index}"
            while name.casefold() in taken or name.casefold() in given:
                name += "_"
        given.add(name.casefold())
        yield name


def _plain(name: str) -> str:
    """Letters, digits and ``._-`` of a name, not hidden and not too long."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:_LONGEST] or "image"
