"""Carrying out the steps of a published row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.records import Results
from denoising_vit.evaluation.segmentation import Protocol
from denoising_vit.evaluation.workbench import Watch, Workbench, unwatched
from denoising_vit.reproduction.denoising import DenoiserRecipe, trained_denoiser
from denoising_vit.reproduction.rows import Row, Step

#: The features of each variant that this version can make.
_FEATURES = {"baseline": "raw", "voc_denoised": "denoiser"}


def reproduce_row(
    row: Row,
    *,
    data: Path,
    backbone: Backbone,
    spec: BackboneSpec,
    protocol: Protocol,
    results: Results,
    folder: Path,
    run: Mapping[str, Any],
    seed: int = 0,
    recipe: DenoiserRecipe | None = None,
    watch: Watch = unwatched,
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Does the steps of a row that are ready, by the published protocol.

    Args:
        row: with the status of its steps.
        data: folder that benchmarks are in.
        backbone: the row's model.
        spec: the same in words.
        protocol: of the probe.
        results: where lines go; a step that is there already is not done again.
        folder: for checkpoints and counts.
        run: command, hardware and software, for the record.
        seed: of the probe, and of the denoiser.
        recipe: how the denoiser of a row is made; as published by default.
        watch: shows progress.

    Yields:
        The step, and its line of results; of data that cannot be used only why, under ``failed``.
    """
    published = {"model": row.published.model, "variant": row.published.variant}
    denoiser: str | None = None
    for step in row.steps:
        if step.status not in ("ready", "done"):
            continue
        if denoiser is None and row.published.variant == "voc_denoised":
            place = folder / f"denoiser-{row.published.model}-{seed}"
            place.parent.mkdir(parents=True, exist_ok=True)
            denoiser = str(trained_denoiser(backbone, data, place, recipe or DenoiserRecipe(), watch, seed))
        try:
            with watch(f"images of {step.benchmark.name} read", None) as advance:
                labelled = open_labelled(data / step.benchmark.place, progress=advance)
        except DenoisingVitError as error:  # the other benchmark may be as it should be
            yield step, {"failed": str(error), "metrics": {}, "skipped": []}
            continue
        bench = Workbench(
            data=labelled,
            backbone=backbone,
            spec=spec,
            results=results,
            folder=folder,
            run=run,
            denoiser=denoiser,
            watch=watch,
        )
        for line, _ in bench.by_protocol((_FEATURES[row.published.variant],), protocol, (seed,), published):
            yield step, line
