"""How close a denoiser comes to the targets of held-out photos, by the number of photos that it is trained on.

    python benchmarks/photos_needed.py PHOTOS [--counts 30 60 120 240] [--out DIR]

Stage 1 and the features of the views are computed once. For each number of photos, spread evenly over all, a
denoiser is trained by the loop of `dvit train` from the same start, with the same number of steps, and evaluated on the
same held-out photos; only the training photos differ. It shows whether more photos help before more steps do.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from measuring import hardware, some_photos, table, write

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import show_progress
from denoising_vit.data import spread
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.denoiser.train import Training
from denoising_vit.training.loop import peak_rate
from denoising_vit.training.run_folder import RunFolder

#: Peak learning rate, whatever the number of pairs per step.
_PEAK = 1e-3


def main(
    folder: tyro.conf.Positional[Path],
    /,
    counts: tuple[int, ...] = (30, 60, 120, 240),
    held_out: int = 24,
    views: int = 12,
    keep: int = 6,
    size: int = 280,
    steps: int = 400,
    batch: int = 8,
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    out: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
) -> None:
    """Trains on increasing numbers of photos.

    Args:
        folder: folder of photographs.
        counts: numbers of training photos, in turn.
        held_out: number of further photos, on which all are evaluated.
        views: views of stage 1 per photo.
        keep: training pairs per photo.
        size: size of all views in pixels.
        steps: steps of each training.
        batch: pairs per step.
        model: the backbone.
        out: folder for the record.
    """
    found: dict[str, Any] = {"hardware": hardware(), "held_out": held_out, "views": views, "keep": keep}
    found |= {"size": size, "steps": steps, "batch": batch, "counts": {}}
    options = TrainOptions(
        steps=steps,
        batch_size=batch,
        learning_rate=_PEAK / peak_rate(1.0, batch),
        blank=0.0,
        held_out=held_out,
        evaluate_every=steps,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as name:
        photos = some_photos(folder, max(counts) + held_out)
        require_enough(len(photos) - held_out, counts)
        source = Photos(photos, DenoiseOptions(views=views, held_out=0, size=size), "none")
        job = TrainJob.prepare(source, Path(name) / "run", model, options, PairOptions(sizes=str(size), keep=keep))
        found["backbone"] = job.backbone.extra_repr()
        job.fill(show_progress)
        require_enough(len(job.kept.usable()) - held_out, counts)
        for count in counts:
            found["counts"][count] = trained_on(job.training(), count, Path(name) / str(count))
            write(out, "photos_needed", found, markdown(found["counts"]))


def require_enough(there: int, counts: tuple[int, ...]) -> None:
    """Exits if there are too few photos for one of the rows."""
    if not 0 < min(counts) <= max(counts) <= there:
        raise SystemExit(f"expected --counts of 1 to {there} photos, as many as can be trained on; got {counts}")


def trained_on(run: Training, count: int, folder: Path) -> dict[str, float]:
    """Held-out metrics of a run on that many of its photos, after its last step."""
    folder.mkdir()
    there = run.sampler.images
    sampler = replace(run.sampler, images=tuple(there[index] for index in spread(len(there), count)))
    run = replace(run, folder=RunFolder(folder), sampler=sampler)
    seen: list[dict[str, float]] = []
    told: list[float] = []
    run.run(lambda _step, figures: told.append(figures["cosine"]), lambda _step, figures: seen.append(figures))
    last = seen[-1]
    return {
        "whole": last["ratio"],
        "crop": (1 - last["crop_cosine"]) / (1 - last["raw_crop_cosine"]),
        "rank": last["rank"] / last["raw_rank"],
        "training_cosine": sum(told[-50:]) / len(told[-50:]),
    }


def markdown(counts: dict[int, dict[str, float]]) -> str:
    """One row per number of photos."""
    head = ["photos", "1 - cosine, relative to raw: whole", "crops", "effective rank, relative", "cosine in training"]
    rows = [[count, *(f"{value:.3f}" for value in figures.values())] for count, figures in counts.items()]
    return table(head, rows)


if __name__ == "__main__":
    tyro.cli(main)
