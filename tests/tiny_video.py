"""Shared by the tests of videos: generated clips, and a backbone that takes no time."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

import tiny_denoiser
from denoising_vit import Backbone
from denoising_vit.show.options import VideoOptions

#: Height and width of the frames, and the side of the planted patches.
SIZE = 48, 80

#: Options with which the planted backbone has about 3 x 5 patches.
SMALL = VideoOptions(features="raw", size=80, panel_size=80, part_frames=4, basis_frames=4)


def backbone(seed: int = 0) -> Backbone:
    return tiny_denoiser.backbone(seed=seed)


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture of coarse squares that codecs preserve well, different for each number."""
    chance = np.random.default_rng(number)
    coarse = chance.integers(40, 216, (size[0] // 16 + 1, size[1] // 16 + 1, 3))
    return np.kron(coarse, np.ones((16, 16, 1)))[: size[0], : size[1]].astype(np.uint8)


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    rate: Fraction = Fraction(25),
    options: dict[str, str] | None = None,
    container_format: str | None = None,
) -> Path:
    """A video of these frames (H, W, 3 or 4) uint8; times are in milliseconds, those of the rate unless given."""
    with av.open(str(path), "w", format=container_format) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgba" if pixels.shape[-1] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damage(path: Path, number: int) -> None:
    """Overwrites the content of packet ``number``, counted from 0, with noise."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place, size = packets[number].pos, packets[number].size
    assert place is not None
    content = bytearray(path.read_bytes())
    content[place + 8 : place + size] = np.random.default_rng(0).bytes(size - 8)
    path.write_bytes(content)


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes a display matrix (a, b, c, d) into the track header of an MP4 file."""
    content = bytearray(path.read_bytes())
    # After the name: version and flags, two times, number, reserved, duration, reserved, layer to reserved.
    place = content.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 8
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def folder(path: Path, frames: Sequence[np.ndarray]) -> Path:
    """A folder of PNG frames."""
    path.mkdir(parents=True)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


def decoded(path: Path) -> list[np.ndarray]:
    """All frames (H, W, 3) uint8 of a video."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def seconds(path: Path) -> tuple[list[float], float]:
    """Times at which the frames of a video are shown, and its duration."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base = stream.time_base
        assert base is not None and stream.duration is not None
        times = sorted(float(packet.pts * base) for packet in container.demux(stream) if packet.pts is not None)
        return times, float(stream.duration * base)
