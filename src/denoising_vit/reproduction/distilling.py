"""The distilled model of a published row: the backbone fine-tuned to the output of its denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from denoising_vit.backbones import Backbone
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.progress import Progress
from denoising_vit.reproduction.denoising import training_photos
from denoising_vit.reproduction.rows import TrainingPhotos
from denoising_vit.training.options import ViewOptions


@dataclass(frozen=True)
class DistilledRecipe:
    """How the distilled model of a row is made: as the released code does, but that gradients are averaged.

    Attributes:
        training: five epochs in steps of 512 photos, which were 64 on each of 8 devices, in float32; class token and
            registers are let go.
        views: whole photos, mirrored or not.
    """

    training: DistillOptions = field(
        default_factory=lambda: DistillOptions(batch_size=64, accumulate=8, hold_prefix=0, precision="float32")
    )
    views: ViewOptions = field(default_factory=ViewOptions)


def distilled_model(
    backbone: Backbone,
    denoiser: Path,
    data: Path,
    where: TrainingPhotos,
    folder: Path,
    recipe: DistilledRecipe,
    watch: Progress,
    seed: int = 0,
) -> Path:
    """Distils a backbone from its denoiser; what is done already is not done again.

    Args:
        backbone: the row's model, which stays as it is.
        denoiser: its file.
        data: folder that the photos' folder is in.
        where: the photos.
        folder: of the run.
        recipe: how.
        watch: shows progress.
        seed: of the training.

    Returns:
        The file of the weights after the last step, as was published.

    Raises:
        TrainError: if a run in the folder has other options, or the photos are too few.
        PhotoError: if there are no photos.
    """
    photos = training_photos(data, where)
    training, begun = replace(recipe.training, seed=seed), (folder / "run.json").is_file()
    job = DistillJob.prepare(photos, folder, backbone, training, recipe.views, denoiser=denoiser, resume=begun)
    if not job.folder.is_over(job.options.steps):
        with watch("steps of the distillation", job.options.steps) as advance:
            job.training().run(lambda _step, _figures: advance())
    return job.folder.last
