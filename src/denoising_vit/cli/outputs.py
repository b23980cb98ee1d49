"""Where results go: a name for every photo, and what is finished already."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from denoising_vit.backbones import BackboneSpec
from denoising_vit.errors import FormatError, OutputError
from denoising_vit.files import Mark, atomic_path, digest_of, plain_stem, readable, unwritable

__all__ = ["Output", "OutputError", "OutputFolder", "input_digest", "require_writable"]


def numbered(stem: str) -> Iterator[str]:
    """``stem``, ``stem-2``, ``stem-3``, ..."""
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))


@dataclass(frozen=True)
class Output:
    """The files of one photo.

    Attributes:
        result: the safetensors file.
        panel: the picture.
        mark: of the picture.
        existing: what an earlier run recorded of this very photo, None where it has not been done.
        replaces: whether there is a result of this photo, which is written anew.
        note: what is to be said of another result that stays.
    """

    result: Path
    panel: Path
    mark: Mark
    existing: dict[str, Any] | None = None
    replaces: bool = False
    note: str | None = None


def input_digest(data: str, model: BackboneSpec) -> str:
    """What tells an output of a data set and a backbone from those of others: where and which they are."""
    own = {name: value for name, value in asdict(model).items() if name not in ("device", "dtype")}
    return digest_of(data if "://" in data else Path(data), own)


def require_writable(folder: Path) -> None:
    """Makes a folder where it does not exist, and writes to it to see whether that is allowed.

    Raises:
        OutputError: if it is not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".dvit-writable-{os.getpid()}"
        with atomic_path(probe, new=True):
            pass
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({unwritable(error)}); choose another with -o") from error


class OutputFolder:
    """Gives every photo its own name: its stem, or ``stem-2``, ``stem-3``, ... where that belongs to something else.

    A name belongs to the photo whose pixels are recorded in the file there, so that the same command finds its results
    again, two photos of one name never overwrite each other, and files that are no results of ours are left alone.
    With ``overwrite`` it also belongs to the photo that lay at the same place and was edited since.

    A name is free while it has no file: of two runs that take the same one, the first to write its result has it, and
    the other claims again.

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
        mark, place = Mark("panel", digest), digest_of(photo.resolve())
        stem, note = plain_stem(photo.stem), None
        edited: Output | None = None
        for name in numbered(stem):
            if name in self._claimed:
                continue
            result, panel = self.folder / f"{name}.safetensors", self.folder / f"{name}.png"
            if not os.path.lexists(result):
                if not _is_ours(panel, digest, recorded=False):
                    continue
                return self._taken(edited or Output(result, panel, mark, note=note))
            existing = self._recorded(result)
            told = (existing or {}).get("photo", {})
            if existing is None or not _is_ours(panel, told.get("sha256"), recorded=True):
                continue
            if told.get("sha256") == digest:
                return self._taken(Output(result, panel, mark, None if self.overwrite else existing, replaces=True))
            if self.overwrite and told.get("place") == place:
                edited = edited or Output(result, panel, mark, replaces=True)
            elif told.get("name") == readable(photo.name):
                note = _of_another(result, certain=told.get("place") == place)
        raise AssertionError("unreachable: numbers do not end")

    def release(self, output: Output) -> None:
        """Gives a name back that another run has taken meanwhile."""
        self._claimed.discard(output.result.stem)

    def _taken(self, output: Output) -> Output:
        self._claimed.add(output.result.stem)
        return output

    @staticmethod
    def _recorded(path: Path) -> dict[str, Any] | None:
        from denoising_vit.decomposition.files import read_head

        try:
            return read_head(path)["info"]
        except FormatError:
            return None


def _is_ours(panel: Path, digest: str | None, *, recorded: bool) -> bool:
    """Whether a picture may be written there: none is, or one of the photo with this digest.

    Args:
        panel: the picture.
        digest: of the photo that the result beside it is, or will be, made from.
        recorded: whether that result is there: its picture may be of a release that marked no photo.
    """
    from denoising_vit.data.photos import is_panel

    if not os.path.lexists(panel):
        return True
    found = Mark.read(panel)
    return found == Mark("panel", digest or "") or (recorded and found is None and is_panel(panel))


def _of_another(result: Path, *, certain: bool) -> str:
    if certain:
        return f"{result.name} stays: it was made from this photo before it changed; --overwrite replaces it"
    return f"{result.name} stays: it was made from another photo of this name, or from this one before it changed"
