"""Speed of a store compared with its disk, and the number of requests per photo to an object store.

    python benchmarks/store.py [--photos 128] [--per-shard 16] [--writers 4] [--nodes 37] [--precision int8] [--out DIR]

Fields of noise, as large as those of DINOv2 ViT-S/14 at 518 pixels, are written in two ways: staged one by one, as on a
CPU, and held until their shard is sealed, as on an accelerator. The disk's own rate is that of writing the same number
of bytes to one file, with one flush at the end, before and after; the machine may be shared. Requests are counted at
the store's own interface: each read, write, conditional write, deletion and listing is one request of an object store.
zarr's ranged reads are not included.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from measuring import hardware, peak, resident, table, write

from denoising_vit.fit.options import Precision
from denoising_vit.store import FeatureStore, Manifest
from denoising_vit.store.objects import LocalObjects

#: Methods that count as one request each.
KINDS = ("read", "write", "create", "delete", "names")


def main(
    photos: int = 128,
    per_shard: int = 16,
    writers: int = 4,
    nodes: int = 74,
    channels: int = 384,
    precision: Precision = "float16",
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure writing and reading.

    Args:
        photos: number of photos.
        per_shard: photos in a shard.
        writers: shards that are written at once.
        nodes: nodes of a field along each side; 37 for `--grid patch`.
        channels: channels of a field.
        precision: precision of the store.
        folder: folder for the store, which is removed afterwards; a temporary one by default.
        out: folder for JSON and Markdown.
    """
    before = resident()
    field = torch.randn(nodes, nodes, channels)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        manifest = Manifest(
            backbone={"name": "noise"},
            plan="noise",
            options={},
            size=(518, 518),
            patch_size=14,
            stride=14,
            grid=(37, 37),
            field=(nodes, nodes),
            channels=channels,
            dtype=precision,
            images_per_shard=per_shard,
        )
        size = manifest.image_bytes
        rates = {"disk": photos / seconds(lambda: sequential(Path(place) / "plain", photos * size))}
        requests: dict[str, dict[str, float]] = {}
        for name in ("staged", "held"):
            url = Path(place) / name
            store = FeatureStore.create_or_open(url, manifest, [f"{n:08d}" for n in range(photos)])
            with counted() as counts:
                rates[name] = photos / seconds(lambda to=store, held=name == "held": fill(to, field, writers, held))
            requests[name] = {kind: count / photos for kind, count in counts.items()}
        rates["disk again"] = photos / seconds(lambda: sequential(Path(place) / "plain", photos * size))
        again = FeatureStore.open(Path(place) / "held")
        rates["read in order"] = photos / seconds(lambda: [again.read(index) for index in range(photos)])
        order = random.Random(0).sample(range(photos), photos)
        rates["read at random"] = photos / seconds(lambda: [again.read(index) for index in order])
        used = sum(path.stat().st_size for path in (Path(place) / "held").rglob("*") if path.is_file())
    disk = (rates["disk"] + rates["disk again"]) / 2
    found: dict[str, Any] = {
        "hardware": hardware(),
        "photos": photos,
        "per_shard": per_shard,
        "writers": writers,
        "precision": precision,
        "nodes": nodes,
        "bytes_per_photo": used / photos,
        "requests_per_photo": requests,
        "peak_bytes": max(peak(torch.device("cpu")) - before, 0),
        "rates": {
            name: {"photos_per_s": rate, "mb_per_s": rate * size / 1e6, "of_disk": rate / disk}
            for name, rate in rates.items()
        },
    }
    write(out, "store", found, markdown(found))


def fill(store: FeatureStore, field: torch.Tensor, writers: int, held: bool) -> None:
    """Write the same field for every photo, and seal all shards."""

    def shard(number: int) -> None:
        with store.writer(number) as writer:
            for index in writer.missing():
                (writer.hold if held else writer.put)(index, field, {"heldout_r2": 0.5})
            writer.finish()

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(shard, store.unfinished()))


def sequential(path: Path, size: int, block: int = 1 << 24) -> None:
    """Write that many bytes to one file, and flush it."""
    data = os.urandom(block)
    with path.open("wb") as file:
        for start in range(0, size, block):
            file.write(data[: size - start])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count requests within the block."""
    requests: collections.Counter[str] = collections.Counter()

    def counting(kind: str) -> Callable[..., Any]:
        method = getattr(LocalObjects, kind)

        def call(*args: Any, **named: Any) -> Any:
            requests[kind] += 1
            return method(*args, **named)

        return call

    with contextlib.ExitStack() as patches:
        for kind in KINDS:
            patches.enter_context(mock.patch.object(LocalObjects, kind, counting(kind)))
        yield requests


def seconds(job: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def markdown(found: dict[str, Any]) -> str:
    """The record as tables."""
    rates = [
        (name, f"{rate['photos_per_s']:.1f}", f"{rate['mb_per_s']:.0f}", f"{rate['of_disk']:.2f}")
        for name, rate in found["rates"].items()
    ]
    kinds = found["requests_per_photo"]
    requests = [(kind, *(f"{kinds[name].get(kind, 0):.2f}" for name in kinds)) for kind in KINDS]
    text = f"{found['hardware']}; {found['photos']} photos, {found['per_shard']} a shard, {found['writers']} shards at "
    text += f"once, {found['precision']}, {found['bytes_per_photo'] / 1e6:.2f} MB each; "
    text += f"peak {found['peak_bytes'] / 1e6:.0f} MB\n\n"
    requests_table = table(("requests a photo", *kinds), requests)
    return text + table(("", "photos/s", "MB/s", "of the disk"), rates) + "\n" + requests_table


if __name__ == "__main__":
    tyro.cli(main)
