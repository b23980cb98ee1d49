"""Which photos a user means: files, folders and globs, in a stable order, and what of it is not there."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from denoising_vit.data.folders import files_below, image_names
from denoising_vit.data.items import Skipped
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel
from denoising_vit.data.storage import Storage
from denoising_vit.errors import PhotoError


def find_photos(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Skipped]]:
    """Expands files, folders (searched recursively for image files) and globs (``**`` allowed).

    Args:
        inputs: in the order that the user gave them.

    Returns:
        Files, each once, folders and globs sorted by name; and what matched nothing. A file named outright is returned
        whatever its ending.
    """
    found: dict[Path, Path] = {}
    skipped: list[Skipped] = []
    for item in map(str, inputs):
        try:
            files, reason = _expand(item, skipped)
        except OSError as error:  # a name too long for the file system
            files, reason = [], error.strerror or str(error)
        except PhotoError as error:  # a folder that may not be read
            files, reason = [], str(error)
        for file in files:
            found.setdefault(file.resolve(), file)  # one file under two spellings comes once
        if not files:
            skipped.append(Skipped(item, reason))
    return list(found.values()), skipped


def _expand(item: str, skipped: list[Skipped]) -> tuple[list[Path], str]:
    """The files an input stands for, and why there are none where there are none; adds what is in the way."""
    path = Path(item)
    if not item.strip():
        return [], "an empty name"
    if path.is_dir():
        return _images_below(
            path, skipped
        ), f"no image files in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
    if path.exists():
        return [path], ""
    if not glob.has_magic(item):
        return [], "no such file or folder"
    matches = sorted(Path(match) for match in glob.glob(item, recursive=True))  # noqa: PTH207, may be absolute
    files = [file for match in matches for file in (_images_below(match, skipped) if match.is_dir() else [match])]
    return files, "the pattern matches no files"


def _images_below(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """Image files at any depth, without hidden ones and without pictures that were drawn of results."""
    names, others = files_below(Storage(), str(folder))
    skipped += (replace(entry, item=str(folder / entry.item)) for entry in others)
    files = (folder / name for name in image_names(names, str(folder)))
    return sorted(file for file in files if not is_panel(file))
