"""Fitting a data set with the local engine: stored fields, failures, interruptions and existing stores."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import denoising_vit as dv
import tiny_fit as tiny
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.data import Dataset, open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import Done, Ready, StageOne, finish_together
from denoising_vit.errors import FitError, PhotoError, PlanError, StoreError
from denoising_vit.fit.job import Estimate, FitJob
from denoising_vit.fit.local import _OpenShard, _Writers, manifest_of
from denoising_vit.fit.options import FitOptions
from denoising_vit.store import FeatureStore, layout
from denoising_vit.store.fields import FieldArray
from denoising_vit.store.objects import LocalObjects

pytestmark = pytest.mark.usefixtures("one_thread")

#: Not a multiple of 3, the number of images per shard.
PHOTOS = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def spec(weights: Path) -> BackboneSpec:
    return tiny.spec_of(weights)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, photos: Path, spec: BackboneSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all photos, fitted in one uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    tiny.prepare(photos, folder, spec).run()
    return folder


class Passes:
    """Number of images of the fitted size that a backbone has processed."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    counted, forward = Passes(), TimmBackbone.forward

    def count(self: TimmBackbone, image: Tensor) -> Tensor:
        if tuple(image.shape[2:]) == (tiny.SIZE, tiny.SIZE):  # the fingerprint's image has a different size
            counted.count += len(image)
        return forward(self, image)

    monkeypatch.setattr(TimmBackbone, "forward", count)
    return counted


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function that simulates a disk that is full once that many photos are staged, and stays full."""
    write = LocalObjects.write
    staged = 0

    def fill(room: int) -> None:
        def refuse(self: LocalObjects, key: str, data: bytes, *, durable: bool = True) -> None:
            nonlocal staged
            if key.startswith(layout.STAGED):
                staged += 1
                if staged > room:
                    raise no_room()
            write(self, key, data, durable=durable)

        monkeypatch.setattr(LocalObjects, "write", refuse)

    yield fill
    monkeypatch.setattr(LocalObjects, "write", write)


def stop_after(
    count: int, photos: Path, store: Path, spec: BackboneSpec, disk_of: Callable[[int], None], mend: pytest.MonkeyPatch
) -> None:
    """Fit until the disk is full after `count` photos. Afterwards the disk has free space again."""
    before = LocalObjects.write
    disk_of(count)
    with pytest.raises(OSError, match="No space left"):
        tiny.prepare(photos, store, spec).run()
    mend.setattr(LocalObjects, "write", before)


# --- what is stored ---


def test_stored_fields_match_denoise_image(undisturbed: Path, photos: Path, spec: BackboneSpec) -> None:
    store, backbone = FeatureStore.open(undisturbed), spec.load()
    assert store.manifest.field == (6, 6)
    for index, item in enumerate(open_dataset(photos)):
        alone = dv.denoise_image(backbone, item.url, options=tiny.denoising())
        stored = store[item.id]
        assert stored.index == index
        half = 2.0**-11 * float(alone.field.abs().max())
        torch.testing.assert_close(stored.field, alone.field, rtol=2.0**-11, atol=half + 1e-5)
        torch.testing.assert_close(stored.semantic, alone.semantic, rtol=2.0**-10, atol=2 * half + 1e-5)
        assert stored.record["heldout_r2"] == pytest.approx(alone.heldout_r2, abs=1e-5)
        assert stored.record["photo"]["sha256"] == alone.info["photo"]["sha256"]
        assert stored.record["photo"]["name"] == item.id


def test_patch_grid_holds_the_field_at_the_patch_centres(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    tiny.prepare(photos, tmp_path / "store", spec, grid="patch").run()
    store, backbone = FeatureStore.open(tmp_path / "store"), spec.load()
    assert store.manifest.field == store.manifest.grid == (3, 3)
    for item in open_dataset(photos):
        alone = dv.denoise_image(backbone, item.url, options=tiny.denoising())
        half = 2.0**-11 * float(alone.field.abs().max())
        torch.testing.assert_close(store[item.id].field, alone.semantic, rtol=2.0**-11, atol=half + 1e-5)
        torch.testing.assert_close(store[item.id].semantic, alone.semantic, rtol=2.0**-11, atol=half + 1e-5)


def test_manifest_records_backbone_sizes_and_options(undisturbed: Path, weights: Path) -> None:
    manifest = FeatureStore.open(undisturbed).manifest
    assert (manifest.count, manifest.shards, manifest.images_per_shard) == (PHOTOS, 3, 3)
    assert manifest.backbone["name"] == tiny.MODEL
    assert manifest.backbone["weights"] == str(weights)
    assert (manifest.size, manifest.patch_size, manifest.channels) == ((48, 48), 16, 192)
    assert (manifest.options["views"], manifest.options["grid"]) == (tiny.VIEWS, "field")
    tiny.assert_whole(undisturbed)


def test_several_devices_give_the_same_store_as_one(
    photos: Path, weights: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", tiny.spec_of(weights, device="cpu,cpu"))
    assert len(job.stages) == 2
    seen: list[int] = []
    job.run(lambda index, _: seen.append(index))
    assert sorted(seen) == list(range(PHOTOS))
    assert tiny.contents(tmp_path / "store") == tiny.contents(undisturbed)


def test_progress_reports_every_photo_once_with_its_failure(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "03.png").write_text("words")
    seen: list[tuple[int, str | None]] = []
    tiny.prepare(data, tmp_path / "store", spec).run(lambda index, reason: seen.append((index, reason)))
    assert [index for index, _ in seen] == list(range(PHOTOS))
    assert [index for index, reason in seen if reason is not None] == [3]


def test_without_held_out_views_fields_are_the_same(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", spec, stage_one=tiny.denoising(held_out=0))
    job.run()
    assert "heldout_r2" not in job.store[0].record
    for index in range(PHOTOS):
        theirs = FeatureStore.open(undisturbed)[index].field
        torch.testing.assert_close(job.store[index].field, theirs, rtol=2.0**-10, atol=1e-3)


# --- photos that cannot be used ---


def bad_photos(data: Path) -> dict[str, str]:
    """Damage three of the photos and return a part of the expected reason for each."""
    (data / "00.png").write_text("words")
    (data / "04.png").write_bytes(b"")
    Image.new("RGB", (9, 40)).save(data / "05.png")
    return {"00.png": "not an image file", "04.png": "0 bytes", "05.png": "less than one patch"}


def test_unusable_photos_are_recorded_and_the_others_fitted(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    expected = bad_photos(data)
    job = tiny.prepare(data, tmp_path / "store", spec)
    job.run()
    reasons = {job.dataset[index].id: reason for index, reason in job.store.failed().items()}
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]
        with pytest.raises(StoreError, match=f"{name} failed: .*{part}"):
            job.store[name]
    tiny.assert_whole(job.store, failed=3)
    whole = tiny.fields(undisturbed)
    assert tiny.fields(job.store) == {name: whole[name] for name in whole if name not in expected}


def test_failed_photos_are_not_retried_by_default(
    photos: Path, spec: BackboneSpec, tmp_path: Path, passes: Passes
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    bad_photos(data)
    tiny.prepare(data, tmp_path / "store", spec).run()
    assert passes.count == (PHOTOS - 3) * tiny.PASSES
    again = tiny.prepare(data, tmp_path / "store", spec)
    estimate = again.estimate()
    assert (estimate.done, estimate.failed, estimate.left) == (PHOTOS - 3, 3, 0)
    again.run()
    assert passes.count == (PHOTOS - 3) * tiny.PASSES


def test_retry_failed_fits_failed_photos_again(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path, passes: Passes
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    bad_photos(data)
    tiny.prepare(data, tmp_path / "store", spec).run()
    kept = tiny.fields(tmp_path / "store")
    for name in ("00.png", "04.png", "05.png"):
        shutil.copy(photos / name, data / name)
    passes.count = 0
    again = tiny.prepare(data, tmp_path / "store", spec, retry_failed=True)
    again.run()
    assert passes.count == 3 * tiny.PASSES
    tiny.assert_whole(tmp_path / "store")
    assert tiny.fields(tmp_path / "store").items() >= kept.items()
    assert tiny.fields(tmp_path / "store") == tiny.fields(undisturbed)


def test_run_finishes_if_all_photos_are_unusable(spec: BackboneSpec, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "data", 4)
    for path in data.iterdir():
        path.write_text("words")
    job = tiny.prepare(data, tmp_path / "store", spec)
    job.run()
    tiny.assert_whole(job.store, failed=4)


def test_strict_stops_at_an_unusable_photo_and_keeps_finished_ones(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path
) -> None:
    data = tiny.write_photos(tmp_path / "data", 20)
    (data / "04.png").write_text("words")
    job = tiny.prepare(data, tmp_path / "store", spec, strict=True, stage_one=tiny.denoising(batch_size=tiny.PASSES))
    with pytest.raises(PhotoError, match="not an image file"):
        job.run()
    assert {0, 1, 2, 3} <= job.store.done()
    assert len(job.store.done()) < 15
    whole = tiny.fields(undisturbed)  # the first photos are the same
    for name, field in tiny.fields(job.store).items():
        assert name not in whole or field == whole[name]
    assert list(job.store.verify()) == []


def test_strict_names_the_photo(spec: BackboneSpec, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "data", 4)
    (data / "02.png").write_bytes(b"")
    with pytest.raises(PhotoError, match=r"02\.png"):
        tiny.prepare(data, tmp_path / "store", spec, strict=True).run()


def test_strict_stops_again_at_the_same_photo(spec: BackboneSpec, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "data", 12)
    (data / "02.png").write_bytes(b"")
    one_by_one = tiny.denoising(batch_size=tiny.PASSES)
    for _ in range(2):
        with pytest.raises(PhotoError, match="0 bytes"):
            tiny.prepare(data, tmp_path / "store", spec, strict=True, stage_one=one_by_one).run()


# --- resuming ---


def test_finished_store_needs_no_forward_pass_and_is_unchanged(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path, passes: Passes
) -> None:
    store = shutil.copytree(undisturbed, tmp_path / "store")
    before = tiny.contents(store)
    job = tiny.prepare(photos, store, spec)
    assert job.store.unfinished() == []
    assert job.estimate() == Estimate(PHOTOS, PHOTOS, 0, 0, 0, 0.0, 6 * 6 * 192 * 2, 0, job.estimate().bytes_free)
    job.run(lambda index, _: pytest.fail(f"photo {index} was done again"))
    assert passes.count == 0
    assert tiny.contents(store) == before


@pytest.mark.parametrize("room", [0, 4, 7])
def test_run_stopped_by_a_full_disk_can_be_resumed(
    photos: Path,
    spec: BackboneSpec,
    undisturbed: Path,
    tmp_path: Path,
    passes: Passes,
    disk_of: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    stop_after(room, photos, tmp_path / "store", spec, disk_of, monkeypatch)
    store = FeatureStore.open(tmp_path / "store")
    assert len(store.done()) == room
    assert store.failed() == {}
    assert list(store.verify()) == []
    kept = tiny.fields(store)

    passes.count = 0
    job = tiny.prepare(photos, tmp_path / "store", spec)
    assert job.estimate().left == PHOTOS - room
    passes.count = 0
    job.run()
    assert passes.count == (PHOTOS - room) * tiny.PASSES
    tiny.assert_whole(tmp_path / "store")
    assert tiny.fields(tmp_path / "store").items() >= kept.items()
    assert tiny.contents(tmp_path / "store") == tiny.contents(undisturbed)


def test_resuming_seals_an_unsealed_shard_without_a_forward_pass(
    photos: Path,
    spec: BackboneSpec,
    undisturbed: Path,
    tmp_path: Path,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise no_room()

    data = tiny.write_photos(tmp_path / "data", 3)  # one shard
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr(FieldArray, "write_shard", refuse)
        tiny.prepare(data, tmp_path / "store", spec).run()
    job = tiny.prepare(data, tmp_path / "store", spec)
    assert job.store.staged() == {0, 1, 2}
    passes.count = 0
    assert job.store.unfinished() == [0]
    assert job.estimate().left == 0
    job.run()
    assert passes.count == 0
    tiny.assert_whole(job.store)
    whole = tiny.fields(undisturbed)
    assert tiny.fields(job.store) == {name: whole[name] for name in ("00.png", "01.png", "02.png")}


def test_run_stopped_by_a_backbone_error_can_be_resumed(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = tiny.denoising(batch_size=tiny.PASSES)
    job = tiny.prepare(photos, tmp_path / "store", spec, stage_one=one_by_one)
    forward, calls = TimmBackbone.forward, 0

    def break_down(self: TimmBackbone, image: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("the device is gone")
        return forward(self, image)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="the device is gone"):
        broken.setattr(TimmBackbone, "forward", break_down)
        job.run()
    assert len(job.store.done()) == 4  # photos in flight are written before the error is raised
    again = tiny.prepare(photos, tmp_path / "store", spec, stage_one=one_by_one)
    again.run()
    assert tiny.fields(again.store) == tiny.fields(undisturbed)


def test_damaged_staged_photo_is_fitted_again(
    photos: Path,
    spec: BackboneSpec,
    undisturbed: Path,
    tmp_path: Path,
    disk_of: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(2, photos, tmp_path / "store", spec, disk_of, monkeypatch)
    path = tmp_path / "store" / layout.staged_key(1)
    path.write_bytes(path.read_bytes()[:-100])
    tiny.prepare(photos, tmp_path / "store", spec).run()
    tiny.assert_whole(tmp_path / "store")
    assert tiny.fields(tmp_path / "store") == tiny.fields(undisturbed)


def test_write_error_during_a_read_reaches_the_caller(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is about the full disk, not about the reader that was busy at that moment."""
    reading = threading.Event()
    read, write = Dataset.read, LocalObjects.write

    def slow(self: Dataset, index: int) -> np.ndarray:
        if index == 4:  # the last one requested while the first is being written
            time.sleep(0.5)
            reading.set()
            time.sleep(0.5)
        return read(self, index)

    def full(self: LocalObjects, key: str, data: bytes, *, durable: bool = True) -> None:
        if key.startswith(layout.STAGED):
            assert reading.wait(20), "the photo is not read ahead"
            raise no_room()
        write(self, key, data, durable=durable)

    one_by_one = tiny.denoising(batch_size=tiny.PASSES)
    job = tiny.prepare(photos, tmp_path / "store", spec, stage_one=one_by_one, decoders=1)
    monkeypatch.setattr(Dataset, "read", slow)
    monkeypatch.setattr(LocalObjects, "write", full)
    with pytest.raises(OSError, match="No space left"):
        job.run()


