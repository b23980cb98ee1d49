"""How fast an ONNX export runs: onnxruntime against PyTorch on a CPU, both with the same number of threads.

    python benchmarks/export.py [--size 518] [--batch 1] [--threads 1] [--features denoiser] [--int8] [--json out.json]

In one process, alternating, on the same noise: PyTorch in float32, the exported graph in onnxruntime, and optionally
that graph with int8 linear layers. Prints one JSON line and one row of a Markdown table: medians, their ratio, and the
minimum and maximum ratio over pairs of runs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import onnxruntime
import torch
import tyro
from measuring import hardware
from torch import Tensor

import denoising_vit as dv
from denoising_vit import ExportOptions

#: Maximum time of the graph, relative to PyTorch.
BAR = 1.2


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    features: Literal["raw", "denoiser"] = "raw",
    size: int = 518,
    batch: int = 1,
    threads: int = 1,
    repeats: int = 11,
    int8: bool = False,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures a forward pass in PyTorch and in onnxruntime."""
    torch.set_num_threads(threads)
    raw = dv.load_backbone(backbone, weights=weights, device="cpu", dtype="float32")
    extractor = raw if features == "raw" else dv.DenoisedViT(raw, dv.load_denoiser("shipped", backbone=raw))
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    jobs: dict[str, Callable[[Tensor], object]] = {"pytorch": extractor}
    found: dict[str, Any] = {"hardware": hardware(), "backbone": raw.extra_repr(), "features": features, "size": size}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("onnx", "int8") if int8 else ("onnx",):
            compared = dv.export_extractor(extractor, Path(folder) / name, ExportOptions(int8=name == "int8"))
            found[f"{name}_cosine"], found[f"{name}_difference"] = compared.cosine, compared.difference
            jobs[name] = session(next((Path(folder) / name).glob("*.onnx")), threads)
        found |= {"batch": batch, "threads": threads, "repeats": repeats, "bar": BAR}
        found |= {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        found |= measured(jobs, image, repeats)
    print(json.dumps(found))
    print(markdown(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def session(path: Path, threads: int) -> Callable[[Tensor], object]:
    """A function that runs a graph with that many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: opened.run(None, {"image": image.numpy()})


def measured(jobs: dict[str, Callable[[Tensor], object]], image: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each, and the time of the others relative to PyTorch."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.inference_mode():
        for job in (*jobs.values(), *jobs.values()):
            job(image)  # warms up caches
        for _ in range(repeats):
            for name, job in jobs.items():
                started = time.perf_counter()
                job(image)
                times[name].append(time.perf_counter() - started)
    found = {f"{name}_s": statistics.median(taken) for name, taken in times.items()}
    for name in list(jobs)[1:]:
        ratios = [theirs / own for theirs, own in zip(times[name], times["pytorch"], strict=True)]
        found |= {f"{name}_ratio": found[f"{name}_s"] / found["pytorch_s"]}
        found |= {f"{name}_least_ratio": min(ratios), f"{name}_largest_ratio": max(ratios)}
    return found


def markdown(found: dict[str, Any]) -> str:
    """The record as rows of a table, one per graph."""
    lines = [
        f"| {found['features']}, {name} | {found['size']} px, batch {found['batch']}, {found['threads']} thread(s) | "
        f"{1000 * found['pytorch_s']:.0f} ms | {1000 * found[f'{name}_s']:.0f} ms | {found[f'{name}_ratio']:.2f} "
        f"({found[f'{name}_least_ratio']:.2f} to {found[f'{name}_largest_ratio']:.2f}; at most {found['bar']}) | "
        f"{found[f'{name}_cosine']:.6f} | {found['hardware']} |"
        for name in ("onnx", "int8")
        if f"{name}_s" in found
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
