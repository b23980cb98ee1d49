"""Where results go: a name for every photo, and what is finished already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.decomposition.files import read_head
from denoising_vit.errors import DenoisingVitError, FormatError
from denoising_vit.files import atomic_path


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


class OutputFolder:
    """Gives every photo its own name: its stem, or ``stem-2``, ``stem-3``, ... where that belongs to another photo.

    A name belongs to the photo whose pixels are recorded in the file there, so that the same command finds its results
    again and two photos of one name never overwrite each other.

    Args:
        folder: made where it does not exist.
        overwrite: take names whatever they held before this run.

    Raises:
        OutputError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self._claimed: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / ".dvit-writable"):
                pass
            (folder / ".dvit-writable").unlink()
        except OSError as error:
            raise OutputError(
                f"cannot write to {folder} ({error.strerror or error}); choose another with -o"
            ) from error

    def claim(self, photo: Path, digest: str) -> Output:
        """The files for a photo whose pixels have this digest."""
        number = 1
        while True:
            name = photo.stem if number == 1 else f"{photo.stem}-{number}"
            result = self.folder / f"{name}.safetensors"
            if name not in self._claimed:
                existing = self._recorded(result)
                mine = existing is not None and existing.get("photo", {}).get("sha256") == digest
                if self.overwrite or mine or not result.exists():
                    self._claimed.add(name)
                    kept = existing if mine and not self.overwrite else None
                    return Output(result, self.folder / f"{name}.png", kept)
            number += 1

    @staticmethod
    def _recorded(path: Path) -> dict[str, Any] | None:
        try:
            return read_head(path)["info"]
        except FormatError:
            return None
