"""Fitting with Ray gives the store of the local engine, bit for bit, even if a worker is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch

import tiny_fit as tiny
from child import Child
from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli import app
from denoising_vit.errors import DenoisingVitError, DenoisingVitWarning, FitError
from denoising_vit.fit import job as jobs
from denoising_vit.fit import ray_engine
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.fit.ray_engine import RayJob, ShardFitter
from denoising_vit.store import FeatureStore, layout

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PHOTOS = 12

#: Index of a file that is not a photo.
BAD = 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def spec(weights: Path) -> BackboneSpec:
    return tiny.spec_of(weights)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)
    (folder / f"{BAD:02}.png").write_text("words")
    return folder


@pytest.fixture(scope="module")
def local(
    one_thread: None, photos: Path, spec: BackboneSpec, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Contents of the store that the local engine writes."""
    folder = tmp_path_factory.mktemp("local") / "store"
    tiny.prepare(photos, folder, spec).run()
    return tiny.contents(folder)


# --- without a cluster: jobs of workers, and errors ---


def test_missing_ray_is_reported_with_its_extra(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FitError, match="engine 'ray' needs Ray: install the extra `ray`"):
        tiny.prepare(photos, tmp_path / "store", spec, engine="ray").run()


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
def test_unreachable_cluster_is_named_in_the_error(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(**_options: Any) -> None:
        raise kind("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("socket.create_connection", lambda *_address, **_options: socket.socket())
    job = tiny.prepare(photos, tmp_path / "store", spec, engine="ray", ray_address="192.0.2.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(FitError, match=r"no Ray cluster at 192\.0\.2\.1:6379: nobody there.*RAY_AUTH_MODE=token"):
        job.run()


def test_several_devices_are_refused(photos: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="expects one device; set the workers with --workers and --worker-gpus"):
        tiny.prepare(photos, tmp_path / "store", tiny.spec_of(weights, device="cpu,cpu"), engine="ray")
    assert not (tmp_path / "store").exists()


def test_a_finished_store_needs_no_cluster(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.prepare(photos, tmp_path / "store", spec).run()
    monkeypatch.setitem(sys.modules, "ray", None)
    tiny.prepare(photos, tmp_path / "store", spec, engine="ray", workers=2).run()


def job_of_workers(job: FitJob, monkeypatch: pytest.MonkeyPatch) -> RayJob:
    """The description of a job that its workers would get."""
    given: list[RayJob] = []
    monkeypatch.setattr(jobs, "fit_with_ray", lambda order, *_others: given.append(order))
    with contextlib.suppress(FitError):  # raised because nothing was fitted
        job.run()
    return given[0]


def test_worker_fits_a_shard_and_reports_the_outcome(
    photos: Path, spec: BackboneSpec, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", spec, engine="ray")
    worker = ShardFitter(job_of_workers(job, monkeypatch))
    row = worker({"shard": 1})
    assert row["shard"] == 1
    reasons = json.loads(row["reasons"])
    assert list(reasons) == [str(BAD)] and "not an image file" in reasons[str(BAD)]
    assert job.store.sealed() == {1}
    before = tiny.contents(tmp_path / "store")
    assert worker({"shard": 1})["shard"] == 1  # a second time, after a crash: nothing is left to do
    assert tiny.contents(tmp_path / "store") == before
    for shard in (0, 2, 3):
        worker({"shard": shard})
    assert tiny.contents(tmp_path / "store") == local


def test_address_without_a_listener_fails_at_once(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_options: pytest.fail("Ray would wait for minutes"))
    job = tiny.prepare(photos, tmp_path / "store", spec, engine="ray", ray_address="127.0.0.1:1")
    with pytest.raises(FitError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        job.run()


def test_worker_in_another_folder_finds_photos_of_a_relative_path(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a running cluster have the working directory in which it was started."""
    monkeypatch.chdir(photos.parent)
    job = tiny.prepare(Path(photos.name), tmp_path / "store", spec, engine="ray")
    order = job_of_workers(job, monkeypatch)
    monkeypatch.chdir(tmp_path)
    ShardFitter(order)({"shard": 0})
    assert job.store.done() == {0, 1, 2}


def test_worker_in_another_folder_finds_weights_of_a_relative_path(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)
    job = tiny.prepare(photos, tmp_path / "store", tiny.spec_of(Path(weights.name)), engine="ray")
    order = job_of_workers(job, monkeypatch)
    monkeypatch.chdir(tmp_path)
    ShardFitter(order)({"shard": 0})
    assert job.store.done() == {0, 1, 2}


def test_worker_with_changed_photos_stores_nothing_under_a_wrong_name(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may start or restart hours later: after one more photo, every index refers to another one."""
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    job = tiny.prepare(data, tmp_path / "store", spec, engine="ray")
    order = job_of_workers(job, monkeypatch)
    shutil.copy(data / "11.png", data / "00 new.png")  # sorts before all others
    try:
        ShardFitter(order)({"shard": 0})
    except DenoisingVitError:
        return  # an error is fine as well
    for index in job.store.done():
        assert job.store[index].record["photo"]["name"] == job.store.ids[index]


def test_a_job_that_failed_can_be_run_again(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", spec, engine="ray")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(FitError):
            job.run()
    assert job_of_workers(job, monkeypatch).store == str(tmp_path / "store")


def test_local_workers_share_the_cpu_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [ray_engine.local_threads(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


# --- with a cluster, in a child process, because Ray ends the process that uses a cluster when the cluster is gone ---


@contextlib.contextmanager
def local_cluster() -> Iterator[None]:
    """Context of the child process: a cluster, and the settings that pytest and fixtures make in this process."""
    warnings.simplefilter("error", DenoisingVitWarning)
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Child]:
    child = Child(local_cluster)
    yield child
    child.end()


@dataclass(frozen=True)
class Ran:
    """Outcome of a command, and whether Ray was still connected after it."""

    code: int
    out: str
    err: str
    connected: bool


@contextlib.contextmanager
def diverted(stream: TextIO, path: Path) -> Iterator[None]:
    """Redirect the descriptor of a stream to a file, because Ray's libraries bypass Python's streams."""
    stream.flush()
    kept = os.dup(stream.fileno())
    with path.open("wb") as file:
        os.dup2(file.fileno(), stream.fileno())
    try:
        yield
    finally:
        stream.flush()
        os.dup2(kept, stream.fileno())
        os.close(kept)


def run_command(arguments: list[str], folder: Path) -> Ran:
    out, err = folder / "out", folder / "err"
    with diverted(sys.stdout, out), diverted(sys.stderr, err):
        code = app.run(arguments)
    return Ran(code, out.read_text(), err.read_text(), ray.is_initialized())


def run_job(photos: Path, store: Path, spec: BackboneSpec, **options: Any) -> list[tuple[int, str | None]]:
    """Index and reason that a run with Ray reports for each photo."""
    seen: list[tuple[int, str | None]] = []
    tiny.prepare(photos, store, spec, engine="ray", **options).run(lambda index, reason: seen.append((index, reason)))
    return seen


def test_two_workers_match_the_local_engine_and_print_only_json(
    cluster: Child, photos: Path, weights: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*tiny.command(photos, tmp_path / "store", weights), "--engine", "ray", "--workers", "2", "--json"]
    ran = cluster(run_command, arguments, tmp_path)
    assert ran.code == 1  # one file is not a photo
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert sorted(row["image"] for row in rows) == [f"{number:02}.png" for number in range(PHOTOS)]
    assert [row["image"] for row in rows if row["status"] != "done"] == [f"{BAD:02}.png"]
    assert f"skipped: {BAD:02}.png: not an image file" in ran.err
    assert tiny.contents(tmp_path / "store") == local
    tiny.assert_whole(tmp_path / "store", failed=1)
    assert ran.connected  # an existing cluster stays


@dataclass
class Watcher:
    """Kills the first worker that has stored some but not all photos of a shard; records all writers and writes.

    Attributes:
        store: the store, opened for reading.
        ended: event that stops the watcher.
        killed: the shard whose worker was killed.
        kept: photos of it that this worker had stored.
        holders: ids of the processes that held each shard.
        written: times at which each staged photo was written, in ns.
    """

    store: FeatureStore
    ended: threading.Event = field(default_factory=threading.Event)
    killed: int | None = None
    kept: frozenset[int] = frozenset()
    holders: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    written: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __call__(self) -> None:
        while not self.ended.wait(0.03):
            for index in self.store.staged():
                with contextlib.suppress(FileNotFoundError):  # sealed in the meantime
                    self.written[index].add((Path(self.store.url) / layout.staged_key(index)).stat().st_mtime_ns)
            for shard in range(self.store.manifest.shards):
                holder = self.holder(shard)
                if holder is not None:
                    self.holders[shard].add(holder)
                    if self.killed is None:
                        self.kill(shard, holder)

    def kill(self, shard: int, holder: int) -> None:
        images = set(self.store.manifest.images_of(shard))
        kept = self.store.staged() & images
        if kept and kept < images:
            os.kill(holder, signal.SIGKILL)
            self.killed, self.kept = shard, frozenset(kept)

    def holder(self, shard: int) -> int | None:
        """Id of the process that writes a shard, if it is a descendant of this one."""
        below = {child.pid for child in psutil.Process().children(recursive=True)}
        for path in (Path(self.store.url) / layout.LEASES).glob(f"{layout.shard_lease(shard)}.*.json"):
            with contextlib.suppress(OSError, ValueError):  # released in the meantime
                entry = json.loads(path.read_bytes())
                if not entry["released"] and entry["holder"]["pid"] in below:
                    return entry["holder"]["pid"]
        return None


def test_killed_worker_affects_only_its_shard(cluster: Child, spec: BackboneSpec, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "photos", PHOTOS)
    slow = tiny.denoising(views=100)  # so that a shard takes long enough for its worker to be killed
    store = tiny.prepare(data, tmp_path / "store", spec, stage_one=slow).store
    watcher = Watcher(FeatureStore.open(tmp_path / "store"))
    thread = threading.Thread(target=watcher)
    thread.start()
    try:
        seen = cluster(run_job, data, tmp_path / "store", spec, workers=2, stage_one=slow)
    finally:
        watcher.ended.set()
        thread.join()
    assert watcher.killed is not None, "no worker was killed: the photos are done too fast for this test"
    assert sorted(index for index, _ in seen) == list(range(PHOTOS))
    tiny.assert_whole(store)
    assert [shard for shard, holders in watcher.holders.items() if len(holders) > 1] == [watcher.killed]
    assert watcher.kept <= watcher.written.keys()
    assert [index for index, times in watcher.written.items() if len(times) > 1] == []  # no photo was written twice
    undisturbed = tiny.prepare(data, tmp_path / "undisturbed", spec, stage_one=slow)
    undisturbed.run()
    assert tiny.contents(tmp_path / "store") == tiny.contents(tmp_path / "undisturbed")


def test_cluster_without_live_machines_is_refused() -> None:
    ray = SimpleNamespace(nodes=lambda: [{"Alive": False, "Resources": {"CPU": 8.0}}])
    job: Any = SimpleNamespace(options=FitOptions(workers=2, worker_cpus=1.0), on_gpu=False)
    with pytest.raises(FitError, match="needs 1 CPUs, but the largest machine of the cluster has 0"):
        ray_engine._request(ray, job)
