"""What a video of features costs on top of its forward passes, and whether its memory grows with the clip (Linux).

    python benchmarks/video.py [CLIP] [--frames 80] [--repeats 3] [--memory-frames 80 800] [--json out.json]

Time: in one process, alternating, the bare forward passes of backbone and denoiser on the clip's frames (decoded,
resized and normalised beforehand, in the same batches as the video), and `render_video` on the clip, from opening it
to the joined result; the model is already loaded. The ratio of their processor time is reported as well, which does not
depend on other work on the machine. Memory: a separate process for each length, at a smaller size so that the long one
takes a minute, but in batches as at full size; its peak above the loaded model. Without a clip, one of
854 x 480 is generated. Prints one JSON line.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import torch
import tyro
from memory import resident
from overhead import hardware, synchronise
from torch import Tensor

import denoising_vit as dv
from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.show.options import VideoOptions, panel_size, shown_size
from denoising_vit.show.video.films import open_clip
from denoising_vit.show.video.rendering import render_video
from denoising_vit.views.rendering import to_image

#: Maximum time of a video relative to its forward passes, and maximum memory of a long one relative to a short one.
TIME_BAR, MEMORY_BAR = 1.3, 1.0

#: Height and width of a generated clip.
MADE_UP = 480, 854


def main(
    clip: tyro.conf.Positional[Path | None] = None,
    /,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    frames: int = 80,
    repeats: int = 3,
    memory_frames: tuple[int, int] = (80, 800),
    memory_size: int = 140,
    only_memory_of: Annotated[int | None, tyro.conf.arg(help="used by this script itself")] = None,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures time and memory.

    Args:
        clip: a video or a folder of frames; if it is shorter than requested, all of it is measured.
        backbone: name of a model with a shipped denoiser.
        weights: weights of the backbone.
        frames: number of frames for the time.
        repeats: number of alternating bare passes and videos.
        memory_frames: short and long clip length for the memory; 0 0 skips this part.
        memory_size: long side of the frames for the memory, in pixels.
        only_memory_of: measures only the memory of that many frames.
        json_path: file for the record.
    """
    model = dv.load_backbone(backbone, weights=weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = clip or make_clip(folder / "clip.mp4", max(frames, *memory_frames) if only_memory_of else frames)
        if only_memory_of is not None:
            print(peak_above(model, source, folder, only_memory_of, memory_size))
            return
        found = {
            "hardware": hardware(),
            "backbone": model.extra_repr(),
            **speed(model, source, folder, frames, repeats),
        }
    if all(memory_frames):
        peaks = [in_child(length, clip, backbone, weights, memory_size, memory_frames) for length in memory_frames]
        found |= {"memory_frames": memory_frames, "memory_size": memory_size, "peaks_mib": peaks}
        found |= {"memory_ratio": peaks[1] / peaks[0], "memory_bar": MEMORY_BAR}
    print(json.dumps(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def speed(model: dv.Backbone, source: Path, folder: Path, frames: int, repeats: int) -> dict[str, Any]:
    """Seconds of the bare passes and of the video, and their ratio."""
    options = VideoOptions(features="raw,denoiser", max_frames=frames)
    clip = open_clip(source, options.rate)
    size = shown_size(clip.size, model, options)
    batch = fitting_batch(model.device, math.prod(model.grid_size(*size)))
    shown = [frame.shown for frame in clip.frames(size, panel_size(clip.size, options), most=frames)]
    batches = list(normalised(model, [pixels for pixels in shown if pixels is not None], batch))
    clean = dv.DenoisedViT(model, dv.load_denoiser("shipped", backbone=model))
    bare(clean, batches[:2])  # warms up caches
    jobs = [
        ("bare", lambda _: bare(clean, batches)),
        ("video", lambda number: render_video(model, source, folder / f"{number}.mp4", options=options)),
    ]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in jobs}
    for number in range(repeats):
        for name, job in jobs:
            synchronise()
            started = time.perf_counter(), time.process_time()
            job(number)
            synchronise()
            times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    ratios = [video[0] / alone[0] for video, alone in zip(times["video"], times["bare"], strict=True)]
    work = [video[1] / alone[1] for video, alone in zip(times["video"], times["bare"], strict=True)]
    return {
        "frames": len(shown),
        "clip": clip.size,
        "shown": size,
        "batch": batch,
        "bare_s": [round(seconds, 2) for seconds, _ in times["bare"]],
        "video_s": [round(seconds, 2) for seconds, _ in times["video"]],
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "cpu_time_ratio": statistics.median(work),
        "bar": TIME_BAR,
    }


@torch.inference_mode()
def bare(clean: dv.DenoisedViT, batches: list[Tensor]) -> None:
    """Runs the forward passes alone, raw and clean features in one pass, as in the video."""
    for images in batches:
        clean(images)


def normalised(model: dv.Backbone, shown: list[np.ndarray], batch: int) -> Iterator[Tensor]:
    """Frames (H, W, 3) uint8 as images (B, 3, H, W) in the model's dtype and on its device."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    remaining = iter(shown)
    while part := list(itertools.islice(remaining, batch)):
        images = torch.stack([(to_image(pixels) - mean) / std for pixels in part])
        yield images.to(model.device, model.dtype)


def in_child(frames: int, clip: Path | None, backbone: str, weights: str, size: int, lengths: tuple[int, int]) -> float:
    """MiB above the loaded model, measured in a process of its own."""
    command = [sys.executable, __file__, *([str(clip)] if clip else []), "--backbone", backbone, "--weights", weights]
    command += ["--memory-size", str(size), "--memory-frames", *map(str, lengths), "--only-memory-of", str(frames)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_above(model: dv.Backbone, source: Path, folder: Path, frames: int, size: int) -> float:
    """MiB that a video of that many frames takes at its peak above the loaded model."""
    _ = model.fingerprint  # one forward pass: libraries allocate their permanent buffers
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    clip_size = open_clip(source, Fraction(24)).size
    batch = fitting_batch(model.device, math.prod(model.grid_size(*shown_size(clip_size, model, VideoOptions()))))
    done = render_video(model, source, folder / "video.mp4", size=size, max_frames=frames, batch_size=batch)
    if done.frames != frames:
        raise SystemExit(f"{source} has {done.frames} frames, fewer than {frames}")
    (told,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) / 1024 - before / 2**20


def make_clip(path: Path, frames: int) -> Path:
    """Writes coloured squares that move over a gradient, 30 frames per second, as H.264."""
    height, width = MADE_UP
    chance = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    ground = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 96)], axis=-1).astype(np.uint8)
    colours = chance.integers(0, 256, (8, 3))
    starts, steps = chance.uniform(0, 1, (8, 2)), chance.uniform(-0.01, 0.01, (8, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30), options={"preset": "veryfast"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            pixels = ground.copy()
            for colour, place in zip(colours, (starts + steps * number) % 1, strict=True):
                top, left = int(place[0] * (height - 96)), int(place[1] * (width - 96))
                pixels[top : top + 96, left : left + 96] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    tyro.cli(main)
