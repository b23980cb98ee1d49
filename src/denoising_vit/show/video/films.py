"""Video files: their frames, decoded one by one, with what is broken in them put up with."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import logging
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from denoising_vit.data.photos import MAX_PIXELS
from denoising_vit.errors import ClipError
from denoising_vit.files import needed
from denoising_vit.show.video.clips import Clip, FolderClip, Timed
from denoising_vit.show.video.pictures import FilmPicture, display_matrix, shown_size

#: Bytes at either end of a file that identify it, with its length.
_ENDS = 1 << 20


def open_clip(path: str | Path, rate: Fraction) -> Clip:
    """The clip in a video file or a folder of frames.

    Args:
        path: either.
        rate: frames a second of a folder.

    Raises:
        ClipError: if there is none, or it cannot be read.
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

    Args:
        path: the file.

    Raises:
        ClipError: if it is none, holds no video or no frame, none can be decoded, or frames are too large; or PyAV is
            not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._av = needed("av", "video", ClipError)
        self._av.logging.set_level(None)  # what is broken is counted and told; lines of the decoder help nobody
        with self._opened() as (container, stream):
            context = stream.codec_context
            _require_possible(path, context.height, context.width)
            self.time_base = stream.time_base or Fraction(1, 1000)
            times = self._times(container, stream)
            self.count = len(times)
            self.missing = max(0, stream.frames - self.count)
            self.rate = _rate(stream, times, self.time_base)
        if not self.count:
            raise ClipError(f"{path}: a video of no length: it holds no frame")
        self.digest = _digest(path)
        self._matrix: tuple[int, ...] | None = None
        first = next((source.picture for source in self.timed() if isinstance(source.picture, FilmPicture)), None)
        if first is None:
            raise ClipError(f"{path}: none of its {self.count} frames can be decoded; is the file damaged?")
        self._matrix = display_matrix(first.frame)
        self.size = shown_size((first.frame.height, first.frame.width), first.aspect, self._matrix)

    def timed(self) -> Iterator[Timed]:
        """Decoded frames in the order they are shown; those of packets that cannot be decoded come without picture."""
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
        """The file and its video."""
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
                raise ClipError(f"{self.path}: there is no video in it, only {', '.join(kinds) or 'nothing'}")
            # One thread: an error then belongs to the packet that it comes with, and few large frames are held.
            streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
            yield container, streams[0]

    def _times(self, container: Any, stream: Any) -> array[int]:
        """When each packet is shown, in order, without decoding any."""
        found: array[int] = array("q")
        for packet in _until_broken(self._av, container.demux(stream)):
            if packet.size:
                found.append(next((time for time in (packet.pts, packet.dts) if time is not None), len(found)))
        return array("q", sorted(found))


def _until_broken(av: Any, packets: Iterator[Any]) -> Iterator[Any]:
    """Packets, up to where the file ends early."""
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError) as error:
            if not isinstance(error, StopIteration):
                logging.getLogger(__name__).debug("the file ends early: %s", error)
            return
        yield packet


def _require_possible(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ClipError(
            f"{path}: frames of {width:,} x {height:,} pixels are more than the limit of {MAX_PIXELS:,}; shrink them "
            "first"
        )


def _rate(stream: Any, times: array[int], time_base: Fraction) -> Fraction:
    """Frames a second, on average: what the file says, or what its times tell."""
    told = stream.average_rate or stream.guessed_rate
    if told:
        return Fraction(told)
    if len(times) > 1 and times[-1] > times[0]:
        return ((len(times) - 1) / ((times[-1] - times[0]) * time_base)).limit_denominator(100_000)
    return Fraction(25)


def _digest(path: Path) -> str:
    """SHA-256 of a file's length and its two ends: enough to tell it from others, and quick for hours of video."""
    length = path.stat().st_size
    with path.open("rb") as file:
        content = hashlib.sha256(str(length).encode() + file.read(_ENDS))
        file.seek(max(0, length - _ENDS))
        content.update(file.read(_ENDS))
    return content.hexdigest()
