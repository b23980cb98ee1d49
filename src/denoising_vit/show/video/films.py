"""Video files: frames decoded one by one, tolerating damage."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from denoising_vit.data.photos import MAX_PIXELS
from denoising_vit.errors import ClipError
from denoising_vit.files import needed
from denoising_vit.show.video.clips import Clip, FolderClip, Timed

#: Number of bytes at each end of a file to identify it by, together with its length.
_ENDS = 1 << 20

#: Frames without a colour space are treated as BT.709 from this height on, below as BT.601.
HIGH_DEFINITION = 720

#: Value of a frame's colour space for "unspecified".
_UNSPECIFIED = 2


def open_clip(path: str | Path, rate: Fraction) -> Clip:
    """Open a video file, or a folder of frames at ``rate`` frames per second.

    Raises:
        ClipError: if it does not exist or cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderClip(path, rate)
    if not path.exists():
        raise ClipError(f"{path}: no such file or folder; expected a video file or a folder of frames")
    if path.stat().st_size == 0:
        raise ClipError(f"{path}: the file is empty (0 bytes)")
    return FilmClip(path)


class FilmClip(Clip):
    """A video file.

    Raises:
        ClipError: if it is not a video, no frame can be decoded, frames are too large, or PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._av = needed("av", "video", ClipError)
        self._av.logging.set_level(None)  # damaged frames are counted and reported here
        with self._opened() as (container, stream):
            context = stream.codec_context
            _require_possible(path, context.height, context.width)
            self.time_base = stream.time_base or Fraction(1, 1000)
            times = self._times(container, stream)
            self.count = len(times)
            self.missing = max(0, stream.frames - self.count)
            self.rate = _rate(stream, times, self.time_base)
        if not self.count:
            raise ClipError(f"{path}: the video has no frames")
        self.digest = _digest(path)
        self._matrix: tuple[int, ...] | None = None
        first = next((source.picture for source in self.timed() if isinstance(source.picture, FilmPicture)), None)
        if first is None:
            raise ClipError(f"{path}: none of its {self.count} frames can be decoded; the file may be damaged")
        self._matrix = display_matrix(first.frame)
        self.size = _displayed((first.frame.height, first.frame.width), first.aspect, self._matrix)

    def timed(self) -> Iterator[Timed]:
        """Frames in display order; an undecodable packet gives a frame without a picture."""
        lost: list[int] = []
        scaler = functools.cache(lambda _size: self._av.video.reformatter.VideoReformatter())
        with self._opened() as (container, stream):
            aspect = float(stream.codec_context.sample_aspect_ratio or 1) or 1.0
            for packet in _until_broken(self._av, container.demux(stream)):
                try:
                    frames = packet.decode()
                except self._av.error.FFmpegError:
                    if packet.pts is not None:
                        heapq.heappush(lost, packet.pts)
                    continue
                for frame in frames:
                    while lost and frame.pts is not None and lost[0] < frame.pts:
                        yield Timed(heapq.heappop(lost), self.step, None)
                    _require_possible(self.path, frame.height, frame.width)
                    picture = None if frame.is_corrupt else FilmPicture(frame, aspect, self._matrix, scaler)
                    yield Timed(frame.pts, frame.duration or self.step, picture)
            while lost:
                yield Timed(heapq.heappop(lost), self.step, None)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream."""
        try:
            container = self._av.open(str(self.path), metadata_errors="replace")
        except (self._av.error.FFmpegError, OSError) as error:
            raise ClipError(
                f"{self.path}: not a video file that can be read ({error.strerror or error}); expected a video such as "
                "MP4, MOV, MKV, WebM or AVI, or a folder of frames"
            ) from error
        with container:
            covers = self._av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise ClipError(f"{self.path}: expected a video stream, found {', '.join(kinds) or 'no stream'}")
            # One thread, so that errors belong to their packet, and only a few large frames are in memory.
            streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
            yield container, streams[0]

    def _times(self, container: Any, stream: Any) -> array[int]:
        """Display times of all packets, sorted, without decoding."""
        found: array[int] = array("q")
        for packet in _until_broken(self._av, container.demux(stream)):
            if packet.size:
                found.append(next((time for time in (packet.pts, packet.dts) if time is not None), len(found)))
        return array("q", sorted(found))


