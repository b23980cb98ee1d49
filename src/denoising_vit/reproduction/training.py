"""The denoiser and the distilled model of a published row, trained on the published photos."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from denoising_vit.backbones import Backbone
from denoising_vit.data import Dataset, Item, open_dataset, spread
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.errors import PhotoError
from denoising_vit.progress import Progress
from denoising_vit.reproduction.rows import TrainingPhotos
from denoising_vit.training.options import ViewOptions

#: List of a folder's validation photos, next to the folder.
_EVALUATED_ON = Path("ImageSets", "Segmentation", "val.txt")


@dataclass(frozen=True)
class DenoiserRecipe:
    """Training of a row's denoiser, as in the released code except for stage 1, which is solved exactly.

    Attributes:
        images: number of photos: for VOC the first of the released list, for ImageNet spread evenly over all.
        denoising: options of stage 1.
        views: whole images, never mirrored.
        training: 50,000 steps of 128 pairs (published: 16 on each of 8 devices), float32, random initial weights, no
            content-free images. One image is held out, for the run's metrics.
    """

    images: int = 10_000
    denoising: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(held_out=0))
    views: PairOptions = field(default_factory=lambda: PairOptions(whole=1, flip=0, keep=1))
    training: TrainOptions = field(
        default_factory=lambda: TrainOptions(
            batch_size=16, accumulate=8, blank=0.0, start="random", precision="float32", held_out=1
        )
    )


def trained_denoiser(
    backbone: Backbone,
    data: Path,
    where: TrainingPhotos,
    folder: Path,
    recipe: DenoiserRecipe,
    progress: Progress,
    seed: int = 0,
) -> Path:
    """Fit the photos and train the denoiser of a backbone; a finished or interrupted run is resumed.

    Returns:
        File of the denoiser after the last step, as published.

    Raises:
        TrainError: if a run in the folder has other options, or the photos are too few.
        PhotoError: if there are no photos.
    """
    photos = training_photos(data, where, recipe.images)
    training = replace(recipe.training, seed=seed)
    source = Photos(photos, recipe.denoising)
    job = TrainJob.prepare(source, folder, backbone, training, recipe.views, resume=(folder / "run.json").is_file())
    if not job.folder.is_over(training.steps):
        job.fill(progress)
        with progress("steps of the denoiser", training.steps) as advance:
            job.training().run(lambda _step, _figures: advance())
    return job.folder.last


def training_photos(data: Path, where: TrainingPhotos, count: int = 0) -> Dataset:
    """Training photos, with ids of their folder and name.

    Args:
        data: folder with the photos' folders.
        where: the photos.
        count: number of photos: the first of the list, or without a list, spread evenly over all except validation
            photos; 0 uses all.

    Raises:
        PhotoError: if there are no photos, or listed photos are missing.
    """
    if where.listed is not None:
        return Dataset(str(data / where.places[0]), _listed(data, where, count))
    items: list[Item] = []
    for place in where.places:
        folder = data / place
        if folder.is_dir():
            evaluated = folder.parent / _EVALUATED_ON
            names = set(evaluated.read_text().split()) if evaluated.is_file() else set()
            found = [item for item in open_dataset(folder) if Path(item.id).stem not in names]
            items += [replace(item, id=f"{folder.parent.name}/{item.id}") for item in found]
    chosen = spread(len(items), count)
    return Dataset(str(data / where.places[0]), [items[index] for index in chosen])


def _listed(data: Path, where: TrainingPhotos, count: int) -> list[Item]:
    """The first photos of a list with paths such as ``data/VOCdevkit/VOC2012/JPEGImages/NAME.jpg``."""
    assert where.listed is not None
    names = (data / where.listed).read_text().split()
    names = [name.removeprefix("data/") for name in (names[:count] if count else names)]
    absent = [name for name in names if not (data / name).is_file()]
    if not names:
        raise PhotoError(f"{data / where.listed}: the list is empty; source: {where.list_source}")
    if absent:
        raise PhotoError(
            f"{data / where.listed}: {len(absent)} of {len(names)} photos are missing, such as {data / absent[0]}; "
            f"source: {where.source}"
        )
    return [Item(f"{Path(name).parts[-3]}/{Path(name).name}", str((data / name).absolute())) for name in names]


@dataclass(frozen=True)
class DistilledRecipe:
    """Training of a row's distilled model, as in the released code except that gradients are averaged.

    Attributes:
        training: five epochs in steps of 512 photos (published: 64 on each of 8 devices), float32, without a loss on
            the class token and registers.
        views: whole photos, mirrored or not.
    """

    training: DistillOptions = field(
        default_factory=lambda: DistillOptions(
            batch_size=64, accumulate=8, hold_prefix=0, blank=0.0, precision="float32"
        )
    )
    views: ViewOptions = field(default_factory=ViewOptions)


def distilled_model(
    backbone: Backbone,
    denoiser: Path,
    data: Path,
    where: TrainingPhotos,
    folder: Path,
    recipe: DistilledRecipe,
    progress: Progress,
    seed: int = 0,
) -> Path:
    """Distil a backbone from its denoiser; a finished or interrupted run is resumed.

    Returns:
        File of the weights after the last step, as published.

    Raises:
        TrainError: if a run in the folder has other options, or the photos are too few.
        PhotoError: if there are no photos.
    """
    photos = training_photos(data, where)
    training, begun = replace(recipe.training, seed=seed), (folder / "run.json").is_file()
    job = DistillJob.prepare(photos, folder, backbone, training, recipe.views, denoiser=denoiser, resume=begun)
    if not job.folder.is_over(job.options.steps):
        with progress("steps of the distillation", job.options.steps) as advance:
            job.training().run(lambda _step, _figures: advance())
    return job.folder.last
