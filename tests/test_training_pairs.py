"""Pairs: raw features of views from the backbone, and F at the patch centres of these views."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_artifact
import tiny_training as tiny
from denoising_vit import Backbone
from denoising_vit.data import open_dataset
from denoising_vit.denoiser.job import Stored
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import Fitted, StoredTargets, Unusable
from denoising_vit.errors import TrainError
from denoising_vit.training import pair_files
from denoising_vit.training.pair_files import RowWriter, read_reasons, write_reason
from denoising_vit.training.photos import ViewReader
from denoising_vit.training.run_folder import differences
from denoising_vit.training.samples import Sample, kept_view, whole_view
from denoising_vit.views.crops import Crop
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((56, 56), (40, 72))

#: Tolerance of half precision for values of a few units.
ROUNDED: dict[str, Any] = {"atol": 4e-3, "rtol": 2e-3}


@pytest.fixture(scope="module")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tiny.Fitted:
    return tiny.fitted(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def extractor() -> Backbone:
    return tiny.backbone()


@pytest.fixture
def targets(data: tiny.Fitted, extractor: Backbone) -> StoredTargets:
    return StoredTargets(data.store, data.stored.photos, extractor)


VIEWS = tiny.views(keep=6, flip=0.5, inverted=0.5)


@pytest.fixture
def kept(targets: StoredTargets, extractor: Backbone, tmp_path: Path) -> KeptPairs:
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    pairs.fill(targets.images)
    return pairs


def sample(image: int, size: int, number: int) -> Sample:
    return Sample(image, size, number, kept_view(5, image, number, SIZES[size], VIEWS))


def all_samples() -> Iterator[Sample]:
    return (sample(image, size, number) for image in range(3) for size in (0, 1) for number in range(6))


def centres(crop: Crop) -> Iterator[tuple[int, int, float, float]]:
    """Row and column of each patch in the view, and (x, y) of its centre in the image."""
    x0, y0, x1, y1 = crop.box
    for row in range(crop.size[0] // tiny.PATCH):
        for column in range(crop.size[1] // tiny.PATCH):
            across = (column + 0.5) * tiny.PATCH / crop.size[1]
            down = (row + 0.5) * tiny.PATCH / crop.size[0]
            across = 1 - across if crop.flip else across
            across, down = (1 - across, 1 - down) if crop.inverted else (across, down)
            yield row, column, x0 + across * (x1 - x0), y0 + down * (y1 - y0)


def by_hand(field: Tensor, crop: Crop) -> Tensor:
    found = torch.empty(crop.size[0] // tiny.PATCH, crop.size[1] // tiny.PATCH, field.shape[2])
    for row, column, x, y in centres(crop):
        found[row, column] = tiny.bilinear(field, x, y)
    return found


def seen_by_hand(data: tiny.Fitted, extractor: Backbone, image: int, crop: Crop) -> Tensor:
    """Raw features (h, w, C) of a view from the renderer of stage 1."""
    pixels = np.asarray(Image.open(data.photos / data.store.ids[image]).convert("RGB"))
    plan = ViewPlan(np.array([crop.box]), np.array([crop.flip]), crop.size, 1, 1, (2, 2))
    view = ViewRenderer(to_image(pixels), plan, extractor.mean, extractor.std)(slice(1))
    with torch.no_grad():
        return extractor(view.flip((2, 3)) if crop.inverted else view)[0]


def test_samples_include_every_combination_of_flip_and_inversion() -> None:
    crops = [sample.crop for sample in all_samples() if sample.number and sample.number > 1]
    assert {(crop.flip, crop.inverted) for crop in crops} == {(a, b) for a in (False, True) for b in (False, True)}


def test_targets_are_f_at_the_patch_centres_of_each_view(data: tiny.Fitted, kept: KeptPairs) -> None:
    store = data.store
    for one in all_samples():
        target = kept.read([one])[1][0]
        torch.testing.assert_close(target, by_hand(store[one.image].field, one.crop), **ROUNDED)


def test_targets_match_store_samples_at_hand_computed_coordinates(data: tiny.Fitted, kept: KeptPairs) -> None:
    stored = data.store[1]
    marks = torch.tensor([(k + 0.5) / 7 for k in range(7)])
    y, x = torch.meshgrid(marks, marks, indexing="ij")
    plain, mirrored = (kept.read([sample(1, 0, number)])[1][0] for number in (0, 1))
    torch.testing.assert_close(plain, stored.sample(torch.stack([x, y], -1)), **ROUNDED)
    torch.testing.assert_close(plain, stored.semantic, **ROUNDED)
    torch.testing.assert_close(mirrored, stored.sample(torch.stack([1 - x, y], -1)), **ROUNDED)
    for number in (2, 3, 4, 5):
        one = sample(1, 0, number)
        coords = torch.zeros(7, 7, 2)
        for row, column, across, down in centres(one.crop):
            coords[row, column] = torch.tensor([across, down])
        torch.testing.assert_close(kept.read([one])[1][0], stored.sample(coords), **ROUNDED)


def test_raw_features_match_views_rendered_by_hand(data: tiny.Fitted, kept: KeptPairs, extractor: Backbone) -> None:
    for one in all_samples():
        raw = kept.read([one])[0][0]
        torch.testing.assert_close(raw, seen_by_hand(data, extractor, one.image, one.crop), **ROUNDED)


def test_batch_keeps_the_order_of_its_samples(kept: KeptPairs) -> None:
    samples = [sample(2, 1, 3), sample(0, 1, 0), sample(2, 1, 3)]
    raw, target = kept.read(samples)
    assert raw.shape == target.shape == (3, 5, 9, tiny.CHANNELS)
    assert raw.dtype == target.dtype == torch.float32
    for place, one in enumerate(samples):
        torch.testing.assert_close(raw[place], kept.read([one])[0][0])
        torch.testing.assert_close(target[place], kept.read([one])[1][0])


def test_fresh_pairs_are_the_same_views_without_rounding(tmp_path: Path) -> None:
    extractor = tiny.backbone()
    photos = tiny.write_photos(tmp_path / "photos", 2)
    data = tiny.Fitted(photos, tmp_path / "store")
    tiny.fit(photos, data.folder, extractor)
    targets = StoredTargets(data.store, data.stored.photos, extractor)
    crop = Crop((0.1, 0.2, 0.7, 0.9), (40, 56), flip=True, inverted=True)
    reader = ViewReader(targets, extractor, torch.device("cpu"), [(40, 56)], tmp_path)
    (batch,) = reader.batches([[Sample(1, 0, None, crop), Sample(0, 0, None, crop)]])
    with torch.no_grad():
        raw = extractor(batch.images)
    target = batch.fields
    assert target is not None
    torch.testing.assert_close(raw[0], seen_by_hand(data, extractor, 1, crop), atol=1e-4, rtol=1e-4)
    rows, columns = (side // 8 for side in crop.size)
    for row in range(rows):
        for column in range(columns):
            # Mirrored and upside down: the order from left to right is that of the image.
            x = 0.1 + 0.6 * (column * 8 + 4) / 56
            y = 0.2 + 0.7 * (1 - (row * 8 + 4) / 40)
            torch.testing.assert_close(target[0, row, column], tiny.bilinear(data.store[1].field, x, y))
    assert torch.equal(target[0], crop.sample(data.store[1].field, 8, 8))  # for any dtype of the fields


def test_filling_resumes_where_it_stopped(targets: StoredTargets, tmp_path: Path) -> None:
    planted = tiny.module()
    extractor = tiny_artifact.plain(planted)

    def opened(create: bool = True) -> KeptPairs:
        pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
        pairs.open(create=create)
        return pairs

    first = opened()
    assert first.todo() == [0, 1, 2]
    assert first.usable() == ()
    first.fill([1])
    passes = planted.passes
    again = opened()
    assert again.todo() == [0, 2]
    assert again.usable() == (1,)
    reported: list[tuple[int, ...]] = []
    again.fill(again.todo(), lambda: reported.append(again.usable()))
    assert reported == [(0, 1), (0, 1, 2)]
    assert planted.passes > passes
    passes = planted.passes
    assert opened(create=False).todo() == []
    assert planted.passes == passes


def test_pairs_with_other_settings_are_rejected_with_each_difference(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    other = KeptPairs(kept.folder, targets, targets.images, extractor, ((56, 56),), tiny.views(keep=5), seed=6)
    with pytest.raises(TrainError, match=r"has pairs of other settings: .*Choose another folder") as caught:
        other.open(create=True)
    for part in ("seed was 5, now 6", "sizes was [[56, 56], [40, 72]], now [[56, 56]]", "views.keep was 6, now 5"):
        assert part in str(caught.value)


def test_fraction_of_whole_images_does_not_change_the_cache(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    again = KeptPairs(
        kept.folder, targets, targets.images, extractor, SIZES, tiny.views(keep=6, inverted=0.5, whole=0.1), seed=5
    )
    again.open(create=True)
    assert again.usable() == (0, 1, 2)


def test_pairs_of_other_photos_are_rejected(
    kept: KeptPairs, data: tiny.Fitted, extractor: Backbone, tmp_path: Path
) -> None:
    photos = tiny.write_photos(tmp_path / "photos", 3, seed=1)
    other = Stored(tiny.fit(photos, tmp_path / "store", extractor), open_dataset(photos)).targets(extractor)
    assert other.ids == data.store.ids
    again = KeptPairs(kept.folder, other, other.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises(
        TrainError, match=r'has pairs of other settings: targets.photos was "\w+[.]{3}, now "\w+[.]{3}[.] Choose'
    ):
        again.open(create=True)


def test_older_pairs_without_a_record_of_photos_stay_valid(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    head = kept.folder / "pairs.json"
    record = json.loads(head.read_text())
    del record["targets"]["photos"]  # as in older versions
    assert "wholes" not in record["views"]
    head.write_text(json.dumps(record))
    again = KeptPairs(kept.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    again.open(create=True)
    assert again.usable() == (0, 1, 2)


def test_no_kept_view_is_mirrored_with_flip_0(targets: StoredTargets, extractor: Backbone, tmp_path: Path) -> None:
    views = tiny.views(keep=3, flip=0)
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, views, seed=5)
    pairs.open(create=True)
    pairs.fill([1])
    assert list(pairs.crops) == [1, 2]
    for number in range(3):
        crop = kept_view(5, 1, number, SIZES[0], views)
        assert not crop.flip
        target = pairs.read([Sample(1, 0, number, crop)])[1][0]
        torch.testing.assert_close(target, by_hand(next(targets.stream([1])).field.float(), crop), **ROUNDED)
    # Older versions kept a mirrored whole image.
    head = pairs.folder / "pairs.json"
    record = json.loads(head.read_text())
    del record["views"]["wholes"]
    head.write_text(json.dumps(record))
    with pytest.raises(TrainError, match=r"has pairs of other settings: views.wholes was null, now 1"):
        pairs.open(create=True)


# --- images without pairs ---


class PartlyUnusable:
    """Targets where only the last image can be used."""

    def __init__(self, targets: StoredTargets) -> None:
        self.targets = targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self.targets, name)

    def stream(self, images: Sequence[int]) -> Iterator[Fitted | Unusable]:
        for index in images:
            yield next(self.targets.stream([index])) if index == 2 else Unusable(index, f"no {index}")


@pytest.fixture
def unfilled(targets: StoredTargets, extractor: Backbone, tmp_path: Path) -> KeptPairs:
    """Opened, but not filled; only the last image can be used."""
    lacking: Any = PartlyUnusable(targets)
    pairs = KeptPairs(tmp_path / "pairs", lacking, targets.images, extractor, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    return pairs


def test_truncated_reason_is_ignored_and_its_image_is_retried(unfilled: KeptPairs) -> None:
    (unfilled.folder / "unusable.jsonl").write_text('["00.png", "no')  # the crash came before the image was marked
    assert unfilled.unusable() == {}
    assert unfilled.todo() == [0, 1, 2]
    unfilled.fill(unfilled.todo())
    assert unfilled.unusable() == {"00.png": "no 0", "01.png": "no 1"}
    assert unfilled.usable() == (2,)


def test_unusable_images_with_a_lost_reason_are_still_reported(unfilled: KeptPairs) -> None:
    unfilled.fill(unfilled.todo())
    path = unfilled.folder / "unusable.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    unfilled.open(create=False)
    assert unfilled.unusable() == {"00.png": "no 0", "01.png": "unusable; the reason was not recorded"}
    path.unlink()
    assert list(unfilled.unusable()) == ["00.png", "01.png"]


def test_image_is_marked_only_after_its_reason_is_on_disk(unfilled: KeptPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    def synced(_file: int) -> None:
        assert read_reasons(unfilled.folder) == {"00.png": "no 0"}
        assert unfilled.todo() == [0, 1, 2]
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", synced)
    with pytest.raises(OSError, match="Input/output"):
        unfilled.fill([0])
    assert unfilled.unusable() == {}


@pytest.mark.parametrize("rubbish", [b"", b"\0\0\0", b"[1]\n", b"[[], 2]\n\n", b"\xff\xfe", b'{"a": 1}\nwords'])
def test_invalid_reason_lines_are_ignored(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / "unusable.jsonl").write_bytes(b'["a", "b"]\n' + rubbish)
    write_reason(tmp_path, "café\udce9", "line\nbreak")
    assert {"a": "b", "café\udce9": "line\nbreak"}.items() <= read_reasons(tmp_path).items()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
    ],
)
def test_damaged_record_of_pairs_is_an_error_with_a_hint(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone, text: str
) -> None:
    (kept.folder / "pairs.json").write_text(text)
    again = KeptPairs(kept.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises(TrainError, match=r"pairs.json: damaged .*delete .* to compute its features again"):
        again.open(create=True)


def test_truncated_cache_is_rejected(kept: KeptPairs, targets: StoredTargets, extractor: Backbone) -> None:
    path = kept.folder / "raw-0-7x7.f16"
    path.write_bytes(path.read_bytes()[:1000])
    again = KeptPairs(kept.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    expected = 3 * 6 * 49 * tiny.CHANNELS * 2  # images, views, patches, channels of two bytes
    with pytest.raises(TrainError, match=rf"raw-0-7x7\.f16: damaged, expected {expected} bytes; delete .* to compute"):
        again.open(create=True)


def test_missing_disk_space_is_reported_before_anything_is_computed(
    targets: StoredTargets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tiny.module()
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, tiny_artifact.plain(planted), SIZES, VIEWS, seed=5)
    # 3 images, 6 views, 7 x 7 and 5 x 9 patches, features and targets of two bytes
    assert pairs.bytes == 3 * 6 * (49 + 45) * tiny.CHANNELS * 2 * 2
    passes = planted.passes
    tiny.leave_free(pairs.bytes - 1, monkeypatch)
    with pytest.raises(TrainError, match=r"features of 6 views of 3 images take .* GB are free; keep fewer views"):
        pairs.open(create=True)
    assert planted.passes == passes
    assert not (tmp_path / "pairs" / "pairs.json").exists()
    tiny.leave_free(pairs.bytes, monkeypatch)
    pairs.open(create=True)


def test_disk_space_is_reserved_when_files_are_created(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _file, _start, size: reserved.append(size), raising=False)
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    assert sum(reserved) == pairs.bytes + 3
    pairs.open(create=True)
    pairs.open(create=False)
    assert len(reserved) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_failed_reservation_is_reported_and_leaves_no_files(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    left = iter(range(2))

    def full(_file: int, _start: int, _size: int) -> None:
        if next(left, None) is None:
            raise OSError(number, os.strerror(number))

    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(
            TrainError, match=rf"features of 6 views .* not available \({os.strerror(number)}\); keep fewer views"
        ):
            pairs.open(create=True)
    assert list(pairs.folder.iterdir()) == []
    pairs.open(create=True)
    assert pairs.todo() == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_pairs_are_kept_where_space_cannot_be_reserved(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refused(_file: int, _start: int, _size: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    if number is None:  # a platform without this function
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    pairs.fill([1])
    assert pairs.usable() == (1,)


def test_incomplete_files_of_another_process_do_not_use_up_space(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "state.u8").write_bytes(bytes(3))
    (tmp_path / "pairs" / "raw-0-7x7.f16").write_bytes(b"\1" * 1000)

    def usage(folder: Path) -> tiny.Usage:
        return tiny.Usage(0, 0, 0 if any(folder.glob("*.*6")) else pairs.bytes)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    pairs.open(create=True)
    assert pairs.todo() == [0, 1, 2]


class Diverged(tiny_artifact.Planted):
    """Sets the first channel to ``value``, which may exceed half precision."""

    value = 1e6

    def forward(self, image: Tensor) -> Tensor:
        features = super().forward(image)
        features[..., 0] = self.value
        return features


@pytest.mark.parametrize("value", [1e6, torch.nan, torch.inf])
def test_non_finite_features_are_an_error(
    data: tiny.Fitted, extractor: Backbone, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = StoredTargets(data.store, data.stored.photos, extractor)
    monkeypatch.setattr(Diverged, "value", 1.0)
    diverged = tiny_artifact.plain(Diverged(channels=tiny.CHANNELS))
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, diverged, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    monkeypatch.setattr(Diverged, "value", value)
    with pytest.raises(
        TrainError, match=r"^00\.png: features that are not finite or exceed the range of float16; training has not"
    ):
        pairs.fill(targets.images)
    assert pairs.usable() == ()


def test_differences_show_both_values() -> None:
    there: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": None, "long": "x" * 100}
    here = json.loads(json.dumps({"a": {"b": 2, "c": [1, 2]}, "e": True, "long": "y" * 100}))
    found = differences(there, here)
    assert found[0] == "a.b was 1, now 2"
    assert found[1] == "e was null, now true"
    assert found[2].startswith('long was "xxx')
    assert len(found) == 3
    assert differences(there, there) == []


def test_using_pairs_before_opening_is_an_assertion_error(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path
) -> None:
    pairs = KeptPairs(tmp_path, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises(AssertionError, match="comes first"):
        pairs.todo()
    assert whole_view((56, 56), mirrored=True).flip


def test_pairs_are_on_disk_before_they_are_marked(kept: KeptPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut between the two must not leave an image that is marked as done but has zeros as features."""
    done, synced = os.fsync, []

    def sync(file: int) -> None:
        synced.append((Path(f"/proc/self/fd/{file}").readlink().name, (kept.folder / "state.u8").read_bytes()))
        done(file)

    again = KeptPairs(kept.folder.with_name("anew"), kept._targets, kept.images, kept._backbone, SIZES, VIEWS, seed=5)
    again.open(create=True)
    monkeypatch.setattr(pair_files, "_AT_ONCE", 2)
    monkeypatch.setattr(os, "fsync", sync)
    kept = again
    kept.fill(kept.todo())
    names = [path.name for path, *_ in kept._files()]
    state, arrays = names[0], names[1:]
    assert [name for name, _ in synced] == [*arrays, state] * 2  # two images, then the third
    assert [marks for name, marks in synced if name == arrays[0]] == [bytes(3), bytes([1, 1, 0])]
    assert (kept.folder / state).read_bytes() == bytes([1, 1, 1])


