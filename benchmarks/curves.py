"""The curves that chose stage 1's defaults: held-out views and labels against views, resolution, penalties and crops.

    python benchmarks/curves.py FOLDER --cache CACHE --out OUT

FOLDER holds `images/` and `masks/` (index PNGs; 11 and above is void), as CamVid's training split. Gallery and query
frames come from different drives (the part of the name before the underscore). Features are extracted once per source
(view size, crops, precision) into CACHE; everything else is varied from these. Every finished variant is a line of
`OUT/curves.jsonl` and is skipped later; `curves_report.py` makes tables and pictures from that file alone.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from measuring import hardware
from neighbours import confusion, mean_iou, nearest_labels, patch_labels
from safetensors.torch import load_file, save_file
from torch import Tensor

import denoising_vit as dv
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.inputs import extract_views, load_image
from denoising_vit.decomposition.neural_field.fit import SeenViews, fit_neural_field
from denoising_vit.decomposition.options import NeuralFieldOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.decomposition.statistics import HeldOut, Statistics
from denoising_vit.files import atomic_path
from denoising_vit.views.options import CropOptions
from denoising_vit.views.plan import ViewPlan

CLASSES, GRID, PATCH, HELD_OUT = 11, (37, 37), 14, 8
#: Gallery patches are thinned by this factor with all frames, and not at all with some.
THINNING = 4


@dataclass(frozen=True)
class Source:
    """How features were computed.

    Attributes:
        size: size of a view in pixels, square.
        coverage: as in `CropOptions`.
        area: as in `CropOptions`.
        dtype: dtype of the backbone.
    """

    size: int = 518
    coverage: Literal["even", "plain"] = "even"
    area: tuple[float, float] = (0.1, 0.5)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def name(self) -> str:
        """Name for files; other crops with the same settings would need another name."""
        settings = f"{self.size}-{self.coverage}-{self.area[0]}-{self.area[1]}-{self.dtype}"
        return f"{settings}-{self.plan(HELD_OUT).digest[:8]}"

    def plan(self, views: int, *, seed: int = 0, full_image: bool = True, **more: Any) -> ViewPlan:
        """The first views of this source."""
        crops = CropOptions(coverage=self.coverage, area=self.area)
        size = (self.size, self.size)
        return ViewPlan.make(views, size=size, patch_size=PATCH, seed=seed, full_image=full_image, crops=crops, **more)


@dataclass(frozen=True)
class Variant:
    """One way to run stage 1; without changes, the defaults at 32 views.

    Attributes:
        curve: the curve that it is a point of.
        frames: all, or some (an evenly spaced subset).
        artifact: fitted with the field, known beforehand (mean over the fits of the gallery's frames, which are among
            those that it is then used for), or none (zero).
        features: features that are evaluated with labels.
        ablation: terms of the neural field, used by that curve only.
    """

    curve: str
    source: Source = Source()
    frames: Literal["all", "some"] = "all"
    views: int = 32
    resolution: int = 74
    smoothness: float = 1e-2
    shrinkage: float = 1e-3
    taper: float = 0.3
    clip: float | None = None
    artifact: Literal["fitted", "known", "none"] = "fitted"
    features: Literal["raw", "F", "F+G"] = "F"
    ablation: Literal["F", "F+G", "F+G+h"] | None = None

    def sums(self) -> tuple[Any, ...]:
        """Key of variants that share their sums over views."""
        return self.source, self.frames, self.views, self.resolution, self.taper, self.clip


def variants() -> list[Variant]:
    """All points of all curves."""
    v = Variant
    few = "some"
    base = [v("raw", features="raw"), v("default"), v("default", features="F+G")]
    some = [v("raw", frames=few, features="raw"), v("default", frames=few)]
    views = [v("views", views=n) for n in (8, 16)] + [v("views", frames=few, views=n) for n in (8, 16, 64, 128, 256)]
    known = [v("views, G known", views=n, artifact="known") for n in (8, 16, 32)]
    known += [v("views, G known", frames=few, views=n, artifact="known") for n in (8, 16, 32, 64, 128, 256)]
    nodes = [v("resolution", resolution=n) for n in (37, 111)]
    nodes += [v("resolution", frames=few, views=256, resolution=n) for n in (37, 111)]
    smooth = [v("smoothness", smoothness=x) for x in (1e-4, 1e-3, 3e-2, 0.1, 0.3, 1.0)]
    shrink = [v("shrinkage", shrinkage=x) for x in (1e-5, 1e-2, 0.1, 1.0)]
    taper = [v("taper", taper=x) for x in (0.0, 0.15, 0.5)]
    taper += [v("taper", frames=few, views=256, taper=0.0)]
    clip = [v("clip", clip=x) for x in (3.0, 6.0)]
    none = [v("artifact", artifact="none"), v("artifact", frames=few, views=256, artifact="none")]
    sources = [v("view size", source=Source(size=n), resolution=74, frames=few) for n in (280, 392)]
    sources += [v("raw", source=Source(size=n), frames=few, features="raw") for n in (280, 392)]
    sources += [v("coverage", source=Source(coverage="plain"), frames=few)]
    sources += [v("area", source=Source(area=x), frames=few) for x in ((0.05, 0.25), (0.25, 1.0))]
    sources += [v("precision", source=Source(dtype="float32"), frames=few, views=16)]
    terms: tuple[Literal["F", "F+G", "F+G+h"], ...] = ("F", "F+G", "F+G+h")
    ablation = [v("neural field", frames=few, ablation=x) for x in terms]
    return [*base, *some, *smooth, *shrink, *none, *known, *views, *nodes, *taper, *clip, *sources, *ablation]


@dataclass(frozen=True)
class Frames:
    """Image files of the gallery and the queries, with the labels of their patches."""

    gallery: list[Path]
    queries: list[Path]
    folder: Path

    @classmethod
    def choose(cls, folder: Path, count: int) -> Frames:
        """Chooses evenly from two sets of drives: queries from the drive with most frames, gallery from the others."""
        images = sorted((folder / "images").iterdir())
        if not images:
            raise SystemExit(f"{folder}/images is empty; expected photographs, and index masks in {folder}/masks")
        drives = [image.name.split("_")[0] for image in images]
        largest = max(set(drives), key=drives.count)
        ours = [image for image, drive in zip(images, drives, strict=True) if drive != largest]
        theirs = [image for image, drive in zip(images, drives, strict=True) if drive == largest]
        return cls(evenly(ours, count), evenly(theirs, count), folder)

    def subset(self, count: int) -> Frames:
        """An evenly spaced subset of both."""
        return replace(self, gallery=evenly(self.gallery, count), queries=evenly(self.queries, count))

    def all(self) -> list[Path]:
        """All image files, the gallery first."""
        return [*self.gallery, *self.queries]

    def labels(self, image: Path) -> Tensor:
        """(h w,) classes of the patches, -1 where there is no label."""
        return patch_labels(self.folder / "masks" / f"{image.stem}.png", GRID, CLASSES).flatten()


def evenly(items: list[Path], count: int) -> list[Path]:
    """``count`` of the items, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def main(
    folder: tyro.conf.Positional[Path],
    /,
    cache: Path,
    out: Path,
    frames: int = 40,
    some: int = 8,
    most_views: int = 256,
    ablation_steps: int = 1000,
    ablation_finest: int = 256,
) -> None:
    """Extracts missing features and runs all variants.

    Args:
        folder: folder with images/ and masks/.
        cache: folder for features (about 60 MB per frame).
        out: folder for curves.jsonl.
        frames: number of gallery frames, and of query frames.
        some: number of gallery and of query frames in the subset, which has more views and the rarer sources.
        most_views: largest number of views, for the subset.
        ablation_steps: steps of the neural field, fewer than published.
        ablation_finest: vertices of its finest level, fewer than published.
    """
    out.mkdir(parents=True, exist_ok=True)
    everything = Frames.choose(folder, frames)
    chosen: dict[str, Frames] = {"all": everything, "some": everything.subset(some)}
    path = out / "curves.jsonl"
    done = {json.dumps(json.loads(line)["variant"]) for line in path.read_text().splitlines()} if path.exists() else ()
    points = dict.fromkeys(replace(variant, views=min(variant.views, most_views)) for variant in variants())
    wanted = [variant for variant in points if json.dumps(as_json(variant)) not in done]
    extract(cache, chosen, wanted)
    neural = NeuralFieldOptions(steps=ablation_steps, finest=ablation_finest, evaluate_every=ablation_steps)
    runner = Runner(cache, chosen, neural)
    about = {
        "hardware": hardware(),
        "frames": {name: [len(part.gallery), len(part.queries)] for name, part in chosen.items()},
        "neural": {"steps": ablation_steps, "finest": ablation_finest},
    }
    for _, group in itertools.groupby(sorted(wanted, key=lambda v: str(v.sums())), key=Variant.sums):
        for record in runner.run(list(group)):
            with path.open("a") as file:
                file.write(json.dumps(record | {"run": about}) + "\n")
            print({k: v for k, v in record.items() if k not in ("confusions", "variant")}, describe(record))


