"""Features of crops: in order, in batches of one size, and identical with and without the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.evaluation.features import FeatureCache, Shown, see
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.files import compact
from denoising_vit.training_free import Subspace
from denoising_vit.views.crops import Crop
from tiny_labelled import PATCH, SIZE, coloured, colours, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("coloured"), coloured(5, 0), coloured(1, 1))


@pytest.fixture
def shown(data: LabelledData) -> list[Shown]:
    return [(image, Crop.whole((SIZE, SIZE))) for image in data.train.images]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


class Counted:
    """An extractor that records its input shapes; float16 rounds its features."""

    def __init__(self, model: Callable[[Tensor], Tensor] = colours) -> None:
        self.model = model
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        return self.model(image) / 3

    def source(self, name: str = "raw", **identity: object) -> ExtractorSource:
        return ExtractorSource(name, tiny_backbone(), self, identity)


def files(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- features ---


def test_features_match_each_image_in_order(shown: list[Shown]) -> None:
    source = Counted().source()
    found = list(see(source, shown))
    for (image, crop), features in zip(shown, found, strict=True):
        exact = source.features(source.inputs(image, crop)[None])[0]
        assert features.shape == (6, 6, 3) and features.dtype == torch.float32
        assert torch.equal(features, exact.half().float())
        assert not torch.equal(features, exact)
    assert not torch.equal(found[0], found[1])


def test_progress_is_reported_once_per_crop(shown: list[Shown], cache: FeatureCache) -> None:
    for _ in range(2):
        reported: list[int] = []
        list(see(Counted().source(), shown, cache, lambda reported=reported: reported.append(1)))
        assert len(reported) == 5


def test_no_crops_give_no_features(cache: FeatureCache) -> None:
    assert list(see(Counted().source(), [], cache)) == []


def test_order_is_kept_when_sizes_are_mixed(shown: list[Shown]) -> None:
    sizes = [(48, 48), (48, 48), (32, 64), (48, 48), (64, 32)]
    mixed = [(image, Crop.whole(size)) for (image, _), size in zip(shown, sizes, strict=True)]
    extractor = Counted()
    found = list(see(extractor.source(), mixed))
    assert [tuple(features.shape[:2]) for features in found] == [(6, 6), (6, 6), (4, 8), (6, 6), (8, 4)]
    assert [shape[0] for shape in extractor.shapes] == [2, 1, 1, 1]  # each of one size
    alone = [next(see(Counted().source(), [one])) for one in mixed]
    assert same(found, alone)


def test_batches_fit_the_device(shown: list[Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def two(_device: torch.device, tokens: int) -> int:
        asked.append(tokens)
        return 2

    monkeypatch.setattr("denoising_vit.evaluation.features.fitting_batch", two)
    extractor = Counted()
    found = list(see(extractor.source(), shown))
    assert [shape[0] for shape in extractor.shapes] == [2, 2, 1]
    assert set(asked) == {36}
    monkeypatch.undo()
    assert same(found, list(see(Counted().source(), shown)))


def test_pads_are_part_of_the_input(shown: list[Shown]) -> None:
    padded = [(image, replace(crop, pads=(PATCH, 0, 0, 2 * PATCH))) for image, crop in shown]
    extractor = Counted()
    assert all(features.shape == (8, 7, 3) for features in see(extractor.source(), padded))
    assert {shape[2:] for shape in extractor.shapes} == {(64, 56)}


# --- the cache ---


def test_cached_features_are_identical(shown: list[Shown], cache: FeatureCache) -> None:
    without = list(see(Counted().source(), shown))
    first, second = (list(see(Counted().source(), shown, cache)) for _ in range(2))
    assert same(first, without) and same(second, without)
    assert len(files(cache)) == 5


def test_a_second_pass_makes_no_forward_pass(shown: list[Shown], cache: FeatureCache) -> None:
    extractor = Counted()
    list(see(extractor.source(), shown, cache))
    assert sum(shape[0] for shape in extractor.shapes) == 5
    extractor.shapes.clear()
    list(see(extractor.source(), shown, FeatureCache(cache.folder)))
    assert extractor.shapes == []


def test_cleaned_and_raw_features_share_forward_passes(shown: list[Shown], cache: FeatureCache) -> None:
    model = Counted()
    backbone = tiny_backbone(model)
    identity = {"subspace": "one direction"}
    extractor = DenoisedViT(backbone, Subspace(torch.eye(3)[:1], describe(backbone)))
    model.shapes.clear()
    clean, raw = ExtractorSource("project", backbone, extractor, identity), ExtractorSource("raw", backbone)
    first = list(see(clean, shown, cache))
    passes = sum(shape[0] for shape in model.shapes)
    assert passes == 5 and len(files(cache)) == 5
    kept = list(see(raw, shown, cache))
    again = list(see(clean, shown, cache))
    assert sum(shape[0] for shape in model.shapes) == passes  # neither needed one
    assert same(first, again) and same(first, list(see(clean, shown)))
    for features, of_raw in zip(first, kept, strict=True):
        assert not features[..., 0].any() and torch.equal(features[..., 1:], of_raw[..., 1:])


def test_raw_features_of_another_normalisation_are_cached_separately(shown: list[Shown], cache: FeatureCache) -> None:
    backbone = tiny_backbone()
    extractor = DenoisedViT(backbone, Subspace(torch.eye(3)[:1], describe(backbone)))
    list(see(ExtractorSource("raw", backbone), shown, cache))
    other = ExtractorSource("project", backbone, extractor, {"normalisation": "imagenet"}, ((0.5,) * 3, (0.5,) * 3))
    found = list(see(other, shown, cache))
    assert len(files(cache)) == 10
    image, crop = shown[0]
    expected = extractor(other.inputs(image, crop)[None])[0]
    torch.testing.assert_close(found[0], expected, atol=1e-3, rtol=1e-3)


def test_only_missing_features_are_computed_and_order_is_kept(shown: list[Shown], cache: FeatureCache) -> None:
    list(see(Counted().source(), [shown[1], shown[3]], cache))
    extractor = Counted()
    found = list(see(extractor.source(), shown, cache))
    assert sum(shape[0] for shape in extractor.shapes) == 3
    assert same(found, list(see(Counted().source(), shown)))


def test_source_with_features_on_disk_is_not_cached(shown: list[Shown], cache: FeatureCache) -> None:
    source = Counted().source()
    source.cached = False
    list(see(source, shown, cache))
    assert files(cache) == []


def test_cache_stays_within_the_limit(shown: list[Shown], tmp_path: Path) -> None:
    """The limit counts whole files: 216 bytes of features and a header each."""
    cache = FeatureCache(tmp_path / "cache", limit=700)
    found = list(see(Counted().source(), shown, cache))
    assert 1 <= len(files(cache)) < 5
    assert sum(path.stat().st_size for path in files(cache)) <= 700
    assert same(found, list(see(Counted().source(), shown)))


def test_files_of_earlier_runs_count_towards_the_limit(shown: list[Shown], cache: FeatureCache) -> None:
    list(see(Counted().source(), shown[:2], cache))
    used = sum(path.stat().st_size for path in files(cache))
    list(see(Counted().source(), shown, FeatureCache(cache.folder, limit=used + 100)))
    assert len(files(cache)) == 2
    list(see(Counted().source(), shown, FeatureCache(cache.folder)))
    assert len(files(cache)) == 5


@pytest.mark.parametrize("keep", [0, 5, 100], ids=["empty", "within its header's length", "within its features"])
def test_damaged_cache_file_is_replaced(shown: list[Shown], cache: FeatureCache, keep: int) -> None:
    first = list(see(Counted().source(), shown, cache))
    victim = files(cache)[2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:keep])
    extractor = Counted()
    assert same(list(see(extractor.source(), shown, cache)), first)
    assert sum(shape[0] for shape in extractor.shapes) == 1
    assert victim.read_bytes() == whole


def test_features_beyond_float16_are_cached_exactly(shown: list[Shown], cache: FeatureCache) -> None:
    extractor = Counted(lambda image: colours(image) * 1e6)
    for _ in range(2):
        found = list(see(extractor.source(), shown, cache))
        source = extractor.source()
        exact = [source.features(source.inputs(*one)[None])[0] for one in shown]
        assert same(found, exact)


def test_compact_uses_float16_only_if_values_fit() -> None:
    assert compact(torch.tensor([65000.0, -3.0])).dtype == torch.float16
    assert compact(torch.tensor([3.0, -65600.0])).dtype == torch.float32
    assert torch.isfinite(compact(torch.tensor([65504.0, 65519.0, 65520.0]))).all()


# --- paths of cached files ---


def test_same_input_has_the_same_path(shown: list[Shown], cache: FeatureCache) -> None:
    image, crop = shown[0]
    path = cache.path(Counted().source(a=1), shown[0])
    assert path == FeatureCache(cache.folder).path(Counted().source(a=1), (image, replace(crop)))
    assert path.is_relative_to(cache.folder)


def test_another_crop_image_or_source_has_another_file(shown: list[Shown], cache: FeatureCache) -> None:
    image, crop = shown[0]
    source = Counted().source(a=1)
    crops = [
        crop,
        replace(crop, box=(0.0, 0.0, 1.0, 0.5)),
        replace(crop, size=(48, 56)),
        replace(crop, pads=(8, 0, 0, 0)),
        replace(crop, pads=(0, 8, 0, 0)),
        replace(crop, flip=True),
        replace(crop, inverted=True),
    ]
    paths = [cache.path(source, (image, one)) for one in crops]
    paths += [cache.path(source, other) for other in shown[1:]]
    paths += [cache.path(one, shown[0]) for one in (Counted().source(), Counted().source(a=2), Counted().source(b=1))]
    paths.append(cache.path(Counted().source("another", a=1), shown[0]))
    finer = ExtractorSource("raw", tiny_backbone(lambda x: colours(x)[:, ::2, ::2, :2], 16, 48), None, {"a": 1})
    assert (finer.patch_size, finer.stride) == (16, 16)
    paths.append(cache.path(finer, shown[0]))
    assert len(set(paths)) == len(paths)


def test_another_backbone_has_another_file(shown: list[Shown], cache: FeatureCache) -> None:
    """Also with the same name and patch grid, as in two models of one family, and in one cache folder."""
    ours, theirs = (ExtractorSource("raw", tiny_backbone(model)) for model in (colours, lambda x: colours(x).flip(-1)))
    assert cache.path(ours, shown[0]) != cache.path(theirs, shown[0])
    first, second = (list(see(source, shown, cache)) for source in (ours, theirs))
    assert not same(first, second)
    assert same(second, list(see(theirs, shown)))
