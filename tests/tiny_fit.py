"""Shared by the tests of `dvit fit`: photos, a model and options so small that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from denoising_vit.backbones import BackboneSpec
from denoising_vit.data import open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.store import FeatureStore

MODEL = "vit_tiny_patch16_224"

#: A grid of 3 x 3 patches, a field of 6 x 6 nodes.
SIZE = 48

#: Forward passes per photo: fitted views and one held out.
VIEWS, HELD_OUT = 8, 1
PASSES = VIEWS + HELD_OUT


def write_weights(path: Path, model: str = MODEL) -> Path:
    """Writes random weights to a file: ``weights="random"`` differ between processes."""
    torch.manual_seed(0)
    save_file(timm.create_model(model).state_dict(), path)
    return path


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Different photos of gradients under noise, 80 x 60 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, 80), np.linspace(0, 1, 60))
    for number in range(count):
        slopes = chance.uniform(-120, 120, (2, 3))
        smooth = 128 + across[..., None] * slopes[0] + down[..., None] * slopes[1]
        pixels = (smooth + chance.normal(0, 25, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def spec_of(weights: Path, **changes: Any) -> BackboneSpec:
    values: dict[str, Any] = {"backbone": MODEL, "weights": str(weights), "device": "cpu", "dtype": "float32"}
    return BackboneSpec(**(values | changes))


def denoising(**changes: Any) -> DenoiseOptions:
    values: dict[str, Any] = {"views": VIEWS, "held_out": HELD_OUT, "size": SIZE}
    return DenoiseOptions(**(values | changes))


def prepare(data: Path, store: Path, spec: BackboneSpec, **options: Any) -> FitJob:
    """A job in shards of three photos; options of stage 1 by the name ``stage_one``."""
    stage_one = options.pop("stage_one", None) or denoising()
    running: dict[str, Any] = {"images_per_shard": 3, **options}
    return FitJob.prepare(open_dataset(data), store, spec, stage_one, FitOptions(**running))


def command(data: Path, store: Path, weights: Path) -> list[str]:
    """The same job as arguments of `dvit`."""
    return [
        *("fit", str(data), "-o", str(store), "--backbone", MODEL, "--weights", str(weights), "--device", "cpu"),
        *("--dtype", "float32", "--size", str(SIZE), "--views", str(VIEWS), "--held-out", str(HELD_OUT)),
        *("--images-per-shard", "3"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Exact bytes of every result object of a store; without leases, which record the writer."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.relative_to(folder).parts[0] in ("ids.json", "field", "staged", "failed", "sealed")
    }


def fields(store: FeatureStore | Path) -> dict[str, bytes]:
    """The field of each finished image as stored, by id."""
    opened = FeatureStore.open(store) if isinstance(store, Path) else store
    return {opened.ids[index]: opened.read(index)[0].tobytes() for index in sorted(opened.done())}


def assert_whole(store: FeatureStore | Path, failed: int = 0) -> None:
    """All photos but ``failed`` are done, every shard is sealed, nothing is left over or damaged."""
    opened = FeatureStore.open(store) if isinstance(store, Path) else store
    assert len(opened.done()) == len(opened) - failed
    assert len(opened.failed()) == failed
    assert opened.staged() == set()
    assert opened.unfinished() == []
    assert list(opened.verify()) == []
