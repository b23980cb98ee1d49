"""An unfinished video: a folder of finished parts beside it, from which a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

from denoising_vit.errors import ClipError
from denoising_vit.files import atomic_path
from denoising_vit.video.encoding import frames_in, join
from denoising_vit.video.records import differences, parsed


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
            OSError: if the folder cannot be written to.
        """
        before = self.record
        changed = differences(before, record) if before is not None else []
        if changed and not overwrite:
            raise ClipError(
                f"{self._video}: an unfinished run was made with other settings ({'; '.join(changed)}); the same "
                "settings go on from there, --overwrite begins anew"
            )
        if before is None or changed or not self.palette.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with atomic_path(self.folder / "record.json") as temporary:
                temporary.write_text(json.dumps(record))
        for leftover in self.folder.glob(".*.part"):  # of a run that was killed
            leftover.unlink()
        self._find(each)

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
        join(self.finished, self._video, end, json.dumps(self.record))
        shutil.rmtree(self.folder)

    def _find(self, each: int) -> None:
        """Whole parts up to the first that is not there or not whole; only the last may be short."""
        while (part := self.path(len(self.finished))).is_file() and (frames := frames_in(part)):
            self.add(part, frames)
            if frames != each:
                break
