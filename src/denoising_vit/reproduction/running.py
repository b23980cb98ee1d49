"""Run the steps of a published row."""

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
from denoising_vit.evaluation.data import EvaluationData
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.segmentation import RELEASED, Protocol, by_protocol
from denoising_vit.evaluation.workbench import Line, Progress, Workbench, no_progress
from denoising_vit.extractors import Cleaners
from denoising_vit.reproduction.rows import NYU, VARIANTS_MADE, VOC_PHOTOS, Benchmark, Row, Step
from denoising_vit.reproduction.training import DenoiserRecipe, DistilledRecipe, distilled_model, trained_denoiser


@dataclass(frozen=True)
class Protocols:
    """Protocols of the steps of a row; the defaults are the released ones.

    Attributes:
        segmentation: protocol of the segmentation probe.
        depth: protocol of the depth probe.
        recipe: training recipe of the denoiser.
        distilling: training recipe of the distilled model.
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
    progress: Progress = no_progress,
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Run the ready steps of a row by the published protocol.

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
    made: _Made | None = None
    for step in row.steps:
        if step.status not in ("ready", "done"):
            continue
        if made is None:
            made = _made(row, data, backbone, folder, protocols, progress, seed)
        try:
            with progress(f"images of {step.benchmark.name} read", None) as advance:
                opened = _opened(step.benchmark, data, advance)
        except DenoisingVitError as error:  # the other benchmarks may still be usable
            yield step, {"failed": str(error), "metrics": {}, "skipped": []}
            continue
        features = VARIANTS_MADE[row.published.variant].features
        bench = Workbench(
            data=opened,
            backbone=_as_segmented(backbone, features) if step.benchmark.task == "segmentation" else backbone,
            spec=spec,
            results=results,
            folder=folder,
            run=run,
            cleaners=Cleaners(denoiser=made.denoiser, distilled=made.distilled),
            progress=progress,
        )
        for line, _ in _lines(bench, features, step.benchmark, protocols, seed, published):
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


def _made(
    row: Row, data: Path, backbone: Backbone, folder: Path, protocols: Protocols, progress: Progress, seed: int
) -> _Made:
    """Train the denoiser and the distilled model of a row, unless they exist."""
    model, variant = row.published.model, VARIANTS_MADE[row.published.variant]
    if variant.denoiser is None:
        return _Made()
    folder.mkdir(parents=True, exist_ok=True)
    # Rows with the same photos share the denoiser.
    photos = "" if variant.denoiser is VOC_PHOTOS else "imgnet-"
    place = folder / f"denoiser-{photos}{model}-{seed}"
    denoiser = trained_denoiser(backbone, data, variant.denoiser, place, protocols.recipe, progress, seed)
    if variant.distilled is None:
        return _Made(denoiser=str(denoiser))
    place, how = folder / f"distilled-{photos}{model}-{seed}", protocols.distilling
    distilled = distilled_model(backbone, denoiser, data, variant.distilled, place, how, progress, seed)
    return _Made(distilled=str(distilled))


@dataclass(frozen=True)
class _Made:
    """Files of the denoiser or distilled model to evaluate, if any."""

    denoiser: str | None = None
    distilled: str | None = None


def _opened(benchmark: Benchmark, data: Path, progress: Callable[[], None]) -> EvaluationData:
    place = data / benchmark.place
    if benchmark is NYU:
        return depth.open_depth(place, progress=progress)
    return open_labelled(place, progress=progress)


def _lines(
    bench: Workbench, features: str, benchmark: Benchmark, protocols: Protocols, seed: int, published: dict[str, str]
) -> Iterator[Line]:
    if benchmark is NYU:
        return depth.by_protocol(bench, (features,), protocols.depth, (seed,), published)
    return by_protocol(bench, (features,), protocols.segmentation, (seed,), published)
