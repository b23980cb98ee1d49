"""What each kind of features costs, relative to the bare backbone pass.

    python benchmarks/costs.py [--size 518] [--runs 15] [--out DIR]

In one process, alternating, on the same noise: the backbone, and every kind of features in one call. Cleaners have
random weights, which do not affect the time. For features of stage 1 only forward passes are counted, since
`benchmarks/overhead.py` times them. Ratios are medians over pairs of runs, with minimum and maximum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measuring import alternate, hardware, operations, passes, ratios, table, write

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.catalog import Dtype
from denoising_vit.backbones.recorded import describe
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.extractors import KINDS, Extractor
from denoising_vit.training_free import AveragedViT, Registers, with_registers

CLOCKS = ("wall", "processor")


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    device: str = "auto",
    dtype: Dtype = "bfloat16",
    size: int = 518,
    runs: int = 15,
    out: Annotated[Path | None, tyro.conf.arg(help="folder for JSON and Markdown")] = None,
) -> None:
    """Measures the cost of each kind of features."""
    model = dv.load_backbone(backbone, weights=weights, device=device, dtype=dtype)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    extractors = one_call(model, size)
    jobs = {name: passes(one, image) for name, one in extractors.items()}
    times = alternate({"backbone": passes(model, image)} | jobs, runs)
    bare = operations(passes(model, image))
    found: dict[str, Any] = {"hardware": hardware(), "backbone": model.extra_repr(), "size": size, "runs": runs}
    found["backbone_s"] = {clock: times["backbone"].median(clock) for clock in CLOCKS}
    rows = []
    for name in KINDS:
        if name not in extractors:
            rows.append([name, DenoiseOptions.views + DenoiseOptions.held_out, "", "", ""])
            continue
        ratio = ratios(times[name], times["backbone"])
        more = operations(jobs[name]) / bare
        count = getattr(extractors[name], "passes", 1)
        found[name] = {"passes": count, "operations": more, "times": ratio}
        rows.append([name, count, f"{more:.3f}", *(told(ratio[clock]) for clock in CLOCKS)])
    head = ["features", "passes", "operations", *(f"{clock} time" for clock in CLOCKS)]
    write(out, "costs", found, table(head, rows))


def one_call(model: Backbone, size: int) -> dict[str, Extractor]:
    """Every kind of features that needs no fit per image, by name."""
    grid, record = model.grid_size(size, size), describe(model)
    values = torch.randn(*grid, model.embed_dim)
    denoiser = dv.Denoiser(model.embed_dim, grid).to(model.device, model.dtype).eval().requires_grad_(False)
    neurons = tuple((block, 0) for block in range(4, 8))
    extractors: dict[str, Extractor] = {
        "raw": model,
        "subtract": dv.DenoisedViT(model, dv.Artifact(values - values.mean((0, 1)), (size, size), record)),
        "denoiser": dv.DenoisedViT(model, denoiser),
        "distilled": model,  # the same network with other weights
        "project": dv.DenoisedViT(model, dv.find_subspace(model, rank=16)),
        "average": AveragedViT(model),
        "registers": with_registers(model, Registers(neurons, record)),
    }
    missing = [name for name, kind in KINDS.items() if not kind.per_image and name not in extractors]
    assert not missing, f"kinds of features without a cost here: {missing}"
    return extractors


def told(ratio: dict[str, float]) -> str:
    """A median with its range."""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"


if __name__ == "__main__":
    tyro.cli(main)
