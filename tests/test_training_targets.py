"""Sources of targets: a missing target is an error and is never replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_artifact
import tiny_training as tiny
from denoising_vit import Backbone
from denoising_vit.data import open_dataset
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import Fitted, FittedTargets, StoredTargets, Unusable
from denoising_vit.errors import DenoisingVitError, TrainError
from denoising_vit.store import FeatureStore, layout
from denoising_vit.store.fields import FieldArray
from denoising_vit.store.writing import ShardWriter
from denoising_vit.training.photos import ViewReader

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tiny.Fitted:
    return tiny.fitted(tmp_path_factory.mktemp("data"), 5)


@pytest.fixture
def data(shared: tiny.Fitted, tmp_path: Path) -> tiny.Fitted:
    """A copy that may be damaged."""
    photos, store = (Path(shutil.copytree(at, tmp_path / at.name)) for at in (shared.photos, shared.folder))
    return tiny.Fitted(photos, store)


@pytest.fixture(scope="module")
def extractor() -> Backbone:
    return tiny.backbone()


def stored(data: tiny.Fitted, extractor: Backbone) -> StoredTargets:
    return StoredTargets(data.store, data.stored.photos, extractor)


def test_finished_store_gives_all_images_with_their_fields(data: tiny.Fitted, extractor: Backbone) -> None:
    targets = stored(data, extractor)
    assert targets.images == (0, 1, 2, 3, 4)
    assert (targets.size, targets.keeps_fields) == ((56, 56), True)
    for fitted, index in zip(targets.stream([3, 1]), [3, 1], strict=True):
        assert fitted.index == index
        assert fitted.field.dtype == torch.float16  # as it is stored
        assert torch.equal(fitted.field.float(), data.store[index].field)
        assert fitted.image.shape == (3, 90, 120)
    assert torch.equal(next(targets.stream([2])).field.float(), data.store[2].field)
    assert targets.photo(2).shape == (90, 120, 3)


def test_photos_may_be_in_another_order_and_include_others(
    data: tiny.Fitted, extractor: Backbone, tmp_path: Path
) -> None:
    more = shutil.copytree(data.photos, tmp_path / "more")
    Image.fromarray(tiny_artifact.flat(3)).save(more / "000.png")
    targets = StoredTargets(data.store, open_dataset(more), extractor)
    torch.testing.assert_close(next(targets.stream([0])).image, next(stored(data, extractor).stream([0])).image)


def test_store_of_another_backbone_is_rejected_with_both_names(data: tiny.Fitted) -> None:
    with pytest.raises(
        TrainError, match=r"the store was fitted with .*Planted.*, got .*Planted.*Use the store's backbone"
    ):
        stored(data, tiny.backbone(seed=1))


def test_an_unfinished_store_is_refused(data: tiny.Fitted, extractor: Backbone) -> None:
    _remove(data.folder)
    with pytest.raises(TrainError, match=r"5 of 5 images have no target yet \(00.png, 01.png, 02.png, and 2 more\)"):
        stored(data, extractor)


@pytest.mark.parametrize("opened_anew", [False, True])
def test_target_removed_during_training_raises(data: tiny.Fitted, extractor: Backbone, opened_anew: bool) -> None:
    targets = stored(data, extractor)
    assert next(targets.stream([1])).index == 1
    _remove(data.folder)
    if opened_anew:  # as in other processes, which have not read the store before
        targets.store = FeatureStore.open(data.folder)
    with pytest.raises(TrainError, match=r"01.png: the target is missing \("):
        next(targets.stream([1]))


def _remove(store: Path) -> None:
    """Removes the results, as if nothing had been fitted yet."""
    shutil.rmtree(store / layout.SEALED)
    shutil.rmtree(store / layout.FIELD / "c", ignore_errors=True)


def test_damaged_shard_raises_with_the_name_of_the_image(data: tiny.Fitted, extractor: Backbone) -> None:
    (shard,) = [path for path in (data.folder / layout.FIELD).rglob("*") if path.is_file() and path.name == "0"]
    shard.write_bytes(b"nothing of use")
    with pytest.raises(TrainError, match=r"02.png: the target is missing \(.*cannot be read"):
        next(stored(data, extractor).stream([2]))


def test_missing_photos_are_named(data: tiny.Fitted, extractor: Backbone) -> None:
    (data.photos / "03.png").unlink()
    with pytest.raises(TrainError, match=r"1 of the store's 5 photos are missing \(03.png\); expected the photos"):
        stored(data, extractor)


def test_other_photo_of_the_same_name_raises(data: tiny.Fitted, extractor: Backbone) -> None:
    Image.fromarray(tiny_artifact.photos(1, seed=9)[0]).save(data.photos / "03.png")
    targets = stored(data, extractor)
    assert next(targets.stream([2])).index == 2
    with pytest.raises(TrainError, match=r"03.png: the photo differs from the one that the store was fitted on"):
        next(targets.stream([3]))


def test_photo_that_became_unreadable_raises(data: tiny.Fitted, extractor: Backbone) -> None:
    (data.photos / "03.png").write_text("words")
    with pytest.raises(TrainError, match=r"03.png: the target's photo cannot be read \(.*not an image"):
        next(stored(data, extractor).stream([3]))


def test_kept_and_fresh_pairs_never_replace_a_missing_target(
    data: tiny.Fitted, extractor: Backbone, tmp_path: Path
) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run", extractor, pairs=tiny.views(keep=0), training=tiny.options())
    (data.photos / "03.png").write_text("words")
    targets = stored(data, extractor)
    kept = KeptPairs(tmp_path / "pairs", targets, targets.images, extractor, [(56, 56)], tiny.views(), 0)
    kept.open(create=True)
    with pytest.raises(TrainError, match=r"03.png"):
        kept.fill(targets.images)
    assert 3 not in kept.usable()
    with pytest.raises(DenoisingVitError, match=r"03.png"):
        job.training().run()
    assert isinstance(job.training().pairs, ViewReader)


def test_patch_grid_store_is_rejected_for_crops(data: tiny.Fitted, extractor: Backbone, tmp_path: Path) -> None:
    tiny.fit(data.photos, tmp_path / "coarse", extractor, grid="patch")
    coarse = tiny.Fitted(data.photos, tmp_path / "coarse")
    assert not stored(coarse, extractor).keeps_fields
    with pytest.raises(TrainError, match="the patch grid only, which is too coarse for crops; fit with --grid field"):
        tiny.prepared(coarse.stored, tmp_path / "run", extractor, tiny.options(held_out=1))
    whole = tiny.views(keep=2, whole=1)
    job, progress = tiny.trained(coarse.stored, tmp_path / "run", extractor, tiny.options(held_out=1), whole)
    assert progress.step == 20
    assert job.sizes == ((56, 56),)


def on_the_fly(data: tiny.Fitted, extractor: Backbone) -> FittedTargets:
    made = data.unfitted.targets(extractor)
    assert isinstance(made, FittedTargets)
    return made


def test_on_the_fly_fields_match_those_of_a_store(data: tiny.Fitted, extractor: Backbone) -> None:
    targets = on_the_fly(data, extractor)
    assert (list(targets.ids), targets.size) == (data.store.ids, (56, 56))
    for found, index in zip(targets.stream([4, 0, 2]), [4, 0, 2], strict=True):
        assert isinstance(found, Fitted)
        assert found.index == index
        torch.testing.assert_close(found.field, data.store[index].field, atol=4e-3, rtol=2e-3)
        torch.testing.assert_close(found.image, next(stored(data, extractor).stream([index])).image)


def test_on_the_fly_and_store_make_the_same_pairs(data: tiny.Fitted, extractor: Backbone, tmp_path: Path) -> None:
    there = tiny.prepared(data.stored, tmp_path / "stored", extractor)
    here = tiny.prepared(data.unfitted, tmp_path / "fitted", extractor)
    samples = there.training().sampler.step(0)
    assert here.training().sampler.step(0) == samples
    for one in samples:
        (raw, target), (same_raw, same_target) = there.kept.read([one]), here.kept.read([one])
        torch.testing.assert_close(raw, same_raw)
        torch.testing.assert_close(target, same_target, atol=6e-3, rtol=3e-3)


def test_on_the_fly_reports_unusable_photos_in_order(data: tiny.Fitted, extractor: Backbone) -> None:
    (data.photos / "01.png").write_text("words")
    Image.new("RGB", (5, 90)).save(data.photos / "02.png")
    found = list(on_the_fly(data, extractor).stream(range(5)))
    assert [one.index for one in found] == [0, 1, 2, 3, 4]
    assert [isinstance(one, Unusable) for one in found] == [False, True, True, False, False]
    assert isinstance(found[1], Unusable)
    assert "not an image file" in found[1].reason


def test_identity_records_plan_ids_and_nodes(data: tiny.Fitted, extractor: Backbone) -> None:
    identity = on_the_fly(data, extractor).identity
    other = tiny.Photos(open_dataset(data.photos), tiny.denoising(views=9)).targets(extractor).identity
    assert identity["plan"] != other["plan"]
    assert identity == on_the_fly(data, extractor).identity
    manifest = data.store.manifest
    recorded = stored(data, extractor).identity
    assert (recorded["plan"], recorded["ids"], recorded["nodes"]) == (manifest.plan, manifest.ids_digest, [14, 14])


def test_identity_differs_for_other_photos_of_the_same_names(
    data: tiny.Fitted, extractor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Path(shutil.copytree(data.photos, tmp_path / "others"))
    Image.fromarray(tiny_artifact.photos(1, seed=9)[0]).save(photos / "03.png")
    tiny.fit(photos, tmp_path / "other", extractor)
    other = tiny.Fitted(photos, tmp_path / "other")

    def reading(*_: Any) -> None:
        raise AssertionError("a field was read")

    monkeypatch.setattr(FieldArray, "read", reading)
    identity, others = stored(data, extractor).identity, stored(other, extractor).identity
    assert identity == stored(data, extractor).identity
    assert {name for name in identity if identity[name] != others[name]} == {"photos"}


def test_identity_is_the_same_for_unsealed_shards(
    data: tiny.Fitted, extractor: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crashed(_writer: ShardWriter) -> bool:
        return False

    monkeypatch.setattr(ShardWriter, "finish", crashed)
    tiny.fit(data.photos, tmp_path / "staged", extractor)
    staged = tiny.Fitted(data.photos, tmp_path / "staged")
    assert not staged.store.sealed()
    assert stored(staged, extractor).identity == stored(data, extractor).identity
