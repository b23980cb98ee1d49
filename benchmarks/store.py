"""How fast a store takes and gives fields, and how many requests each photo costs an object store.

    python benchmarks/store.py [--photos 64] [--per-shard 16] [--together 1] [--out DIR]

Fields of noise, as large as those of DINOv2 ViT-S/14 at 518 pixels, are put, sealed, and read in order and at random.
Requests are counted at the store's own interface: each read, write, conditional write, deletion and listing is one
request of an object store. zarr's own (a write a shard, a ranged read a photo) come on top.
"""

from __future__ import annotations

import collections
import contextlib
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

from denoising_vit.store import FeatureStore, Manifest
from denoising_vit.store.local import LocalObjects

#: What is a request.
KINDS = ("read", "write", "create", "delete", "names")


def main(
    photos: int = 64,
    per_shard: int = 16,
    together: int = 1,
    nodes: int = 74,
    channels: int = 384,
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measures writing and reading.

    Args:
        photos: how many.
        per_shard: photos in a shard.
        together: photos that are staged at once, as after an accelerator.
        nodes: of a field, along each side.
        channels: of a field.
        folder: where the store is made and removed; a temporary one by default.
        out: folder for JSON and Markdown.
    """
    before = resident()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        manifest = Manifest(
            backbone={"name": "noise"},
            plan="noise",
            options={},
            size=(14 * nodes // 2, 14 * nodes // 2),
            patch_size=14,
            stride=14,
            grid=(nodes // 2, nodes // 2),
            field=(nodes, nodes),
            channels=channels,
            images_per_shard=per_shard,
        )
        store = FeatureStore.create_or_open(Path(place) / "store", manifest, [f"{n:08d}" for n in range(photos)])
        field = torch.randn(nodes, nodes, channels)
        with counted() as requests:
            writing = seconds(lambda: fill(store, field, together))
        again = FeatureStore.open(Path(place) / "store")
        in_order = seconds(lambda: [again.read(index) for index in range(photos)])
        order = random.Random(0).sample(range(photos), photos)
        at_random = seconds(lambda: [again.read(index) for index in order])
        used = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    size = manifest.image_bytes
    found: dict[str, Any] = {
        "hardware": hardware(),
        "photos": photos,
        "per_shard": per_shard,
        "together": together,
        "bytes_per_photo": used / photos,
        "requests_per_photo": {kind: count / photos for kind, count in requests.items()},
        "peak_bytes": max(peak(torch.device("cpu")) - before, 0),
    }
    for name, took in {"written": writing, "read_in_order": in_order, "read_at_random": at_random}.items():
        found[name] = {"photos_per_s": photos / took, "mb_per_s": photos * size / took / 1e6}
    write(out, "store", found, markdown(found))


def fill(store: FeatureStore, field: torch.Tensor, together: int) -> None:
    """Puts the same field for every photo, and seals all shards."""
    with ThreadPoolExecutor(together) as pool:
        for shard in store.unfinished():
            with store.writer(shard) as writer:
                list(pool.map(lambda index, to=writer: to.put(index, field, {"heldout_r2": 0.5}), writer.missing()))
                writer.finish()


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Counts requests while it lasts."""
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
    """Of one call."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def markdown(found: dict[str, Any]) -> str:
    """The record as tables."""
    rates = [
        (name.replace("_", " "), f"{found[name]['photos_per_s']:.1f}", f"{found[name]['mb_per_s']:.0f}")
        for name in ("written", "read_in_order", "read_at_random")
    ]
    requests = [(kind, f"{count:.2f}") for kind, count in found["requests_per_photo"].items()]
    text = f"{found['hardware']}; {found['photos']} photos, {found['per_shard']} a shard, {found['together']} at once, "
    text += f"{found['bytes_per_photo'] / 1e6:.2f} MB each; peak {found['peak_bytes'] / 1e6:.0f} MB\n\n"
    return text + table(("", "photos/s", "MB/s"), rates) + "\n" + table(("request", "a photo"), requests)


if __name__ == "__main__":
    tyro.cli(main)
