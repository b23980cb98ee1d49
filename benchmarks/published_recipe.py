"""The published recipe compared with ours: steps of the neural field and of stage 2, scaled to published numbers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from measuring import alternate, passes, synchronise

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.inputs import prepare
from denoising_vit.decomposition.neural_field.fit import SeenViews, fit_neural_field
from denoising_vit.decomposition.options import DenoiseOptions, NeuralFieldOptions

#: The published run: photos, steps of stage 2, pairs per step; and the hours that both stages may take.
PHOTOS, STEPS, PAIRS, HOURS = 10_000, 50_000, 16, 1.0


def neural_field(model: Backbone, size: int, views: int, timed_steps: int) -> dict[str, Any]:
    """Seconds of the published stage 1 of one photo, without its forward passes; on noise, which takes the same time.

    Args:
        model: backbone whose feature shape is used.
        size: size of a view in pixels.
        views: number of fitted views.
        timed_steps: number of timed steps, half of them with h; all steps are scaled from them.
    """
    options = DenoiseOptions(method="neural-field", views=views, held_out=0, size=size, coverage="plain")
    plan, _ = prepare(model, options)
    seen = SeenViews(plan, torch.randn(views, *plan.grid, model.embed_dim, device=model.device))
    return timed_field(seen, NeuralFieldOptions(), timed_steps) | {"views": views}


def timed_field(seen: SeenViews, options: NeuralFieldOptions, few: int) -> dict[str, Any]:
    """Seconds of a few steps of the neural field, and of all steps, scaled from them."""
    fit_neural_field(seen, replace(options, steps=20))
    synchronise()
    started = time.perf_counter()
    fit_neural_field(seen, replace(options, steps=few))
    synchronise()
    seconds = time.perf_counter() - started
    steps = options.total_steps
    return {"timed_steps": few, "timed_s": seconds, "steps": steps, "seconds": seconds / few * steps}


def stage_two(model: Backbone, size: int, runs: int) -> dict[str, Any]:
    """Seconds of a denoiser step on precomputed features, and of the backbone's pass of the same number of views."""
    from denoising_vit.training.loop import denoising_loss  # imports matplotlib, which the other parts do not need

    grid = model.grid_size(size, size)
    denoiser = dv.Denoiser(model.embed_dim, grid).to(model.device)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    images = torch.randn(PAIRS, 3, size, size).to(model.device, model.dtype)
    raw, target = (torch.randn(PAIRS, *grid, model.embed_dim, device=model.device) for _ in range(2))

    def step() -> None:
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            clean = denoiser(raw)
        squared, cosine = denoising_loss(clean.float(), target)
        (squared + 1 - cosine).backward()
        optimiser.step()
        optimiser.zero_grad()

    times = alternate({"step": step, "features": passes(model, images)}, 3 * runs)
    return {f"{name}_s": took.median("wall") for name, took in times.items()}


def hours(rate: float, step: dict[str, float]) -> list[tuple[str, str]]:
    """Hours of both stages of the published run, from the measured rates."""
    first = PHOTOS / rate / 3600
    kept, fresh = (STEPS * seconds / 3600 for seconds in (step["step_s"], step["step_s"] + step["features_s"]))
    return [
        (f"stage 1 of {PHOTOS:,} photos", f"{first:.2f} h"),
        (f"{STEPS:,} steps of stage 2, features kept; made in every step", f"{kept:.2f}; {fresh:.2f} h"),
        (f"both, at most {HOURS:.0f} h", f"{first + kept:.2f} to {first + fresh:.2f} h"),
        ("times the published 128 s of stage 1 a photo", f"{math.floor(128 * rate)}"),
    ]
