"""Reading a store: single images, damage, exports, and training data in shuffled order."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.errors import StoreError
from denoising_vit.store import FeatureStore, Manifest, MissingImageError, ShardSampler, StoreDataset
from denoising_vit.store.passes import file_names

SHAPE = (3, 4, 5)
IDS = [f"photo{index}.jpg" for index in range(7)]


def field_of(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)).half().float()


def make(folder: Path, ids: list[str] = IDS, per_shard: int = 2) -> FeatureStore:
    manifest = Manifest(
        backbone={"name": "vit"}, plan="abc", size=(28, 42), patch_size=14, stride=14, grid=(2, 3), field=(3, 4),
        channels=5, images_per_shard=per_shard,
    )  # fmt: skip
    return FeatureStore.create(folder, manifest, ids)


def fill(store: FeatureStore, fail: tuple[int, ...] = (), leave: tuple[int, ...] = ()) -> FeatureStore:
    """Writes all images except those in `fail` and `leave`; shards with an image left out stay unsealed."""
    for shard in range(store.manifest.shards):
        with store.writer(shard) as writer:
            for index in writer.images:
                if index in fail:
                    writer.fail(index, f"no luck with {index}")
                elif index not in leave:
                    writer.put(index, field_of(index), {"heldout_r2": 0.5})
            writer.finish()
    return store


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Shards 0 (1 failed), 2 and 3 sealed, shard 1 without image 2."""
    return fill(make(tmp_path / "store"), fail=(1,), leave=(2,))


@pytest.fixture
def whole(tmp_path: Path) -> FeatureStore:
    return fill(make(tmp_path / "whole"))


def path_in(store: FeatureStore, key: str) -> Path:
    return Path(store.url) / key


# --- single images ---


def test_image_by_index_and_by_id_is_the_same(store: FeatureStore) -> None:
    for index in (0, 3, 6):
        by_index, by_id = store[index], store[IDS[index]]
        assert torch.equal(by_index.field, field_of(index))
        assert torch.equal(by_id.field, by_index.field)
        assert (by_id.index, by_id.id) == (index, IDS[index])
        assert by_id.record == {"id": IDS[index], "heldout_r2": 0.5}
        assert by_id.field.dtype == torch.float32


def test_semantic_and_sample_match_the_decomposition(store: FeatureStore) -> None:
    nothing = torch.zeros(2, 3, 5)
    expected = Decomposition(field_of(0), nothing, nothing, size=(28, 42), patch_size=14, stride=14)
    coords = torch.rand(11, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(store[0].semantic, expected.semantic)
    assert store[0].semantic.shape == (2, 3, 5)
    assert torch.allclose(store[0].sample(coords), expected.sample(coords))
    assert torch.allclose(store[0].sample(expected.coords), store[0].semantic)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nobody.jpg", r"unknown image 'nobody\.jpg'"),
        (7, "no image 7; expected an index from 0 to 6"),
        (-1, "no image -1"),
        (1, r"photo1\.jpg failed: no luck with 1"),
        ("photo2.jpg", r"photo2\.jpg is not finished yet"),
    ],
)
def test_missing_image_raises_a_key_error_with_the_reason(store: FeatureStore, image: int | str, message: str) -> None:
    with pytest.raises(MissingImageError, match=message) as caught:
        store[image]
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, StoreError)
    assert str(caught.value).startswith(store.url)  # without the quotes that a KeyError adds


def test_failed_image_of_an_unsealed_shard_gives_its_reason(tmp_path: Path) -> None:
    store = fill(make(tmp_path / "store"), fail=(2,), leave=(3,))
    with pytest.raises(MissingImageError, match="failed: no luck with 2"):
        store[2]


def test_a_damaged_reason_does_not_hide_the_other_failures(tmp_path: Path) -> None:
    store = fill(make(tmp_path / "store"), fail=(2, 3), leave=(4,))
    path_in(store, "failed/00000002.json").write_text("{")
    found = FeatureStore.open(store.url).failed()
    assert "failed/00000002.json is damaged" in found[2] and found[3] == "no luck with 3"


def test_image_that_is_sealed_while_it_is_read_is_found(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, original = FeatureStore.open(store.url), type(store.objects).read

    def late(self: Any, key: str) -> bytes:
        if self is reader.objects and key.startswith("staged"):
            with store.writer(1) as writer:
                writer.put(2, field_of(2))
                assert writer.finish()
        return original(self, key)

    monkeypatch.setattr(type(store.objects), "read", late)
    assert torch.equal(reader[3].field, field_of(3))


def test_open_reader_sees_what_a_writer_adds(store: FeatureStore) -> None:
    reader = FeatureStore.open(store.url)
    assert 2 not in reader.done()
    with store.writer(1) as writer:
        writer.put(2, field_of(2))
        assert reader.done() == {0, 2, 3, 4, 5, 6}
        assert writer.finish()
    assert reader.done() == {0, 2, 3, 4, 5, 6}
    assert torch.equal(reader[2].field, field_of(2))


def test_damaged_image_raises_and_its_neighbours_are_read(store: FeatureStore) -> None:
    path = path_in(store, "field/c/2/0/0/0")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"photo4\.jpg in shard 2 cannot be read.*dvit store verify"):
        store[4]
    assert torch.equal(store[5].field, field_of(5))


