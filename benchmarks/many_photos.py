"""What `dvit denoise` of many photos costs, compared with the bare forward passes of the same photos.

    python benchmarks/many_photos.py PHOTOS [--count 20] [--runs 3] [--no-pictures] [--out DIR]

In one process, in alternating runs: the passes of the backbone and of its denoiser over half of the photos, rendered
beforehand; `dvit denoise --method denoiser` of that half; and the same of all. The difference of the last two is what
the other half costs once everything is loaded: decoding, rendering, passes, pictures and results. Writes the ratio of
pairs of runs, by wall and by processor seconds, and the processor seconds for drawing a picture.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measuring import Times, alternate, hardware, passes, ratios, some_photos, table, write

import denoising_vit as dv
from denoising_vit.cli import app
from denoising_vit.data.photos import read_photo
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.maps import draw_panel
from denoising_vit.views.rendering import per_channel, to_image

#: Maximum time of a photo, relative to its bare forward passes.
BAR = 1.15

CLOCKS = ("wall", "processor")


def main(
    photos: tyro.conf.Positional[Path],
    /,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    count: Annotated[int, tyro.conf.arg(help="number of photos; an even one")] = 20,
    runs: int = 3,
    pictures: Annotated[bool, tyro.conf.arg(help="draw pictures, as the verb does by default")] = True,
    out: Annotated[Path | None, tyro.conf.arg(help="folder for JSON and Markdown")] = None,
) -> None:
    """Measures `dvit denoise` of many photos."""
    model = dv.load_backbone(backbone)
    chosen = [Path(photo.url) for photo in some_photos(photos, count)]
    half = len(chosen) // 2
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "out"
        bare = forward(model, chosen[half:])
        jobs: dict[str, Callable[[], Any]] = {
            "forward": lambda: [job() for job in bare],
            "half": lambda: denoise(chosen[:half], results, backbone, pictures),
            "all": lambda: denoise(chosen, results, backbone, pictures),
        }
        times = alternate(jobs, runs)
        beyond = Times(
            *(
                [
                    every - part
                    for every, part in zip(getattr(times["all"], clock), getattr(times["half"], clock), strict=True)
                ]
                for clock in CLOCKS
            )
        )
        found: dict[str, Any] = {
            "hardware": hardware(),
            "backbone": model.extra_repr(),
            "photos": len(chosen),
            "pictures": pictures,
            "forward_s": {clock: times["forward"].median(clock) / half for clock in CLOCKS},
            "denoise_s": {clock: beyond.median(clock) / half for clock in CLOCKS},
            "ratio": ratios(beyond, times["forward"]),
            "draw_processor_s": drawing(chosen[0], results),
        }
    write(out, "many_photos", found, markdown(found))


def forward(model: dv.Backbone, photos: list[Path]) -> list[Callable[[], None]]:
    """A job for each photo: the backbone and the shipped denoiser, over the whole photo."""
    side = (model.default_size, model.default_size)
    extractor = dv.DenoisedViT(model, dv.load_denoiser(model.name)).eval()
    mean, std = (per_channel(values, model.device) for values in (model.mean, model.std))
    jobs = []
    for photo in photos:
        image = to_image(read_photo(photo), model.device)[None]
        image = torch.nn.functional.interpolate(image, side, mode="bicubic", antialias=True).clamp(0, 1)
        jobs.append(passes(extractor, ((image - mean) / std).to(model.dtype)))
    return jobs


def denoise(photos: list[Path], out: Path, backbone: str, pictures: bool) -> None:
    """Runs the command, including its start-up but not imports."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        more = [] if pictures else ["--no-pictures"]
        named = ["--backbone", backbone, "--method", "denoiser"]
        code = app.run(["denoise", *map(str, photos), "-o", str(out), *named, *more])
    assert code == 0, f"dvit denoise ended with {code}"


def drawing(photo: Path, results: Path) -> float:
    """Processor seconds of one picture, in the drawing thread."""
    pixels, result = read_photo(photo), Decomposition.load(results / f"{photo.stem}.safetensors")
    started = time.thread_time()
    draw_panel(pixels, result, results / "again.png")
    return time.thread_time() - started


def markdown(found: dict[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for clock in CLOCKS:
        ratio = found["ratio"][clock]
        spread = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"
        rows.append((clock, f"{found['forward_s'][clock]:.3f}", f"{found['denoise_s'][clock]:.3f}", spread, BAR))
    drawn = "with pictures" if found["pictures"] else "without pictures"
    head = ("clock", "bare forward, s a photo", "dvit denoise, s a photo", "ratio", "at most")
    return f"{found['hardware']}; {found['backbone']}; {found['photos']} photos, {drawn}\n\n{table(head, rows)}"


if __name__ == "__main__":
    tyro.cli(main)
