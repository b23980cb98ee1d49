"""Carrying out the steps of a published row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation import depth
from denoising_vit.evaluation.judged import JudgedData
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.records import Results
from denoising_vit.evaluation.segmentation import PAPER, Protocol
from denoising_vit.evaluation.workbench import Line, Watch, Workbench, unwatched
from denoising_vit.reproduction.denoising import DenoiserRecipe, trained_denoiser
from denoising_vit.reproduction.rows import NYU, Benchmark, Row, Step

#: The features of each variant that this version can make.
_FEATURES = {"baseline": "raw", "voc_denoised": "denoiser"}


@dataclass(frozen=True)
class Protocols:
    """How the steps of a row are done; as published by default.

    Attributes:
        segmentation: of the probe for classes.
        depth: of the probe for depth.
        recipe: how the denoiser of a row is made.
    """

    segmentation: Protocol = PAPER
    depth: depth.DepthProtocol = depth.PAPER
    recipe: DenoiserRecipe = field(default_factory=DenoiserRecipe)


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
    watch: Watch = unwatched,
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
        seed: of the probe, and of the denoiser.
        protocols: how steps are done; as published by default.
        watch: shows progress.

    Yields:
        The step, and its line of results; of data that cannot be used only why, under ``failed``.
    """
    protocols = protocols or Protocols()
    published = {"model": row.published.model, "variant": row.published.variant}
    denoiser: str | None = None
    for step in row.steps:
        if step.status not in ("ready", "done"):
            continue
        if denoiser is None and row.published.variant == "voc_denoised":
            place = folder / f"denoiser-{row.published.model}-{seed}"
            place.parent.mkdir(parents=True, exist_ok=True)
            denoiser = str(trained_denoiser(backbone, data, place, protocols.recipe, watch, seed))
        try:
            with watch(f"images of {step.benchmark.name} read", None) as advance:
                judged = _opened(step.benchmark, data, advance)
        except DenoisingVitError as error:  # the other benchmark may be as it should be
            yield step, {"failed": str(error), "metrics": {}, "skipped": []}
            continue
        bench = Workbench(
            data=judged,
            backbone=backbone,
            spec=spec,
            results=results,
            folder=folder,
            run=run,
            denoiser=denoiser,
            watch=watch,
        )
        for line, _ in _lines(bench, _FEATURES[row.published.variant], step.benchmark, protocols, seed, published):
            yield step, line


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