def _until_broken(av: Any, packets: Iterator[Any]) -> Iterator[Any]:
    """Packets up to the end of the file, or to the point where it is truncated."""
    try:
        yield from packets
    except av.error.FFmpegError as error:
        logging.getLogger(__name__).debug("the file ends early: %s", error)


def _require_possible(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ClipError(
            f"{path}: frames of {width:,} x {height:,} pixels exceed the limit of {MAX_PIXELS:,}; downscale the video "
            "first"
        )


def _rate(stream: Any, times: array[int], time_base: Fraction) -> Fraction:
    """Average frames per second, from the header or from the times."""
    stated = stream.average_rate or stream.guessed_rate
    if stated:
        return Fraction(stated)
    if len(times) > 1 and times[-1] > times[0]:
        return ((len(times) - 1) / ((times[-1] - times[0]) * time_base)).limit_denominator(100_000)
    return Fraction(25)


def _digest(path: Path) -> str:
    """SHA-256 of a file's length and both ends: enough to identify it, and fast even for hours of video."""
    length = path.stat().st_size
    with path.open("rb") as file:
        content = hashlib.sha256(str(length).encode() + file.read(_ENDS))
        file.seek(max(0, length - _ENDS))
        content.update(file.read(_ENDS))
    return content.hexdigest()


@dataclass(frozen=True, eq=False)
class FilmPicture:
    """A decoded frame: PyAV's frame, pixel aspect ratio, the video's display matrix, and PyAV's scaler for a size."""

    frame: Any
    aspect: float
    matrix: tuple[int, ...] | None
    scaler: Callable[[tuple[int, int]], Any]

    def size(self) -> tuple[int, int]:
        """(H, W) as displayed."""
        return _displayed((self.frame.height, self.frame.width), self.aspect, self.matrix)

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The frame resized to (H, W); resized before the conversion to RGB, which avoids a full-size RGB copy."""
        height, width = size[::-1] if _is_quarter_turn(self.matrix) else size
        alpha = self.frame.format.name == "pal8" or any(part.is_alpha for part in self.frame.format.components)
        unknown = self.frame.colorspace == _UNSPECIFIED and self.frame.height >= HIGH_DEFINITION
        scaled = self.scaler(size).reformat(
            self.frame,
            width=width,
            height=height,
            format="rgba" if alpha else "rgb24",
            interpolation="AREA" if self.frame.height > height else "BICUBIC",
            src_colorspace="ITU709" if unknown else None,
            threads=1,
        )
        pixels = scaled.to_ndarray()
        return upright(over_white(pixels) if alpha else pixels, self.matrix)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 with transparency as (H, W, 3) uint8 on white."""
    share = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The nine numbers of a video's rotation and mirroring; None without either.

    Call it for one frame only: once its side data has been read, PyAV keeps a frame until the next garbage collection,
    which is too long for large frames.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return tuple(np.frombuffer(bytes(data)[:36], np.int32).tolist())
    return None


def upright(pixels: np.ndarray, matrix: Sequence[int] | None) -> np.ndarray:
    """Pixels (H, W, 3) rotated and mirrored by a display matrix, to the nearest quarter turn.

    The matrix a, b, u, c, d, v, x, y, w maps a position (x, y) to (a x + c y, b x + d y).
    """
    if matrix is None:
        return pixels
    a, b, _, c, d = matrix[:5]
    across, down = a, d
    if _is_quarter_turn(matrix):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b  # (H, W, 3) -> (W, H, 3)
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _displayed(size: tuple[int, int], aspect: float, matrix: Sequence[int] | None) -> tuple[int, int]:
    """(H, W) in square pixels, upright, of a frame stored as (H, W) pixels of this aspect ratio."""
    height, width = size[0], max(1, round(size[1] * aspect))
    return (width, height) if _is_quarter_turn(matrix) else (height, width)


def _is_quarter_turn(matrix: Sequence[int] | None) -> bool:
    """True if width and height are swapped."""
    return matrix is not None and abs(matrix[0]) + abs(matrix[4]) < abs(matrix[1]) + abs(matrix[3])
