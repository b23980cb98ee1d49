"""Stores after power cuts, and changes by other processes or by hand: no stale data, every change detected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from denoising_vit.errors import StoreError
from denoising_vit.files import KEY
from denoising_vit.store import FeatureStore, Manifest
from denoising_vit.store.objects import LocalObjects

SHAPE = (3, 4, 5)
IDS = ["a.jpg", "b.jpg", "c.jpg"]
MANIFEST = Manifest(
    backbone={"name": "vit", "fingerprint": [float(value) for value in np.linspace(-1, 1, 128)]},
    plan="abc",
    options={"views": 64},
    size=(42, 56),
    patch_size=14,
    stride=14,
    grid=(3, 4),
    field=SHAPE[:2],
    channels=SHAPE[2],
    images_per_shard=2,
)


def field_of(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with a sealed first shard that contains one failed image, and a second shard with one staged image."""
    store = FeatureStore.create(tmp_path / "store", MANIFEST, IDS)
    with store.writer(0) as writer:
        writer.put(0, field_of(0), {"heldout_r2": 0.5})
        writer.fail(1, "no luck")
        assert writer.finish()
    with store.writer(1) as writer:
        writer.put(2, field_of(2), {"heldout_r2": 0.75, "more": {10: 1, 9: 2}})
    assert list(store.verify()) == []
    return tmp_path / "store"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files and folders in the order in which they are flushed to disk, with their names at that time."""
    done, names = os.fsync, []

    def sync(file: int) -> None:
        names.append(Path(f"/proc/self/fd/{file}").readlink())
        done(file)

    monkeypatch.setattr(os, "fsync", sync)
    return names


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_files_of_a_store_are_flushed_in_order(tmp_path: Path, synced: list[Path]) -> None:
    root = tmp_path / "new" / "store"
    store = FeatureStore.create(root, MANIFEST, IDS)
    manifest = next(place for place, path in enumerate(synced) if path.name.startswith(".manifest.json."))
    before, after = synced[:manifest], synced[manifest + 1 :]
    assert {tmp_path, tmp_path / "new", root, root / "field", root / "field" / "zarr.json"} <= set(before)
    assert any(path.name.startswith(".ids.json.") for path in before)  # the manifest implies that the other files exist
    assert after[0] == root
    synced.clear()
    with store.writer(0) as writer:
        writer.put(0, field_of(0))
        writer.put(1, field_of(1))
        assert root / "staged" in synced
        writer.finish()
    folder, marker = root / "field/c/0/0/0", synced.index(root / "sealed")
    shard = next(place for place, path in enumerate(synced) if path.parent == folder and path.name.startswith(".0."))
    assert {folder.parent, *folder.parent.parents[:3]} <= set(synced[:marker])  # folders created for the shard
    assert shard < synced.index(folder) < marker
    assert root in synced[shard:]


def test_store_with_an_empty_manifest_can_be_created_again(tmp_path: Path) -> None:
    """As after a power cut before the manifest was flushed; no image is finished."""
    FeatureStore.create(tmp_path, MANIFEST, IDS)
    (tmp_path / "manifest.json").write_bytes(b"")
    with pytest.raises(
        StoreError, match=r"manifest\.json is empty, possibly because of a power cut.*the same `dvit fit`"
    ):
        FeatureStore.open(tmp_path)
    assert not FeatureStore.exists(tmp_path)
    assert FeatureStore.create_or_open(tmp_path, MANIFEST, IDS).unfinished() == [0, 1]
    assert FeatureStore.open(tmp_path).ids == IDS


def test_empty_manifest_with_finished_images_changes_no_files(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=r"manifest\.json is empty.*otherwise fit into a new folder"):
        FeatureStore.create_or_open(folder, MANIFEST, IDS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("name", ["field/photo.png", "ids.json"])
def test_unrelated_files_with_names_of_a_store_are_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"theirs")
    with pytest.raises(StoreError, match=r"photo\.png|ids\.json lists other images"):
        FeatureStore.create(tmp_path, MANIFEST, IDS)
    assert path.read_bytes() == b"theirs"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("reported", [True, False], ids=["files", "object store"])
def test_open_reader_notices_that_a_shard_was_sealed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reported: bool
) -> None:
    if not reported:  # object stores do not report that an object was rewritten
        monkeypatch.setattr(LocalObjects, "stamp", lambda _self, _key: ())
    reader = FeatureStore.open(folder)
    with pytest.raises(StoreError, match=r"b\.jpg failed: no luck"):
        reader[1]
    writing = FeatureStore.open(folder, writable=True)
    assert writing.retry_failed() == [1]
    assert reader[0].record["heldout_r2"] == 0.5  # staged in between
    with writing.writer(0) as writer:
        writer.put(1, field_of(1), {"heldout_r2": 0.25})
        assert writer.finish()
    assert reader[1].record["heldout_r2"] == 0.25
    assert torch.equal(reader[1].field, field_of(1).half().float())
    assert reader.failed() == {}


def in_marker(folder: Path) -> None:
    path = folder / "sealed" / "000000.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))


def in_reason_of_marker(folder: Path) -> None:
    path = folder / "sealed" / "000000.json"
    path.write_text(path.read_text().replace("no luck", "bad luck"))


def in_staged(folder: Path) -> None:
    path = folder / "staged" / "00000002.safetensors"
    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.99"))


def in_failed(folder: Path) -> None:
    path = folder / "failed" / "00000001.json"
    path.write_text(path.read_text().replace("no luck", "bad luck"))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (in_marker, "sealed/000000.json"),
        (in_reason_of_marker, "sealed/000000.json"),
        (in_staged, "staged/00000002.safetensors"),
        (in_failed, "failed/00000001.json"),
    ],
)
def test_verify_detects_a_changed_record(folder: Path, change: Callable[[Path], None], where: str) -> None:
    change(folder)
    problems = list(FeatureStore.open(folder).verify())
    assert [problem.where for problem in problems] == [where]
    assert "its checksum does not match" in problems[0].what


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"views": 64', '"views": 32'))
    with pytest.raises(StoreError, match=r"damaged manifest .*checksum does not match"):
        FeatureStore.open(folder)


def test_stores_of_earlier_releases_without_checksums_are_readable(folder: Path) -> None:
    for name in ("manifest.json", "sealed/000000.json", "failed/00000001.json"):
        content = json.loads((folder / name).read_text())
        del content["crc32"]
        (folder / name).write_text(json.dumps(content))
    path = folder / "staged" / "00000002.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    del head["record"]["crc32"]
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(data), {KEY: json.dumps(head)}))
    store = FeatureStore.open(folder)
    assert list(store.verify()) == []
    assert store[2].record == {"id": "c.jpg", "heldout_r2": 0.75, "more": {"10": 1, "9": 2}}
