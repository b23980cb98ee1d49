"""Which views stage 1 should use, by labels of several tasks: areas, numbers of views, and the treatment of G.

PYTHONPATH=src python recipes/views_by_labels.py --weights FILE --labelled DIR -o OUT
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import probes
import torch
from targets import Stage1, clock, plans, seen
from torch import Tensor

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.statistics import weighted_sum
from denoising_vit.views.plan import ViewPlan

AREAS = ((0.4, 1.0), (0.1, 0.5), (0.25, 1.0), (0.6, 1.0), (0.1, 1.0))
COUNTS = (4, 8, 12, 16, 32, 64)

#: Number of views for which an artifact fitted to each photo is tried as well.
_FITTED_AT = 16

#: Number of images solved together.
_TOGETHER = 16


def main() -> None:
    """Runs all rows of the table, and writes each line as soon as it is known."""
    asked = arguments()
    from denoising_vit.backbones import BackboneSpec

    started = time.perf_counter()
    backbone = BackboneSpec(asked.model, str(asked.weights), device=asked.device).load()
    size = (asked.size, asked.size)
    known = Artifact.load(asked.artifact).at(backbone.grid_size(*size)) if asked.artifact else None
    asked.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), (asked.out / "views_by_labels.jsonl").open("w") as lines:

        def tell(**line: Any) -> None:
            print(clock(started), json.dumps(line), flush=True)
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        data = probes.load(asked.labelled, backbone.grid_size(*size), backbone.device, asked.most)
        tell(images={name: len(some.images) for name, some in data.items()}, size=asked.size)
        for name, some in data.items():
            tell(set=name, features="raw", **probes.scores(name, some, probes.shown(some, backbone, size)))
        for area in [tuple(asked.area)] if asked.area else AREAS[: asked.areas]:
            made = plans(backbone, size, max(COUNTS[: asked.counts]), area, 1)[0]
            for name, some in data.items():
                for count, artifact, features in fields(
                    backbone, some, made, COUNTS[: asked.counts], known, asked.batch
                ):
                    line = probes.scores(name, some, features)
                    tell(set=name, features="F", area=area, views=count, artifact=artifact, **line)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--labelled", required=True, type=Path)
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--artifact", type=Path, help="file of G; without it, none is subtracted")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--most", type=int, help="images of each set")
    parser.add_argument("--area", type=float, nargs=2, help="only this range of a view's share of the image's area")
    parser.add_argument("--areas", type=int, default=len(AREAS))
    parser.add_argument("--counts", type=int, default=len(COUNTS))
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args()


def fields(
    backbone: Backbone,
    data: probes.Labelled,
    made: ViewPlan,
    counts: tuple[int, ...],
    known: Tensor | None,
    batch: int,
) -> Iterator[tuple[int, str, Tensor]]:
    """F at the patches (N, h, w, C) float16, by number of views: without G, with the known one, with a fitted one."""
    stages = {count: Stage1(backbone, made.subset(slice(0, count))) for count in counts}
    found: dict[tuple[int, str], list[Tensor]] = {}
    for start in range(0, len(data.images), _TOGETHER):
        some = data.images[start : start + _TOGETHER]
        features = [seen(backbone, image, made, batch) for image in some]
        for count, stage in stages.items():
            b = torch.cat([stage.sums(views[:count]) for views in features], -1)
            ways: dict[str, Tensor | None] = {"none": None}
            if known is not None:
                ways["known"] = known.to(b).repeat(1, 1, len(some))
            if count == _FITTED_AT:
                windows = [window.to(b.device, torch.float32) for window in stage.plan.windows]
                g = torch.cat([weighted_sum(views[:count], *windows).double() for views in features], -1)
                ways["per photo"] = stage.solver.solve_apart(b, g)[1]
            for name, artifact in ways.items():
                maps = stage.at_patches(b, artifact).unflatten(-1, (len(some), -1))  # (h, w, N C) -> (h, w, N, C)
                found.setdefault((count, name), []).append(maps.permute(2, 0, 1, 3).half())
    for (count, name), maps in found.items():
        yield count, name, torch.cat(maps)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
