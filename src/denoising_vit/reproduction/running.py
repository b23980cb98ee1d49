"""Carrying out the steps of a published row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models.eva import Eva

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation import depth
from denoising_vit.evaluation.data import JudgedData
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.segmentation import RELEASED, Protocol
from denoising_vit.evaluation.workbench import Line, Progress, Workbench, no_progress
from denoising_vit.extractors import Cleaners
from denoising_vit.reproduction.denoising import DenoiserRecipe, trained_denoiser
from denoising_vit.reproduction.distilling import DistilledRecipe, distilled_model
from denoising_vit.reproduction.rows import NYU, VARIANTS_MADE, VOC_PHOTOS, Benchmark, Row, Step


@dataclass(frozen=True)
class Protocols:
    """How the steps of a row are done; as the released code does them by default.

    Attributes:
        segmentation: of the probe for classes.
        depth: of the probe for depth.
        recipe: how the denoiser of a row is made.
        distilling: how the distilled model of a row is made.
    """

    segmentation: Protocol = RELEASED
    depth: depth.DepthProtocol = depth.RELEASED
    recipe: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    distilling: DistilledRecipe = field(default_factory=DistilledRecipe)


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
    watch: Progress = no_progress,
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Does the steps of a row that are ready, by the published protocol.

    Args:
        row: with the status of its steps.
        data: folder that benchmarks are in.
        backbone: the row's model.
        spec: the same in words.
        results: where lines go; a step that is there already is not done again.
        folder: for checkpoints and counts.
        run: command, hardware and software, for the record.
        seed: of the probe, the denoiser and the distillation.
        protocols: how steps are done; as published by default.
        watch: shows progress.

    Yields:
        The step, and its line of results; of data that cannot be used only why, under ``failed``.
    """
    protocols = protocols or Protocols()
    published = {"model": row.published.model, "variant": row.published.variant}
    made: _Made | None = None
    for step in row.steps:
        if step.status not in ("ready", "done"):
            continue
        if made is None:
            made = _made(row, data, backbone, folder, protocols, watch, seed)
        try:
            with watch(f"images of {step.benchmark.name} read", None) as advance:
                judged = _opened(step.benchmark, data, advance)
        except DenoisingVitError as error:  # the other benchmark may be as it should be
            yield step, {"failed": str(error), "metrics": {}, "skipped": []}
            continue
        features = VARIANTS_MADE[row.published.variant].features
        bench = Workbench(
            data=judged,
            backbone=_as_segmented(backbone, features) if step.benchmark.task == "segmentation" else backbone,
            spec=spec,
            results=results,
            folder=folder,
            run=run,
            cleaners=Cleaners(denoiser=made.denoiser, distilled=made.distilled),
            watch=watch,
        )
        for line, _ in _lines(bench, features, step.benchmark, protocols, seed, published):
            yield step, line


def _as_segmented(backbone: Backbone, features: str) -> Backbone:
    """The backbone as the released code segments with it.

    Without a denoiser behind it the last block is taken as it is, before the final norm; of EVA-02, through another
    path, the block before it, normed. Depth and denoisers have the normed last block.
    """
    if features == "denoiser" or not isinstance(backbone, TimmBackbone):
        return backbone
    if isinstance(backbone.model, Eva):
        return backbone.at_layer(-2)
    other = backbone.at_layer(-1)
    other.norm = False
    return other


def _made(
    row: Row, data: Path, backbone: Backbone, folder: Path, protocols: Protocols, watch: Progress, seed: int
) -> _Made:
    """Trains what a row needs, where it is not there yet."""
    model, variant = row.published.model, VARIANTS_MADE[row.published.variant]
    if variant.denoiser is None:
        return _Made()
    folder.mkdir(parents=True, exist_ok=True)
    # Rows of one kind of photos share the denoiser.
    photos = "" if variant.denoiser is VOC_PHOTOS else "imgnet-"
    place = folder / f"denoiser-{photos}{model}-{seed}"
    denoiser = trained_denoiser(backbone, data, variant.denoiser, place, protocols.recipe, watch, seed)
    if variant.distilled is None:
        return _Made(denoiser=str(denoiser))
    place, how = folder / f"distilled-{photos}{model}-{seed}", protocols.distilling
    distilled = distilled_model(backbone, denoiser, data, variant.distilled, place, how, watch, seed)
    return _Made(distilled=str(distilled))


@dataclass(frozen=True)
class _Made:
    """Files of what a row judges; None where it does not."""

    denoiser: str | None = None
    distilled: str | None = None


def _opened(benchmark: Benchmark, data: Path, progress: Callable[[], None]) -> JudgedData:
    place = data / benchmark.place
    if benchmark is NYU:
        return depth.open_depth(place, progress=progress)
    return open_labelled(place, progress=progress)


def _lines(
    bench: Workbench, features: str, benchmark: Benchmark, protocols: Protocols, seed: int, published: dict[str, str]
) -> Iterator[Line]:
    if benchmark is NYU:
        return depth.by_protocol(bench, (features,), protocols.depth, (seed,), published)
    return bench.by_protocol((features,), protocols.segmentation, (seed,), published)
