"""What stage 1 costs on top of the forward passes it needs.

    python benchmarks/overhead.py PHOTO [--runs 5] [--json out.json]

In one process, in alternating runs: the bare forward passes of the same views (rendered beforehand, in the model's own
dtype, at the best batch size), and a warm `denoise_image`. Prints medians and their ratio; then what the overhead is
made of, and the time to draw a plan and compute its factors at three grids.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition import ExactSolver, Statistics
from denoising_vit.options import DenoiseOptions
from denoising_vit.photos import read_photo
from denoising_vit.preparing import prepare
from denoising_vit.rendering import ViewRenderer, to_image
from denoising_vit.views import ViewPlan


def main(
    photo: tyro.conf.Positional[Path],
    /,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    views: int = 64,
    runs: int = 5,
    grids: Annotated[bool, tyro.conf.arg(help="also time plans and factors at larger grids")] = True,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures the overhead of stage 1 over bare forward passes."""
    model = dv.load_backbone(backbone, weights=weights)
    options = DenoiseOptions(views=views)
    found: dict[str, Any] = {"hardware": hardware(), "backbone": model.extra_repr(), "views": views + options.held_out}
    found |= overhead(model, photo, options, runs)
    found["parts_s"] = parts(model, photo, options)
    found["plan_and_factors_s"] = plan_and_factors(grids)
    print(json.dumps(found, indent=2))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def overhead(model: Backbone, photo: Path, options: DenoiseOptions, runs: int) -> dict[str, Any]:
    """Medians of alternating runs: forward with torch's attention, forward with ours, `denoise_image`."""
    images = render_all(model, photo, options)
    plain = timm.create_model(model.name, pretrained=False, num_classes=0, dynamic_img_size=True)
    plain = plain.to(model.device, model.dtype).eval()
    jobs: dict[str, Any] = {"timm": plain.forward_features, "ours": model}
    batches = {name: best_batch(job, images) for name, job in jobs.items()}
    times: dict[str, list[float]] = {"timm": [], "ours": [], "denoise": []}
    dv.denoise_image(model, photo, options=options)
    for _ in range(runs):
        for name, job in jobs.items():
            times[name].append(timed(lambda job=job, name=name: forward_all(job, images, batches[name])))
        times["denoise"].append(timed(lambda: dv.denoise_image(model, photo, options=options)))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "runs": runs,
        "best_batch": batches,
        "forward_timm_s": median["timm"],
        "forward_s": median["ours"],
        "denoise_s": median["denoise"],
        "ratio_to_forward": median["denoise"] / median["ours"],
        "ratio_to_forward_timm": median["denoise"] / median["timm"],
    }


def parts(model: Backbone, photo: Path, options: DenoiseOptions) -> dict[str, float]:
    """What the overhead is made of, each alone."""
    image = to_image(read_photo(photo), model.device)
    fitted, _ = prepare(model, options)
    render = ViewRenderer(image, fitted, model.mean, model.std)
    features = torch.randn(2, *fitted.grid, model.embed_dim, device=model.device)
    solver = ExactSolver(fitted, smoothness=options.smoothness, shrinkage=options.shrinkage, device=model.device)
    solver.factorise(artifact_known=False)
    sums = Statistics(fitted, model.embed_dim, device=model.device)

    def accumulate() -> None:
        sums.views_seen = 0
        for _ in range(0, len(fitted), 2):
            sums.add(features)

    return {
        "render": timed(lambda: [render(slice(start, start + 2)) for start in range(0, len(fitted), 2)], 3),
        "accumulate": timed(accumulate, 3),
        "solve": timed(lambda: solver.solve(sums.b, sums.g), 3),
        "solve_artifact_known": timed(lambda: solver.solve_field(sums.b, sums.g), 3),
    }


def plan_and_factors(grids: bool) -> dict[str, float]:
    """Seconds from nothing to the factors of 64 views."""
    geometries = {"37 x 37": (518, 14, 14)}
    if grids:
        geometries |= {"64 x 64": (512, 8, 8), "73 x 73": (518, 14, 7)}

    def build(size: int, patch: int, stride: int) -> None:
        plan = ViewPlan.make(64, size=(size, size), patch_size=patch, stride=stride)
        ExactSolver(plan, smoothness=1e-2, shrinkage=1e-3).factorise(artifact_known=False)

    build(518, 14, 14)
    return {name: timed(lambda geometry=geometry: build(*geometry)) for name, geometry in geometries.items()}


def render_all(model: Backbone, photo: Path, options: DenoiseOptions) -> torch.Tensor:
    """All views, fitted and held out, (V, 3, H, W) in the model's dtype."""
    image = to_image(read_photo(photo), model.device)
    plans = [plan for plan in prepare(model, options) if plan is not None]
    rendered = [ViewRenderer(image, plan, model.mean, model.std)(slice(None)) for plan in plans]
    return torch.cat(rendered).to(model.dtype)


def forward_all(job: Callable[[torch.Tensor], Any], images: torch.Tensor, batch: int) -> None:
    """Runs all images through a model in batches."""
    with torch.inference_mode():
        for part in images.split(batch):
            job(part)
    synchronise()


def best_batch(job: Callable[[torch.Tensor], Any], images: torch.Tensor) -> int:
    """The batch size with the least time per image."""
    sizes = (16, 32, 64) if images.device.type == "cuda" else (1, 2, 4, 8)
    forward_all(job, images[: max(sizes)], max(sizes))
    return min(sizes, key=lambda size: timed(lambda: forward_all(job, images[:16], size), 2))


def timed(job: Callable[[], Any], repeats: int = 1) -> float:
    """Least seconds of a few repeats."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        synchronise()
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> str:
    """What this ran on, in a line."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    kind = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{chip}, {kind}, torch {torch.__version__}"


if __name__ == "__main__":
    tyro.cli(main)
