"""Which photos a user means: files, folders and globs, in a stable order, and what of it is not there."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.photos import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Skipped:
    """Something that was asked for and could not be used.

    Attributes:
        item: what was asked for.
        reason: why it was skipped, for people.
    """

    item: str
    reason: str


def find_photos(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Skipped]]:
    """Expands files, folders (searched recursively for image files) and globs (``**`` allowed).

    Args:
        inputs: in the order that the user gave them.

    Returns:
        Files, each once, folders and globs sorted by name; and what matched nothing. A file named outright is returned
        whatever its ending.
    """
    found: dict[Path, None] = {}
    skipped = []
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            files = _images_below(path)
            reason = f"no image files in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        elif path.exists():
            files, reason = [path], ""
        elif glob.has_magic(item):
            matches = sorted(Path(match) for match in glob.glob(item, recursive=True))  # noqa: PTH207, may be absolute
            files = [file for match in matches for file in (_images_below(match) if match.is_dir() else [match])]
            reason = "the pattern matches no files"
        else:
            files, reason = [], "no such file or folder"
        found |= dict.fromkeys(files)
        if not files:
            skipped.append(Skipped(item, reason))
    return list(found), skipped


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