def as_json(variant: Variant) -> dict[str, Any]:
    """The variant as JSON gives it back."""
    return json.loads(json.dumps(asdict(variant)))


def describe(record: dict[str, Any]) -> str:
    """A short description of a variant."""
    variant, plain = record["variant"], as_json(Variant(""))
    changed = {key: value for key, value in variant.items() if value != plain[key] and key != "curve"}
    return f"{variant['curve']}: {changed}"


# --- features ------------------------------------------------------------------------------------------------------


def extract(cache: Path, chosen: dict[str, Frames], wanted: list[Variant]) -> None:
    """Extracts features of every source and frame that a variant needs, with the largest number of views needed."""
    need: dict[tuple[Source, Path], int] = {}
    for variant in wanted:
        for image in chosen[variant.frames].all():
            key = (variant.source, image)
            need[key] = max(need.get(key, 0), 1 if variant.features == "raw" else variant.views)
    need = {key: views for key, views in need.items() if views_there(cache_file(cache, *key)) < views}
    for dtype in ("bfloat16", "float32"):
        part = {key: views for key, views in need.items() if key[0].dtype == dtype}
        if not part:
            continue
        model = dv.load_backbone("vit_small_patch14_dinov2.lvd142m", dtype=dtype)
        for number, ((source, image), views) in enumerate(part.items()):
            started = time.perf_counter()
            pixels, _ = load_image(image, model)
            # Existing views are kept; a plan with more views begins with the same ones.
            path = cache_file(cache, source, image)
            old = load_file(path) if path.exists() else {}
            have = len(old["features"]) if old else 0
            rest = torch.cat(list(extract_views(model, pixels, source.plan(views).subset(slice(have, views)))))
            features = torch.cat([old["features"], rest.half()]) if old else rest.half()
            held_out = old.get("held_out")
            if held_out is None:
                held_out = torch.cat(list(extract_views(model, pixels, held_out_plan(source)))).half()
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"features": features, "held_out": held_out}, temporary)
            seconds = time.perf_counter() - started
            print(f"{source.name} {image.stem}: {views} views in {seconds:.1f} s ({number + 1} of {len(part)})")


