"""The denoiser of a published row: fitted and trained again on the photos that it was published for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from denoising_vit.backbones import Backbone
from denoising_vit.dataset import Dataset, Item, open_dataset, spread
from denoising_vit.evaluation.watching import Watch
from denoising_vit.options import DenoiseOptions
from denoising_vit.reproduction.rows import TrainingPhotos
from denoising_vit.training import PairOptions, Photos, TrainJob, TrainOptions

#: The list of photos that a folder's benchmark is judged on, beside it.
_JUDGED_ON = Path("ImageSets", "Segmentation", "val.txt")


@dataclass(frozen=True)
class DenoiserRecipe:
    """How the denoiser of a row is made: the published setting, but for stage 1, which is solved exactly.

    Attributes:
        images: photos, spread evenly over all; which 10,000 were taken was not published.
        denoising: stage 1.
        views: whole images and their mirror images, as published.
        training: loss, optimiser, schedule and length as published.
    """

    images: int = 10_000
    denoising: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(held_out=0))
    views: PairOptions = field(default_factory=lambda: PairOptions(whole=1, keep=2))
    training: TrainOptions = field(default_factory=TrainOptions)


def trained_denoiser(
    backbone: Backbone,
    data: Path,
    where: TrainingPhotos,
    folder: Path,
    recipe: DenoiserRecipe,
    watch: Watch,
    seed: int = 0,
) -> Path:
    """Fits the photos and trains the denoiser of a backbone; what is done already is not done again.

    Args:
        backbone: the row's model.
        data: folder that the photos' folders are in.
        where: the photos.
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
    photos = training_photos(data, where, recipe.images)
    training = replace(recipe.training, seed=seed)
    source = Photos(photos, recipe.denoising)
    job = TrainJob.prepare(source, folder, backbone, training, recipe.views, resume=(folder / "run.json").is_file())
    if not job.folder.is_over(training.steps):
        job.fill(watch)
        with watch("steps of the denoiser", training.steps) as advance:
            job.training().run(lambda _step, _figures: advance())
    return job.folder.last


def training_photos(data: Path, where: TrainingPhotos, count: int = 0) -> Dataset:
    """Photos to train on, each folder's by its own name; 0 takes all.

    Those that are judged on are left out, as published.

    Raises:
        PhotoError: if there are none.
    """
    items: list[Item] = []
    for place in where.places:
        folder = data / place
        if folder.is_dir():
            judged = folder.parent / _JUDGED_ON
            names = set(judged.read_text().split()) if judged.is_file() else set()
            found = [item for item in open_dataset(folder) if Path(item.id).stem not in names]
            items += [replace(item, id=f"{folder.parent.name}/{item.id}") for item in found]
    chosen = spread(len(items), count)
    return Dataset(str(data / where.places[0]), [items[index] for index in chosen])
