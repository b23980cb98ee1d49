"""Leases: one writer per shard, decided by process and heartbeat and never by a clock."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from denoising_vit.errors import StoreError
from denoising_vit.store import FeatureStore, Manifest, leases
from denoising_vit.store.leases import Leases, Process
from denoising_vit.store.objects import open_objects

FOREIGN = Process(host="node7", machine="node7/another-boot/pid:[1]", pid=4711, started=99)

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    manifest = Manifest(
        backbone={"name": "vit"}, plan="abc", size=(42, 56), patch_size=14, stride=14, grid=(3, 4), field=(3, 4),
        channels=5, images_per_shard=2,
    )  # fmt: skip
    return FeatureStore.create(tmp_path / "store", manifest, ["a", "b", "c"])


class FakeTime:
    """Replaces the module ``time``: has only what leases may depend on, and sleeps without waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(leases, "time", fake)
    return fake


def lease_file(store: FeatureStore, generation: int = 1, shard: int = 0) -> Path:
    return Path(store.url) / f"leases/shard-{shard:06d}.{generation}.json"


def leave_lease(store: FeatureStore, holder: Process, generation: int = 1, beat: int = 0, shard: int = 0) -> None:
    path = lease_file(store, generation, shard)
    path.parent.mkdir(exist_ok=True)
    content = {"holder": asdict(holder), "token": "theirs", "beat": beat, "released": False}
    path.with_suffix(".new").write_text(json.dumps(content))
    path.with_suffix(".new").replace(path)


def put(store: FeatureStore, index: int) -> None:
    with store.writer(store.manifest.shard_of(index)) as writer:
        writer.put(index, torch.full((3, 4, 5), float(index)))


# --- one writer ---


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_second_writer_is_rejected_with_host_and_process_of_the_first(tmp_path: Path, kind: str) -> None:
    objects = open_objects(tmp_path if kind == "local" else f"memory://{tmp_path}")
    here = Process.current()
    first = Leases(objects).acquire("x")
    with pytest.raises(
        StoreError, match=rf"is being written by process {here.pid} on {here.host}.*finished images are kept"
    ):
        Leases(objects).acquire("x")
    first.release()
    Leases(objects).acquire("x").release()


def test_different_shards_can_be_written_at_once(store: FeatureStore) -> None:
    with store.writer(0) as one, store.writer(1) as other:
        one.put(1, torch.ones(3, 4, 5))
        other.put(2, torch.ones(3, 4, 5))
    assert store.done() == {1, 2}


def test_names_with_a_common_prefix_are_different_leases(tmp_path: Path) -> None:
    some = Leases(open_objects(tmp_path))
    with some.acquire("run"), some.acquire("run.1"), some.acquire("run2"):
        assert some.generations("run") == [1]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_lease_is_released_on_exceptions(store: FeatureStore, kind: type[BaseException]) -> None:
    with pytest.raises(kind), store.writer(0):
        raise kind
    put(store, 0)
    assert store.done() == {0}


