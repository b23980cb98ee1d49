"""FeatureStore: reading back what was written, recovery from crashes and full disks, and rejected input."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from torch.utils.data import DataLoader

from denoising_vit.errors import FieldError, StoreError
from denoising_vit.store import FeatureStore, Manifest, StoreDataset
from denoising_vit.store.leases import Leases
from denoising_vit.store.objects import open_objects

SHAPE = (3, 4, 5)
IDS = ["a.jpg", "b/c.jpg", "d.png", "e e.jpg", "ü.jpg"]
FINGERPRINT = [round(float(value), 5) for value in np.linspace(-1, 1, 128)]


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "backbone": {"name": "vit", "weights": "hub", "fingerprint": FINGERPRINT, "layer": None, "dtype": "float32"},
        "plan": "abc",
        "options": {"views": 64, "seed": 0},
        "size": (42, 56),
        "patch_size": 14,
        "stride": 14,
        "grid": (3, 4),
        "field": SHAPE[:2],
        "channels": SHAPE[2],
        "images_per_shard": 2,
    }
    return Manifest(**(values | changes))


def field_of(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index))


def write_shard(store: FeatureStore, shard: int, fail: tuple[int, ...] = (), finish: bool = True) -> None:
    with store.writer(shard) as writer:
        for index in writer.images:
            if index in fail:
                writer.fail(index, f"no luck with {index}")
            else:
                writer.put(index, field_of(index), {"heldout_r2": index / 10})
        if finish:
            assert writer.finish()


def assert_whole(store: FeatureStore) -> None:
    """Check that every image is sealed and has the values that were written, and that no staged image is left."""
    assert store.done() == set(range(len(IDS)))
    assert store.sealed() == set(range(store.manifest.shards))
    assert store.staged() == set()
    assert store.unfinished() == []
    for index, name in enumerate(IDS):
        assert torch.equal(store[name].field, field_of(index).half().float())
        assert store[index].record == {"id": name, "heldout_r2": index / 10}
    assert list(store.verify()) == []


@pytest.fixture(params=["local", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new location of each kind that needs no server."""
    kinds = {"local": str(tmp_path / "store"), "file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path}/s"}
    return kinds[request.param]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", make_manifest(), IDS)


def root_of(store: FeatureStore) -> Path:
    return Path(store.url)


# --- writing and reading ---


def test_staged_and_sealed_images_are_read_back(url: str) -> None:
    store = FeatureStore.create(url, make_manifest(), IDS)
    assert store.done() == set()
    assert store.unfinished() == [0, 1, 2]
    write_shard(store, 0)
    write_shard(store, 1, finish=False)
    again = FeatureStore.open(url)
    assert again.ids == IDS
    assert len(again) == 5
    assert again.done() == {0, 1, 2, 3}
    assert again.sealed() == {0}
    assert again.staged() == {2, 3}
    assert again.unfinished() == [1, 2]
    for index in range(4):
        assert torch.equal(again[index].field, field_of(index).half().float())
        assert again[index].record == {"id": IDS[index], "heldout_r2": index / 10}
    for shard in again.unfinished():
        write_shard(store, shard)
    assert_whole(again)


def test_array_can_be_read_with_zarr_alone(store: FeatureStore) -> None:
    for shard in range(3):
        write_shard(store, shard, fail=(2,))
    array: Any = zarr.open_array(f"{store.url}/field", mode="r")
    assert array.shape == (5, *SHAPE) and array.dtype == np.float16
    assert array.chunks == (1, *SHAPE) and array.shards == (2, *SHAPE)
    np.testing.assert_array_equal(array[3], field_of(3).half().numpy())
    assert np.isnan(array[2]).all()


def test_failed_image_takes_no_space_in_its_shard(store: FeatureStore) -> None:
    write_shard(store, 0)
    write_shard(store, 1, fail=(2,))
    whole, half = ((root_of(store) / f"field/c/{shard}/0/0/0").stat().st_size for shard in range(2))
    assert whole - half == np.prod(SHAPE) * 2 + 4  # values and their checksum


