"""Pairs: raw features of views as the backbone gives them, and F at these views' own patch centres."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from denoising_vit.crops import Crop
from denoising_vit.errors import TrainError
from denoising_vit.rendering import ViewRenderer, to_image
from denoising_vit.training.pairs import FreshPairs, KeptPairs, differences
from denoising_vit.training.samples import Sample, kept_view, whole_view
from denoising_vit.training.targets import StoredTargets
from denoising_vit.views import ViewPlan

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((56, 56), (40, 72))

#: Half precision, of values of a few units.
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
    pairs.fill(targets.images, lambda _index, _reason: None)
    return pairs


def sample(image: int, size: int, number: int) -> Sample:
    return Sample(image, size, number, kept_view(5, image, number, SIZES[size], VIEWS))


def all_samples() -> Iterator[Sample]:
    return (sample(image, size, number) for image in range(3) for size in (0, 1) for number in range(6))


def centres(crop: Crop) -> Iterator[tuple[int, int, float, float]]:
    """Row and column of each patch as shown, and (x, y) of its centre in the image."""
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
    """Raw features of a view that is rendered by the renderer of stage 1; (h, w, C)."""
    pixels = np.asarray(Image.open(data.photos / data.store.ids[image]).convert("RGB"))
    plan = ViewPlan(np.array([crop.box]), np.array([crop.flip]), crop.size, 1, 1, (2, 2))
    view = ViewRenderer(to_image(pixels), plan, extractor.mean, extractor.std)(slice(1))
    with torch.no_grad():
        return extractor(view.flip((2, 3)) if crop.inverted else view)[0]


def test_kinds_of_views_that_are_compared_below_all_occur() -> None:
    crops = [sample.crop for sample in all_samples() if sample.number and sample.number > 1]
    assert {(crop.flip, crop.inverted) for crop in crops} == {(a, b) for a in (False, True) for b in (False, True)}


def test_targets_are_f_at_the_patch_centres_of_each_view(data: tiny.Fitted, kept: KeptPairs) -> None:
    store = data.store
    for one in all_samples():
        target = kept.read([one])[1][0]
        torch.testing.assert_close(target, by_hand(store[one.image].field, one.crop), **ROUNDED)


def test_targets_are_what_the_store_samples_at_hand_computed_coordinates(data: tiny.Fitted, kept: KeptPairs) -> None:
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


def test_raw_features_are_those_of_views_rendered_by_hand(
    data: tiny.Fitted, kept: KeptPairs, extractor: Backbone
) -> None:
    for one in all_samples():
        raw = kept.read([one])[0][0]
        torch.testing.assert_close(raw, seen_by_hand(data, extractor, one.image, one.crop), **ROUNDED)


def test_a_batch_is_its_samples_in_their_order(kept: KeptPairs) -> None:
    samples = [sample(2, 1, 3), sample(0, 1, 0), sample(2, 1, 3)]
    raw, target = kept.read(samples)
    assert raw.shape == target.shape == (3, 5, 9, tiny.CHANNELS)
    assert raw.dtype == target.dtype == torch.float32
    for place, one in enumerate(samples):
        torch.testing.assert_close(raw[place], kept.read([one])[0][0])
        torch.testing.assert_close(target[place], kept.read([one])[1][0])
    assert kept.features(raw) is raw


def test_fresh_pairs_are_the_same_views_without_rounding(tmp_path: Path) -> None:
    extractor = tiny.backbone()
    photos = tiny.write_photos(tmp_path / "photos", 2)
    data = tiny.Fitted(photos, tmp_path / "store")
    tiny.fit(photos, data.folder, extractor)
    targets = StoredTargets(data.store, data.stored.photos, extractor)
    fresh = FreshPairs(targets, extractor)
    crop = Crop((0.1, 0.2, 0.7, 0.9), (40, 56), flip=True, inverted=True)
    images, target = fresh.read([Sample(1, 0, None, crop), Sample(0, 0, None, crop)])
    raw = fresh.features(images)
    assert not raw.requires_grad
    torch.testing.assert_close(raw[0], seen_by_hand(data, extractor, 1, crop), atol=1e-4, rtol=1e-4)
    rows, columns = (side // 8 for side in crop.size)
    for row in range(rows):
        for column in range(columns):
            # Mirrored and upside down: left to right it is as in the image.
            x = 0.1 + 0.6 * (column * 8 + 4) / 56
            y = 0.2 + 0.7 * (1 - (row * 8 + 4) / 40)
            torch.testing.assert_close(target[0, row, column], tiny.bilinear(data.store[1].field, x, y))


def test_filling_is_taken_up_where_it_stopped(targets: StoredTargets, tmp_path: Path) -> None:
    planted = tiny.module()
    extractor = tiny_artifact.plain(planted)

    def opened(create: bool = True) -> KeptPairs:
        pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, SIZES, VIEWS, seed=5)
        pairs.open(create=create)
        return pairs

    first = opened()
    assert first.todo() == [0, 1, 2]
    assert first.usable() == ()
    first.fill([1], lambda _index, _reason: None)
    passes = planted.passes
    again = opened()
    assert again.todo() == [0, 2]
    assert again.usable() == (1,)
    told: list[int] = []
    again.fill(again.todo(), lambda index, _reason: told.append(index))
    assert told == [0, 2]
    assert planted.passes > passes
    passes = planted.passes
    assert opened(create=False).todo() == []
    assert (planted.passes, told) == (passes, [0, 2])


def test_pairs_of_other_views_are_refused_by_name(kept: KeptPairs, targets: StoredTargets, extractor: Backbone) -> None:
    other = KeptPairs(kept.folder, targets, targets.images, extractor, ((56, 56),), tiny.views(keep=5), seed=6)
    with pytest.raises(TrainError, match=r"holds other pairs: .*name another place|Name another place") as told:
        other.open(create=True)
    for part in ("seed was 5, now 6", "sizes was [[56, 56], [40, 72]], now [[56, 56]]", "views.keep was 6, now 5"):
        assert part in str(told.value)


def test_how_often_whole_images_are_drawn_is_no_other_cache(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    again = KeptPairs(
        kept.folder, targets, targets.images, extractor, SIZES, tiny.views(keep=6, inverted=0.5, whole=0.1), seed=5
    )
    again.open(create=True)
    assert again.usable() == (0, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
    ],
)
def test_damaged_record_of_pairs_says_what_to_do(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone, text: str
) -> None:
    (kept.folder / "pairs.json").write_text(text)
    again = KeptPairs(kept.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises(TrainError, match=r"pairs.json: damaged .*remove .*its features are computed anew"):
        again.open(create=True)


def test_a_cache_that_was_cut_off_is_not_trained_on(
    kept: KeptPairs, targets: StoredTargets, extractor: Backbone
) -> None:
    path = kept.folder / "raw-0-7x7.f16"
    path.write_bytes(path.read_bytes()[:1000])
    again = KeptPairs(kept.folder, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises((TrainError, OSError)):
        again.open(create=True)


def test_no_room_is_told_before_anything_is_computed(
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


class Diverged(tiny_artifact.Planted):
    """Gives so large a feature for dark views that half precision has no number for it."""

    value = 1e6

    def forward(self, image: Tensor) -> Tensor:
        features = super().forward(image)
        features[..., 0] = self.value
        return features


@pytest.mark.parametrize("value", [1e6, torch.nan, torch.inf])
def test_features_that_are_not_finite_name_their_image(
    data: tiny.Fitted, extractor: Backbone, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = StoredTargets(data.store, data.stored.photos, extractor)
    monkeypatch.setattr(Diverged, "value", 1.0)
    diverged = tiny_artifact.plain(Diverged(channels=tiny.CHANNELS))
    pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, diverged, SIZES, VIEWS, seed=5)
    pairs.open(create=True)
    monkeypatch.setattr(Diverged, "value", value)
    with pytest.raises(Exception, match=r"00.png: features that are not finite, or too large|not finite"):
        pairs.fill(targets.images, lambda _index, _reason: None)
    assert pairs.usable() == ()


def test_differences_are_named_with_both_sides() -> None:
    there: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": None, "long": "x" * 100}
    here = json.loads(json.dumps({"a": {"b": 2, "c": [1, 2]}, "e": True, "long": "y" * 100}))
    told = differences(there, here)
    assert told[0] == "a.b was 1, now 2"
    assert told[1] == "e was null, now true"
    assert told[2].startswith('long was "xxx')
    assert len(told) == 3
    assert differences(there, there) == []


def test_reading_before_opening_is_a_mistake_of_the_caller(
    targets: StoredTargets, extractor: Backbone, tmp_path: Path
) -> None:
    pairs = KeptPairs(tmp_path, targets, targets.images, extractor, SIZES, VIEWS, seed=5)
    with pytest.raises(AssertionError, match="comes first"):
        pairs.todo()
    assert whole_view((56, 56), mirrored=True).flip
