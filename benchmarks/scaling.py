"""How the cost of stage 1 grows with photos, views, resolution and model size.

    python benchmarks/scaling.py PHOTOS [--parts images views resolution models] [--out DIR]

Costs are processor seconds on a CPU (OMP_WAIT_POLICY=passive on a busy machine), wall seconds on an accelerator; each
is the minimum over a few rounds that alternate between the amounts. The slope is on log-log axes: 1 is linear in
the work. Memory is the peak above the loaded model during the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from measuring import Times, alternate, hardware, operations, peak, reset_peak, resident, slope, table, write

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.data import Skipped, open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import Ready, StageOne

Part = Literal["images", "views", "resolution", "models"]

#: Maximum distance of a slope from 1.
BAR = 0.05


def main(
    folder: tyro.conf.Positional[Path],
    /,
    parts: tuple[Part, ...] = ("images", "views", "resolution", "models"),
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "random",
    device: str = "auto",
    size: int = 280,
    images: tuple[int, ...] = (2, 4, 8, 16),
    views: tuple[int, ...] = (32, 64, 128, 256),
    sides: tuple[int, ...] = (224, 378, 518, 742, 1036),
    models: tuple[str, ...] = ("small", "base", "large"),
    rounds: int = 2,
    out: Path | None = None,
) -> None:
    """Measures how cost and memory grow.

    Args:
        folder: folder of photographs.
        parts: which measurements to run.
        backbone: name of a timm model.
        weights: as in `load_backbone`; random ones take the same time.
        device: auto, cpu or cuda.
        size: size of the views in pixels, where photos or views grow.
        images: numbers of photos, with 16 views each.
        views: numbers of views of one photo.
        sides: sides of one view in pixels.
        models: sizes of DINOv2 at 518 pixels.
        rounds: number of rounds over all amounts.
        out: folder for JSON and Markdown.
    """
    model = dv.load_backbone(backbone, weights=weights, device=device)
    photos = some_of(folder, max(images))
    jobs: dict[Part, Callable[[], dict[str, Any]]] = {
        "images": lambda: growing_images(model, photos, size, images, rounds),
        "views": lambda: growing_views(model, photos[0], size, views, rounds),
        "resolution": lambda: growing_views_size(model, sides, rounds),
        "models": lambda: growing_model(models, device, rounds),
    }
    found: dict[str, Any] = {"hardware": hardware(), "backbone": model.extra_repr(), "size": size}
    for part in parts:
        found[part] = jobs[part]()
        write(out, "scaling", found, markdown(found))


def growing_images(
    model: Backbone, photos: Sequence[np.ndarray], size: int, amounts: Sequence[int], rounds: int
) -> dict[str, Any]:
    """A stream of increasing numbers of photos through one solver."""
    stage = StageOne(model, DenoiseOptions(views=16, held_out=0, size=size))

    def run(count: int) -> None:
        for result in stage.run((index, str(index), photos[index]) for index in range(count)):
            assert isinstance(result, Ready)
            result.finish()

    return grown(run, amounts, model.device, rounds)


def growing_views(model: Backbone, photo: np.ndarray, size: int, amounts: Sequence[int], rounds: int) -> dict[str, Any]:
    """One photo with increasing numbers of views; plans and factors are recomputed, since only two are cached."""
    stages = {count: StageOne(model, DenoiseOptions(views=count, held_out=0, size=size)) for count in amounts}

    def run(count: int) -> None:
        (result,) = stages[count].run([(0, "0", photo)])
        assert isinstance(result, Ready)
        result.finish()

    return grown(run, amounts, model.device, rounds)


def growing_views_size(model: Backbone, sides: Sequence[int], rounds: int) -> dict[str, Any]:
    """The bare forward pass of a view of increasing size."""
    return grown(lambda side: forward(model, side), sides, model.device, rounds) | {
        "gflop": [operations(lambda side=side: forward(model, side)) / 1e9 for side in sides]
    }


def growing_model(names: Sequence[str], device: str, rounds: int) -> dict[str, Any]:
    """The bare forward pass of a view by models of increasing size."""
    found: dict[str, Any] = {"amounts": list(names), "cost_s": [], "gflop": []}
    for name in names:
        model = dv.load_backbone(f"vit_{name}_patch14_dinov2.lvd142m", weights="random", device=device)
        times = alternate({name: lambda model=model: forward(model, 518)}, rounds)[name]
        found["cost_s"].append(cost(times, model.device))
        found["gflop"].append(operations(lambda model=model: forward(model, 518)) / 1e9)
    return found


@torch.inference_mode()
def forward(model: Backbone, side: int) -> None:
    """One view of noise."""
    model(torch.randn(1, 3, side, side, device=model.device))


def grown(run: Callable[[int], None], amounts: Sequence[int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Cost and memory of each amount, and the slope of the cost."""
    before = resident() if device.type == "cpu" else torch.cuda.memory_allocated()
    peaks = []
    for amount in sorted(amounts):
        reset_peak(device)
        run(amount)
        peaks.append(max(peak(device) - before, 0))
    times = alternate({str(amount): lambda amount=amount: run(amount) for amount in amounts}, rounds, warm=False)
    costs = [cost(times[str(amount)], device) for amount in amounts]
    found = {"amounts": list(amounts), "cost_s": costs, "above_model_bytes": peaks}
    return found | {"slope": slope(amounts, costs), "memory_ratio": peaks[-1] / max(peaks[0], 1)}


def cost(times: Times, device: torch.device) -> float:
    """Minimum seconds, by the clock that measures the device."""
    return min(times.processor if device.type == "cpu" else times.wall)


def some_of(folder: Path, count: int) -> list[np.ndarray]:
    """The first photos of a folder."""
    data = open_dataset(folder)
    found = (pixels for _, pixels in data.stream(iter(range(len(data)))) if not isinstance(pixels, Skipped))
    return [pixels for pixels, _ in zip(found, range(count), strict=False)]


def markdown(found: dict[str, Any]) -> str:
    """The record as tables."""
    text = [f"{found['hardware']}; {found['backbone']}\n"]
    for part in ("images", "views", "resolution", "models"):
        if part not in found:
            continue
        grew = found[part]
        rows = [("seconds", *(f"{value:.2f}" for value in grew["cost_s"]))]
        if "above_model_bytes" in grew:
            rows.append(("peak above the model, MB", *(f"{value / 1e6:.0f}" for value in grew["above_model_bytes"])))
        if "gflop" in grew:
            rows.append(("GFLOP", *(f"{value:.0f}" for value in grew["gflop"])))
            rates = (work / value for work, value in zip(grew["gflop"], grew["cost_s"], strict=True))
            rows.append(("GFLOP/s", *(f"{rate:.0f}" for rate in rates)))
        text.append(table((part, *grew["amounts"]), rows))
        if part in ("images", "views"):
            text.append(f"Slope {grew['slope']:.3f} (1 ± {BAR}); memory {grew['memory_ratio']:.2f} times.\n")
    return "\n".join(text)


if __name__ == "__main__":
    tyro.cli(main)