def test_shard_in_which_every_image_failed_is_sealed(store: FeatureStore) -> None:
    write_shard(store, 0, fail=(0, 1))
    assert store.sealed() == {0}
    assert store.done() == set()
    assert store.failed() == {0: "no luck with 0", 1: "no luck with 1"}
    assert list(store.verify()) == []


def test_float16_loses_at_most_one_part_in_2048(store: FeatureStore) -> None:
    scales = torch.logspace(-3, 4, 60).reshape(SHAPE)
    field = field_of(0) * scales
    with store.writer(0) as writer:
        writer.put(0, field)
    error = (store[0].field - field).abs()
    assert (error <= field.abs() * 2**-11 + 2**-25).all()  # half a unit in the last place; below 2^-14, absolute
    assert error.max() > 0


def test_float32_store_loses_nothing(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", make_manifest(dtype="float32"), IDS)
    field = field_of(0) * 1e6
    with store.writer(0) as writer:
        writer.put(0, field)
        writer.put(1, field_of(1))
        assert writer.finish()
    assert torch.equal(store[0].field, field)


@pytest.mark.parametrize(
    ("value", "message"),
    [(7e4, r"a\.jpg: .*7e\+04.*at most 65504.*float32"), (float("nan"), "not finite"), (-float("inf"), "a.jpg")],
)
def test_values_out_of_range_are_rejected_and_not_stored(store: FeatureStore, value: float, message: str) -> None:
    field = field_of(0)
    field[1, 2, 3] = value
    with store.writer(0) as writer, pytest.raises(FieldError, match=message):
        writer.put(0, field)
    assert store.done() == set()


def test_field_of_another_shape_is_refused(store: FeatureStore) -> None:
    with store.writer(0) as writer, pytest.raises(FieldError, match=r"shape \(3, 4, 5\) .*, got \(4, 3, 5\)"):
        writer.put(0, torch.zeros(4, 3, 5))


def test_record_that_is_not_json_is_refused(store: FeatureStore) -> None:
    with store.writer(0) as writer:
        with pytest.raises(StoreError, match=r"a\.jpg: the record must consist of JSON"):
            writer.put(0, field_of(0), {"heldout_r2": float("nan")})
        with pytest.raises(StoreError, match=r"'a\.jpg', but its record has the id 'd\.png'"):
            writer.put(0, field_of(0), {"id": "d.png"})


def test_image_of_another_shard_is_refused(store: FeatureStore) -> None:
    with store.writer(1) as writer, pytest.raises(StoreError, match=r"image 4 is not in shard 1.* 2 to 3"):
        writer.put(4, field_of(4))


def test_unfinished_shard_is_not_sealed(store: FeatureStore) -> None:
    with store.writer(0) as writer:
        writer.put(1, field_of(1))
        assert writer.missing() == [0]
        assert not writer.finish()
    assert store.sealed() == set()


def test_sealed_shard_rejects_further_images(store: FeatureStore) -> None:
    write_shard(store, 0)
    with store.writer(0) as writer:
        assert writer.missing() == []
        assert writer.finish()
        with pytest.raises(StoreError, match=r"a\.jpg: its shard 0 is already sealed"):
            writer.put(0, field_of(0))


def test_failed_image_can_be_written_again(store: FeatureStore) -> None:
    with store.writer(0) as writer:
        writer.fail(0, "no network")
    assert store.failed() == {0: "no network"}
    write_shard(store, 0)
    assert store.failed() == {}
    assert store.done() == {0, 1}
    assert list(store.verify()) == []


def test_writer_outside_a_with_block_is_rejected(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"with store\.writer"):
        store.writer(0).put(0, field_of(0))
    with pytest.raises(StoreError, match="unknown shard 3; expected 0 to 2"):
        store.writer(3)


# --- crashes and full disks ---


class Crash(Exception):
    """Simulates kill -9: no code handles it, and the store must not depend on cleanup afterwards."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


STEPS = {
    "before the shard": ("delete_below", "field", "before"),
    "after the shard": ("write", "field", "after"),
    "before the marker": ("write", "sealed", "before"),
    "after the marker": ("write", "sealed", "after"),
    "before deleting": ("delete", "staged", "before"),
    "while deleting": ("delete", "staged", "after"),
}


def crash_at(patch: pytest.MonkeyPatch, store: FeatureStore, step: str) -> None:
    """Make the store's objects crash at a step of sealing, before or after the step is carried out."""
    name, folder, when = STEPS[step]
    original = getattr(type(store.objects), name)

    def crashing(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.startswith(folder) and when == "before":
            raise Crash
        result = original(self, key, *args, **kwargs)
        if key.startswith(folder):
            raise Crash
        return result

    patch.setattr(type(store.objects), name, crashing)


@pytest.mark.parametrize("shard", [0, 2], ids=["full shard", "last shard, which is not full"])
@pytest.mark.parametrize("step", STEPS)
def test_crash_between_steps_of_sealing_is_repaired_by_the_next_run(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, step: str, shard: int
) -> None:
    for other in range(3):
        write_shard(store, other, finish=other != shard)
    with monkeypatch.context() as patch, pytest.raises(Crash), store.writer(shard) as writer:
        crash_at(patch, store, step)
        writer.finish()
    again = FeatureStore.open(store.url, writable=True)
    assert again.done() == set(range(5))  # no finished image is lost
    for index in again.manifest.images_of(shard):
        assert torch.equal(again[index].field, field_of(index).half().float())
    if (step, shard) != ("while deleting", 2):  # its only staged image is deleted by then: nothing to repair
        assert again.unfinished() == [shard]
    with again.writer(shard) as writer:
        assert writer.missing() == []  # nothing is computed again
        assert writer.finish()
    assert_whole(again)


@pytest.mark.parametrize("shard", [0, 2])
def test_half_written_shard_without_marker_is_written_again(store: FeatureStore, shard: int) -> None:
    write_shard(store, shard, finish=False)
    path = root_of(store) / f"field/c/{shard}/0/0/0"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a shard")
    path.with_name("0.1234.partial").write_bytes(b"zarr's temporary file")
    with store.writer(shard) as writer:
        assert writer.finish()
    assert [found.name for found in path.parent.iterdir()] == ["0"]
    assert list(store.verify()) == []


def test_damaged_staged_image_is_written_again_before_sealing(store: FeatureStore) -> None:
    write_shard(store, 0, finish=False)
    path = root_of(store) / "staged/00000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = store.verify()
    assert "staged/00000001" in problem.where and "checksum" in problem.what
    with pytest.raises(StoreError, match="checksum"):
        store[1]
    with store.writer(0) as writer:
        assert not writer.finish()
        assert writer.missing() == [1]
        writer.put(1, field_of(1))
        assert writer.finish()
    assert list(store.verify()) == []


def test_full_disk_keeps_finished_images_and_leaves_no_partial_file(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.writer(0) as writer:
        writer.put(0, field_of(0))
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "fsync", full)  # the bytes are in the temporary file by then
            writer.put(1, field_of(1))
        assert sorted(path.name for path in (root_of(store) / "staged").iterdir()) == ["00000000.safetensors"]
        assert store.done() == {0}
        writer.put(1, field_of(1))
    assert torch.equal(store[0].field, field_of(0).half().float())


@pytest.mark.parametrize("where", ["shard", "marker"])
def test_disk_that_fills_while_sealing_keeps_every_image(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = type(store.objects).write

    def full(self: Any, key: str, *args: Any, **named: Any) -> None:
        if key.startswith("field" if where == "shard" else "sealed"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, key, *args, **named)

    write_shard(store, 0, finish=False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"), store.writer(0) as writer:
        patch.setattr(type(store.objects), "write", full)
        writer.finish()
    assert store.done() == {0, 1}
    assert store.sealed() == set()
    write_shard(store, 0)  # the lease was released
    assert store.sealed() == {0}


def test_partial_files_of_a_killed_writer_are_removed(store: FeatureStore) -> None:
    folder = root_of(store) / "staged"
    folder.mkdir()
    mine, other = folder / ".00000001.safetensors.abcd.part", folder / ".00000002.safetensors.abcd.part"
    mine.write_bytes(b"half")
    other.write_bytes(b"another writer is at it")
    assert store.done() == set()
    write_shard(store, 0)
    assert not mine.exists()
    assert other.exists()


# --- opening ---


def test_creating_an_existing_store_is_rejected(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="a feature store already exists"):
        FeatureStore.create(store.url, make_manifest(), IDS)


def test_folder_with_other_files_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"expected an empty or new folder.*thesis\.tex"):
        FeatureStore.create(tmp_path, make_manifest(), IDS)
    with pytest.raises(StoreError, match=r"not a feature store.*thesis\.tex"):
        FeatureStore.open(tmp_path)


def test_interrupted_creation_can_be_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Manifest, "to_json", crash)
        FeatureStore.create_or_open(url, make_manifest(), IDS)
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore.open(url)
    assert len(FeatureStore.create_or_open(url, make_manifest(), IDS)) == 5


def test_create_or_open_opens_an_existing_store(url: str) -> None:
    store = FeatureStore.create_or_open(url, make_manifest(), IDS)
    write_shard(store, 0)
    assert FeatureStore.create_or_open(url, make_manifest(), IDS).done() == {0, 1}


@pytest.mark.parametrize("place", ["nowhere", "file.txt"])
def test_path_without_a_store_is_rejected(tmp_path: Path, place: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(StoreError, match=r"no feature store found.*dvit fit"):
        FeatureStore.open(tmp_path / place)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one image"), (["a", "b", "a"], "'a' occurs 2 times"), (["a", ""], "non-empty strings")],
)
def test_invalid_ids_are_rejected(tmp_path: Path, ids: list[str], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        FeatureStore.create(tmp_path / "store", make_manifest(), ids)


def test_read_only_store_can_be_read_but_not_opened_for_writing(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(store, 0)

    def refuse(*_: Any, **__: Any) -> None:  # tests may run as root, which ignores permissions
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write", "create", "delete"):
        monkeypatch.setattr(type(store.objects), name, refuse)
    reader = FeatureStore.open(store.url)
    assert reader.done() == {0, 1}
    assert torch.equal(reader[1].field, field_of(1).half().float())
    assert list(reader.verify()) == []
    with pytest.raises(StoreError, match=r"Read-only file system.*writable location"):
        FeatureStore.open(store.url, writable=True)
    with pytest.raises(StoreError, match="read-only"):
        reader.writer(1)


def test_missing_library_for_a_url_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", lacking)
    with pytest.raises(StoreError, match="install the extra `s3`"):
        FeatureStore.open("s3://bucket/store")


@pytest.mark.parametrize(("place", "message"), [("nonsense://x", "s3://bucket/store"), (" ", "empty name")])
def test_invalid_url_is_rejected(place: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(place)


# --- manifests ---


def test_manifest_round_trip_through_json() -> None:
    manifest = make_manifest(options={"size": (3, 4), "clip": None}).with_ids(IDS)
    again = Manifest.from_json(manifest.to_json(), "here")
    assert again == manifest
    assert again.size == (42, 56)
    assert manifest.mismatch(again) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "def"}, "plan: the store has abc, this run has def"),
        ({"size": (56, 56)}, "size: the store has 42 x 56, this run has 56 x 56"),
        ({"field": (6, 8)}, "field: the store has 3 x 4, this run has 6 x 8"),
        ({"dtype": "float32"}, "dtype: the store has float16, this run has float32"),
        ({"options": {"views": 128, "seed": 0}}, "option views: the store has 64, this run has 128"),
        ({"options": {"views": 64}}, "option seed: the store has 0, this run has none"),
        (
            {"backbone": {"name": "b", "fingerprint": FINGERPRINT, "dtype": "float32"}},
            "backbone name: the store has vit",
        ),
    ],
)
def test_mismatch_reports_both_values(store: FeatureStore, change: dict[str, Any], message: str) -> None:
    differences = store.manifest.mismatch(make_manifest(**change))
    assert [line for line in differences if not line.startswith(message)] == []
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(store.url, make_manifest(**change))


def test_other_weights_are_detected_by_their_fingerprint() -> None:
    manifest = make_manifest()

    def like(values: list[float]) -> Manifest:
        return make_manifest(backbone=manifest.backbone | {"fingerprint": values, "weights": "w.safetensors"})

    nearly = [value + 0.001 for value in FINGERPRINT]
    assert manifest.mismatch(like(nearly)) == []  # the same weights from another file
    (difference,) = manifest.mismatch(like(FINGERPRINT[::-1]))
    assert "the store has hub" in difference and "this run has w.safetensors" in difference
    assert "-1.000, expected above 0.999" in difference


@pytest.mark.parametrize("values", [(), FINGERPRINT[:2]])
def test_fingerprints_of_other_lengths_are_a_mismatch(values: tuple[float, ...]) -> None:
    manifest = make_manifest()
    (difference,) = manifest.mismatch(make_manifest(backbone=manifest.backbone | {"fingerprint": values}))
    assert difference.endswith("different lengths")


def test_other_images_are_a_mismatch(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"images: the store has 5 .*this run has 4"):
        FeatureStore.create_or_open(store.url, make_manifest(), IDS[:4])
    with pytest.raises(StoreError, match="images: the store has 5"):
        FeatureStore.create_or_open(store.url, make_manifest(), IDS[::-1])


def edit_manifest(store: FeatureStore, **changes: Any) -> None:
    path = root_of(store) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_store_of_a_newer_version_asks_for_an_upgrade(store: FeatureStore) -> None:
    edit_manifest(store, version=3, novelty=True)
    with pytest.raises(StoreError, match="version 2 or lower, got 3; upgrade denoising-vit"):
        FeatureStore.open(store.url)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format": "x"}, "not a feature store"), ({"version": "1"}, "'1'"), ({"size": 3}, "damaged manifest")],
)
def test_damaged_manifest_is_refused(store: FeatureStore, changes: dict[str, Any], message: str) -> None:
    edit_manifest(store, **changes)
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(store.url)


