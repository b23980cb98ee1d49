"""A store's images as single files, for programs that know neither zarr nor this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from denoising_vit.errors import StoreError
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
        OSError: if the folder cannot be written to.
    """
    if kind not in get_args(ExportKind):
        raise StoreError(f"export writes {' or '.join(get_args(ExportKind))}, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(store.ids)
    done = sorted(store.done())
    written = []
    for index in done:
        path = folder / f"{names[index]}.{kind}"
        field, record = store.read(index)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if kind == "npy":
                np.save(file, field, allow_pickle=False)
            else:
                file.write(encode(torch.from_numpy(field), index, record))
        written.append(path)
        if progress is not None:
            progress(len(written), len(done))
    return written


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
