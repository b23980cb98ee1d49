"""A denoiser trained by another one as teacher, while content-free images stay clean: minutes on a CPU.

    PYTHONPATH=src python recipes/second_teacher.py --teacher FILE --photos DIR -o FILE

Starts from the shipped denoiser (`--start`), which is clean on content-free images. The teacher was trained on small
crops, which improves nearest neighbours but leaves the artifact. Half of each step are whole photos, whose targets are
the teacher's features; the other half are content-free images, whose features are the same everywhere. The result is
the mean of the weights before and after: object discovery gets worse the closer the student follows the teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import probes
import torch
from scenes import read_photos, render
from stage_two import Training, apply, blank_features, blend, optimise, some
from targets import clock
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import Denoiser, write_denoiser
from denoising_vit.training.blanks import clean_blanks


@dataclass(frozen=True)
class Options(Training):
    """Options of the training.

    Attributes:
        count: number of photos, the held-out ones included.
        held_out: number of photos that are not trained on.
        blanks: number of content-free images.
        share: share of the trained weights in the result; the rest are those of the start.
        seed: seed for the order; the next one is for the choice of photos and the content-free images.
    """

    count: int = 420
    held_out: int = 20
    blanks: int = 128
    steps: int = 450
    batch: int = 8
    blank: float = 0.5
    rate: float = 3e-4
    average: float = 0.99
    share: float = 0.5


def main(given: list[str] | None = None) -> None:
    """Trains the denoiser, prints its metrics, and writes it."""
    asked = arguments(given)
    asked_for = {name: getattr(asked, name) for name in ("count", "held_out", "blanks", "steps", "share")}
    options = Options(**asked_for)
    started = time.perf_counter()
    backbone = BackboneSpec(weights=asked.weights, device=asked.device).load()
    side: int = asked.size or backbone.default_size
    size = side, side
    start, teacher = (dv.load_denoiser(name, backbone=backbone) for name in (asked.start, asked.teacher))
    raw = whole_photos(backbone, asked.photos, size, options)
    with torch.no_grad():
        blank = blank_features(backbone, size, options.blanks, options.seed + 1, 4)
        target = apply(teacher, raw, 8)
    print(clock(started), f"raw features and targets of {len(raw)} photos", flush=True)
    student = train(start, raw, target, blank, options)
    for line in figures(backbone, student, teacher, raw[-options.held_out :], size):
        print(clock(started), json.dumps(line), flush=True)
    student.trained_for = describe(backbone)
    student.info = {"recipe": "recipes/second_teacher.py", "start": start.info, "teacher": teacher.info}
    student.info |= asdict(options)
    write_denoiser(student, asked.out)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="file of the other denoiser")
    parser.add_argument("--start", default="shipped", help="file of the denoiser to start from")
    parser.add_argument("--photos", required=True, type=Path, help="folder of photos")
    parser.add_argument("-o", "--out", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, help="side of the images in pixels; the backbone's by default")
    parser.add_argument("--count", type=int, default=Options.count, help="number of photos, held-out ones included")
    parser.add_argument("--held-out", type=int, default=Options.held_out, help="number of photos not trained on")
    parser.add_argument("--blanks", type=int, default=Options.blanks, help="number of content-free images")
    parser.add_argument("--steps", type=int, default=Options.steps, help="number of optimizer steps")
    parser.add_argument("--share", type=float, default=Options.share, help="share of the trained weights in the result")
    return parser.parse_args(given)


@torch.no_grad()
def whole_photos(backbone: Backbone, folder: Path, size: tuple[int, int], options: Options) -> Tensor:
    """Raw features (N, h, w, C) float16 of random photos of a folder, each resized to a square."""
    photos = read_photos(folder, backbone.device)
    chosen = np.random.RandomState(options.seed + 1).permutation(len(photos))[: options.count]
    whole, unflipped = np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([False])
    return torch.cat([backbone(render(photos[index], whole, unflipped, size, backbone)).half() for index in chosen])


def train(start: Denoiser, raw: Tensor, target: Tensor, blank: Tensor, options: Options) -> Denoiser:
    """Trains a copy of a denoiser.

    Args:
        start: the denoiser to start from.
        raw: raw features of photos (N, h, w, C); the last `held_out` are not used.
        target: the teacher's features of them.
        blank: raw features of content-free images (M, h, w, C).
        options: steps, batch and learning rate.
    """
    student = copy.deepcopy(start).train().requires_grad_(True)
    order = torch.Generator().manual_seed(options.seed)
    known = round(options.blank * options.batch)

    def draw() -> tuple[Tensor, Tensor]:
        photos = torch.randint(len(raw) - options.held_out, (options.batch - known,), generator=order).to(raw.device)
        blanks = some(blank, known, order)
        targets = torch.cat([target[photos].float(), clean_blanks(blanks)])
        return torch.cat([raw[photos].float(), blanks]), targets

    average = optimise(student, draw, options, lambda step, loss: print(f"step {step}: loss {loss:.4f}", flush=True))
    blend(average, start, 1 - options.share)
    return average


@torch.no_grad()
def figures(
    backbone: Backbone, student: Denoiser, teacher: Denoiser, raw: Tensor, size: tuple[int, int]
) -> Iterator[dict[str, float | str]]:
    """What is left on content-free images, and cosines to the teacher on held-out photos, for student and raw."""
    for kind, images in probes.blank_images(backbone, size).items():
        blank = backbone(images)
        left, high = probes.blank_figures(blank, apply(student, blank.half(), 8))
        yield {"blank": kind, "variance_left": left, "high_frequencies_left": high}
    wanted = apply(teacher, raw, 8).float()
    for name, features in (("student", apply(student, raw, 8)), ("raw", raw)):
        cosine = torch.nn.functional.cosine_similarity(features.float(), wanted, dim=-1).mean()
        yield {"features": name, "cosine_to_teacher": float(cosine)}


if __name__ == "__main__":
    main()
