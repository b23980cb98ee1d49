"""The denoiser of a published row: fitted and trained again on the photos that it was published for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from denoising_vit.backbones import Backbone
from denoising_vit.data import Dataset, Item, open_dataset, spread
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.errors import PhotoError
from denoising_vit.progress import Progress
from denoising_vit.reproduction.rows import TrainingPhotos

#: The list of photos that a folder's benchmark is judged on, beside it.
_JUDGED_ON = Path("ImageSets", "Segmentation", "val.txt")


@dataclass(frozen=True)
class DenoiserRecipe:
    """How the denoiser of a row is made: as the released code does, but for stage 1, which is solved exactly.

    Attributes:
        images: photos: of VOC the first of the released list, of ImageNet spread evenly over all.
        denoising: stage 1.
        views: whole images, never mirrored.
        training: 50,000 steps of 128 pairs, which were 16 on each of 8 devices, in float32, from random weights. One
            image is held out, for the figures of the run.
    """

    images: int = 10_000
    denoising: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(held_out=0))
    views: PairOptions = field(default_factory=lambda: PairOptions(whole=1, flip=0, keep=1))
    training: TrainOptions = field(
        default_factory=lambda: TrainOptions(
            batch_size=16, accumulate=8, start="random", precision="float32", held_out=1
        )
    )


def trained_denoiser(
    backbone: Backbone,
    data: Path,
    where: TrainingPhotos,
    folder: Path,
    recipe: DenoiserRecipe,
    watch: Progress,
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
    """Photos to train on, named by their folder and their own name.

    Args:
        data: folder that the photos' folders are in.
        where: the photos.
        count: the first so many of the list where there is one, else spread evenly over all but those that are judged
            on; 0 takes all.

    Raises:
        PhotoError: if there are none, or some of the list are missing.
    """
    if where.listed is not None:
        return Dataset(str(data / where.places[0]), _listed(data, where, count))
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


def _listed(data: Path, where: TrainingPhotos, count: int) -> list[Item]:
    """The first photos of a list, whose lines are paths like ``data/VOCdevkit/VOC2012/JPEGImages/NAME.jpg``."""
    assert where.listed is not None
    names = (data / where.listed).read_text().split()
    names = [name.removeprefix("data/") for name in (names[:count] if count else names)]
    absent = [name for name in names if not (data / name).is_file()]
    if absent or not names:
        what = f"{len(absent)} of {len(names)} photos are missing, such as {data / absent[0]}" if absent else "is empty"
        raise PhotoError(f"{data / where.listed}: {what}; photos go there from {where.source}")
    return [Item(f"{Path(name).parts[-3]}/{Path(name).name}", str((data / name).absolute())) for name in names]