def held_out_plan(source: Source, **more: Any) -> ViewPlan:
    """Held-out views for evaluation: drawn in the same way whatever crops are fitted."""
    return Source(size=source.size).plan(HELD_OUT, seed=1_000_003, full_image=False, **more)


def cache_file(cache: Path, source: Source, image: Path) -> Path:
    """Path of the cached features of a frame."""
    return cache / source.name / f"{image.stem}.safetensors"


def views_there(path: Path) -> int:
    """Number of views in a cache file."""
    return len(load_file(path)["features"]) if path.exists() else 0


# --- variants ------------------------------------------------------------------------------------------------------


class Runner:
    """Runs variants on cached features."""

    def __init__(self, cache: Path, chosen: dict[str, Frames], neural: NeuralFieldOptions) -> None:
        self.cache, self.chosen, self.neural = cache, chosen, neural
        self._joint: dict[tuple[Any, ...], Tensor] = {}

    def run(self, group: list[Variant]) -> Iterator[dict[str, Any]]:
        """Runs variants that share their sums and gives their records."""
        one = group[0]
        frames = self.chosen[one.frames]
        plain = [variant for variant in group if variant.ablation is None]
        maps: dict[Variant, list[Tensor]] = {variant: [] for variant in group}
        figures: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in group}
        plan = one.source.plan(one.views, resolution=one.resolution, taper=one.taper)
        for image in frames.all():
            stored = load_file(cache_file(self.cache, one.source, image))
            sums: tuple[Tensor, Tensor] | None = None
            for variant in group:
                if variant.features == "raw":
                    maps[variant].append(on_grid(stored["features"][0].float(), one.source.size))
                    continue
                if variant in plain:
                    if sums is None:
                        sums = accumulate(stored["features"][: one.views], plan, one.clip)
                    field, artifact = self._solve(variant, plan, *sums)
                else:
                    field, artifact = self._fit(variant, stored)
                held_out = held_out_plan(one.source, resolution=tuple(field.shape[:2]))
                judge = HeldOut(field, artifact, held_out)
                judge.add_views(stored["held_out"])
                assert judge.r2 is not None and judge.cosine is not None
                figures[variant].append((judge.r2, judge.cosine))
                shown = sample(field)
                maps[variant].append(shown + artifact.float() if variant.features == "F+G" else shown)
        for variant in group:
            counts = self._label(variant, maps[variant])
            r2, cosine = np.mean(figures[variant], axis=0).tolist() if figures[variant] else (None, None)
            yield {
                "variant": as_json(variant),
                "r2": r2,
                "cosine": cosine,
                "miou": mean_iou(counts),
                "confusions": counts.tolist(),
            }

    def _solve(self, variant: Variant, plan: ViewPlan, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        solver = solver_for(plan, variant.smoothness, variant.shrinkage)
        if variant.artifact == "fitted":
            return solver.solve(b, g)
        known = torch.zeros_like(g) if variant.artifact == "none" else self._known(variant)
        return solver.solve_field(b, known), known

    def _known(self, variant: Variant) -> Tensor:
        """G (h, w, C): the mean of the artifacts fitted to the gallery frames, 32 views each."""
        source = variant.source
        if (source,) not in self._joint:
            plan = source.plan(32, resolution=74, taper=0.3)
            total = torch.zeros(*GRID, 384, dtype=torch.float64)
            for image in self.chosen["all"].gallery:
                stored = load_file(cache_file(self.cache, source, image))
                total += solver_for(plan, 1e-2, 1e-3).solve(*accumulate(stored["features"][:32], plan, None))[1]
            self._joint[source,] = total / len(self.chosen["all"].gallery)
        return self._joint[source,]

    def _fit(self, variant: Variant, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        options = replace(
            self.neural,
            shared_artifact=variant.ablation != "F",
            residual_from=0.5 if variant.ablation == "F+G+h" else 1.0,
        )
        plan = variant.source.plan(variant.views)
        fit = fit_neural_field(SeenViews(plan, stored["features"][: variant.views]), options)
        return fit.separate((111, 111), (*GRID, 384))

    def _label(self, variant: Variant, maps: list[Tensor]) -> np.ndarray:
        """Confusion (queries, classes, classes) of the labels predicted from the gallery's patches."""
        frames = self.chosen[variant.frames]
        known = len(frames.gallery)
        gallery = torch.stack(maps[:known]).flatten(0, 2)
        labels = torch.cat([frames.labels(image) for image in frames.gallery])
        keep = labels >= 0
        if variant.frames == "all":
            chance = torch.Generator().manual_seed(0)
            keep &= torch.rand(len(keep), generator=chance) < 1 / THINNING
        counts = []
        for image, features in zip(frames.queries, maps[known:], strict=True):
            truth = frames.labels(image)
            there = truth >= 0
            found = nearest_labels(features.flatten(0, 1)[there], gallery[keep], labels[keep], CLASSES)
            counts.append(confusion(truth[there], found, CLASSES))
        return np.stack(counts)


@lru_cache(maxsize=32)
def solver_for(plan: ViewPlan, smoothness: float, shrinkage: float) -> ExactSolver:
    """Exact solver, whose factors are shared by all frames."""
    return ExactSolver(plan, smoothness=smoothness, shrinkage=shrinkage)


def accumulate(features: Tensor, plan: ViewPlan, clip: float | None) -> tuple[Tensor, Tensor]:
    """The sums b and g of a frame."""
    statistics = Statistics(plan, features.shape[-1], clip=clip)
    for part in features.split(2):
        statistics.add(part.float())
    return statistics.b, statistics.g


def sample(field: Tensor) -> Tensor:
    """F (Ry, Rx, C) at the patch centres of the common grid, whatever the size of the views."""
    side = GRID[0] * PATCH
    nothing = torch.zeros(*GRID, 1)
    return Decomposition(field.float(), nothing, nothing, (side, side), PATCH, PATCH).semantic


def on_grid(raw: Tensor, size: int) -> Tensor:
    """Raw features of a view size, on the common grid (bilinear if the grids differ)."""
    if tuple(raw.shape[:2]) == GRID:
        return raw
    moved = torch.nn.functional.interpolate(raw.permute(2, 0, 1)[None], GRID, mode="bilinear", align_corners=False)
    return moved[0].permute(1, 2, 0)


if __name__ == "__main__":
    tyro.cli(main)
