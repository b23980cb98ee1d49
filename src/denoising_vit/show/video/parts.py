"""An unfinished video: a folder of finished parts beside it, from which a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from denoising_vit.errors import ClipError, OutputError
from denoising_vit.files import atomic_path, current_umask
from denoising_vit.show.video.encoding import frames_in, join
from denoising_vit.show.video.records import differences, parsed, recorded_in


class BegunElsewhereError(ClipError):
    """Another run has taken the name of a video; the next free one will do."""


class Parts:
    """The parts of one video.

    Every part is renamed into place when it is whole, and only then counts; so what is done is read from the files.

    Attributes:
        finished: whole parts, in order.
        frames: how many frames they hold.

    Args:
        video: the file that they become; they lie in a hidden folder beside it.
    """

    def __init__(self, video: Path) -> None:
        self._video = video
        self.folder = video.parent / f".{video.stem}.parts"
        self.finished: list[Path] = []
        self.frames = 0

    @property
    def palette(self) -> Path:
        """File of the colours that all parts share."""
        return self.folder / "palette.safetensors"

    @property
    def record(self) -> dict[str, Any] | None:
        """What the parts are recorded to be; None where there are none."""
        try:
            return parsed((self.folder / "record.json").read_text())
        except (OSError, UnicodeDecodeError):
            return None

    def open(self, record: dict[str, Any], each: int, *, overwrite: bool) -> None:
        """Finds what is there, or begins anew.

        Args:
            record: of this run.
            each: frames of a part; the last may have fewer.
            overwrite: whether parts made in another way are thrown away.

        Raises:
            ClipError: if there are parts that were made in another way.
            OutputError: if the folder holds something else.
            BegunElsewhereError: if another run has just begun a video of this name.
            OSError: if the folder cannot be written to.
        """
        before = self.record
        changed = differences(before, record) if before is not None else []
        if changed and not overwrite:
            raise ClipError(
                f"{self._video}: an unfinished run was made with other settings ({'; '.join(changed)}); the same "
                "settings go on from there, --overwrite begins anew"
            )
        self.require_of(record["source"])
        if before is None or changed or not self.palette.is_file():
            self._begin(record)
        for leftover in self.folder.glob(".*.part"):  # of a run that was killed
            leftover.unlink()
        self._find(each)

    def require_of(self, source: str) -> None:
        """Refuses a folder that holds something else than parts of the clip with this digest.

        Raises:
            OutputError: naming it.
        """
        record = self.record
        if record is None and os.path.lexists(self.folder) and not self._is_empty():
            raise OutputError(f"{self.folder} exists and holds no parts of a video; move it away, or choose another -o")
        if record is not None and record.get("source") != source:
            raise OutputError(
                f"{self.folder} holds an unfinished video of another clip, or of this one before it changed; remove "
                "it, or choose another name"
            )

    def _is_empty(self) -> bool:
        return self.folder.is_dir() and all(path.name.endswith(".part") for path in self.folder.iterdir())

    def _begin(self, record: dict[str, Any]) -> None:
        """Makes the folder with its record in one step: of several processes, one has the name.

        Raises:
            BegunElsewhereError: if another has just made it.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        made = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".video-", suffix=".part"))
        try:
            (made / "record.json").write_text(json.dumps(record))
            made.chmod(0o777 & ~current_umask())
            made.rename(self.folder)  # not onto a folder that holds anything
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise BegunElsewhereError(f"{self._video}: another run has just begun it") from error
            raise
        if os.path.lexists(self._video) and not self._replaces(record):  # finished since its name was found free
            shutil.rmtree(self.folder, ignore_errors=True)
            raise BegunElsewhereError(f"{self._video}: another run has just finished it")

    def _replaces(self, record: dict[str, Any] | None) -> bool:
        """Whether the video that is there is one of the same clip."""
        there = recorded_in(self._video)
        return there is not None and record is not None and there.get("source") == record["source"]

    def path(self, number: int) -> Path:
        """Where a part belongs."""
        return self.folder / f"{number:06d}.nut"

    def writing(self, number: int) -> contextlib.AbstractContextManager[Path]:
        """A path to write a part to; it comes to its place when the block succeeds."""
        return atomic_path(self.path(number))

    def add(self, part: Path, frames: int) -> None:
        """Counts a part that is whole."""
        self.finished.append(part)
        self.frames += frames

    def finish(self, end: Fraction) -> None:
        """Joins the parts and takes them away.

        Args:
            end: when the last frame ends, in seconds.
        """
        record = self.record
        join(self.finished, self._video, end, json.dumps(record), new=not self._replaces(record))
        shutil.rmtree(self.folder)

    def _find(self, each: int) -> None:
        """Whole parts up to the first that is not there or not whole; only the last may be short."""
        while (part := self.path(len(self.finished))).is_file() and (frames := frames_in(part)):
            self.add(part, frames)
            if frames != each:
                break