def test_image_of_a_missing_shard_raises(store: FeatureStore) -> None:
    path_in(store, "field/c/2/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"photo4\.jpg is missing from shard 2"):
        store[4]


def test_info_counts_images_shards_and_bytes(store: FeatureStore) -> None:
    info = store.info()
    counts = {key: info[key] for key in ("images", "done", "failed", "staged", "shards", "sealed")}
    assert counts == {"images": 7, "done": 5, "failed": 1, "staged": 1, "shards": 4, "sealed": 3}
    files = [path for path in Path(store.url).rglob("*") if path.is_file()]
    assert info["bytes"] == sum(path.stat().st_size for path in files)
    assert info["manifest"]["plan"] == "abc"
    assert json.loads(json.dumps(info)) == info


# --- verify ---


def test_unfinished_store_has_no_problems(store: FeatureStore) -> None:
    assert list(store.verify()) == []


@pytest.mark.parametrize("byte", [0, 60, 121, 130])
def test_one_wrong_bit_in_a_chunk_is_found(store: FeatureStore, byte: int) -> None:
    path = path_in(store, "field/c/2/0/0/0")
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)
    problems = list(store.verify())
    assert [problem.where for problem in problems] == [IDS[4] if byte < 3 * 4 * 5 * 2 + 4 else IDS[5]]
    assert "shard 2" in str(problems[0])


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_shard_is_found(store: FeatureStore, keep: int) -> None:
    path = path_in(store, "field/c/2/0/0/0")
    path.write_bytes(path.read_bytes()[:keep])
    assert {problem.where for problem in store.verify()} == {IDS[4], IDS[5]}


def test_missing_shard_is_found(store: FeatureStore) -> None:
    path_in(store, "field/c/2/0/0/0").unlink()
    assert [str(problem) for problem in store.verify()] == [
        f"{name}: marked as finished, but its chunk is missing from shard 2" for name in (IDS[4], IDS[5])
    ]


@pytest.mark.parametrize(
    ("key", "content", "what"),
    [
        ("sealed/000002.json", "{", "damaged"),
        ("sealed/000002.json", '{"images": {}, "failed": {}}', "photo4.jpg is neither finished nor failed"),
        (
            "sealed/000002.json",
            '{"images": {"4": {"id": "x"}, "5": {"id": "photo5.jpg"}}, "failed": {}}',
            "belongs to x",
        ),
        ("sealed/000002.json", '{"images": {"5": {"id": "photo5.jpg"}}, "failed": {"4": "?"}}', "marked as failed"),
        ("sealed/000004.json", "{}", "below 4"),
        ("failed/00000001.json", "{}", "damaged"),
        ("staged/00000003.safetensors", "abc", "damaged"),
        ("ids.json", '["a"]', "was changed"),
        ("ids.json", "[", "missing or damaged"),
    ],
)
def test_damaged_object_is_found(store: FeatureStore, key: str, content: str, what: str) -> None:
    path_in(store, key).write_text(content)
    problems = list(FeatureStore.open(store.url).verify())
    assert problems
    assert what in str(problems[0])


def test_staged_image_under_the_wrong_name_is_found(store: FeatureStore) -> None:
    path_in(store, "staged/00000003.safetensors").rename(path_in(store, "staged/00000002.safetensors"))
    (problem,) = store.verify()
    assert str(problem) == "staged/00000002.safetensors: the record of photo2.jpg belongs to photo3.jpg"


# --- export ---


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_export_writes_a_file_for_each_finished_image(store: FeatureStore, tmp_path: Path, kind: Any) -> None:
    seen = []
    written = store.export(tmp_path / "out", kind, progress=lambda *counts: seen.append(counts))
    assert [path.name for path in written] == [f"{IDS[index]}.{kind}" for index in (0, 3, 4, 5, 6)]
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)
    assert seen[-1] == (5, 5)
    if kind == "npy":
        field, dtype = torch.from_numpy(np.load(written[1], allow_pickle=False)), torch.float16
    else:
        with safetensors.safe_open(written[1], framework="pt") as file:
            field, dtype = file.get_tensor("field"), torch.float16
            assert json.loads(file.metadata()["denoising_vit"])["record"]["id"] == IDS[3]
    assert field.dtype == dtype
    assert torch.equal(field.float(), field_of(3))