# --- concurrent writers ---


def test_error_for_a_second_writer_names_host_and_process(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    import socket

    job = tiny.prepare(photos, tmp_path / "store", spec)
    other = FeatureStore.open(tmp_path / "store", writable=True)
    with other.writer(1), pytest.raises(StoreError) as refusal:
        job.run()
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refusal.value)
    assert list(job.store.verify()) == []
    again = tiny.prepare(photos, tmp_path / "store", spec)  # the other writer has ended and left no lease
    again.run()
    tiny.assert_whole(again.store)


# --- stores and options that do not match ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_one": tiny.denoising(views=9)}, "option views: the store has 8, this run has 9"),
        ({"stage_one": tiny.denoising(seed=1)}, "option seed: the store has 0, this run has 1"),
        ({"stage_one": tiny.denoising(size=64)}, "size: the store has 48 x 48, this run has 64 x 64"),
        ({"stage_one": tiny.denoising(resolution=5)}, "field: the store has 6 x 6, this run has 5 x 5"),
        ({"stage_one": tiny.denoising(smoothness=0.5)}, "option smoothness: the store has 0.01, this run has 0.5"),
        ({"grid": "patch"}, "option grid: the store has field, this run has patch"),
        ({"images_per_shard": 4}, "images_per_shard: the store has 3, this run has 4"),
    ],
)
def test_store_with_other_options_is_rejected_with_both_values(
    photos: Path, spec: BackboneSpec, undisturbed: Path, changes: dict[str, Any], message: str
) -> None:
    before = tiny.contents(undisturbed)
    with pytest.raises(StoreError, match=re.escape(message)):
        tiny.prepare(photos, undisturbed, spec, **changes)
    assert tiny.contents(undisturbed) == before


