"""What a training step costs on top of the block's own forward, backward and optimizer passes.

    python benchmarks/training.py PHOTOS [--steps 30] [--json out.json]

In one process, alternating: steps of `dvit train` on cached features, and the bare passes of the same block in the same
precision on batches already in memory. Prints medians, their ratio, and the fraction of a step spent waiting for
data. Photos are fitted first with few and small views: the content of targets does not affect the time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measuring import hardware, some_photos, synchronise

from denoising_vit.backbones import BackboneSpec
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.progress import no_progress
from denoising_vit.training.loop import denoising_loss

#: Maximum time of a step, relative to the bare passes.
BAR = 1.2


def main(
    folder: tyro.conf.Positional[Path],
    /,
    photos: int = 12,
    steps: int = 30,
    batch: int = 8,
    size: str = "518",
    rounds: int = 3,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures the overhead of a training step.

    Args:
        folder: folder of photographs.
        photos: number of photos.
        steps: number of steps per round.
        batch: pairs per step.
        size: size of the views in pixels.
        rounds: number of alternating rounds of steps and bare passes.
        json_path: file for the record.
    """
    told: list[dict[str, float]] = []
    bare_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        job = prepared(folder, photos, Path(name) / "run", steps * rounds, batch, size)
        job.fill(no_progress)
        run = job.training()
        for number in range(rounds):
            run.options = replace(run.options, stop_at=(number + 1) * steps)
            run.run(lambda _step, figures: told.append(figures))
            bare_s += bare(run, steps)
    step, alone = statistics.median(figures["seconds"] for figures in told), statistics.median(bare_s)
    waited = sum(figures["waited"] for figures in told) / sum(figures["seconds"] for figures in told)
    found: dict[str, Any] = {
        "hardware": hardware(),
        "backbone": job.backbone.extra_repr(),
        "size": size,
        "batch": batch,
    }
    found |= {"precision": str(run.dtype), "step_s": step, "bare_s": alone, "ratio": step / alone}
    found |= {"waited_share": waited, "bar": BAR}
    print(json.dumps(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def prepared(folder: Path, photos: int, run: Path, steps: int, batch: int, size: str) -> TrainJob:
    """A job on some of the photos."""
    denoising = DenoiseOptions(views=8, held_out=0, size=112)
    options = TrainOptions(steps=steps, batch_size=batch, blank=0.0, held_out=2, evaluate_every=steps + 1)
    return TrainJob.prepare(
        Photos(some_photos(folder, photos), denoising), run, BackboneSpec(), options, PairOptions(sizes=size, keep=4)
    )


def bare(run: Any, steps: int) -> list[float]:
    """Seconds of the bare forward, backward and optimizer passes of the same block."""
    optimiser = torch.optim.AdamW(run.denoiser.parameters(), lr=0.0)
    raw, target = (part.to(run.accelerator.device) for part in run.pairs.read(run.sampler.step(0)))
    found = []
    for _ in range(steps):
        synchronise()
        started = time.perf_counter()
        with torch.autocast(raw.device.type, run.dtype, enabled=run.dtype != torch.float32):
            clean = run.denoiser(raw)
        squared, cosine = denoising_loss(clean.float(), target)
        (squared + 1 - cosine).backward()
        optimiser.step()
        optimiser.zero_grad()
        synchronise()
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    tyro.cli(main)
