"""Precision of a store, its shards byte for byte, and images that are held until their shard is sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from torch.nn.functional import cosine_similarity
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from denoising_vit.errors import FieldError, StoreError
from denoising_vit.store import FeatureStore, Manifest, StoreDataset
from denoising_vit.store.fields import FieldArray, decode, encode, shard_parts, stored_field
from denoising_vit.store.objects import LocalObjects

IDS = [f"{number}.jpg" for number in range(5)]
SHAPE = (3, 4, 7)


def manifest_of(dtype: Any = "float16", shape: tuple[int, int, int] = SHAPE) -> Manifest:
    return Manifest(
        backbone={"name": "vit"},
        plan="abc",
        size=(42, 56),
        patch_size=14,
        stride=14,
        grid=(3, 4),
        field=shape[:2],
        channels=shape[2],
        dtype=dtype,
        images_per_shard=3,
    )


def field_of(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)) * 10.0**index


def filled(folder: Path, dtype: Any) -> FeatureStore:
    """The first shard sealed without its second image, which failed; of the second shard, one image staged."""
    store = FeatureStore.create(folder, manifest_of(dtype), IDS)
    with store.writer(0) as writer:
        writer.put(0, field_of(0), {"heldout_r2": 0.5})
        writer.fail(1, "no luck")
        writer.put(2, field_of(2))
        assert writer.finish()
    with store.writer(1) as writer:
        writer.put(4, field_of(4))
    return store


# --- int8 ---


def test_int8_by_hand() -> None:
    field = torch.tensor([[[127.0, -63.5, 0.0], [-127.0, 10.25, 0.0], [64.4, 10.375, 0.0]]])  # (1, 3, 3)
    stored = stored_field(field, manifest_of("int8", (1, 3, 3)), "a.jpg")
    assert stored.scale is not None and stored.values.dtype == np.int8
    assert stored.scale.tolist() == [1.0, 0.5, 0.0]
    assert stored.values.tolist() == [[[127, -127, 0], [-127, 20, 0], [64, 21, 0]]]  # 20.5 is rounded to even
    assert stored.floats.tolist() == [[[127.0, -63.5, 0.0], [-127.0, 10.0, 0.0], [64.0, 10.5, 0.0]]]


def test_patch_with_too_low_an_int8_cosine_is_refused() -> None:
    """0.9 is less than half of the first channel's step, 2: (0.9, 1) becomes (0, 1)."""
    field = torch.tensor([[[254.0, 0.0], [0.9, 1.0]]])
    with pytest.raises(FieldError, match=r"a\.jpg: the int8 values of a patch have a cosine of 0\.743\d .*0\.999"):
        stored_field(field, manifest_of("int8", (1, 2, 2)), "a.jpg")


def test_memory_layout_of_a_field_does_not_matter() -> None:
    field = field_of(0)
    moved = field.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not moved.is_contiguous()
    one, other = (stored_field(each, manifest_of("int8"), "a.jpg") for each in (field, moved))
    assert encode(one, 0, {}) == encode(other, 0, {})


def test_patches_of_zeros_are_accepted() -> None:
    stored = stored_field(torch.zeros(SHAPE), manifest_of("int8"), "a.jpg")
    assert not stored.floats.any() and stored.exists


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_int8_refuses_values_outside_float16(value: float) -> None:
    field = field_of(0)
    field[1, 2, 3] = value
    with pytest.raises(FieldError, match=r"not finite|at most 65504"):
        stored_field(field, manifest_of("int8"), "a.jpg")