def test_lease_is_released_if_entering_fails(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(type(store.objects), "sweep", fail)
        with pytest.raises(OSError, match="no network"), store.writer(0):
            pytest.fail("must not be entered")
    put(store, 0)


def test_sealed_shards_leave_no_lease_files(store: FeatureStore) -> None:
    for shard in range(2):
        for index in store.manifest.images_of(shard):
            put(store, index)
        with store.writer(shard) as writer:
            assert writer.finish()
    assert store.objects.names("leases") == []


def test_lease_is_released_on_a_full_disk(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        with pytest.raises(OSError, match="No space"), store.writer(0) as writer:
            patch.setattr(type(store.objects), "write", full)
            writer.put(0, torch.ones(3, 4, 5))
        assert store.objects.names("leases") == []
    put(store, 0)


def test_only_one_contender_takes_over_a_dead_lease(store: FeatureStore) -> None:
    leave_lease(store, replace(Process.current(), started=1))
    start, got, refused = threading.Barrier(8), [], []

    def contend(_: int) -> None:
        mine = Leases(open_objects(store.url))
        start.wait()
        try:
            got.append(mine.acquire("shard-000000"))
        except StoreError:
            refused.append(1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(contend, range(8)))
    assert (len(got), len(refused)) == (1, 7)
    got[0].check()
    got[0].release()


def test_delayed_contender_cannot_claim_an_old_generation(tmp_path: Path) -> None:
    some = Leases(open_objects(tmp_path))
    for _ in range(2):
        some.acquire("x").release()
    holder = some.acquire("x")
    assert some.generations("x") == [3]
    assert some._claim("x", 2) is None  # it saw generation 1 before it slept
    assert some.generations("x") == [3]
    holder.check()
    holder.release()


def test_first_holder_notices_if_conditional_puts_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects(tmp_path)
    monkeypatch.setattr(type(objects), "create", lambda self, key, data, **_: self.write(key, data) or True)
    first = Leases(objects)._claim("x", 1)
    second = Leases(objects)._claim("x", 1)  # both saw no lease
    assert first is not None and second is not None
    with pytest.raises(StoreError, match="another process took over"):
        first.check()
    second.check()
    first.release()
    second.check()  # releasing the lost lease does not release the winner's
    second.release()


def test_file_system_without_hard_links_still_gives_one_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with Leases(open_objects(tmp_path)).acquire("x"), pytest.raises(StoreError, match="is being written by"):
        Leases(open_objects(tmp_path)).acquire("x")


# --- processes of this machine ---


def hold(url: str, ready: Connection) -> None:
    """Runs in a process that is killed in the middle of a shard."""
    store = FeatureStore.open(url, writable=True)
    with store.writer(0) as writer:
        writer.put(0, torch.zeros(3, 4, 5))
        ready.send("holding")
        time.sleep(600)


@linux
def test_lease_is_taken_over_only_after_its_process_was_killed(store: FeatureStore, clock: FakeTime) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=hold, args=(store.url, theirs), daemon=True)
    process.start()
    assert mine.recv() == "holding"
    with pytest.raises(StoreError, match=f"process {process.pid} on"), store.writer(0):
        pytest.fail("two writers of one shard")
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with store.writer(0) as writer:  # its parent has not waited for it yet: it is a zombie, which counts as dead
        assert writer.missing() == [1]
        writer.put(1, torch.ones(3, 4, 5))
        assert writer.finish()
    assert clock.now == 0  # no lease had to be watched
    process.join()
    assert store.done() == {0, 1}


@linux
def test_reused_process_id_does_not_keep_a_lease(store: FeatureStore) -> None:
    here = Process.current()
    assert here.alive()
    assert here.started is not None
    leave_lease(store, replace(here, started=here.started - 1))
    put(store, 0)


@linux
def test_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbid)
    assert Process.current().alive()


@pytest.mark.parametrize("change", [{"machine": "vm/other-boot/pid:[1]"}, {"machine": None}, {"started": None}])
def test_process_that_cannot_be_checked_is_neither_dead_nor_alive(change: dict[str, Any]) -> None:
    assert replace(Process.current(), **change).alive() is None


def test_without_proc_the_state_of_processes_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_PROC", tmp_path)
    here = Process.current()
    assert (here.machine, here.started, here.alive()) == (None, None, None)


@linux
def test_forked_child_does_not_release_its_parents_lease(store: FeatureStore) -> None:
    context = multiprocessing.get_context("fork")
    with store.lease("run") as lease:
        child = context.Process(target=lease.release)
        child.start()
        child.join()
        assert child.exitcode == 0
        lease.check()
        with pytest.raises(StoreError, match="run is being written by"):
            store.lease("run")


# --- processes of other machines ---


def test_foreign_lease_without_heartbeat_is_taken_over(store: FeatureStore, clock: FakeTime) -> None:
    leave_lease(store, FOREIGN, generation=3)
    with store.writer(0) as writer:
        assert clock.now >= leases.PATIENCE
        assert [path.name for path in lease_file(store).parent.iterdir()] == [lease_file(store, 4).name]
        writer.put(0, torch.ones(3, 4, 5))
    assert store.done() == {0}


def test_foreign_lease_with_heartbeat_is_not_taken_over(store: FeatureStore, clock: FakeTime) -> None:
    leave_lease(store, FOREIGN)

    def beat() -> None:
        if clock.now > leases.PATIENCE - 2:  # late, but in time
            leave_lease(store, FOREIGN, beat=1)

    clock.meanwhile = beat
    with pytest.raises(StoreError, match="process 4711 on node7"), store.writer(0):
        pytest.fail("two writers of one shard")
    clock.meanwhile = lambda: None
    before = clock.now
    put(store, 0)  # no heartbeat from then on, for the whole period
    assert clock.now - before >= leases.PATIENCE