@pytest.mark.parametrize(("text", "message"), [("{", "damaged manifest"), ("[]", "not a feature store")])
def test_manifest_with_other_content_is_rejected(store: FeatureStore, text: str, message: str) -> None:
    (root_of(store) / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(store.url)


def test_manifest_with_a_missing_key_is_rejected(store: FeatureStore) -> None:
    path = root_of(store) / "manifest.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "plan"}))
    with pytest.raises(StoreError, match="damaged manifest: plan missing"):
        FeatureStore.open(store.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_per_shard": 0}, "images_per_shard must be at least 1"),
        ({"dtype": "int4"}, "'float16' or 'float32' or 'int8', got 'int4'"),
        ({"options": {"x": object()}}, "options of a store must consist of JSON values"),
    ],
)
def test_manifest_with_invalid_values_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        make_manifest(**change)


# --- s3 ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of an S3 server on the loopback interface."""
    server_module = pytest.importorskip("moto.server")
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def test_s3_store_is_written_resumed_read_and_verified(s3: str) -> None:
    url = f"{s3}/deep/store"
    store = FeatureStore.create_or_open(url, make_manifest(), IDS)
    write_shard(store, 0)
    write_shard(store, 1, finish=False)
    again = FeatureStore.create_or_open(url, make_manifest(), IDS)
    assert again.done() == {0, 1, 2, 3}
    with again.writer(1) as writer:
        with pytest.raises(StoreError, match="is being written by process"), store.writer(1):
            pytest.fail("two writers of one shard")
        assert writer.finish()
    write_shard(again, 2)
    assert_whole(FeatureStore.open(url, make_manifest()))
    assert again.objects.names("leases") == []
    assert again.info()["bytes"] > 5 * np.prod(SHAPE) * 2


