"""Output files: names for photos, and existing results."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from denoising_vit.backbones import BackboneSpec
from denoising_vit.errors import FormatError, OutputError
from denoising_vit.files import Mark, atomic_path, digest_of, make_folder, plain_stem, readable, unwritable


def numbered(stem: str) -> Iterator[str]:
    """``stem``, ``stem-2``, ``stem-3``, ..."""
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))


@dataclass(frozen=True)
class Output:
    """The files of one photo."""

    result: Path  # the safetensors file
    panel: Path  # the picture
    mark: Mark  # ownership mark of the picture
    existing: dict[str, Any] | None = None  # record of an earlier result of this photo
    replaces: bool = False  # an existing result of this photo is overwritten
    note: str | None = None  # remark about another result that is kept


def input_digest(data: str, model: BackboneSpec) -> str:
    """Digest of a data set's location and a backbone, to identify an output made from them."""
    own = {name: value for name, value in asdict(model).items() if name not in ("device", "dtype")}
    return digest_of(data if "://" in data else Path(data), own)


def require_writable(folder: Path) -> None:
    """Create a folder if it does not exist; OutputError if it is not writable."""
    try:
        make_folder(folder)
        probe = folder / f".dvit-writable-{os.getpid()}"
        with atomic_path(probe, new=True, durable=False):
            pass
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({unwritable(error)}); choose another folder") from error


class OutputFolder:
    """Assigns a name to every photo: its stem, or ``stem-2``, ``stem-3``, ... if the name is taken.

    A result belongs to the photo whose pixels it records. The same command finds its results again, two photos with the
    same name never overwrite each other, and all other files are kept. With ``overwrite``, results are replaced, and a
    result also belongs to an edited photo at the same path.

    A name is free while no file has it. If two runs choose the same name, the first to write keeps it, and the other
    claims a new one. The folder is created if it does not exist; OutputError if it cannot be written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._claimed: set[str] = set()
        self._lock = threading.Lock()  # one thread may claim a name while another releases one
        require_writable(folder)

    def claim(self, photo: Path, digest: str) -> Output:
        """The files for a photo with this digest of its pixels."""
        with self._lock:
            return self._claim(photo, digest)

    def _claim(self, photo: Path, digest: str) -> Output:
        from denoising_vit.decomposition.result import read_head

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
            try:
                existing = read_head(result)["info"]
            except FormatError:
                continue
            source = existing.get("photo", {})
            if not _is_ours(panel, source.get("sha256"), recorded=True):
                continue
            if source.get("sha256") == digest:
                return self._taken(Output(result, panel, mark, None if self.overwrite else existing, replaces=True))
            if self.overwrite and source.get("place") == place:
                edited = edited or Output(result, panel, mark, replaces=True)
            elif source.get("name") == readable(photo.name):
                note = _of_another(result, certain=source.get("place") == place)
        raise AssertionError("unreachable: numbers do not end")

    def release(self, output: Output) -> None:
        """Release a name that another run has taken."""
        self._claimed.discard(output.result.stem)

    def _taken(self, output: Output) -> Output:
        self._claimed.add(output.result.stem)
        return output


def _is_ours(panel: Path, digest: str | None, *, recorded: bool) -> bool:
    """True if the picture does not exist, or shows the photo with this digest."""
    from denoising_vit.data.photos import is_panel

    if not os.path.lexists(panel):
        return True
    found = Mark.read(panel)
    # Earlier releases did not write marks, so next to a recorded result, a picture without one also counts.
    return found == Mark("panel", digest or "") or (recorded and found is None and is_panel(panel))


def _of_another(result: Path, *, certain: bool) -> str:
    if certain:
        return f"{result.name} kept: made from an earlier version of this photo; use --overwrite to replace it"
    return f"{result.name} kept: made from another photo with this name, or from an earlier version of this one"
