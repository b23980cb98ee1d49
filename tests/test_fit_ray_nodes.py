"""Fitting a data set with Ray on two nodes, one of which is lost during the run."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_fit as tiny
from child import Child
from denoising_vit.backbones import BackboneSpec
from denoising_vit.errors import DenoisingVitWarning
from denoising_vit.store import FeatureStore, layout

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PHOTOS = 18

#: The cluster of the process that uses Ray, and its node that will be lost.
_nodes: dict[str, Any] = {}


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """Two nodes with one CPU each, like two machines."""
    from ray.cluster_utils import Cluster

    warnings.simplefilter("error", DenoisingVitWarning)
    torch.set_num_threads(1)
    own = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=own)
    _nodes["cluster"], _nodes["other"] = cluster, cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    cluster.shutdown()


def lose_node(store: FeatureStore, ended: threading.Event, lost: list[int]) -> None:
    """Remove the other node as soon as its worker has stored a part of a shard; record the shard."""
    raylet = next(iter(_nodes["other"].all_processes["raylet"])).process.pid
    while not ended.wait(0.03):
        below = {child.pid for child in psutil.Process(raylet).children(recursive=True)}
        for path in (Path(store.url) / layout.LEASES).glob("shard-*.json"):
            with contextlib.suppress(OSError, ValueError):  # released in the meantime
                entry = json.loads(path.read_bytes())
                images = set(store.manifest.images_of(shard := int(path.name.split(".")[0].removeprefix("shard-"))))
                kept = store.staged() & images
                if entry["holder"]["pid"] in below and kept and kept < images:
                    _nodes["cluster"].remove_node(_nodes["other"], allow_graceful=False)
                    lost.append(shard)
                    return


def run_and_lose_a_node(
    photos: Path, folder: Path, spec: BackboneSpec, **options: Any
) -> tuple[list[tuple[int, str | None]], list[int]]:
    """What a run reports for each photo, and the shard that the lost node was working on."""
    seen: list[tuple[int, str | None]] = []
    lost: list[int] = []
    job = tiny.prepare(photos, folder, spec, engine="ray", **options)
    ended = threading.Event()
    thread = threading.Thread(target=lose_node, args=(FeatureStore.open(folder), ended, lost))
    thread.start()
    try:
        job.run(lambda index, reason: seen.append((index, reason)))
    finally:
        ended.set()
        thread.join()
    return seen, lost


def test_store_after_losing_a_node_matches_an_undisturbed_run(tmp_path: Path) -> None:
    spec = tiny.spec_of(tiny.write_weights(tmp_path / "tiny.safetensors"))
    data = tiny.write_photos(tmp_path / "photos", PHOTOS)
    slow = tiny.denoising(views=100)  # so that a shard takes long enough for its node to be lost
    child = Child(two_nodes, timeout=150)
    try:
        seen, lost = child(run_and_lose_a_node, data, tmp_path / "store", spec, workers=2, stage_one=slow)
    finally:
        child.end()
    assert len(lost) == 1, "no node was lost: the photos are done too fast for this test"
    assert sorted(index for index, _ in seen) == list(range(PHOTOS))
    assert {reason for _, reason in seen} == {None}
    tiny.assert_whole(tmp_path / "store")
    tiny.prepare(data, tmp_path / "undisturbed", spec, stage_one=slow).run()
    assert tiny.contents(tmp_path / "store") == tiny.contents(tmp_path / "undisturbed")
