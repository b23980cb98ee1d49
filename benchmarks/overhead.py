"""What stage 1 costs on top of the forward passes it needs.

    python benchmarks/overhead.py PHOTO [--runs 5] [--out DIR]

In one process, in alternating runs: the bare forward passes of the same views (rendered beforehand, in the model's own
dtype, at the best batch size), and a warm `denoise_image`. Writes medians and ratios of pairs of runs, by wall and
processor seconds; then the parts of the overhead, and the time to draw a plan and compute its factors at three
grids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro
from measuring import alternate, hardware, ratios, synchronise, table, timed, write

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.data.photos import read_photo
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.inputs import prepare
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.statistics import Statistics
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image

#: Maximum time of `denoise_image`, relative to the bare forward passes.
BAR = 1.10

CLOCKS = ("wall", "processor")


def main(
    photo: tyro.conf.Positional[Path],
    /,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    views: int = 64,
    runs: int = 5,
    grids: Annotated[bool, tyro.conf.arg(help="also time plans and factors at larger grids")] = True,
    torch_attention: Annotated[bool, tyro.conf.arg(help="also time the passes with torch's own attention")] = True,
    out: Annotated[Path | None, tyro.conf.arg(help="folder for JSON and Markdown")] = None,
) -> None:
    """Measures the overhead of stage 1 over bare forward passes."""
    model = dv.load_backbone(backbone, weights=weights)
    options = DenoiseOptions(views=views)
    found: dict[str, Any] = {"hardware": hardware(), "backbone": model.extra_repr(), "views": views + options.held_out}
    found |= overhead(model, photo, options, runs, torch_attention)
    found["parts_s"] = parts(model, photo, options)
    found["plan_and_factors_s"] = plan_and_factors(grids)
    write(out, "overhead", found, markdown(found))


def overhead(model: Backbone, photo: Path, options: DenoiseOptions, runs: int, torch_attention: bool) -> dict[str, Any]:
    """Alternating runs: forward with our attention, `denoise_image`, forward with torch's attention."""
    images = render_all(model, photo, options)
    batch = best_batch(model, images)
    jobs: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward_all(model, images, batch),
        "denoise": lambda: dv.denoise_image(model, photo, options=options),
    }
    if torch_attention:
        plain = timm.create_model(model.name, pretrained=False, num_classes=0, dynamic_img_size=True)
        plain = plain.to(model.device, model.dtype).eval()
        jobs["forward_timm"] = lambda: forward_all(plain, images, batch)
    times = alternate(jobs, runs)
    found: dict[str, Any] = {"runs": runs, "best_batch": batch}
    found |= {f"{name}_s": {clock: took.median(clock) for clock in CLOCKS} for name, took in times.items()}
    found["ratio_to_forward"] = ratios(times["denoise"], times["forward"])
    if torch_attention:
        found["ratio_to_forward_timm"] = ratios(times["denoise"], times["forward_timm"])
    return found


def markdown(found: dict[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for clock in CLOCKS:
        ratio = found["ratio_to_forward"][clock]
        rows.append(
            (
                clock,
                f"{found['forward_s'][clock]:.2f}",
                f"{found['denoise_s'][clock]:.2f}",
                f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['largest']:.3f})",
                BAR,
            )
        )
    head = ("clock", "bare forward, s", "denoise_image, s", "ratio", "at most")
    return f"{found['hardware']}; {found['backbone']}; {found['views']} views\n\n{table(head, rows)}"


def parts(model: Backbone, photo: Path, options: DenoiseOptions) -> dict[str, float]:
    """The parts of the overhead, each timed alone."""
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
    """Seconds to draw a plan of 64 views and compute its factors."""
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
    """Runs all images through a model, in batches."""
    with torch.inference_mode():
        for part in images.split(batch):
            job(part)
    synchronise()


def best_batch(job: Callable[[torch.Tensor], Any], images: torch.Tensor) -> int:
    """The batch size with the least time per image."""
    sizes = (16, 32, 64) if images.device.type == "cuda" else (1, 2, 4, 8)
    forward_all(job, images[: max(sizes)], max(sizes))
    return min(sizes, key=lambda size: timed(lambda: forward_all(job, images[:16], size), 2))


if __name__ == "__main__":
    tyro.cli(main)
