"""How fast stages 1 and 2 run on an accelerator, in one command of a few minutes without network.

    python benchmarks/gpu.py --weights FILE --photos DIR -o OUT

Needs torch, timm and this package's sources (PYTHONPATH=src). Runs in one process and writes each part when it is done:

- stage 1: a warm `denoise_image`, and a stream of photos decoded, rendered, solved and written, against the bare
    forward passes of the same number of views; and the time of rendering, sums and solving alone;
- the published stage 1 (20,000 steps of the neural field on 768 views, scaled from a few) against sums and solving;
- roofline: forward passes (eager, compiled, CUDA graphs) against a bfloat16 product of 4096 x 4096, alternating;
- both stages for 10,000 photos: this stream, and the published 50,000 steps of stage 2, measured on a few.

The same runs on a CPU, at small sizes: `--size 112 --views 12 --count 4`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import alternate, hardware, matrix_product, operations, passes, peak, ratios, table, timed, write
from published_recipe import hours, neural_field, stage_two

import denoising_vit as dv
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.passes import compiled
from denoising_vit.data import Dataset, Skipped, open_dataset
from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import Ready, StageOne, finish_together
from denoising_vit.decomposition.statistics import Statistics
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.views.rendering import ViewRenderer, to_image


def main() -> None:
    """Runs all parts."""
    asked = arguments()
    spec = BackboneSpec(asked.model, str(asked.weights), device=asked.device)
    model = spec.load()
    options = DenoiseOptions(views=asked.views, held_out=asked.held_out, size=asked.size)
    found: dict[str, Any] = {"hardware": hardware(), "backbone": model.extra_repr(), "views": asked.views}
    found |= {"held_out": asked.held_out, "size": asked.size, "count": asked.count, "problems": {}}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "pieces": lambda: pieces(model, asked.photos, options),
        "single": lambda: single(model, asked.photos, options, asked.runs),
        "stage_two": lambda: stage_two(model, asked.size, asked.runs),
        "stream": lambda: stream(spec, asked, options),
        "roofline": lambda: roofline(spec, asked),
        "published": lambda: neural_field(model, asked.size, asked.published_views, asked.timed_steps),
    }
    started = time.perf_counter()
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # a failed part is reported, and the others still run
            found["problems"][name] = f"{type(error).__name__}: {error}"[:500]
        found["seconds"] = time.perf_counter() - started
        print(f"{found['seconds']:.0f} s: {name} {found.get(name, found['problems'].get(name))}", flush=True)
        write(asked.out, "gpu", found, markdown(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a .safetensors or .pth file, or random")
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--count", type=int, default=128, help="photos of the stream")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--published-views", type=int, default=768, help="of the published stage 1")
    parser.add_argument("--timed-steps", type=int, default=400, help="of its 20,000; all are scaled from them")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def roofline(spec: BackboneSpec, asked: argparse.Namespace) -> dict[str, Any]:
    """The fraction of the matrix rate that forward passes reach, by mode and batch; the highest view rate."""
    model = spec.load()
    fast = model.device.type == "cuda"
    images = torch.randn(64 if fast else 2, 3, asked.size, asked.size).to(model.device, model.dtype)
    counted = operations(lambda: model(images[:1]))
    product, of_product = matrix_product(model.device)
    jobs: dict[str, Callable[[], Any]] = {f"eager, {n}": passes(model, images[:n]) for n in sizes(fast)}
    problems: dict[str, str] = {}
    for way, mode in {"compiled": "default", "CUDA graphs": "reduce-overhead"}.items():
        if asked.no_compile or not fast:
            continue
        job = passes(torch.compile(spec.load(), dynamic=False, mode=mode), images[:32])
        try:
            job()
            jobs[f"{way}, 32"] = job
        except Exception as error:  # compilers fail in many ways
            problems[way] = f"{type(error).__name__}: {error}"[:300]
    times = alternate({"product": product, **jobs}, 3 * asked.runs)
    rate = of_product / times["product"].median("wall")
    ways = {}
    for name in jobs:
        views = int(name.split(", ")[1]) / times[name].median("wall")
        ways[name] = {"views_per_s": views, "share": views * counted / rate}
    best = max(way["views_per_s"] for way in ways.values())
    return {
        "gflop_per_view": counted / 1e9,
        "product_tflops": rate / 1e12,
        "ways": ways,
        "problems": problems,
        "best_views_per_s": best,
        "best_share": best * counted / rate,
    }


def sizes(fast: bool) -> tuple[int, ...]:
    """Batch sizes to try."""
    return (16, 32, 64) if fast else (1, 2)


def pieces(model: Backbone, photos: Path, options: DenoiseOptions) -> dict[str, float]:
    """Milliseconds per photo of each step other than the forward passes, timed alone."""
    stage = StageOne(model, options)
    pixels = pictures(open_dataset(photos), 8)
    image = to_image(pixels[0], model.device)
    render = ViewRenderer(image, stage.fitted, model.mean, model.std)
    features = torch.randn(stage.batch_size, *stage.fitted.grid, model.embed_dim, device=model.device)
    batches = [slice(at, at + stage.batch_size) for at in range(0, len(stage.fitted), stage.batch_size)]

    def add() -> None:
        sums = Statistics(stage.fitted, model.embed_dim, device=model.device)
        for batch in batches:
            sums.add(features[: len(stage.fitted.boxes[batch])])

    ready = [result for result in stage.run(enumerated(pixels)) if isinstance(result, Ready)]
    seconds = {
        "upload": timed(lambda: to_image(pixels[0], model.device), 5),
        "render": timed(lambda: [render(batch) for batch in batches], 5),
        "sums": timed(add, 5),
        "solve_alone": timed(lambda: [photo.finish() for photo in ready], 3) / len(ready),
        "solve_together": timed(lambda: finish_together(ready), 3) / len(ready),
    }
    return {f"{name}_ms": 1000 * value for name, value in seconds.items()}


def single(model: Backbone, photos: Path, options: DenoiseOptions, runs: int) -> dict[str, Any]:
    """A warm `denoise_image` against the bare passes of its views, alternating."""
    (photo,) = pictures(open_dataset(photos), 1)
    jobs = {"bare": bare_passes(model, options), "denoise": lambda: dv.denoise_image(model, photo, options=options)}
    times = alternate(jobs, runs)
    return {"bare_s": times["bare"].median("wall"), "denoise_s": times["denoise"].median("wall")} | {
        "ratio": ratios(times["denoise"], times["bare"])["wall"]["median"]
    }


def stream(spec: BackboneSpec, asked: argparse.Namespace, options: DenoiseOptions) -> dict[str, Any]:
    """Photos per second of `dvit fit`, compiled or not, against bare passes of as many views before and after."""
    data = open_dataset(asked.photos)
    model = spec.load()
    bare = bare_passes(model, options)
    found: dict[str, Any] = {}
    for name in ("eager",) if asked.no_compile or model.device.type != "cuda" else ("eager", "compiled"):
        if name == "compiled":
            bare = bare_passes(compiled(model), options)
        bare()
        before = timed(bare)
        fit = FitOptions(decoders=8, compiled=name == "compiled")
        if importlib.util.find_spec("zarr") is None:
            rate = in_memory(spec, data, options, asked.count, fit.compiled)
        else:
            rate = into_store(spec, data, options, asked.count, fit)
        seconds = (before + timed(bare)) / 2
        found[name] = {"photos_per_s": rate, "bare_s_per_photo": seconds, "of_bare_passes": 1 / rate / seconds}
        found[name]["peak_bytes"] = peak(model.device)
    best = max(way["photos_per_s"] for way in found.values())
    return {"ways": found, "photos_per_s": best, "stored": importlib.util.find_spec("zarr") is not None}


def bare_passes(model: Backbone, options: DenoiseOptions) -> Callable[[], None]:
    """A job of the forward passes of one photo, in the batches of stage 1, on views of noise."""
    size = options.size
    images = torch.randn(options.views + options.held_out, 3, size, size)  # pyright: ignore[reportArgumentType, reportCallIssue]
    images = images.to(model.device, model.dtype)
    batch = fitting_batch(model.device, math.prod(model.grid_size(*images.shape[2:])))
    jobs = [passes(model, part) for part in images.split(batch)]

    def bare() -> None:
        for job in jobs:
            job()

    return bare


def into_store(spec: BackboneSpec, data: Dataset, options: DenoiseOptions, count: int, fit: FitOptions) -> float:
    """Photos per second into a store, from the first finished photo to the last."""
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        some = linked(data, count, Path(folder) / "photos")
        job = FitJob.prepare(open_dataset(some), Path(folder) / "store", spec, options, fit)
        job.run(lambda _index, _reason: clock.append(time.perf_counter()))
    first = min(8, len(clock) // 2)
    return (len(clock) - 1 - first) / (clock[-1] - clock[first])


def in_memory(spec: BackboneSpec, data: Dataset, options: DenoiseOptions, count: int, compiling: bool) -> float:
    """The same without zarr: fields are moved to the CPU in float16 and not written."""
    stage = StageOne(compiled(spec.load()) if compiling else spec.load(), options)
    clock: list[float] = []
    group: list[Ready] = []
    order = (number % len(data) for number in range(count))
    photos = ((index, str(index), pixels) for index, pixels in data.stream(order, workers=8, ahead=16))
    for result in stage.run(photos):
        group += [result] if isinstance(result, Ready) else []
        if len(group) == 8:
            clock += [time.perf_counter()] * len([done.field.half() for done in finish_together(group)])
            group = []
    clock += [time.perf_counter()] * len([photo.finish() for photo in group])
    first = min(8, len(clock) // 2)
    return (len(clock) - 1 - first) / (clock[-1] - clock[first])


def pictures(data: Dataset, count: int) -> list[np.ndarray]:
    """The first usable photos."""
    found = (pixels for _, pixels in data.stream(iter(range(len(data)))) if not isinstance(pixels, Skipped))
    return [pixels for pixels, _ in zip(found, range(count), strict=False)]


def enumerated(photos: list[np.ndarray]) -> list[tuple[int, str, np.ndarray | Skipped]]:
    """Photos as stage 1 expects them."""
    return [(number, str(number), pixels) for number, pixels in enumerate(photos)]


def linked(data: Dataset, count: int, folder: Path) -> Path:
    """A folder with that many links to local photos, some of them repeated."""
    folder.mkdir()
    for number in range(count):
        path = (Path(data.source) / data[number % len(data)].id).absolute()
        (folder / f"{number:06d}{path.suffix}").symlink_to(path)
    return folder


def markdown(found: dict[str, Any]) -> str:
    """The results as tables."""
    text = [
        f"{found['hardware']}; {found['backbone']}; {found['size']} px, {found['views']} + {found['held_out']} views\n"
    ]
    if "roofline" in found:
        roof = found["roofline"]
        text.append(f"Product of 4096 x 4096: {roof['product_tflops']:.2f} TFLOP/s.\n")
        rows = [(name, f"{way['views_per_s']:.1f}", f"{way['share']:.2f}") for name, way in roof["ways"].items()]
        text.append(table(("forward pass, batch", "views/s", "share of the matrix rate"), rows))
    rows = [(name.removesuffix("_ms"), f"{value:.2f} ms") for name, value in found.get("pieces", {}).items()]
    if "single" in found:
        rows.append(("denoise_image against bare passes", f"{found['single']['ratio']:.3f} times"))
    for name, way in found.get("stream", {}).get("ways", {}).items():
        rows.append((f"photos a second, {name}", f"{way['photos_per_s']:.2f}"))
        rows.append((f"stage 1 against the bare passes, {name}", f"{way['of_bare_passes']:.3f} times"))
    if "stream" in found and "stage_two" in found:
        rows += hours(found["stream"]["photos_per_s"], found["stage_two"])
    if "published" in found and "pieces" in found:
        ours = (found["pieces"]["sums_ms"] + found["pieces"]["solve_together_ms"]) / 1000
        field = found["published"]["seconds"]
        rows.append((f"{found['published']['steps']:,} steps of the published recipe, a photo", f"{field:.0f} s"))
        rows.append(("sums and solving against them", f"{field / ours:,.0f} times as fast"))
    text.append(table(("what", "figure"), rows))
    text += [f"Not measured: {name} ({why})\n" for name, why in found["problems"].items()]
    return "\n".join(text)


if __name__ == "__main__":
    main()
