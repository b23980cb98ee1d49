"""Where results go: a name for every photo, and what is finished already."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.decomposition.files import read_head
from denoising_vit.errors import DenoisingVitError, FormatError
from denoising_vit.files import atomic_path
from denoising_vit.photos import is_panel


class OutputError(DenoisingVitError):
    """An output folder that cannot be written to."""


@dataclass(frozen=True)
class Output:
    """The files of one photo.

    Attributes:
        result: the safetensors file.
        panel: the picture.
        existing: what an earlier run recorded of this very photo, None where it has not been done.
    """

    result: Path
    panel: Path
    existing: dict[str, Any] | None


def require_writable(folder: Path) -> None:
    """Makes a folder where it does not exist, and writes to it to see whether that is allowed.

    Raises:
        OutputError: if it is not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".dvit-writable"):
            pass
        (folder / ".dvit-writable").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror or error}); choose another with -o") from error


class OutputFolder:
    """Gives every photo its own name: its stem, or ``stem-2``, ``stem-3``, ... where that belongs to something else.

    A name belongs to the photo whose pixels are recorded in the file there, so that the same command finds its results
    again, two photos of one name never overwrite each other, and files that are no results of ours are left alone.

    Args:
        folder: made where it does not exist.
        overwrite: do a photo again where its own result exists.

    Raises:
        OutputError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self._claimed: set[str] = set()
        require_writable(folder)

    def claim(self, photo: Path, digest: str) -> Output:
        """The files for a photo whose pixels have this digest."""
        for number in itertools.count(1):
            name = photo.stem if number == 1 else f"{photo.stem}-{number}"
            result, panel = self.folder / f"{name}.safetensors", self.folder / f"{name}.png"
            existing = self._recorded(result)
            mine = existing is not None and existing.get("photo", {}).get("sha256") == digest
            free = not result.exists() and (not panel.exists() or is_panel(panel))
            if name not in self._claimed and (mine or free):
                self._claimed.add(name)
                return Output(result, panel, existing if mine and not self.overwrite else None)
        raise AssertionError("unreachable: numbers do not end")

    @staticmethod
    def _recorded(path: Path) -> dict[str, Any] | None:
        try:
            return read_head(path)["info"]
        except FormatError:
            return None
