"""Files of a video: the record of its settings, finished parts for resuming, PNG frames."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from denoising_vit.backbones.recorded import same_weights
from denoising_vit.data.photos import PANEL_SOFTWARE
from denoising_vit.errors import ClipError, OutputError
from denoising_vit.files import (
    Mark,
    current_umask,
    flush_folder,
    flush_tree,
    make_folder,
    owned_path,
    parse_json,
    require_ours,
)
from denoising_vit.show.video.clips import Clip
from denoising_vit.show.video.encoding import comment_of, frames_in, join

#: Format of the records, with its version.
_FORMAT = "denoising-vit/video 1"

#: Fields of a backbone's record that do not determine its features, or are compared separately.
_INDIFFERENT = ("weights", "device", "fingerprint", "digest")


class BegunElsewhereError(ClipError):
    """Another run has taken the name of a video; use the next free one."""


def make_record(source: str, settings: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """The record of a video: digest of the clip, options that determine the frames, identity of the features."""
    record = {"format": _FORMAT, "source": source, "settings": settings, **identity}
    return json.loads(json.dumps(record))  # as read from a file: tuples become lists


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Differences between two records, as text; empty if frames of both belong to the same video."""
    found = ["a different clip"] if theirs.get("source") != mine["source"] else []
    before = theirs.get("settings") or {}
    for name in sorted(before.keys() | mine["settings"].keys()):
        if before.get(name) != (now := mine["settings"].get(name)):
            found.append(f"{name} {before.get(name)}, now {now}")
    backbones = [dict(record.get("backbone") or {}) for record in (theirs, mine)]
    kept = [{name: value for name, value in one.items() if name not in _INDIFFERENT} for one in backbones]
    if kept[0] != kept[1] or not same_weights(*backbones):
        found.append("a different backbone or weights")
    rest = (theirs.keys() | mine.keys()) - {"source", "settings", "backbone"}
    return found + [f"a different {key}" for key in sorted(rest) if theirs.get(key) != mine.get(key)]


def recorded_in(video: Path) -> dict[str, Any] | None:
    """The record in a finished video; None without a video or record."""
    return _parsed(comment_of(video)) if video.is_file() else None


def _parsed(text: str | None) -> dict[str, Any] | None:
    try:
        record = parse_json(text or "")
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def require_own_video(out: Path, clip: Clip) -> dict[str, Any] | None:
    """The record of an existing video of this clip; None if there is no file.

    Raises:
        OutputError: if the file is something else or a video of another clip, or if another clip's unfinished video
            exists.
    """
    existing = recorded_in(out)
    if os.path.lexists(out) and (existing is None or (clip.path.exists() and clip.path.samefile(out))):
        raise OutputError(f"{out} exists and was not written by dvit video; choose another name")
    if existing is not None and existing.get("source") != clip.digest:
        raise OutputError(f"{out} is a video of another clip, or of this one before it changed; choose another name")
    Parts(out).require_of(clip.digest)
    return existing


