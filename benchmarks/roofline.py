"""What fraction of the device's matrix rate the bare forward pass reaches.

    python benchmarks/roofline.py [MODEL...] [--size 518] [--runs 7] [--out DIR]

For each model (random weights, which do not affect the time) forward passes and a bfloat16 product of two matrices of
4096 x 4096 alternate. Operations of the forward pass are counted as it runs: products and convolutions only, so that
softmax, GELU and normalisation count as lost time. On a CPU shares are given by wall and by processor seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import alternate, hardware, matrix_product, operations, table, write

import denoising_vit as dv

#: The required minimum fraction.
BARS = {"vit_small": 0.50, "vit_base": 0.60}


def main(
    models: tyro.conf.Positional[tuple[str, ...]] = (
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch14_dinov2.lvd142m",
    ),
    /,
    device: str = "auto",
    size: int = 518,
    batches: tuple[int, ...] = (1, 2),
    runs: int = 7,
    out: Path | None = None,
) -> None:
    """Measures the forward pass against the matrix rate.

    Args:
        models: timm names.
        device: auto, cpu or cuda.
        size: size of the views in pixels.
        batches: batch sizes to try.
        runs: alternating runs of each job.
        out: folder for JSON and Markdown.
    """
    rows = [row for model in models for row in shares(model, device, size, batches, runs)]
    found = {"hardware": hardware(), "size": size, "runs": runs, "rows": rows}
    write(out, "roofline", found, markdown(found))


def shares(name: str, device: str, size: int, batches: tuple[int, ...], runs: int) -> list[dict[str, Any]]:
    """Records of one model, one per batch size."""
    model = dv.load_backbone(name, weights="random", device=device, dtype="bfloat16")
    images = torch.randn(max(batches), 3, size, size).to(model.device, model.dtype)
    product, of_product = matrix_product(model.device)
    counted = operations(lambda: model(images[:1]))
    jobs: dict[str, Any] = {"product": product}
    jobs |= {str(batch): lambda batch=batch: forward(model, images[:batch]) for batch in batches}
    times = alternate(jobs, runs)
    rows = []
    for batch in batches:
        row: dict[str, Any] = {"model": name, "batch": batch, "gflop_per_view": counted / 1e9}
        for clock in ("wall", "processor"):
            rate = of_product / times["product"].median(clock)
            reached = counted * batch / times[str(batch)].median(clock)
            row[clock] = {"product_gflops": rate / 1e9, "forward_gflops": reached / 1e9, "share": reached / rate}
        rows.append(row)
    return rows


@torch.inference_mode()
def forward(model: dv.Backbone, images: torch.Tensor) -> None:
    """Runs one forward pass."""
    model(images)


def markdown(found: dict[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for row in found["rows"]:
        bar = next((f"{bar:.2f}" for start, bar in BARS.items() if row["model"].startswith(start)), "-")
        wall, processor = row["wall"], row["processor"]
        rows.append(
            (
                row["model"],
                row["batch"],
                f"{row['gflop_per_view']:.0f}",
                f"{wall['product_gflops']:.0f}",
                f"{wall['forward_gflops']:.0f}",
                f"{wall['share']:.2f}",
                f"{processor['share']:.2f}",
                bar,
            )
        )
    head = (
        "model",
        "batch",
        "GFLOP a view",
        "product, GFLOP/s",
        "forward, GFLOP/s",
        "share",
        "by processor time",
        "bar",
    )
    return f"{found['hardware']}; {found['size']} px\n\n{table(head, rows)}"


if __name__ == "__main__":
    tyro.cli(main)