def test_workers_read_an_object_store(s3: str) -> None:
    """Forked workers cannot use connections that were opened before the fork."""
    store = FeatureStore.create(f"{s3}/forked", make_manifest(), IDS)
    write_shard(store, 0)
    write_shard(store, 1, finish=False)
    assert store[1].id == IDS[1]
    loader = DataLoader(StoreDataset(store), batch_size=None, num_workers=1, timeout=60, multiprocessing_context="fork")
    for index, field in loader:
        assert torch.equal(field, field_of(index).half().float())


def test_only_one_of_several_writers_gets_the_lease_in_an_object_store(s3: str) -> None:
    start, got, refused = threading.Barrier(4), [], []

    def contend(_: int) -> None:
        mine = Leases(open_objects(f"{s3}/contended"))
        start.wait()
        try:
            got.append(mine.acquire("shard"))
        except StoreError:
            refused.append(1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(contend, range(4)))
    assert (len(got), len(refused)) == (1, 3)
    got[0].check()
    got[0].release()


def test_corrupted_chunk_in_an_object_store_is_found(s3: str) -> None:
    store = FeatureStore.create(f"{s3}/corrupt", make_manifest(), IDS)
    write_shard(store, 0)
    data = bytearray(store.objects.read("field/c/0/0/0/0"))
    data[3] ^= 1
    store.objects.write("field/c/0/0/0/0", bytes(data))
    assert [problem.where for problem in store.verify()] == ["a.jpg"]


