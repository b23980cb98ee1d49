"""H.264 through PyAV: parts of a video one by one, and their joining without encoding anything again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from denoising_vit.errors import ClipError
from denoising_vit.files import atomic_path, needed

#: Encoders of H.264 that are looked for, in order.
ENCODERS = ("libx264", "libopenh264")

#: Each frame refers to earlier ones only, so that parts can be joined by their times. Little is lost to the eye at 16.
_SETTINGS = {"libx264": {"preset": "superfast", "crf": "16", "bf": "0"}, "libopenh264": {"b": "8000000"}}

#: BT.709, as video players expect: matrix, primaries and transfer; and studio range.
_BT709, _STUDIO = 1, 1


def find_encoder() -> str:
    """The name of the encoder that is used.

    Raises:
        ClipError: if PyAV is not installed, or was built without one.
    """
    av = needed("av", "video", ClipError)
    for name in ENCODERS:
        if name in av.codecs_available:
            try:
                av.codec.Codec(name, "w")
            except av.error.FFmpegError:
                continue
            return name
    raise ClipError(
        f"this PyAV ({av.__version__}) has no H.264 encoder: expected {' or '.join(ENCODERS)}. PyAV from PyPI has "
        "libx264: pip install --force-reinstall --only-binary av av"
    )


class PartWriter:
    """Writes frames to one part; used as a context, in which the part is not finished before its end.

    Args:
        path: of the part, in the container format NUT, which keeps all times as they are.
        size: (H, W) in pixels, both even.
        time_base: seconds in a unit of time.
        rate: frames a second, on average.
        encoder: its name.
    """

    def __init__(self, path: Path, size: tuple[int, int], time_base: Fraction, rate: Fraction, encoder: str) -> None:
        self._av = needed("av", "video", ClipError)
        self._time_base = time_base
        self._scaler = self._av.video.reformatter.VideoReformatter()
        self._container = self._av.open(str(path), "w", format="nut")
        self._stream = self._container.add_stream(encoder, rate=rate, options=_SETTINGS[encoder])
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = self._stream.time_base = time_base
        context.thread_count = 1  # the model has the others
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _STUDIO

    def write(self, pixels: np.ndarray, time: int) -> None:
        """Adds a frame (H, W, 3) uint8 that is shown from a time on."""
        frame = self._av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame = self._scaler.reformat(
            frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
        )
        frame.pts, frame.time_base = time, self._time_base
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def frames_in(part: Path) -> int:
    """How many frames a part holds; 0 where it cannot be read."""
    av = needed("av", "video", ClipError)
    try:
        with av.open(str(part)) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.error.FFmpegError, OSError, IndexError):
        return 0


def join(parts: Sequence[Path], path: Path, end: Fraction, comment: str, *, new: bool = False) -> None:
    """Puts the frames of all parts into one MP4 file that plays while it loads.

    Args:
        parts: in order.
        path: the file.
        end: when the last frame ends, in seconds.
        comment: what the file says of itself.
        new: never replace a file.

    Raises:
        OSError: if it cannot be written.
    """
    av = needed("av", "video", ClipError)
    with (
        atomic_path(path, new=new) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata["comment"] = comment
        with av.open(str(parts[0])) as first:
            stream = container.add_stream_from_template(first.streams.video[0])
            stream.time_base = first.streams.video[0].time_base
        waiting = None
        for packet in _packets(av, parts):
            packet.stream = stream
            if waiting is not None:
                waiting.duration = packet.pts - waiting.pts
                container.mux(waiting)
            waiting = packet
        if waiting is not None:
            waiting.duration = max(1, round(end / waiting.time_base) - waiting.pts)
            container.mux(waiting)


def comment_of(path: Path) -> str | None:
    """What an MP4 file says of itself; None where that is nothing, or it is no such file."""
    av = needed("av", "video", ClipError)
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, OSError):
        return None


def _packets(av: Any, parts: Sequence[Path]) -> Iterator[Any]:
    for part in parts:
        with av.open(str(part)) as container:
            for packet in container.demux(video=0):
                if packet.size:
                    yield packet
