"""The shipped denoiser, from photos to file: stage 1 of thousands of scenes, then stage 2, in minutes on one GPU.

    PYTHONPATH=src python recipes/shipped_denoiser.py --weights FILE --photos DIR -o OUT [--labelled DIR]

Everything stays on the device: photos, raw features, targets. Each photo gives several scenes (itself, and crops of
half of it or more), each scene is fitted by the exact solver on wide views, which keep the context of a single pass,
and one block is trained to map raw features to the fitted ones, with content-free images as known truth. With
`--labelled` every denoiser is evaluated by quick label probes. `--tiny` is a small version for a CPU.

In the record, `subtract` is true for targets of a known artifact, and `blank` is the share of content-free images.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import probes
import torch
from scenes import SHAPES, draw_scenes, read_photos
from stage_two import Training, apply, blank_features, train
from targets import Pairs, clock, fit, indices, plans

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import Denoiser, write_denoiser

Size = tuple[int, int]

#: Grids of `--tiny`, as SHAPES.
TINY = (((8, 8), 0.7), ((8, 10), 0.3))


@dataclass(frozen=True)
class Variant:
    """A denoiser to train: its name, and its differences from the recipe."""

    name: str
    training: Training


def main(arguments_given: list[str] | None = None) -> None:
    """Runs both stages and records the results."""
    asked = arguments(arguments_given)
    backbone = BackboneSpec(asked.model, str(asked.weights), device=asked.device).load()
    run = Run(asked, backbone)
    run.targets()
    for variant in variants(asked):
        run.denoiser(variant)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="weights file of the backbone, or random")
    parser.add_argument("--photos", required=True, type=Path, help="folder of photos")
    parser.add_argument("-o", "--out", required=True, type=Path, help="folder for the denoisers and the record")
    parser.add_argument("--labelled", type=Path, help="folder of labelled images for quick probes")
    parser.add_argument("--artifact", type=Path, help="file of G; without it, none is subtracted")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scenes", type=int, default=4, help="scenes of each photo")
    parser.add_argument("--views", type=int, default=12, help="views of each scene")
    parser.add_argument("--area", type=float, nargs=2, default=(0.4, 1.0), help="least and largest area of a view")
    parser.add_argument("--plans", type=int, default=8, help="plans of each size that scenes take in turn")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each denoiser")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a step")
    parser.add_argument("--blanks", type=int, default=1024, help="content-free images of each size")
    parser.add_argument("--variants", nargs="+", default=["half-blank"], help="names, see `variants`; half-blank ships")
    parser.add_argument("--tiny", action="store_true", help="grids of 8 x 8 patches, for a test on a CPU")
    return parser.parse_args(given)


def variants(asked: argparse.Namespace) -> list[Variant]:
    """The requested denoisers."""
    base = Training(steps=asked.steps, batch=asked.batch)
    known = {
        "fifth-blank": base,
        "no-blank": replace(base, blank=0.0),
        "subtract": replace(base, subtract=True),
        "long": replace(base, steps=3 * asked.steps),
        "subtract-long": replace(base, subtract=True, steps=3 * asked.steps),
        "half-blank": replace(base, blank=0.5),
        "fast": replace(base, rate=2e-3),
    }
    return [Variant(name, known[name]) for name in asked.variants]


class Run:
    """The backbone, the data on its device, and the record."""

    def __init__(self, asked: argparse.Namespace, backbone: Backbone) -> None:
        self.asked, self.backbone, self.started = asked, backbone, time.perf_counter()
        grids = TINY if asked.tiny else SHAPES
        patch = backbone.patch_size
        self.shapes = tuple(((patch * h, patch * w), share) for (h, w), share in grids)
        self.size: Size = self.shapes[0][0]
        asked.out.mkdir(parents=True, exist_ok=True)
        self.lines = (asked.out / "record.jsonl").open("a")
        self.pairs: dict[Size, Pairs] = {}
        self.chosen: dict[Size, torch.Tensor] = {}
        self.held_out: dict[Size, torch.Tensor] = {}

    def tell(self, **line: Any) -> None:
        """Prints and records a line."""
        print(clock(self.started), json.dumps(line), flush=True)
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()

    def targets(self) -> None:
        """Runs stage 1 on all scenes, and computes raw features of content-free and labelled images."""
        asked, backbone = self.asked, self.backbone
        artifact = Artifact.load(asked.artifact) if asked.artifact else None
        photos = read_photos(asked.photos, backbone.device)
        self.tell(photos=len(photos), model=backbone.extra_repr(), device=str(backbone.device))
        held_out = np.random.RandomState(0).permutation(len(photos))[: max(len(photos) // 20, 1)]
        self.blanks = {}
        for size, scenes in draw_scenes(photos, asked.scenes, 0, self.shapes).items():
            made = plans(backbone, size, asked.views, tuple(asked.area), asked.plans)
            known = None if artifact is None else artifact.at(backbone.grid_size(*size))
            self.pairs[size] = fit(backbone, photos, scenes, made, known, 64 if torch.cuda.is_available() else 8)
            self.chosen[size], self.held_out[size] = indices(self.pairs[size], held_out)
            self.blanks[size] = blank_features(backbone, size, asked.blanks, 1)
            self.tell(size=size, scenes=len(scenes), held_out=len(self.held_out[size]))
        self.sets, self.raw = {}, {}
        with torch.no_grad():
            self.test_blanks = {
                kind: backbone(images) for kind, images in probes.blank_images(backbone, self.size).items()
            }
            if asked.labelled:
                self.sets = probes.load(asked.labelled, backbone.grid_size(*self.size), backbone.device)
                self.raw = {name: probes.shown(some, backbone, self.size) for name, some in self.sets.items()}
            self.evaluate("raw", None)

    def denoiser(self, variant: Variant) -> None:
        """Trains, evaluates and writes a denoiser."""
        started = time.perf_counter()
        denoiser = train(
            self.backbone,
            self.pairs,
            self.chosen,
            self.blanks,
            variant.training,
            lambda step, loss: self.tell(variant=variant.name, step=step, loss=loss),
        )
        options = asdict(variant.training) | {"views": self.asked.views, "area": list(self.asked.area)}
        options |= {"scenes": sum(len(chosen) for chosen in self.chosen.values())}
        self.tell(variant=variant.name, seconds=time.perf_counter() - started, **options)
        self.evaluate(variant.name, denoiser)
        written = denoiser.cpu()
        written.trained_for, written.info = describe(self.backbone), options
        write_denoiser(written, self.asked.out / f"{variant.name}.safetensors")

    @torch.no_grad()
    def evaluate(self, name: str, denoiser: Denoiser | None) -> None:
        """Evaluates features on held-out pairs, content-free images, and labels."""
        for size in self.pairs:
            pairs, index = self.pairs[size], self.held_out[size]
            if len(index):
                clean = apply(denoiser, pairs.raw[index]).float()
                cosine = torch.nn.functional.cosine_similarity(clean, pairs.target[index].float(), dim=-1).mean()
                self.tell(features=name, size=size, held_out_cosine=float(cosine))
        for kind, raw in self.test_blanks.items():
            left, high = probes.blank_figures(raw, apply(denoiser, raw.half()))
            self.tell(features=name, blank=kind, variance_left=left, high_frequencies_left=high)
        for name_of_set, some in self.sets.items():
            self.tell(
                features=name,
                set=name_of_set,
                **probes.scores(name_of_set, some, apply(denoiser, self.raw[name_of_set])),
            )


if __name__ == "__main__":
    main()