def test_missing_bucket_is_reported(s3: str) -> None:
    with pytest.raises(StoreError, match="no feature store found"):
        FeatureStore.open("s3://no-such-bucket/store")
    with pytest.raises(StoreError, match="cannot be written to"):
        FeatureStore.create("s3://no-such-bucket/store", make_manifest(), IDS)


def test_failed_images_of_a_sealed_shard_can_be_retried(url: str) -> None:
    store = FeatureStore.create(url, make_manifest(), IDS)
    write_shard(store, 0, fail=(1,))
    write_shard(store, 1)
    write_shard(store, 2, fail=(4,))
    assert store.retry_failed() == [1, 4]
    assert store.failed() == {}
    assert store.done() == {0, 2, 3}
    assert store.unfinished() == [0, 2]
    for shard, index in ((0, 1), (2, 4)):
        with store.writer(shard) as writer:
            assert writer.missing() == [index]
            writer.put(index, field_of(index), {"heldout_r2": index / 10})
            assert writer.finish()
    assert_whole(store)


def test_crash_while_reopening_a_sealed_shard_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore.create(url, make_manifest(), IDS)
    write_shard(store, 0, fail=(1,))

    delete = store.objects.delete

    def crash(key: str) -> None:
        if key.startswith("sealed"):
            raise OSError(errno.EIO, f"crash at {key}")
        delete(key)

    with monkeypatch.context() as patch:
        patch.setattr(store.objects, "delete", crash)
        with pytest.raises(OSError, match="sealed"), store.writer(0) as writer:
            writer.retry_failed()
    store = FeatureStore.open(url, writable=True)
    assert store.failed() == {1: "no luck with 1"}
    assert torch.equal(store[0].field, field_of(0).half().float())
    assert store.retry_failed() == [1]
    assert torch.equal(store[0].field, field_of(0).half().float())


def test_retry_without_failures_changes_nothing(url: str) -> None:
    store = FeatureStore.create(url, make_manifest(), IDS)
    write_shard(store, 0)
    assert store.retry_failed() == []
    assert store.sealed() == {0}