def test_export_of_an_unknown_kind_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    kind: Any = "pickle"
    with pytest.raises(StoreError, match="npy or safetensors, got 'pickle'"):
        store.export(tmp_path, kind)


def test_export_stays_in_its_folder_whatever_the_ids(tmp_path: Path) -> None:
    ids = ["../../up.jpg", "/etc/passwd", "..", "a/b.jpg", "a_b.jpg", "A_B.jpg", "..\\win.jpg", "x" * 400, "nul\0.jpg"]
    store = fill(make(tmp_path / "store", ids))
    written = store.export(tmp_path / "out" / "deep")
    assert {path.parent for path in written} == {tmp_path / "out" / "deep"}
    assert sorted((tmp_path / "out").rglob("*.npy")) == sorted(written)
    assert len({path.name.casefold() for path in written}) == len(ids)
    for index, path in enumerate(written):
        np.testing.assert_array_equal(np.load(path), field_of(index).half().numpy())


def test_file_names_are_unique_and_plain_ids_keep_theirs() -> None:
    ids = ["a/b", "a_b-0", "a_b", "A_B", ".a_b", "日本", "é"]
    names = file_names(ids)
    assert names[1] == "a_b-0" and names[2] == "a_b"
    assert len({name.casefold() for name in names}) == len(ids)
    assert not [name for name in names if name.startswith(".") or "/" in name]


# --- training data ---


def test_dataset_gives_finished_images_only(store: FeatureStore) -> None:
    dataset = StoreDataset(store)
    items = [dataset[item] for item in range(len(dataset))]
    assert [index for index, _ in items] == [0, 3, 4, 5, 6]
    for index, field in items:
        assert torch.equal(field, field_of(index))


def test_dataset_of_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no image is finished"):
        StoreDataset(make(tmp_path / "store"))


def test_sampler_is_reproducible_and_covers_each_image_once_per_epoch(store: FeatureStore) -> None:
    dataset = StoreDataset(store)
    sampler, again = ShardSampler(dataset, seed=3), ShardSampler(dataset, seed=3)
    orders = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(5)) and len(sampler) == 5
        assert order == list(again) == list(sampler)
        orders.add(tuple(order))
    assert len(orders) > 1
    assert list(ShardSampler(dataset, seed=4)) != list(ShardSampler(dataset, seed=3))


def test_sampler_without_shuffling_keeps_the_order(store: FeatureStore) -> None:
    assert list(ShardSampler(StoreDataset(store), shuffle=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("window", [1, 3])
def test_sampler_reads_a_few_shards_at_a_time_in_shuffled_order(tmp_path: Path, window: int) -> None:
    store = fill(make(tmp_path / "store", [f"{index}" for index in range(36)], per_shard=3))
    shards = [item // 3 for item in ShardSampler(StoreDataset(store), seed=1, window=window)]
    windows = [set(shards[start : start + 3 * window]) for start in range(0, 36, 3 * window)]
    assert [len(group) for group in windows] == [window] * (12 // window)
    assert [min(group) for group in windows] != sorted(min(group) for group in windows)
    if window > 1:
        assert shards[:9] != sorted(shards[:9], key=shards.index)  # images of a window's shards are mixed


def test_window_below_one_is_refused(whole: FeatureStore) -> None:
    with pytest.raises(ValueError, match="at least 1 shard, got 0"):
        ShardSampler(StoreDataset(whole), window=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_and_without_workers_gives_the_same(store: FeatureStore, workers: int) -> None:
    store[0]  # handles are open before the workers are forked
    dataset = StoreDataset(store)
    sampler = ShardSampler(dataset, seed=5)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers, timeout=60 if workers else 0)
    seen = []
    for indices, fields in loader:
        for index, field in zip(indices.tolist(), fields, strict=True):
            assert torch.equal(field, field_of(index))
            seen.append(index)
    assert seen == [dataset.indices[item] for item in sampler]


@pytest.mark.parametrize("writable", [False, True])
def test_store_is_pickled_by_its_url(store: FeatureStore, writable: bool) -> None:
    opened = FeatureStore.open(store.url, writable=writable)
    opened[0]
    data = pickle.dumps(opened)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert (again.url, again.writable, again.manifest) == (store.url, writable, store.manifest)
    assert torch.equal(again[3].field, field_of(3))


def test_store_pickled_by_relative_path_works_in_another_folder(
    whole: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(FeatureStore.open("whole"))
    monkeypatch.chdir("/")
    assert pickle.loads(data).done() == set(range(7))
