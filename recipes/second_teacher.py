"""A denoiser trained by another model as teacher, while content-free images stay clean: minutes on a CPU.

    PYTHONPATH=src python recipes/second_teacher.py --denoiser FILE --photos DIR -o FILE
    PYTHONPATH=src python recipes/second_teacher.py --distilled FILE --sizes 518,364x476 --share 1 --photos DIR -o FILE

The teacher is another denoiser, or a distilled ViT (`--distilled shipped` for the package's). Training starts from
the shipped denoiser (`--start`). Part of each step are whole photos, whose targets are the teacher's features; the rest
are content-free images, whose features are the same everywhere. The result lies between the weights before and after
(`--share`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import probes
import torch
from scenes import read_photos, render
from stage_two import Size, Training, apply, blank_features, blend, optimise, some
from targets import clock
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import Denoiser, write_denoiser
from denoising_vit.extractors import Cleaners, Extractor
from denoising_vit.training.blanks import clean_blanks
from denoising_vit.training.options import ViewOptions


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


class Taught(NamedTuple):
    """Training data of one size, float16: features (N, h, w, C) of photos, the teacher's, and content-free images'.

    The last `held_out` photos are not trained on.
    """

    raw: Tensor
    target: Tensor
    blank: Tensor


def main(given: list[str] | None = None) -> None:
    """Trains the denoiser, prints its metrics, and writes it."""
    asked = arguments(given)
    asked_for = {name: getattr(asked, name) for name in ("count", "held_out", "blanks", "steps", "blank", "share")}
    options = Options(**asked_for)
    started = time.perf_counter()
    backbone = BackboneSpec(weights=asked.weights, device=asked.device).load()
    kind = "denoiser" if asked.distilled is None else "distilled"
    teacher, record = Cleaners(denoiser=asked.denoiser, distilled=asked.distilled).extractor(kind, backbone)
    start = dv.load_denoiser(asked.start, backbone=backbone)
    sizes = ViewOptions(sizes=asked.sizes).parsed_sizes()
    pairs = {size: paired(backbone, teacher, asked.photos, size, options) for size in sizes}
    print(clock(started), f"features of {len(pairs[sizes[0]].raw)} photos at {len(sizes)} size(s)", flush=True)
    student = train(start, pairs, options)
    for size, some_pairs in pairs.items():
        for line in figures(backbone, student, some_pairs, size, options.held_out):
            print(clock(started), json.dumps({"size": size} | line), flush=True)
    student.trained_for = describe(backbone)
    student.info = {"recipe": "recipes/second_teacher.py", "start": start.info, "teacher": record}
    student.info |= asdict(options) | {"sizes": list(pairs)}
    write_denoiser(student, asked.out)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--denoiser", help="file of the teacher, a denoiser")
    teacher.add_argument("--distilled", help="file of the teacher, a distilled ViT, or `shipped` for the package's")
    parser.add_argument("--start", default="shipped", help="file of the denoiser to start from")
    parser.add_argument("--photos", required=True, type=Path, help="folder of photos")
    parser.add_argument("-o", "--out", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", default="518", help="sizes in pixels as for dvit train: 518,364x476 (H x W)")
    parser.add_argument("--count", type=int, default=Options.count, help="number of photos, held-out ones included")
    parser.add_argument("--held-out", type=int, default=Options.held_out, help="number of photos not trained on")
    parser.add_argument("--blanks", type=int, default=Options.blanks, help="number of content-free images per size")
    parser.add_argument("--steps", type=int, default=Options.steps, help="number of optimizer steps")
    parser.add_argument("--blank", type=float, default=Options.blank, help="share of content-free images in a step")
    parser.add_argument("--share", type=float, default=Options.share, help="share of the trained weights in the result")
    return parser.parse_args(given)


@torch.no_grad()
def paired(backbone: Backbone, teacher: Extractor, folder: Path, size: Size, options: Options) -> Taught:
    """Features of random photos of a folder, resized to one size, and of content-free images."""
    photos = read_photos(folder, backbone.device)
    chosen = np.random.RandomState(options.seed + 1).permutation(len(photos))[: options.count]
    whole, unflipped = np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([False])
    images = (render(photos[index], whole, unflipped, size, backbone) for index in chosen)
    features = [(backbone(image).half(), teacher(image).half()) for image in images]
    raw, target = (torch.cat(maps) for maps in zip(*features, strict=True))
    return Taught(raw, target, blank_features(backbone, size, options.blanks, options.seed + 1, 4))


def train(start: Denoiser, pairs: dict[Size, Taught], options: Options) -> Denoiser:
    """Trains a copy of a denoiser; each step has pairs of one size."""
    student = copy.deepcopy(start).train().requires_grad_(True)
    order = torch.Generator().manual_seed(options.seed)
    known = round(options.blank * options.batch)
    each = list(pairs.values())

    def draw() -> tuple[Tensor, Tensor]:
        raw, target, blank = each[int(torch.randint(len(each), (), generator=order))]
        index = torch.randint(len(raw) - options.held_out, (options.batch - known,), generator=order).to(raw.device)
        blanks = some(blank, known, order)
        return torch.cat([raw[index].float(), blanks]), torch.cat([target[index].float(), clean_blanks(blanks)])

    average = optimise(student, draw, options, lambda step, loss: print(f"step {step}: loss {loss:.4f}", flush=True))
    blend(average, start, 1 - options.share)
    return average


@torch.no_grad()
def figures(
    backbone: Backbone, student: Denoiser, pairs: Taught, size: Size, held_out: int
) -> Iterator[dict[str, float | str]]:
    """What is left on content-free images, and cosines to the teacher on held-out photos, for student and raw."""
    for kind, images in probes.blank_images(backbone, size).items():
        blank = backbone(images)
        left, high = probes.blank_figures(blank, apply(student, blank.half(), 8))
        yield {"blank": kind, "variance_left": left, "high_frequencies_left": high}
    raw, wanted = pairs.raw[-held_out:], pairs.target[-held_out:].float()
    for name, features in (("student", apply(student, raw, 8)), ("raw", raw)):
        cosine = torch.nn.functional.cosine_similarity(features.float(), wanted, dim=-1).mean()
        yield {"features": name, "cosine_to_teacher": float(cosine)}


if __name__ == "__main__":
    main()
