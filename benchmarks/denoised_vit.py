"""What clean features cost on top of raw ones: `DenoisedViT` against its backbone.

    python benchmarks/denoised_vit.py [--size 518] [--batch 1] [--dtype bfloat16] [--compile] [--json out.json]

In one process, alternating: the backbone, and the backbone with a denoiser, on the same noise. The denoiser's weights
are random, which does not affect its time. Prints one JSON line and one row of a Markdown table: medians, their
ratio, and the minimum and maximum ratio over pairs of runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measuring import hardware, synchronise
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones.catalog import Dtype

#: Maximum time of clean features, relative to raw ones.
BAR = 1.12


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    device: str = "auto",
    dtype: Dtype = "bfloat16",
    size: int = 518,
    batch: int = 1,
    repeats: int = 20,
    compiled: Annotated[bool, tyro.conf.arg(name="compile", help="compile both")] = False,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures what the denoiser adds to a forward pass."""
    raw = dv.load_backbone(backbone, weights=weights, device=device, dtype=dtype)
    denoiser = dv.Denoiser(raw.embed_dim, raw.grid_size(raw.default_size, raw.default_size))
    denoiser = denoiser.to(raw.device, raw.dtype).eval().requires_grad_(False)
    clean = dv.DenoisedViT(raw, denoiser)
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(raw.device, raw.dtype)
    jobs: dict[str, Callable[[Tensor], Tensor]] = {"backbone": raw, "denoised": clean}
    if compiled:
        jobs = {name: torch.compile(job) for name, job in jobs.items()}
    found: dict[str, Any] = {"hardware": hardware(), "backbone": raw.extra_repr(), "size": size, "batch": batch}
    found |= {"compiled": compiled, "repeats": repeats, **measured(jobs, image, repeats), "bar": BAR}
    print(json.dumps(found))
    print(markdown(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def measured(jobs: dict[str, Callable[[Tensor], Tensor]], image: Tensor, repeats: int) -> dict[str, Any]:
    """Median seconds of both, and the time of clean features relative to raw ones."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.inference_mode():
        for job in (*jobs.values(), *jobs.values()):
            seconds(job, image)  # compiles, and warms up caches
        for _ in range(repeats):
            for name, job in jobs.items():
                times[name].append(seconds(job, image))
    ratios = [denoised / raw for raw, denoised in zip(times["backbone"], times["denoised"], strict=True)]
    raw, denoised = (statistics.median(times[name]) for name in ("backbone", "denoised"))
    return {
        "backbone_s": raw,
        "denoised_s": denoised,
        "ratio": denoised / raw,
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def seconds(job: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Seconds of one call, including all work that it started."""
    synchronise()
    started = time.perf_counter()
    job(image)
    synchronise()
    return time.perf_counter() - started


def markdown(found: dict[str, Any]) -> str:
    """The record as a row of a table."""
    return (
        f"| {found['backbone']} | {found['size']} px, batch {found['batch']}{', compiled' * found['compiled']} | "
        f"{1000 * found['backbone_s']:.1f} ms | {1000 * found['denoised_s']:.1f} ms | {found['ratio']:.3f} "
        f"({found['least_ratio']:.3f} to {found['largest_ratio']:.3f}; at most {found['bar']}) | {found['hardware']} |"
    )


if __name__ == "__main__":
    tyro.cli(main)
