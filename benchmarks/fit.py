"""What `dvit fit` costs on top of its forward passes, its memory, and its throughput on Ray.

    python benchmarks/fit.py throughput FOLDER [--photos 100]
    python benchmarks/fit.py memory FOLDER
    python benchmarks/fit.py ray FOLDER

throughput: bare forward passes of the same number of views (best batch size, half before and half after) against a full
run: photos decoded, rendered, solved, written. memory: peak resident memory for 100 and 400 photos, each in a separate
process. ray: photos per second with 1 and 2 workers against the local engine, from the first finished shard to the
last, so that the start of the cluster does not count.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import hardware, timed
from overhead import best_batch, forward_all

from denoising_vit.backbones import BackboneSpec
from denoising_vit.data import open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions

app = tyro.extras.SubcommandApp()


@dataclass
class Clock:
    """Times at which photos were finished."""

    times: list[float] = field(default_factory=list)

    def __call__(self, _index: int, reason: str | None) -> None:
        """Records a finished photo."""
        if reason is not None:
            raise SystemExit(f"a photo failed: {reason}")
        self.times.append(time.perf_counter())

    def steady(self, first: int) -> float:
        """Photos per second after the first ``first`` photos."""
        return (len(self.times) - first) / (self.times[-1] - self.times[first - 1])


@app.command
def throughput(
    folder: tyro.conf.Positional[Path], /, photos: int = 100, views: int = 16, held_out: int = 2, size: int = 280
) -> None:
    """Measures photos per second against bare forward passes.

    Args:
        folder: folder of photographs.
        photos: number of photos.
        views: fitted views per photo.
        held_out: held-out views per photo.
        size: size of a view in pixels.
    """
    denoising = DenoiseOptions(views=views, held_out=held_out, size=size)
    with some_of(folder, photos) as part:
        job = prepare(part, denoising, FitOptions())
        stage = job.stages[0]
        images = torch.randn(32, 3, size, size).to(stage.backbone.device, stage.backbone.dtype)
        batch = best_batch(stage.backbone, images)
        passes = photos * stage.views

        def bare() -> float:
            """Runs half of the passes."""
            rounds = -(-passes // (2 * len(images)))
            started = time.perf_counter()
            for _ in range(rounds):
                forward_all(stage.backbone, images, batch)
            return (time.perf_counter() - started) / (rounds * len(images)) * passes / 2

        forward = bare()
        fitting = timed(lambda: job.run(Clock()))
        forward += bare()
    say(
        {"photos": photos, "passes": passes, "batch": stage.batch_size, "best_batch": batch, "forward_s": forward}
        | {"fit_s": fitting, "photos_per_s": photos / fitting, "forward_over_fit": forward / fitting}
    )


@app.command
def memory(folder: tyro.conf.Positional[Path], /, views: int = 8, size: int = 112) -> None:
    """Measures peak memory for 100 and 400 photos.

    Args:
        folder: folder of photographs.
        views: fitted views per photo.
        size: size of a view in pixels.
    """
    peaks = {}
    for count in (100, 400):
        command = [sys.executable, __file__, "peak", str(folder), "--photos", str(count), "--views", str(views)]
        found = subprocess.run([*command, "--size", str(size)], check=True, capture_output=True, text=True)
        peaks[count] = int(found.stdout.split()[-1])
    say({"peak_bytes": peaks, "ratio": peaks[400] / peaks[100]})


@app.command
def peak(folder: tyro.conf.Positional[Path], /, photos: int, views: int, size: int) -> None:
    """Prints the peak memory of one run in bytes.

    Args:
        folder: folder of photographs.
        photos: number of photos.
        views: fitted views per photo.
        size: size of a view in pixels.
    """
    with some_of(folder, photos) as part:
        prepare(part, DenoiseOptions(views=views, held_out=0, size=size, resolution=12), FitOptions()).run(Clock())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@app.command
def ray(
    folder: tyro.conf.Positional[Path], /, photos: int = 60, views: int = 12, size: int = 280, per_shard: int = 5
) -> None:
    """Measures steady throughput of Ray against the local engine.

    Args:
        folder: folder of photographs.
        photos: number of photos.
        views: fitted views per photo.
        size: size of a view in pixels.
        per_shard: photos per shard, the unit of work of a worker.
    """
    denoising = DenoiseOptions(views=views, held_out=0, size=size)
    rates: dict[str, float] = {}
    local = FitOptions(images_per_shard=per_shard)
    runs = {"local": local} | {f"ray, workers: {n}": replace(local, engine="ray", workers=n) for n in (1, 2)}
    with some_of(folder, photos) as part:
        for name, options in runs.items():
            clock = Clock()
            prepare(part, denoising, options).run(clock)
            rates[name] = clock.steady(per_shard * options.workers)
    say({"photos_per_s": rates, "against_local": {name: rate / rates["local"] for name, rate in rates.items()}})


def prepare(folder: Path, denoising: DenoiseOptions, options: FitOptions) -> FitJob:
    """A job with a fresh store."""
    store = Path(tempfile.mkdtemp(dir=folder.parent)) / "store"
    return FitJob.prepare(open_dataset(folder), store, BackboneSpec(), denoising, options)


@contextlib.contextmanager
def some_of(folder: Path, count: int) -> Iterator[Path]:
    """A folder with copies of the first photos of another one."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise SystemExit(f"{folder} has {len(files)} photos, {count} are needed")
    with tempfile.TemporaryDirectory() as temporary:
        photos = Path(temporary) / "photos"
        photos.mkdir()
        for number, file in enumerate(files[:count]):
            shutil.copy(file, photos / f"{number:05d}{file.suffix}")
        yield photos  # stores are created next to it, and removed with it


def say(found: dict[str, Any]) -> None:
    """Prints the results."""
    print(json.dumps({"hardware": hardware(), **found}, indent=2))


if __name__ == "__main__":
    app.cli()
