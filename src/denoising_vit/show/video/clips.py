"""Clips: frames in order with their times, from a video file or a folder of images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from denoising_vit.data.listing import by_number, image_names
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel, read_photo
from denoising_vit.errors import ClipError, PhotoError

#: Relative difference below which aspect ratios count as the same.
_SAME_ASPECT = 0.01


class Picture(Protocol):
    """A frame before it is resized; both methods raise PhotoError if it cannot be read."""

    def size(self) -> tuple[int, int]:
        """(H, W) as displayed, upright and with square pixels."""
        ...

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The frame resized to (H, W), (H, W, 3) uint8."""
        ...


@dataclass(frozen=True, eq=False)
class Timed:
    """A source frame: start (None if unknown) and duration in units of time, and picture (None if damaged)."""

    time: int | None
    duration: int
    picture: Picture | None


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of the result; it has pixels only if it is wanted."""

    number: int  # from 0
    time: int  # in the clip's units of time, from 0
    duration: int  # used only for the last frame
    shown: np.ndarray | None = None  # input of the backbone, (H, W, 3) uint8
    panel: np.ndarray | None = None  # image panel, (H, W, 3) uint8
    lost: str | None = None  # why another frame replaces it
    boxed: bool = False  # its aspect ratio differs from the clip's: black bars are added


class Clip(ABC):
    """Frames with their times."""

    path: Path  # the file or folder
    size: tuple[int, int]  # (H, W) in pixels of the first frame as displayed
    count: int  # number of frames, estimated before decoding; at least 1
    time_base: Fraction  # seconds in a unit of time
    rate: Fraction  # average frames per second
    digest: str  # identifies the content
    missing: int = 0  # number of frames that the header lists but the file lacks

    @abstractmethod
    def timed(self) -> Iterator[Timed]:
        """All frames of the source in order."""

    @property
    def step(self) -> int:
        """Average units of time between frames; at least 1."""
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
        """Frames of the result; an unreadable frame is replaced by the previous one, so that times stay correct.

        Args:
            shown: (H, W) of the backbone's input.
            panel: (H, W) of a panel.
            wanted: selects frame numbers; other frames have no pixels.
            every: use every n-th frame.
            most: maximum number of frames.

        Raises:
            ClipError: if no frame can be read.
        """
        origin, last, reason = None, -1, ""
        known: tuple[np.ndarray, np.ndarray, bool] | None = None
        waiting: list[Frame] = []  # unreadable frames before the first readable one
        for index, source in enumerate(self.timed()):
            if origin is None:
                origin = source.time or 0
            time = last + self.step if source.time is None else source.time - origin
            last = time = max(time, last + 1)  # times in damaged files may repeat or decrease
            number = index // every
            if index % every:
                continue
            if number == most:
                break
            frame = Frame(number, time, source.duration * min(every, max(1, self.count - index)))
            # The frame before the first wanted frame replaces it if it cannot be read.
            if not wanted(number) and not wanted(number + 1):
                yield frame
                continue
            try:
                if source.picture is None:
                    raise PhotoError("damaged frame")
                boxed = _other_aspect(source.picture.size(), self.size)
                known = fitted(source.picture, shown, boxed), fitted(source.picture, panel, boxed), boxed
            except PhotoError as error:
                reason = str(error)
                frame = replace(frame, lost=reason)
            waiting.append(frame)
            if known is not None:
                for one in waiting:
                    yield replace(one, shown=known[0], panel=known[1], boxed=known[2])
                waiting.clear()
        if waiting:
            raise ClipError(f"{self.path}: none of its frames can be read ({reason})")


def fitted(picture: Picture, size: tuple[int, int], boxed: bool) -> np.ndarray:
    """A picture as (H, W, 3) uint8, stretched to the size or, if boxed, padded with black bars."""
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


class PhotoPicture:
    """An image file, read on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pixels: np.ndarray | None = None

    def size(self) -> tuple[int, int]:
        """(H, W) of the photo."""
        height, width = self._read().shape[:2]
        return height, width

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The photo resized to (H, W)."""
        image = Image.fromarray(self._read())
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=3.0))

    def _read(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = read_photo(self._path)
        return self._pixels


class FolderClip(Clip):
    """A folder of images in natural order of their names; subfolders are not searched.

    Raises:
        ClipError: if it has no readable images.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate, self.time_base = path, rate, 1 / rate
        try:
            inside = sorted(path.iterdir(), key=lambda file: by_number(file.name))
        except OSError as error:
            raise ClipError(f"{path}: cannot be read ({error.strerror or error})") from error
        shown = [file.name for file in inside if not file.name.startswith(".") and file.is_file()]
        self._files = [path / name for name in image_names(shown, str(path)) if not is_panel(path / name)]
        if not self._files:
            folders = any(file.is_dir() for file in inside)
            raise ClipError(
                f"{path}: no frames in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
                + ("; it has subfolders: give one that has frames" if folders else "")
            )
        self.count = len(self._files)
        self.size = self._first_size()
        content = hashlib.sha256(str(rate).encode())
        for file in self._files:
            content.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        self.digest = content.hexdigest()

    def timed(self) -> Iterator[Timed]:
        """The images, read on first use."""
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
