"""The denoiser of a published row: fitted and trained again on the photos that it was published for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from denoising_vit.backbones import Backbone
from denoising_vit.dataset import Dataset, Item, open_dataset, spread
from denoising_vit.evaluation.watching import Watch
from denoising_vit.options import DenoiseOptions
from denoising_vit.training import PairOptions, Photos, TrainJob, TrainOptions

#: Where the photos lie below the data folder, VOC 2007 where it is there.
PHOTOS = ("VOCdevkit/VOC2007/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")


@dataclass(frozen=True)
class DenoiserRecipe:
    """How the denoiser of a row is made: the published setting, but for stage 1, which is solved exactly.

    Attributes:
        images: photos of VOC 2007 and 2012, spread evenly over both; which 10,000 were taken was not published.
        denoising: stage 1.
        views: whole images and their mirror images, as published.
        training: loss, optimiser, schedule and length as published.
    """

    images: int = 10_000
    denoising: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(held_out=0))
    views: PairOptions = field(default_factory=lambda: PairOptions(whole=1, keep=2))
    training: TrainOptions = field(default_factory=TrainOptions)


def trained_denoiser(
    backbone: Backbone, data: Path, folder: Path, recipe: DenoiserRecipe, watch: Watch, seed: int = 0
) -> Path:
    """Fits the photos and trains the denoiser of a backbone; what is done already is not done again.

    Args:
        backbone: the row's model.
        data: folder that VOCdevkit is in.
        folder: of the run.
        recipe: how.
        watch: shows progress.
        seed: of the training.

    Returns:
        The file of the denoiser after the last step, as was published.

    Raises:
        TrainError: if a run in the folder has other options, or the photos are too few.
        PhotoError: if there are no photos.
    """
    photos = _photos(data, recipe.images)
    training = replace(recipe.training, seed=seed)
    source = Photos(photos, recipe.denoising)
    job = TrainJob.prepare(source, folder, backbone, training, recipe.views, resume=(folder / "run.json").is_file())
    if job.folder.checkpoints.step < training.steps or not job.folder.last.is_file():
        job.fill(watch)
        with watch("steps of the denoiser", training.steps) as advance:
            job.training().run(lambda _step, _figures: advance())
    return job.folder.last


def _photos(data: Path, count: int) -> Dataset:
    """Photos of both years, each year's by its own name."""
    items: list[Item] = []
    for place in PHOTOS:
        if (data / place).is_dir():
            found = open_dataset(data / place)
            items += [replace(item, id=f"{place.split('/')[1]}/{item.id}") for item in found]
    chosen = spread(len(items), count)
    return Dataset(str(data / "VOCdevkit"), [items[index] for index in chosen])