def test_int8_store_is_read_as_floats(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", "int8")
    reader = FeatureStore.open(tmp_path / "store")
    assert reader.done() == {0, 2, 4} and list(reader.verify()) == []
    for index in (0, 2, 4):
        expected = stored_field(field_of(index), store.manifest, "a").floats
        found = reader[index]
        assert found.field.dtype == torch.float32 and found.semantic.shape == SHAPE
        assert torch.equal(found.field, torch.from_numpy(expected))
        assert cosine_similarity(found.field, field_of(index), dim=-1).min() > 0.999
    assert reader[0].record == {"id": "0.jpg", "heldout_r2": 0.5}
    assert torch.equal(StoreDataset(reader)[1][1], reader[2].field)
    for path in reader.export(tmp_path / "npy"):
        assert np.load(path).dtype == np.float32
    raw = zarr.open_array(LocalStore(tmp_path / "store" / "field"), mode="r")
    assert raw.dtype == np.int8 and (np.asarray(raw[1]) == -128).all()
    assert store.manifest.image_bytes == 3 * 4 * 7 + 4 * 7


def test_a_reopened_shard_of_int8_keeps_its_values(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", "int8")
    before = store.read_stored(2)[0]
    assert store.retry_failed() == [1]
    assert store.staged() == {0, 2, 4}
    with store.writer(0) as writer:
        writer.put(1, field_of(1))
        assert writer.finish()
    after = store.read_stored(2)[0]
    assert np.array_equal(before.values, after.values) and before.scale is not None and after.scale is not None
    assert np.array_equal(before.scale, after.scale)


def test_a_marker_without_scales_is_damaged(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", "int8")
    path = tmp_path / "store" / "sealed" / "000000.json"
    content = json.loads(path.read_text())
    del content["scales"], content["crc32"]
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"sealed/000000\.json is damaged \(scales of images are missing"):
        FeatureStore.open(store.url)[0]


def test_a_staged_image_of_int8_has_a_checksum_over_its_scale(tmp_path: Path) -> None:
    manifest = manifest_of("int8")
    data = bytearray(encode(stored_field(field_of(0), manifest, "a"), 0, {"id": "a"}))
    assert decode(bytes(data), manifest, "a")[1] == {"id": "a"}
    for place in (-1, -3 * 4 * 7 - 1):  # safetensors sorts by dtype: the scale and the field, in either order
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(StoreError, match="checksum"):
            decode(bytes(damaged), manifest, "a")


@pytest.mark.parametrize(("dtype", "version"), [("float16", 1), ("float32", 1), ("int8", 2)])
def test_int8_stores_have_a_newer_format_version(tmp_path: Path, dtype: str, version: int) -> None:
    store = FeatureStore.create(tmp_path / "store", manifest_of(dtype), IDS)
    content = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (content["version"], content["dtype"]) == (version, dtype)
    assert FeatureStore.open(store.url).manifest == store.manifest
    other = manifest_of("float32" if dtype == "int8" else "int8")
    assert any(line.startswith("dtype: ") for line in store.manifest.mismatch(other))


# --- shards ---


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_shards_match_those_of_zarr_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).uniform(-90, 90, (5, *SHAPE)).astype(dtype)
    missing = -128 if dtype == "int8" else np.nan
    values[1] = missing
    array = zarr.create_array(
        LocalStore(tmp_path),
        shape=values.shape,
        chunks=(1, *SHAPE),
        shards=(3, *SHAPE),
        dtype=dtype,
        fill_value=missing,
        compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": False},
    )
    array[0:3], array[3:5] = values[0:3], values[3:5]
    ours = [shard_parts({0: values[0], 2: values[2]}, 0, 3), shard_parts({3: values[3], 4: values[4]}, 3, 3)]
    assert [b"".join(parts) for parts in ours] == [(tmp_path / f"c/{shard}/0/0/0").read_bytes() for shard in (0, 1)]


# --- held images ---


def test_held_images_are_written_once_and_sealed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    write = LocalObjects.write

    def noted(self: LocalObjects, key: str, data: bytes | list[bytes], *, durable: bool = True) -> None:
        keys.append(key)
        write(self, key, data, durable=durable)

    store = FeatureStore.create(tmp_path / "store", manifest_of(), IDS)
    monkeypatch.setattr(LocalObjects, "write", noted)
    with store.writer(0) as writer:
        for index in (0, 1, 2):
            assert writer.missing() == list(range(index, 3))
            writer.hold(index, field_of(index), {"heldout_r2": 0.25})
        assert store.done() == set()
        assert writer.finish()
    assert [key for key in keys if not key.startswith("leases")] == ["field/c/0/0/0/0", "sealed/000000.json"]
    assert store.done() == {0, 1, 2} and list(store.verify()) == []
    assert store[1].record == {"id": "1.jpg", "heldout_r2": 0.25}
    assert torch.equal(store[2].field, field_of(2).half().float())


def test_held_images_of_an_incomplete_shard_are_staged(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", manifest_of(), IDS)
    with store.writer(0) as writer:
        writer.put(0, field_of(0))
        writer.hold(1, field_of(1))
        assert not writer.finish()
        assert store.staged() == {0, 1}
        writer.hold(2, field_of(2))
        writer.flush()
        assert store.staged() == {0, 1, 2}
    with store.writer(1) as writer:
        writer.hold(3, field_of(3))
    assert store.staged() == {0, 1, 2, 3}  # leaving the block stages held images


def test_held_images_survive_an_error_in_their_block(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", manifest_of(), IDS)
    with pytest.raises(RuntimeError, match="the device is gone"), store.writer(1) as writer:
        writer.hold(3, field_of(3))
        raise RuntimeError("the device is gone")
    assert store.done() == {3}


def test_full_disk_while_sealing_keeps_held_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore.create(tmp_path / "store", manifest_of(), IDS)

    def full(_self: FieldArray, _shard: int, _fields: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FieldArray, "write_shard", full)
    with pytest.raises(OSError, match="No space left"), store.writer(1) as writer:
        writer.hold(3, field_of(3))
        writer.hold(4, field_of(4))
        writer.finish()
    assert store.done() == {3, 4} and store.sealed() == set()


def test_held_image_replaces_a_staged_one(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", "float16")
    with store.writer(1) as writer:
        writer.hold(4, field_of(1))
        writer.hold(3, field_of(3))
        assert writer.finish()
    assert torch.equal(store[4].field, field_of(1).half().float())


def test_a_held_record_must_be_json(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", manifest_of(), IDS)
    with store.writer(0) as writer, pytest.raises(StoreError, match="must consist of JSON values"):
        writer.hold(0, field_of(0), {"x": object()})