def test_unknown_files_are_neither_removed_nor_used_as_pairs(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path
) -> None:
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    pairs.folder.mkdir()
    (pairs.folder / "raw-0-7x7.f16").write_bytes(b"theirs")
    with pytest.raises(TrainError, match=r"has raw-0-7x7\.f16 but no pairs\.json"):
        pairs.open(create=True)
    (pairs.folder / "state.u8").write_bytes(b"\0\1\0")
    with pytest.raises(TrainError, match=r"has state\.u8 but no pairs\.json"):
        pairs.open(create=True)
    assert (pairs.folder / "raw-0-7x7.f16").read_bytes() == b"theirs"


def test_processes_exchange_marks_instead_of_reading_them_from_disk(
    unfilled: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    """On a network disk, machines may see different states of a file for a while."""
    other = KeptPairs(unfilled.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    other.open(create=False)
    unfilled.fill([0, 2])
    other.fill([1])
    assert other.usable() == (1,)
    known = [unfilled.marks(), other.marks()]
    for pairs in (unfilled, other):
        for marks, reasons in known:
            pairs.adopt(marks, reasons)
        assert pairs.usable() == (1, 2)
        assert pairs.unusable() == {"00.png": "no 0"}
        assert pairs.todo() == []


def test_machines_that_share_files_keep_each_others_rows(tmp_path: Path) -> None:
    state, rows = tmp_path / "state.u8", tmp_path / "rows.f16"
    state.write_bytes(bytes(3))
    rows.write_bytes(bytes(30))
    with RowWriter([state, rows]) as first, RowWriter([state, rows]) as second:
        first.write(0, [np.full(5, 1, np.float16)])
        first.mark(0, 1)
        second.write(2, [np.full(5, 3, np.float16)])
        second.mark(2, 2)
    assert np.frombuffer(rows.read_bytes(), np.float16).reshape(3, 5).tolist() == [[1] * 5, [0] * 5, [3] * 5]
    assert state.read_bytes() == bytes([1, 0, 2])