class Parts:
    """The parts of one video, in a hidden folder next to it.

    A part is renamed into place when it is complete; progress is read from the files.
    """

    def __init__(self, video: Path) -> None:
        self._video = video
        self.folder = video.parent / f".{video.stem}.parts"
        self.palette = self.folder / "palette.safetensors"  #: colours of all parts
        self.finished: list[Path] = []  #: complete parts in order
        self.frames = 0  #: number of frames in complete parts

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of the parts; None if there are none."""
        try:
            return _parsed((self.folder / "record.json").read_text())
        except (OSError, UnicodeDecodeError):
            return None

    def open(self, record: dict[str, Any], each: int, *, overwrite: bool) -> None:
        """Resume from existing parts of ``each`` frames, or start over; ``overwrite`` drops parts with other settings.

        Raises:
            ClipError: if there are parts with other settings.
            OutputError: if the folder has other content.
            BegunElsewhereError: if another run has just started a video with this name.
            OSError: if the folder cannot be written to.
        """
        before = self.record
        changed = differences(before, record) if before is not None else []
        if changed and not overwrite:
            raise ClipError(
                f"{self._video}: an unfinished run has other settings ({'; '.join(changed)}); use the same settings to "
                "resume it, or start over with --overwrite"
            )
        self.require_of(record["source"])
        if before is None or changed or not self.palette.is_file():
            self._begin(record)
        for leftover in self.folder.glob(".*.part"):  # from a killed run
            leftover.unlink()
        # Complete parts up to the first missing or damaged one; only the last may be short.
        while (part := self.path(len(self.finished))).is_file() and (frames := frames_in(part)):
            self.add(part, frames)
            if frames != each:
                break

    def require_of(self, source: str) -> None:
        """Raise OutputError if the folder has anything but parts of the clip with this digest."""
        record = self.record
        if record is None and os.path.lexists(self.folder) and not self._is_empty():
            raise OutputError(f"{self.folder} exists and has no parts of a video; move it away, or choose another -o")
        if record is not None and record.get("source") != source:
            raise OutputError(
                f"{self.folder} has an unfinished video of another clip, or of this one before it changed; remove it, "
                "or choose another name"
            )

    def _is_empty(self) -> bool:
        return self.folder.is_dir() and all(path.name.endswith(".part") for path in self.folder.iterdir())

    def _begin(self, record: dict[str, Any]) -> None:
        """Create the folder with its record in one step, so that only one of several processes gets the name."""
        shutil.rmtree(self.folder, ignore_errors=True)
        made = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".video-", suffix=".part"))
        try:
            (made / "record.json").write_text(json.dumps(record))
            made.chmod(0o777 & ~current_umask())
            flush_tree(made)
            made.rename(self.folder)  # fails if the folder is not empty
            flush_folder(self.folder.parent)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise BegunElsewhereError(f"{self._video}: another run has just started it") from error
            raise
        if os.path.lexists(self._video) and not self._replaces(record):  # finished since its name was checked
            shutil.rmtree(self.folder, ignore_errors=True)
            raise BegunElsewhereError(f"{self._video}: another run has just finished it")

    def _replaces(self, record: dict[str, Any] | None) -> bool:
        """True if the existing video is of the same clip."""
        there = recorded_in(self._video)
        return there is not None and record is not None and there.get("source") == record["source"]

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"{number:06d}.nut"

    def add(self, part: Path, frames: int) -> None:
        """Add a complete part with this number of frames."""
        self.finished.append(part)
        self.frames += frames

    def finish(self, end: Fraction) -> None:
        """Join the parts and remove them; ``end`` is the end of the last frame in seconds."""
        record = self.record
        join(self.finished, self._video, end, json.dumps(record), new=not self._replaces(record))
        shutil.rmtree(self.folder)


class FrameFolder:
    """PNG frames of a video, marked with the digest of their clip."""

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._mark = folder, Mark("frame", source)

    def require_free(self, clip: Path) -> None:
        """Raise OutputError if writing frames would replace anything but frames of the clip at this path."""
        folder = self._folder
        if not os.path.lexists(folder):
            return
        if not folder.is_dir() or (clip.exists() and clip.samefile(folder)):
            what = "the clip's own folder" if folder.is_dir() else "a file"
            raise OutputError(f"{folder}: expected a free folder for frames, found {what}; choose another -o")
        for path in self._numbered():
            require_ours(path, self._mark)

    def write(self, pixels: np.ndarray, number: int) -> None:
        """Write a frame (H, W, 3) uint8, with metadata that distinguishes it from a photo."""
        make_folder(self._folder)
        about = PngInfo()
        about.add_text("Software", PANEL_SOFTWARE)
        with owned_path(self._folder / f"{number:06d}.png", self._mark) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG", pnginfo=about, compress_level=1)

    def drop_after(self, count: int) -> None:
        """Remove leftover frames of an earlier, longer video of the same clip."""
        for path in self._numbered():
            if int(path.stem) >= count and Mark.read(path) == self._mark:
                path.unlink()

    def _numbered(self) -> list[Path]:
        return [path for path in self._folder.glob("[0-9]*.png") if path.stem.isdecimal()]
