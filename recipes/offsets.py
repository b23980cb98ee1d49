"""Stage 1 with and without a constant for each crop: planted patterns, then probes fitted on train, scored on val.

    PYTHONPATH=src python recipes/offsets.py --voc VOCdevkit/VOC2012 --camvid DIR --nyu DIR -o FILE

Whole photos are resized to a square. The probes are the quick ones of `confirm.py`, on patches, with intervals over
images.
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
from targets import Stage1, plans, seen
from torch import Tensor

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.decomposition.statistics import view_sums, weighted_sum
from denoising_vit.views.plan import ViewPlan

#: Number of images of each set, for fitting probes and for scoring.
IMAGES = {"voc": (120, 80), "nyu": (90, 60), "camvid": (60, 60)}

#: Numbers of views to plant patterns in.
PATTERN_VIEWS = (24, 64)

#: Views per forward pass.
_BATCH = 12

#: Pairs of features to compare.
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
    """Write a line for each number of views and way to fit, then for each set, task and pair of features."""
    asked = arguments(given)
    backbone = BackboneSpec(asked.model, asked.weights).load()
    size = (asked.size, asked.size)
    with torch.no_grad(), asked.out.open("a") as lines:

        def tell(line: dict[str, object]) -> None:
            print(json.dumps(line), flush=True)
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        for line in left_of_patterns(backbone, size):
            tell(line)
        for name, numbers in IMAGES.items():
            numbers = [min(number, asked.most or number) for number in numbers]
            train, val = (
                open_part(name, getattr(asked, name), split, number, backbone.grid_size(*size))
                for split, number in zip(("train", "val"), numbers, strict=True)
            )
            memory, queries = (fields(backbone, part.images, size, asked.views) for part in (train, val))
            counts = {kind: counts_of(name, train, val, memory[kind], queries[kind]) for kind in memory}
            for line in comparisons(name, counts):
                tell(line)


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
    pairs = labelled.pairs_of(name, root, split)
    pairs = [pairs[place] for place in np.linspace(0, len(pairs) - 1, min(number, len(pairs))).astype(int)]
    labels = probes.on_grid(name, torch.from_numpy(labelled.truths(name, pairs)), grid)
    images = [torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1) for photo, _ in pairs]
    every = torch.arange(len(images))
    return probes.Labelled(images, labels, every, every)


def fields(backbone: Backbone, images: list[Tensor], size: tuple[int, int], views: int) -> dict[str, Tensor]:
    """By kind, features (N, h, w, C) float16 of whole images: raw, and F with and without G and offsets."""
    plan, stages = stages_of(backbone, size, views)
    found: dict[str, list[Tensor]] = {}
    for image in images:
        features = seen(backbone, image.contiguous(), plan, _BATCH).float()
        for kind, maps in [("raw", features[0]), *solved(stages, features)]:
            found.setdefault(kind, []).append(maps.half())
    return {kind: torch.stack(maps) for kind, maps in found.items()}


def stages_of(backbone: Backbone, size: tuple[int, int], views: int) -> tuple[ViewPlan, dict[str, Stage1]]:
    """Small crops, and stage 1 on them without and with offsets."""
    plan = plans(backbone, size, views, (0.1, 0.5), 1)[0]
    return plan, {"": Stage1(backbone, plan), ", offsets": Stage1(backbone, plan, offsets=True)}


def solved(stages: dict[str, Stage1], features: Tensor) -> Iterator[tuple[str, Tensor]]:
    """By kind, F at the patches (h, w, C) without G, and with a G fitted to the photo, from features (V, h, w, C)."""
    for way, stage in stages.items():
        rows, columns = (window.to(features) for window in stage.plan.windows)
        b, g = stage.sums(features), weighted_sum(features, rows, columns).double()
        s = view_sums(features, rows, columns).double()
        yield f"no G{way}", stage.sampled(stage.solver.solve_field(b, None, s))
        yield f"G fitted{way}", stage.sampled(stage.solver.solve(b, g, s)[0])


def left_of_patterns(backbone: Backbone, size: tuple[int, int]) -> Iterator[dict[str, object]]:
    """What is left in F of patterns that every view has at the same patches: fractions of their variance.

    The solution is linear, so they are the same whatever the photo shows.
    """
    h, w = backbone.grid_size(*size)
    planted = torch.stack([(one - one.mean()) / one.std() for one in patterns(h, w).values()], -1)
    for views in PATTERN_VIEWS:
        _, stages = stages_of(backbone, size, views)
        for kind, maps in solved(stages, planted.expand(views, -1, -1, -1).contiguous()):
            left = dict(zip(patterns(h, w), maps.var((0, 1)).tolist(), strict=True))
            yield {"views": views, "features": kind, "left": left}


def patterns(h: int, w: int) -> dict[str, Tensor]:
    """Planted patterns (h, w) by name."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    noise = torch.randn(h, w, generator=torch.Generator().manual_seed(0))
    checkerboard, stripes = (row + column) % 2, column % 4 < 2
    return {
        "checkerboard": checkerboard.float(),
        "stripes": stripes.float(),
        "ramp": x,
        "vignette": x.square() + y.square(),
        "noise": noise,
    }


def comparisons(name: str, counts: dict[str, dict[str, np.ndarray]]) -> Iterator[dict[str, object]]:
    """A line for each task of a set and each pair of features."""
    for first, second in PAIRS:
        for task in counts[first]:
            found = compared(task, counts[first][task], counts[second][task])
            shown = {"first": found.pop("raw"), "second": found.pop("clean")}
            yield {"set": name, "task": task, "features": [first, second], **shown, **found}


if __name__ == "__main__":
    main()
