"""Shared by the tests of training: a planted backbone, a fitted store, and runs that take a second."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

import tiny_artifact
from denoising_vit import Backbone
from denoising_vit.backbones import BackboneSpec
from denoising_vit.data import open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, Stored, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.progress import no_progress
from denoising_vit.store import FeatureStore
from denoising_vit.training.checkpoints import Progress

CHANNELS = 64
PATCH, SIDE, GRID = tiny_artifact.PATCH, tiny_artifact.SIDE, tiny_artifact.GRID

#: Number of photos in the shared store.
PHOTOS = 11

#: Metrics of a step that depend on the clock.
TIMES = ("seconds", "waited")


def module(**planted: Any) -> tiny_artifact.Planted:
    """Local features under a pattern that is the same for every image; it counts its passes."""
    return tiny_artifact.Planted(**({"channels": CHANNELS} | planted))


def backbone(**planted: Any) -> Backbone:
    return tiny_artifact.plain(module(**planted))


@dataclass(frozen=True)
class Given(BackboneSpec):
    """A backbone that needs no words."""

    backbone_given: Backbone | None = None

    def load(self) -> Backbone:
        assert self.backbone_given is not None
        return self.backbone_given


def denoising(**changes: Any) -> DenoiseOptions:
    values: dict[str, Any] = {"views": 8, "held_out": 0}
    return DenoiseOptions(**(values | changes))


def fit(photos: Path, store: Path, extractor: Backbone, grid: Any = "field", **stage_one: Any) -> FeatureStore:
    spec = Given(device="cpu", backbone_given=extractor)
    job = FitJob.prepare(open_dataset(photos), store, spec, denoising(**stage_one), FitOptions(grid=grid))
    job.run()
    return FeatureStore.open(store)


def write_photos(folder: Path, count: int = PHOTOS, seed: int = 0) -> Path:
    return tiny_artifact.write_photos(folder, count, seed)


@dataclass(frozen=True)
class Fitted:
    """Photos and the store of their fields.

    Attributes:
        photos: folder of the photos.
        folder: folder of the store.
    """

    photos: Path
    folder: Path

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.folder)

    @property
    def stored(self) -> Stored:
        return Stored(self.store, open_dataset(self.photos))

    @property
    def unfitted(self) -> Photos:
        return Photos(open_dataset(self.photos), denoising())


def fitted(folder: Path, count: int = PHOTOS, **fitting: Any) -> Fitted:
    """A store of that many photos of the planted backbone."""
    made = Fitted(write_photos(folder / "photos", count), folder / "store")
    fit(made.photos, made.folder, backbone(), **fitting)
    return made


def options(**changes: Any) -> TrainOptions:
    values: dict[str, Any] = {"steps": 20, "batch_size": 4, "learning_rate": 0.01, "held_out": 3, "blank": 0.0}
    values |= {"evaluate_every": 10, "checkpoint_every": 5, "precision": "float32"}
    return TrainOptions(**(values | changes))


def views(**changes: Any) -> PairOptions:
    values: dict[str, Any] = {"keep": 4, "whole": 0.5}
    return PairOptions(**(values | changes))


def prepared(
    source: Photos | Stored,
    run: Path,
    extractor: Backbone | BackboneSpec | None = None,
    training: TrainOptions | None = None,
    pairs: PairOptions | None = None,
    **more: Any,
) -> TrainJob:
    """A job whose pairs are ready."""
    job = TrainJob.prepare(source, run, extractor or backbone(), training or options(), pairs or views(), **more)
    job.fill(no_progress)
    return job


def trained(source: Photos | Stored, run: Path, *args: Any, **more: Any) -> tuple[TrainJob, Progress]:
    """A job that was run, to its end or to where it stops."""
    job = prepared(source, run, *args, **more)
    return job, job.training().run()


def rows(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The log without times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if kind in (None, line["kind"])]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in chosen]


def results(run: Path) -> dict[str, Any]:
    """Exact results of a run: checkpoints, denoisers, names of panels, and the log without times."""
    files = [*sorted((run / "checkpoints").iterdir()), run / "denoiser.safetensors", run / "last.safetensors"]
    contents: dict[str, Any] = {path.name: path.read_bytes() for path in files if path.is_file()}
    return contents | {"log": rows(run), "panels": sorted(path.name for path in (run / "panels").iterdir())}


def stopped(training: TrainOptions, step: int) -> TrainOptions:
    return replace(training, stop_at=step)


def bilinear(field: Tensor, x: float, y: float) -> Tensor:
    """F (Ry, Rx, C) at one position of the image, node by node."""
    rows_, columns = field.shape[:2]
    across = min(max(x * columns - 0.5, 0.0), columns - 1.0)
    down = min(max(y * rows_ - 0.5, 0.0), rows_ - 1.0)
    left, top = min(int(across), columns - 2), min(int(down), rows_ - 2)
    right, lower = across - left, down - top
    upper_row = field[top, left] * (1 - right) + field[top, left + 1] * right
    lower_row = field[top + 1, left] * (1 - right) + field[top + 1, left + 1] * right
    return upper_row * (1 - lower) + lower_row * lower


def weights_of(path: Path) -> dict[str, Tensor]:
    """Model tensors of a checkpoint, by name."""
    return {name: value for name, value in load_file(path).items() if name.startswith("model.")}


class Usage(NamedTuple):
    """Result of `shutil.disk_usage`."""

    total: int
    used: int
    free: int


def leave_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all disks report that many free bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(free, 0, free))
