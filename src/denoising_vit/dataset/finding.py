"""Which photos a user means: files, folders and globs, in a stable order, and what of it is not there."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from denoising_vit.dataset.items import Skipped
from denoising_vit.photos import IMAGE_SUFFIXES, is_panel


def find_photos(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Skipped]]:
    """Expands files, folders (searched recursively for image files) and globs (``**`` allowed).

    Args:
        inputs: in the order that the user gave them.

    Returns:
        Files, each once, folders and globs sorted by name; and what matched nothing. A file named outright is returned
        whatever its ending.
    """
    found: dict[Path, Path] = {}
    skipped = []
    for item in map(str, inputs):
        try:
            files, reason = _expand(item)
        except OSError as error:  # a name too long for the file system, a folder that may not be read
            files, reason = [], error.strerror or str(error)
        for file in files:
            found.setdefault(file.resolve(), file)  # one file under two spellings comes once
        if not files:
            skipped.append(Skipped(item, reason))
    return list(found.values()), skipped


def _expand(item: str) -> tuple[list[Path], str]:
    """The files an input stands for, and why there are none where there are none."""
    path = Path(item)
    if not item.strip():
        return [], "an empty name"
    if path.is_dir():
        return _images_below(path), f"no image files in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
    if path.exists():
        return [path], ""
    if not glob.has_magic(item):
        return [], "no such file or folder"
    matches = sorted(Path(match) for match in glob.glob(item, recursive=True))  # noqa: PTH207, may be absolute
    files = [file for match in matches for file in (_images_below(match) if match.is_dir() else [match])]
    return files, "the pattern matches no files"


def _images_below(folder: Path) -> list[Path]:
    """Image files at any depth, without hidden ones and without pictures that were drawn of results."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and not is_panel(path)
    )
