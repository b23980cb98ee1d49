"""What a step of stage 3 costs on top of its bare passes, and what a distilled model costs on top of a raw one.

    python benchmarks/distillation.py PHOTOS [--steps 10] [--json out.json]

In one process, alternating: steps of `dvit distill`, reading and rendering of photos included, and the bare passes of
the same models in the same precision on views already in memory: teacher forward, student forward, backward and
optimizer step. Prints medians, their ratio, and the fraction of a step spent waiting for photos. Then times the forward
pass of the backbone with its own weights and with those of the run.
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
import torch.nn.functional as F
import tyro
from denoised_vit import measured
from measuring import hardware, synchronise

from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.loading import with_weights
from denoising_vit.data import open_dataset
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.train import Distillation
from denoising_vit.training.options import ViewOptions

#: Maximum time of a step, relative to the bare passes, and of a distilled model, relative to the raw one.
STEP_BAR, FORWARD_BAR = 1.1, 1.02


def main(
    photos: tyro.conf.Positional[Path],
    /,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    steps: int = 10,
    batch: int = 4,
    size: str = "518",
    rounds: int = 3,
    repeats: int = 21,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures both overheads.

    Args:
        photos: folder of photographs.
        backbone: name of a model with a shipped denoiser.
        steps: number of steps per round.
        batch: views per step.
        size: size of the views in pixels.
        rounds: number of alternating rounds of steps and bare passes.
        repeats: number of forward passes.
        json_path: file for the record.
    """
    told: list[dict[str, float]] = []
    bare_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        # One evaluation at the end, for the weights that are written then.
        options = DistillOptions(
            steps=steps * rounds, batch_size=batch, blank=0.0, held_out=1, evaluate_every=steps * rounds + 1
        )
        spec = BackboneSpec(backbone)
        job = DistillJob.prepare(open_dataset(photos), folder, spec, options, ViewOptions(sizes=size))
        run = job.training()
        for number in range(rounds):
            run.options = replace(run.options, stop_at=(number + 1) * steps)
            part: list[dict[str, float]] = []
            run.run(lambda _step, figures, part=part: part.append(figures))
            told += part[1:]  # the first waits for the first photos
            bare_s += bare(run, steps)[1:]
        raw = run.teacher.backbone
        distilled = with_weights(raw, job.folder.last)
    side = raw.default_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(raw.device, raw.dtype)
    forward = measured({"backbone": raw, "denoised": distilled}, image, repeats)
    step, alone = statistics.median(figures["seconds"] for figures in told), statistics.median(bare_s)
    waited = sum(figures["waited"] for figures in told) / sum(figures["seconds"] for figures in told)
    found: dict[str, Any] = {"hardware": hardware(), "backbone": raw.extra_repr(), "size": size, "batch": batch}
    found |= {"precision": str(run.dtype), "step_s": step, "bare_s": alone, "ratio": step / alone}
    found |= {"waited_share": waited, "bar": STEP_BAR, "raw_s": forward["backbone_s"]}
    found |= {"distilled_s": forward["denoised_s"], "forward_ratio": forward["ratio"], "forward_bar": FORWARD_BAR}
    print(json.dumps(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def bare(run: Distillation, steps: int) -> list[float]:
    """Seconds of the bare passes of a step on one batch."""
    optimiser = torch.optim.AdamW([value for value in run.student.parameters() if value.requires_grad], lr=0.0)
    device = run.accelerator.device
    batch = next(run.reader.batches([run.sampler.step(0)]))
    found = []
    for _ in range(steps):
        synchronise()
        started = time.perf_counter()
        lesson = run.teacher(batch)
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            features, prefixes = run.student(batch.images)
        loss = torch.zeros((), device=device)
        for answers, targets in ((features, lesson.features), (prefixes, lesson.prefixes)):
            clean, target = answers[0], targets[0]
            loss = loss + F.mse_loss(clean, target) + 1 - F.cosine_similarity(clean, target, dim=-1).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        synchronise()
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    tyro.cli(main)