def test_a_store_of_other_weights_is_refused(photos: Path, spec: BackboneSpec, undisturbed: Path) -> None:
    with pytest.raises(StoreError, match=r"weights: the store has .*this run has random"):
        tiny.prepare(photos, undisturbed, tiny.spec_of(Path("random")))


def test_a_store_of_other_layers_is_refused(photos: Path, weights: Path, undisturbed: Path) -> None:
    with pytest.raises(StoreError, match=r"backbone layer: the store has"):
        tiny.prepare(photos, undisturbed, tiny.spec_of(weights, layer=-2))


def test_a_store_of_other_photos_is_refused(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    shutil.copy(data / "00.png", data / "one more.png")
    with pytest.raises(StoreError, match=rf"images: the store has {PHOTOS} .* this run has {PHOTOS + 1}"):
        tiny.prepare(data, undisturbed, spec)


def test_store_with_another_artifact_is_rejected(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    def job(artifact: Tensor | None) -> FitJob:
        options = FitOptions(images_per_shard=3)
        return FitJob.prepare(open_dataset(photos), tmp_path / "store", spec, tiny.denoising(), options, artifact)

    known = torch.randn(3, 3, 192, generator=torch.Generator().manual_seed(0))
    job(known)
    for other in (None, known + 1):
        with pytest.raises(StoreError, match="option artifact"):
            job(other)
    job(known).run()
    tiny.assert_whole(tmp_path / "store")


def test_options_that_do_not_affect_fields_may_differ(
    photos: Path, spec: BackboneSpec, undisturbed: Path, weights: Path, tmp_path: Path
) -> None:
    """Held-out views, batch size, number of decoders, strict mode, and the path of the same weights."""
    copied = Path(shutil.copy(weights, tmp_path / "copy.safetensors"))
    store = shutil.copytree(undisturbed, tmp_path / "store")
    stage_one = tiny.denoising(held_out=3, batch_size=5)
    job = tiny.prepare(photos, store, tiny.spec_of(copied), stage_one=stage_one, decoders=1, strict=True)
    assert job.store.unfinished() == []


def test_an_empty_data_set_is_refused(spec: BackboneSpec, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="nowhere: no photos to fit"):
        FitJob.prepare(Dataset("nowhere", ()), tmp_path / "store", spec, tiny.denoising(), FitOptions())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, "workers applies to engine 'ray' only"),
        ({"ray_address": "auto"}, "ray_address applies to engine 'ray' only"),
        ({"worker_gpus": 1.0}, "worker_gpus applies to engine 'ray' only"),
        ({"engine": "spark"}, "engine must be 'local' or 'ray', got 'spark'"),
        ({"grid": "fine"}, "grid must be 'field' or 'patch', got 'fine'"),
        ({"images_per_shard": 0}, "images_per_shard must be at least 1, got 0"),
        ({"decoders": 0}, "decoders must be at least 1, got 0"),
        ({"engine": "ray", "workers": 0}, "workers must be at least 1, got 0"),
        ({"engine": "ray", "worker_cpus": float("nan")}, "worker_cpus must be at least 0, got nan"),
    ],
)
def test_invalid_options_are_rejected_before_the_store_is_created(
    photos: Path, spec: BackboneSpec, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        tiny.prepare(photos, tmp_path / "store", spec, **options)
    assert not (tmp_path / "store").exists()


def test_other_methods_are_rejected_before_the_store_is_created(
    photos: Path, spec: BackboneSpec, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="exact method for data sets, got 'neural-field'"):
        tiny.prepare(photos, tmp_path / "store", spec, stage_one=tiny.denoising(method="neural-field"))
    assert not (tmp_path / "store").exists()


# --- the estimate ---


def test_the_estimate_counts_photos_passes_and_bytes(
    photos: Path,
    spec: BackboneSpec,
    tmp_path: Path,
    disk_of: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimate = tiny.prepare(photos, tmp_path / "store", spec).estimate()
    assert (estimate.photos, estimate.done, estimate.failed, estimate.left) == (PHOTOS, 0, 0, PHOTOS)
    assert estimate.passes == PHOTOS * 9
    assert estimate.image_bytes == 6 * 6 * 192 * 2
    assert estimate.bytes_needed == (PHOTOS + 3) * 6 * 6 * 192 * 2  # three exist twice while their shard is sealed
    assert estimate.seconds > 0
    assert f"{PHOTOS} photos, {PHOTOS} to do: 72 forward passes" in str(estimate)
    assert "152.1 kB" in str(estimate)

    stop_after(5, photos, tmp_path / "store", spec, disk_of, monkeypatch)
    later = tiny.prepare(photos, tmp_path / "store", spec).estimate()
    assert (later.done, later.left, later.passes) == (5, 3, 27)
    assert later.bytes_needed < estimate.bytes_needed
    assert "5 already done, 3 to do" in str(later)


def test_estimated_bytes_match_the_size_of_the_store(
    undisturbed: Path, photos: Path, spec: BackboneSpec, tmp_path: Path
) -> None:
    estimate = tiny.prepare(photos, tmp_path / "store", spec).estimate()
    field = sum(path.stat().st_size for path in (undisturbed / "field").rglob("*") if path.is_file())
    assert field == pytest.approx(PHOTOS * estimate.image_bytes, rel=0.05)


@pytest.mark.parametrize(("grid", "nodes"), [("field", 36), ("patch", 9)])
def test_the_patch_grid_takes_a_quarter_of_the_bytes(
    photos: Path, spec: BackboneSpec, tmp_path: Path, grid: str, nodes: int
) -> None:
    assert tiny.prepare(photos, tmp_path / "store", spec, grid=grid).estimate().image_bytes == nodes * 192 * 2


def test_estimate_for_two_devices_counts_an_open_shard_for_each(photos: Path, weights: Path, tmp_path: Path) -> None:
    spec = tiny.spec_of(weights, device="cpu,cpu")
    estimate = tiny.prepare(photos, tmp_path / "store", spec).estimate()
    assert estimate.bytes_needed == (PHOTOS + 6) * estimate.image_bytes


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # pyright: ignore


def test_error_for_a_small_disk_names_needed_and_free_bytes(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", spec)
    needed = job.estimate().bytes_needed
    disk_with(monkeypatch, needed)
    job.estimate().require_room()
    disk_with(monkeypatch, needed - 1)
    assert job.estimate().bytes_free == needed - 1
    message = r"not enough disk space: 8 photos, 8 to do: .*, 152\.1 kB \(152\.1 kB free\)\. Free some"
    with pytest.raises(FitError, match=message):
        job.estimate().require_room()


def test_finished_store_needs_no_disk_space(
    photos: Path, spec: BackboneSpec, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_with(monkeypatch, 0)
    tiny.prepare(photos, undisturbed, spec).estimate().require_room()


def test_suggested_patch_grid_works_after_too_little_disk_space(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_with(monkeypatch, 50_000)  # enough for the patch grid's 38 kB
    with pytest.raises(FitError, match="--grid patch"):
        tiny.prepare(photos, tmp_path / "store", spec).estimate().require_room()
    tiny.prepare(photos, tmp_path / "store", spec, grid="patch")


def test_free_space_of_an_object_store_is_unknown(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/store"
    job = FitJob.prepare(open_dataset(photos), url, spec, tiny.denoising(), FitOptions(images_per_shard=3))
    estimate = job.estimate()
    assert estimate.bytes_free is None
    assert "free" not in str(estimate)
    estimate.require_room()
    job.run()
    tiny.assert_whole(job.store)


def test_free_space_is_known_before_the_folder_exists(photos: Path, spec: BackboneSpec, tmp_path: Path) -> None:
    estimate = tiny.prepare(photos, tmp_path / "not" / "there" / "yet", spec).estimate()
    assert estimate.bytes_free is not None and estimate.bytes_free > 0


# --- faulty backbones ---


class Patches(nn.Module):
    """One convolution, 5 channels, patches of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 5, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images)


def stage_of(module: nn.Module, **options: Any) -> StageOne:
    backbone: Backbone = dv.load_backbone(module, patch_size=8, default_size=24)
    values: dict[str, Any] = {"views": 8, "held_out": 1, **options}
    return StageOne(backbone, DenoiseOptions(**values))


def job_of(stages: list[StageOne], data: Dataset, folder: Path, **options: Any) -> FitJob:
    """A job for stages with backbones that no `BackboneSpec` describes."""
    values: dict[str, Any] = {"images_per_shard": 3, **options}
    running = FitOptions(**values)
    store = FeatureStore.create(folder, manifest_of(stages[0], running), [item.id for item in data])
    return FitJob(data, store, stages, BackboneSpec(), running)


def test_field_beyond_float16_fails_only_its_photo(photos: Path, tmp_path: Path) -> None:
    class Loud(Patches):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            loud = images.amax((1, 2, 3)) < -1.5
            out[loud] = out[loud] * 1e6
            return out

    data = shutil.copytree(photos, tmp_path / "data")
    Image.new("RGB", (80, 60)).save(data / "04.png")
    dataset, stage = open_dataset(data), stage_of(Loud())
    job = job_of([stage], dataset, tmp_path / "store")
    job.run()
    store = job.store
    assert store.failed().keys() == {4}
    assert "expected at most 65504 for float16" in store.failed()[4]
    tiny.assert_whole(store, failed=1)


def test_non_finite_held_out_features_do_not_stop_other_photos(photos: Path, tmp_path: Path) -> None:
    class Poisoned(Patches):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            if len(images) == 9 and images.amax() < -1.5:
                out[-1] = torch.nan  # the only held-out view of this photo
            return out

    data = shutil.copytree(photos, tmp_path / "data")
    Image.new("RGB", (80, 60)).save(data / "04.png")
    dataset, stage = open_dataset(data), stage_of(Poisoned(), batch_size=9)
    job = job_of([stage], dataset, tmp_path / "store")
    job.run()
    store = job.store
    assert store.done() | store.failed().keys() == set(range(PHOTOS))
    assert store.done() >= set(range(PHOTOS)) - {4}


def test_failure_of_one_device_soon_stops_the_others(tmp_path: Path) -> None:
    broken = threading.Event()

    class Breaking(Patches):
        armed = False

        def forward(self, images: Tensor) -> Tensor:
            if self.armed:
                broken.set()
                raise RuntimeError("this device is gone")
            return super().forward(images)

    class Waiting(Patches):
        armed = False

        def forward(self, images: Tensor) -> Tensor:
            if self.armed:
                broken.wait(20)
                time.sleep(0.02)
            return super().forward(images)

    dataset = open_dataset(tiny.write_photos(tmp_path / "data", 60))
    modules = (Waiting(), Breaking())
    stages = [stage_of(module, batch_size=9) for module in modules]
    job = job_of(stages, dataset, tmp_path / "store", images_per_shard=1, decoders=1)
    for module in modules:
        module.armed = True
    with pytest.raises(RuntimeError, match="this device is gone"):
        job.run()
    assert len(job.store.done()) < 30
    assert list(job.store.verify()) == []


# --- precision ---


def test_int8_store_is_smaller_and_close_to_float16(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path
) -> None:
    job = tiny.prepare(photos, tmp_path / "store", spec, precision="int8")
    assert job.estimate().image_bytes < 0.6 * FeatureStore.open(undisturbed).manifest.image_bytes
    job.run()
    tiny.assert_whole(job.store)
    for index in range(PHOTOS):
        exact, found = FeatureStore.open(undisturbed)[index].field, job.store[index].field
        assert torch.nn.functional.cosine_similarity(exact, found, dim=-1).min() > 0.999
    with pytest.raises(StoreError, match=r"dtype: the store has int8, this run has float16"):
        tiny.prepare(photos, tmp_path / "store", spec)


def test_photos_with_too_large_int8_error_fail_with_a_reason(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("denoising_vit.store.fields.LEAST_COSINE", 1.1)
    job = tiny.prepare(photos, tmp_path / "store", spec, precision="int8")
    job.run()
    tiny.assert_whole(job.store, failed=PHOTOS)
    assert all(reason.startswith("the int8 values of a patch have") for reason in job.store.failed().values())


# --- as on an accelerator: views rendered ahead, photos solved in groups ---


def test_solving_in_groups_matches_solving_one_by_one(
    photos: Path, spec: BackboneSpec, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []

    def watched(ready: Sequence[Ready]) -> list[Done]:
        groups.append(len(ready))
        return finish_together(ready)

    monkeypatch.setattr(StageOne, "on_cpu", property(lambda _: False))
    monkeypatch.setattr("denoising_vit.fit.local._SOLVED", 3)
    monkeypatch.setattr("denoising_vit.fit.local.finish_together", watched)
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    broken = data / "04.png"
    broken.write_bytes(b"no photo")
    reasons: dict[int, str | None] = {}
    tiny.prepare(data, tmp_path / "store", spec).run(lambda index, reason: reasons.update({index: reason}))
    # The failed photo ends its group: 0 1 2, then 3 (solved alone, so not recorded) and the failed 4, then 5 6 7.
    assert groups == [3, 3]
    assert list(reasons) == list(range(PHOTOS)) and [index for index, reason in reasons.items() if reason] == [4]
    found, expected = FeatureStore.open(tmp_path / "store"), FeatureStore.open(undisturbed)
    for index in sorted(found.done()):
        torch.testing.assert_close(found[index].field, expected[index].field, rtol=1e-3, atol=1e-3)


def test_compile_is_called_once_and_only_on_request(
    photos: Path, spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _self, *, dynamic: asked.append(dynamic))
    tiny.prepare(photos, tmp_path / "plain", spec)
    assert asked == []
    tiny.prepare(photos, tmp_path / "store", spec, compiled=True)
    assert asked == [False]


def test_all_leases_end_even_if_ending_one_fails() -> None:
    ended: list[int] = []

    def leases(shard: int) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.callback(ended.append, shard)
        if shard == 1:
            stack.callback(lambda: (_ for _ in ()).throw(OSError("no longer reachable")))
        return stack

    run: Any = None
    with pytest.raises(OSError, match="no longer reachable"), _Writers(run, hold=False) as writers:
        writer: Any = None
        writers._open = {shard: _OpenShard(writer, leases(shard), 1) for shard in range(3)}
    assert sorted(ended) == [0, 1, 2]
