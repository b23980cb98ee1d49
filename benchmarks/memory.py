"""Peak memory of stage 1 above the loaded model, for few and for many views (Linux, or CUDA).

    python benchmarks/memory.py PHOTO [--views 64 768]

The same process denoises the photo with each number of views in turn; peaks are of resident memory on the CPU and of
allocated memory on CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import tyro
from measuring import peak, resident

import denoising_vit as dv


def main(
    photo: tyro.conf.Positional[Path],
    /,
    views: tuple[int, int] = (64, 768),
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
) -> None:
    """Measures memory above the loaded model, in GiB, and the ratio of many views to few."""
    model = dv.load_backbone(backbone, weights=weights)
    _ = model.fingerprint  # one small forward pass: libraries allocate their permanent buffers
    before = resident() if model.device.type == "cpu" else torch.cuda.memory_allocated()
    peaks = {}
    for count in sorted(views):  # fewest first: a peak never decreases
        dv.denoise_image(model, photo, views=count)
        peaks[count] = (peak(model.device) - before) / 2**30
    few, many = sorted(views)
    print(json.dumps({"above_model_gib": peaks, "ratio": peaks[many] / peaks[few]}))


if __name__ == "__main__":
    tyro.cli(main)