def test_earlier_time_watching_a_lease_counts(store: FeatureStore, clock: FakeTime) -> None:
    leave_lease(store, FOREIGN)

    def interrupt() -> None:
        raise KeyboardInterrupt

    clock.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt), store.writer(0):
        pytest.fail("must not be entered")
    clock.meanwhile = lambda: None
    clock.now = 10 * leases.PATIENCE
    put(store, 0)
    assert clock.now == 10 * leases.PATIENCE


@pytest.mark.parametrize("shift", [-1e9, 1e9], ids=["back", "forth"])
def test_clocks_and_file_times_have_no_effect(
    store: FeatureStore, clock: FakeTime, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Neither the system clock, which may be set back, nor file times, which come from another machine's clock."""
    moments = iter(range(10**6))
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + (1 + next(moments)) * shift / 1e3)
    leave_lease(store, FOREIGN)
    os.utime(lease_file(store), (real + shift, real + shift))
    clock.meanwhile = lambda: leave_lease(store, FOREIGN, beat=1)
    with pytest.raises(StoreError, match="4711"), store.writer(0):
        pytest.fail("however old its file looks, it is alive")
    clock.meanwhile = lambda: None
    with store.writer(0) as writer:  # however new its file looks, it is dead
        for index in writer.images:
            writer.put(index, torch.full((3, 4, 5), float(index)))
        with pytest.raises(StoreError, match="being written"), store.writer(0):
            pytest.fail("two writers of one shard")
        assert writer.finish()
    assert store.done() == {0, 1}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"holder": 3}'])
def test_damaged_lease_is_watched_like_a_foreign_one(store: FeatureStore, clock: FakeTime, content: str) -> None:
    leave_lease(store, FOREIGN)
    lease_file(store).write_text(content)
    put(store, 0)
    assert clock.now >= leases.PATIENCE


# --- heartbeats ---


@pytest.fixture
def quick(store: FeatureStore) -> Iterator[FeatureStore]:
    """A store whose leases send a heartbeat every 0.01 seconds."""
    store.leases = Leases(store.objects, heartbeat=0.01)
    yield store


def wait_until(true: Callable[[], bool]) -> None:
    """Waits for another thread; the limit only keeps a broken test from hanging."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


def beat_of(store: FeatureStore) -> int:
    return json.loads(lease_file(store).read_text())["beat"]


def test_heartbeat_continues_after_network_failures(quick: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise OSError("no network")

    with quick.writer(0):
        wait_until(lambda: beat_of(quick) >= 2)
        with monkeypatch.context() as patch:
            patch.setattr(type(quick.objects), "write", fail)
            wait_until(lambda: len(tried) >= 2)
        before = beat_of(quick)
        wait_until(lambda: beat_of(quick) > before)
    assert not [thread for thread in threading.enumerate() if thread.name == "lease shard-000000"]


def test_writer_whose_lease_was_taken_over_writes_nothing_more(quick: FeatureStore) -> None:
    with quick.writer(0) as writer:
        writer.put(0, torch.ones(3, 4, 5))
        leave_lease(quick, FOREIGN, generation=2)
        with pytest.raises(StoreError, match="another process took over shard-000000"):
            writer.put(1, torch.ones(3, 4, 5))
            writer.finish()

        def put_is_refused() -> bool:
            try:
                writer.put(1, torch.ones(3, 4, 5))
            except StoreError:
                return True
            return False

        wait_until(put_is_refused)
    assert quick.sealed() == set()
    assert json.loads(lease_file(quick, 2).read_text())["token"] == "theirs"  # the new holder's lease is intact


def test_takeover_during_sealing_writes_no_marker(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(store.array).write_shard

    def slow(self: Any, *args: Any) -> None:
        original(self, *args)
        leave_lease(store, FOREIGN, generation=2, shard=1)

    monkeypatch.setattr(type(store.array), "write_shard", slow)
    with store.writer(1) as writer:
        writer.put(2, torch.ones(3, 4, 5))
        with pytest.raises(StoreError, match="another process took over"):
            writer.finish()
    assert store.sealed() == set()
    assert store.done() == {2}
