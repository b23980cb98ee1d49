"""What a constant for each crop does to stage 1: probes fitted on train, scored on val, with intervals over images.

    PYTHONPATH=src python recipes/offsets.py --voc VOCdevkit/VOC2012 --camvid DIR --nyu DIR -o FILE

Whole photos are squeezed to a square. The probes are those of `confirm.py`, quick ones on patches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import labelled
import numpy as np
import probes
import torch
from confirm import compared, counts_of
from PIL import Image
from scenes import render
from targets import Stage1, plans
from torch import Tensor

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.decomposition.statistics import weighted_sum

#: Number of images of each set, for fitting probes and for scoring.
IMAGES = {"voc": (120, 80), "nyu": (90, 60), "camvid": (60, 60)}

#: Views of a forward pass.
_BATCH = 12

#: What is compared with what: raw features with the rest, and offsets with none, by what becomes of G.
PAIRS = (
    ("raw", "G fitted"),
    ("raw", "G fitted, offsets"),
    ("raw", "no G"),
    ("raw", "no G, offsets"),
    ("G fitted", "G fitted, offsets"),
    ("no G", "no G, offsets"),
    ("G fitted", "no G, offsets"),
)


def main(given: list[str] | None = None) -> None:
    """Writes a line for each set, task and pair of features."""
    asked = arguments(given)
    backbone = BackboneSpec(asked.model, asked.weights).load()
    size = (asked.size, asked.size)
    with torch.no_grad(), asked.out.open("a") as lines:
        for name, numbers in IMAGES.items():
            numbers = [min(number, asked.most or number) for number in numbers]
            train, val = (
                open_part(name, getattr(asked, name), split, number, backbone.grid_size(*size))
                for split, number in zip(("train", "val"), numbers, strict=True)
            )
            memory, queries = (fields(backbone, part.images, size, asked.views) for part in (train, val))
            counts = {kind: counts_of(name, train, val, memory[kind], queries[kind]) for kind in memory}
            for line in comparisons(name, counts):
                print(json.dumps(line), flush=True)
                lines.write(json.dumps(line) + "\n")
                lines.flush()


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in IMAGES:
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--size", type=int, default=364)
    parser.add_argument("--views", type=int, default=24, help="number of crops, the whole photo included")
    parser.add_argument("--most", type=int, help="maximum number of images of each part")
    return parser.parse_args(given)


def open_part(name: str, root: Path, split: str, number: int, grid: tuple[int, int]) -> probes.Labelled:
    """Images of a split, spread evenly over it, with the labels of their patches."""
    pairs = {"voc": labelled.voc, "camvid": labelled.camvid, "nyu": labelled.nyu}[name](root, split)
    pairs = [pairs[place] for place in np.linspace(0, len(pairs) - 1, min(number, len(pairs))).astype(int)]
    read, ignored = (labelled.depths, None) if name == "nyu" else (labelled.classes, {"voc": 255, "camvid": 11}[name])
    labels = torch.from_numpy(np.stack([read(truth, ignored) for _, truth in pairs]))
    rows, columns = (torch.arange(n) * m // n for n, m in zip(grid, labels.shape[1:], strict=True))
    labels = (labels.float() if name == "nyu" else labels.long())[:, rows[:, None], columns]
    images = [torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1) for photo, _ in pairs]
    every = torch.arange(len(images))
    return probes.Labelled(images, labels, every, every)


def fields(backbone: Backbone, images: list[Tensor], size: tuple[int, int], views: int) -> dict[str, Tensor]:
    """By kind, features (N, h, w, C) float16 of whole images: raw, and F with and without G and offsets."""
    plan = plans(backbone, size, views, (0.1, 0.5), 1)[0]
    stages = {"": Stage1(backbone, plan), ", offsets": Stage1(backbone, plan, offsets=True)}
    found: dict[str, list[Tensor]] = {}
    for image in images:
        shown = render(image.contiguous(), plan.boxes, plan.flips, size, backbone)
        features = torch.cat([backbone(part) for part in shown.split(_BATCH)]).float()
        found.setdefault("raw", []).append(features[0].half())
        for way, stage in stages.items():
            for kind, field in solved(stage, features):
                found.setdefault(f"{kind}{way}", []).append(field.half())
    return {kind: torch.stack(maps) for kind, maps in found.items()}


def solved(stage: Stage1, features: Tensor) -> Iterator[tuple[str, Tensor]]:
    """F at the patches (h, w, C) without G, and with a G fitted to the photo, from features (V, h, w, C)."""
    rows, columns = (window.to(features) for window in stage.plan.windows)
    b, g = stage.sums(features), weighted_sum(features, rows, columns).double()
    s = torch.einsum("vh,vhwc,vw->vc", rows, features, columns).double()
    yield "no G", stage.sampled(stage.solver.solve_field(b, None, s))
    yield "G fitted", stage.sampled(stage.solver.solve(b, g, s)[0])


def comparisons(name: str, counts: dict[str, dict[str, np.ndarray]]) -> Iterator[dict[str, object]]:
    """A line for each task of a set and each pair of features."""
    for first, second in PAIRS:
        for task in counts[first]:
            found = compared(task, counts[first][task], counts[second][task])
            shown = {"first": found.pop("raw"), "second": found.pop("clean")}
            yield {"set": name, "task": task, "features": [first, second], **shown, **found}


if __name__ == "__main__":
    main()
