"""Run the steps of a published row: train its denoiser and distilled model, and evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models.eva import Eva

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.data import Dataset, Item, open_dataset, spread
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.errors import DenoisingVitError, PhotoError
from denoising_vit.evaluation import depth
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.segmentation import RELEASED, Protocol, by_protocol
from denoising_vit.evaluation.workbench import Progress, Workbench, no_progress
from denoising_vit.extractors import Cleaners
from denoising_vit.reproduction.rows import NYU, VARIANTS_MADE, VOC_PHOTOS, Row, Step, TrainingPhotos
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
    denoising: DenoiseOptions = DenoiseOptions(held_out=0)  # noqa: RUF009, frozen
    views: PairOptions = PairOptions(whole=1, flip=0, keep=1)  # noqa: RUF009, frozen
    training: TrainOptions = TrainOptions(  # noqa: RUF009, frozen
        batch_size=16, accumulate=8, blank=0.0, start="random", precision="float32", held_out=1
    )


@dataclass(frozen=True)
class DistilledRecipe:
    """Training of a row's distilled model, as in the released code except that gradients are averaged.

    Attributes:
        training: five epochs in steps of 512 photos (published: 64 on each of 8 devices), float32, without a loss on
            the class token and registers.
        views: whole photos, mirrored or not.
    """

    training: DistillOptions = DistillOptions(  # noqa: RUF009, frozen
        batch_size=64, accumulate=8, hold_prefix=0, blank=0.0, precision="float32"
    )
    views: ViewOptions = ViewOptions()  # noqa: RUF009, frozen


@dataclass(frozen=True)
class Protocols:
    """Protocols of the steps of a row: both probes, and both training recipes; the defaults are the released ones."""

    segmentation: Protocol = RELEASED
    depth: depth.DepthProtocol = depth.RELEASED
    recipe: DenoiserRecipe = DenoiserRecipe()
    distilling: DistilledRecipe = DistilledRecipe()


def reproduce_row(
    row: Row,
    *,
    data: Path,
    backbone: Backbone,
    spec: BackboneSpec,
    results: Results,
    folder: Path,
    run: Mapping[str, Any],
    seed: int = 0,
    protocols: Protocols | None = None,
    progress: Progress = no_progress,
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Run the steps of a row whose data are available, by the published protocol.

    Args:
        row: the row with the status of its steps.
        data: folder with the benchmarks.
        backbone: the row's model.
        spec: specification of the model, for the record.
        results: results file; existing results are not recomputed.
        folder: folder for checkpoints and counts.
        run: command, hardware and software, for the record.
        seed: seed for the probe, the denoiser and the distillation.
        protocols: protocols of the steps; defaults to the published ones.
        progress: progress reporting.

    Yields:
        The step and its result line; for unusable data only the reason, under ``failed``.
    """
    protocols = protocols or Protocols()
    published = {"model": row.published.model, "variant": row.published.variant}
    features = VARIANTS_MADE[row.published.variant].features
    steps = [step for step in row.steps if step.status != "missing"]
    cleaners = _trained(row, data, backbone, folder, protocols, progress, seed) if steps else Cleaners()
    for step in steps:
        is_depth = step.benchmark is NYU
        try:
            with progress(f"images of {step.benchmark.name} read", None) as advance:
                read = depth.open_depth if is_depth else open_labelled
                opened = read(data / step.benchmark.place, progress=advance)
        except DenoisingVitError as error:  # the other benchmarks may still be usable
            yield step, {"failed": str(error), "metrics": {}, "skipped": []}
            continue
        bench = Workbench(
            data=opened,
            backbone=backbone if is_depth else _as_segmented(backbone, features),
            spec=spec,
            results=results,
            folder=folder,
            run=run,
            cleaners=cleaners,
            progress=progress,
        )
        if is_depth:
            lines = depth.by_protocol(bench, (features,), protocols.depth, (seed,), published)
        else:
            lines = by_protocol(bench, (features,), protocols.segmentation, (seed,), published)
        for line, _ in lines:
            yield step, line


def _as_segmented(backbone: Backbone, features: str) -> Backbone:
    """The backbone as the released code uses it for segmentation.

    Without a denoiser, it uses the last block before the final norm; for EVA-02, in another code path, the normalised
    second-to-last block. Depth and denoisers use the normalised last block.
    """
    if features == "denoiser" or not isinstance(backbone, TimmBackbone):
        return backbone
    if isinstance(backbone.model, Eva):
        return backbone.at_layer(-2)
    other = backbone.at_layer(-1)
    other.norm = False
    return other


def _trained(
    row: Row, data: Path, backbone: Backbone, folder: Path, protocols: Protocols, progress: Progress, seed: int
) -> Cleaners:
    """The denoiser or the distilled model of a row, trained unless it exists."""
    model, variant = row.published.model, VARIANTS_MADE[row.published.variant]
    if variant.denoiser is None:
        return Cleaners()
    folder.mkdir(parents=True, exist_ok=True)
    # Rows with the same photos share the denoiser.
    photos = "" if variant.denoiser is VOC_PHOTOS else "imgnet-"
    place = folder / f"denoiser-{photos}{model}-{seed}"
    denoiser = trained_denoiser(backbone, data, variant.denoiser, place, protocols.recipe, progress, seed)
    if variant.distilled is None:
        return Cleaners(denoiser=str(denoiser))
    place, how = folder / f"distilled-{photos}{model}-{seed}", protocols.distilling
    distilled = distilled_model(backbone, denoiser, data, variant.distilled, place, how, progress, seed)
    return Cleaners(distilled=str(distilled))


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
    """Like :func:`trained_denoiser`: distil a backbone from its denoiser, and return the file of the weights."""
    photos = training_photos(data, where)
    training, begun = replace(recipe.training, seed=seed), (folder / "run.json").is_file()
    job = DistillJob.prepare(photos, folder, backbone, training, recipe.views, denoiser=denoiser, resume=begun)
    if not job.folder.is_over(job.options.steps):
        with progress("steps of the distillation", job.options.steps) as advance:
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
