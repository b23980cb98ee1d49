"""Clips: frames in order with the times they are shown at, from a video file or a folder of images."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from denoising_vit.data.folders import image_names
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel
from denoising_vit.errors import ClipError, PhotoError
from denoising_vit.show.video.pictures import PhotoPicture, Picture

#: Sides that differ by less than this share have the same aspect ratio.
_SAME_ASPECT = 0.01


@dataclass(frozen=True, eq=False)
class Timed:
    """One frame of a clip's source.

    Attributes:
        time: when it is shown, in the clip's units of time; None where it is not told.
        duration: for how long.
        picture: None where it could not be decoded.
    """

    time: int | None
    duration: int
    picture: Picture | None


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame as it is worked on.

    Attributes:
        number: in the result, from 0.
        time: when it is shown, in the clip's units of time, from 0.
        duration: for how long, where no other frame follows.
        shown: what the backbone sees, (H, W, 3) uint8; None where it was not wanted.
        panel: what people see, (H, W, 3) uint8; None where it was not wanted.
        lost: why another frame is shown in its place; None where it is itself.
        boxed: whether its aspect is another than the clip's, so that it has black bars.
    """

    number: int
    time: int
    duration: int
    shown: np.ndarray | None = None
    panel: np.ndarray | None = None
    lost: str | None = None
    boxed: bool = False


class Clip(ABC):
    """Frames with their times.

    Attributes:
        path: the file or the folder.
        size: (H, W) in pixels of the first frame as it is shown.
        count: frames, as far as is known before all are decoded; at least 1.
        time_base: seconds in a unit of time.
        rate: frames a second, on average.
        digest: identifies the content.
        missing: frames that the file tells of and does not hold.
    """

    path: Path
    size: tuple[int, int]
    count: int
    time_base: Fraction
    rate: Fraction
    digest: str
    missing: int = 0

    @abstractmethod
    def timed(self) -> Iterator[Timed]:
        """All frames of the source in order, decoded, but not in their final size."""

    @property
    def step(self) -> int:
        """Units of time from one frame to the next, on average; at least 1."""
        return max(1, round(1 / (self.rate * self.time_base)))

    def frames(
        self,
        shown: tuple[int, int],
        panel: tuple[int, int],
        *,
        wanted: Callable[[int], bool] = lambda number: True,
        every: int = 1,
        most: int | None = None,
    ) -> Iterator[Frame]:
        """Frames of the result; in place of one that cannot be read comes the one before it, so that time stays right.

        Args:
            shown: (H, W) that the backbone is shown.
            panel: (H, W) of a panel.
            wanted: which numbers are wanted; others come without pixels.
            every: take every so many-th frame.
            most: end after so many frames.

        Raises:
            ClipError: if no frame can be read.
        """
        return _Sizing(self, shown, panel, wanted).run(every, most)


class _Sizing:
    """One pass over a clip."""

    def __init__(
        self, clip: Clip, shown: tuple[int, int], panel: tuple[int, int], wanted: Callable[[int], bool]
    ) -> None:
        self._clip, self._shown, self._panel, self._wanted = clip, shown, panel, wanted
        self._last: tuple[np.ndarray, np.ndarray, bool] | None = None
        self._waiting: list[Frame] = []  # lost frames at the beginning, before any that can take their place

    def run(self, every: int, most: int | None) -> Iterator[Frame]:
        origin, last = None, -1
        reason = ""
        for index, source in enumerate(self._clip.timed()):
            if origin is None:
                origin = source.time or 0
            time = last + self._clip.step if source.time is None else source.time - origin
            last = time = max(time, last + 1)  # files with times that stand still or go back exist
            number = index // every
            if index % every:
                continue
            if number == most:
                break
            left = min(every, max(1, self._clip.count - index))
            # The frame before the first wanted one is at hand where that cannot be read.
            if not self._wanted(number) and not self._wanted(number + 1):
                yield Frame(number, time, source.duration * left)
                continue
            frame = self._sized(number, time, source.duration * left, source.picture)
            reason = frame.lost or reason
            if frame.shown is None:
                self._waiting.append(frame)
                continue
            yield from self._released(frame)
            yield frame
        if self._waiting and self._last is None:
            raise ClipError(f"{self._clip.path}: none of its frames can be read ({reason})")

    def _sized(self, number: int, time: int, duration: int, picture: Picture | None) -> Frame:
        lost = None
        try:
            if picture is None:
                raise PhotoError("damaged frame")
            boxed = _other_aspect(picture.size(), self._clip.size)
            self._last = fitted(picture, self._shown, boxed), fitted(picture, self._panel, boxed), boxed
        except PhotoError as error:
            lost = str(error)
        if self._last is None:
            return Frame(number, time, duration, lost=lost)
        shown, panel, boxed = self._last
        return Frame(number, time, duration, shown, panel, lost, boxed)

    def _released(self, first: Frame) -> Iterator[Frame]:
        for frame in self._waiting:
            yield Frame(frame.number, frame.time, frame.duration, first.shown, first.panel, frame.lost, first.boxed)
        self._waiting.clear()


def fitted(picture: Picture, size: tuple[int, int], boxed: bool) -> np.ndarray:
    """A picture in (H, W) pixels, (H, W, 3) uint8; where it is boxed, at its own aspect between black bars."""
    if not boxed:
        return picture.at(size)
    height, width = picture.size()
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = picture.at(inner)
    return canvas


def _other_aspect(size: tuple[int, int], usual: tuple[int, int]) -> bool:
    return abs(size[0] * usual[1] / (size[1] * usual[0]) - 1) > _SAME_ASPECT


class FolderClip(Clip):
    """A folder of images, in the order of their names; numbers in them count as numbers.

    Args:
        path: the folder; those below it are not searched.
        rate: frames a second.

    Raises:
        ClipError: if it holds no images, or none that can be read.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate, self.time_base = path, rate, 1 / rate
        try:
            inside = sorted(path.iterdir(), key=_by_numbers)
        except OSError as error:
            raise ClipError(f"{path}: cannot be read ({error.strerror or error})") from error
        shown = [file.name for file in inside if not file.name.startswith(".") and file.is_file()]
        self._files = [path / name for name in image_names(shown, str(path)) if not is_panel(path / name)]
        if not self._files:
            folders = any(file.is_dir() for file in inside)
            raise ClipError(
                f"{path}: no frames in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
                + ("; there are folders in it: name one that holds frames" if folders else "")
            )
        self.count = len(self._files)
        self.size = self._first_size()
        content = hashlib.sha256(str(rate).encode())
        for file in self._files:
            content.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        self.digest = content.hexdigest()

    def timed(self) -> Iterator[Timed]:
        """The images; each is read when its pixels are asked for."""
        for number, file in enumerate(self._files):
            yield Timed(number, 1, PhotoPicture(file))

    def _first_size(self) -> tuple[int, int]:
        reason = ""
        for file in self._files:
            try:
                return PhotoPicture(file).size()
            except PhotoError as error:
                reason = reason or str(error)
        raise ClipError(f"{self.path}: none of its {len(self._files)} images can be read ({reason})")


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Names in the order of people: 2 before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]
