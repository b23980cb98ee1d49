"""H.264 through PyAV: encode parts of a video, and join them without re-encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from denoising_vit.errors import ClipError
from denoising_vit.files import atomic_path, needed

#: H.264 encoders, in order of preference.
ENCODERS = ("libx264", "libopenh264")

#: No B-frames, so that parts can be joined by their times. CRF 16 is visually almost lossless.
_SETTINGS = {"libx264": {"preset": "superfast", "crf": "16", "bf": "0"}, "libopenh264": {"b": "8000000"}}

#: BT.709 (matrix, primaries and transfer) and limited range, as video players expect.
_BT709, _LIMITED = 1, 1


def find_encoder() -> str:
    """The name of the first available encoder; ClipError if PyAV is not installed, or was built without one."""
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


@contextlib.contextmanager
def part_writer(
    path: Path, size: tuple[int, int], time_base: Fraction, rate: Fraction, encoder: str
) -> Iterator[Callable[[np.ndarray, int], None]]:
    """Yield ``write(pixels, time)`` for frames (H, W, 3) uint8 of one part, which is finalized at the end of the block.

    Args:
        path: the part, in the container format NUT, which keeps times exactly.
        size: (H, W) in pixels, both even.
        time_base: seconds in a unit of time.
        rate: average frames per second.
        encoder: name of the encoder.
    """
    av = needed("av", "video", ClipError)
    scaler = av.video.reformatter.VideoReformatter()
    with av.open(str(path), "w", format="nut") as container:
        stream = container.add_stream(encoder, rate=rate, options=_SETTINGS[encoder])
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = stream.time_base = time_base
        context.thread_count = 1  # the model uses the other cores
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED

        def write(pixels: np.ndarray, time: int) -> None:
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame = scaler.reformat(frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))


def frames_in(part: Path) -> int:
    """Number of frames in a part; 0 if it cannot be read."""
    av = needed("av", "video", ClipError)
    try:
        return sum(1 for _ in _packets(av, [part]))
    except (av.error.FFmpegError, OSError, IndexError):
        return 0


def join(parts: Sequence[Path], path: Path, end: Fraction, comment: str, *, new: bool = False) -> None:
    """Join parts in order into one streamable MP4 file, with a comment in its metadata.

    ``end`` is the end of the last frame in seconds; ``new`` raises FileExistsError instead of replacing a file.
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
    """The comment in a video's metadata; None without one, or if it is not a video."""
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
