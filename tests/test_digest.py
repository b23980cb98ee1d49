"""Weights that hardly differ, such as successive checkpoints: stored data of one is not used for the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import denoising_vit.maps
import tiny_artifact
import tiny_training
from command import in_process
from denoising_vit import Backbone, load_backbone
from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.recorded import describe, same_weights, weights_key
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import StoredTargets
from denoising_vit.errors import StoreError, TrainError
from denoising_vit.evaluation.data import EvaluationSet
from denoising_vit.evaluation.features import FeatureCache, store_name
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.show.video.parts import differences, make_record
from denoising_vit.store import FeatureStore
from denoising_vit.views.crops import Crop
from tiny_labelled import SIZE, coloured, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((56, 56),)


@pytest.fixture
def backbone() -> Backbone:
    return tiny_training.backbone()


@pytest.fixture
def later(backbone: Backbone) -> Backbone:
    """The next checkpoint: one weight differs."""
    other = copy.deepcopy(backbone)
    other.get_parameter("model.project.weight").data[3, 1, 2, 5] += 1e-4
    other._fingerprint = None
    assert other.fingerprint.short == backbone.fingerprint.short
    assert other.fingerprint.matches(backbone.fingerprint)
    return other


# The digest


def test_equal_weights_have_the_same_digest_and_others_do_not(backbone: Backbone, later: Backbone) -> None:
    assert backbone.digest == tiny_training.backbone().digest == copy.deepcopy(backbone).digest
    assert backbone.digest != later.digest


def test_another_layer_of_the_same_weights_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", weights="random", device="cpu")
    digest = backbone.digest
    monkeypatch.setattr("denoising_vit.backbones.base.state_digest", lambda _module: pytest.fail("hashed again"))
    assert backbone.at_layer(3).digest == digest


def test_modified_weights_have_another_digest(backbone: Backbone) -> None:
    before = backbone.digest
    weight = backbone.get_parameter("model.project.weight")
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
    written = backbone.digest
    assert written not in (before, None)
    with torch.no_grad():
        weight[0, 0, 0, 0] -= 1
        weight.copy_(tiny_training.backbone().get_parameter("model.project.weight"))
    assert backbone.digest == before
    assert backbone.to(dtype=torch.bfloat16).to(dtype=torch.float32).digest != before  # rounded
    backbone.load_state_dict(tiny_training.backbone().state_dict(), assign=True)
    assert backbone.digest == before


def test_digest_of_loaded_weights_does_not_depend_on_the_file(tmp_path: Path) -> None:
    random = load_backbone("test_vit", weights="random", dtype="float32", device="cpu")
    torch.save({"teacher": random.get_submodule("model").state_dict()}, tmp_path / "a.pth")
    again = load_backbone("test_vit", weights=tmp_path / "a.pth", dtype="float32", device="cpu")
    assert again.digest == random.digest == again.at_layer(2).digest


def test_function_has_no_digest_and_is_identified_by_its_fingerprint() -> None:
    functions = [tiny_artifact.plain(tiny_artifact.Planted(strength).forward) for strength in (1.0, 1.0, 1.5)]
    assert {function.digest for function in functions} == {None}
    first, same, other = map(weights_key, functions)
    assert first == same != other


def test_records_are_compared_by_digest_where_both_have_a_usable_one(backbone: Backbone, later: Backbone) -> None:
    ours, theirs = describe(backbone), describe(later)
    assert same_weights(ours, json.loads(json.dumps(ours)))
    assert not same_weights(ours, theirs)
    assert same_weights(ours, theirs | {"digest": None})
    assert same_weights(ours, {key: value for key, value in theirs.items() if key != "digest"})  # as in older versions
    assert same_weights(ours, theirs | {"dtype": "bfloat16"})
    assert not same_weights(ours, describe(tiny_training.backbone(seed=1)) | {"digest": None})


# Stored data


def test_cached_features_and_fields_of_similar_weights_are_separate(
    backbone: Backbone, later: Backbone, tmp_path: Path
) -> None:
    data = write_labelled(tmp_path / "data", coloured(1, 0), coloured(1, 1))
    shown = data.train.images[0], Crop.whole((SIZE, SIZE))
    cache = FeatureCache(tmp_path / "cache")
    ours, theirs = (ExtractorSource("raw", each) for each in (backbone, later))
    assert cache.path(ours, shown) == cache.path(ExtractorSource("raw", copy.deepcopy(backbone)), shown)
    assert cache.path(ours, shown) != cache.path(theirs, shown)
    assert ours.backbone != theirs.backbone  # identifies recorded results
    images: EvaluationSet = data.train
    names = [store_name(images, each, BackboneSpec(), {}) for each in (backbone, later, copy.deepcopy(backbone))]
    assert names[0] == names[2] != names[1]


@pytest.fixture
def fitted(backbone: Backbone, tmp_path: Path) -> tiny_training.Fitted:
    return tiny_training.fitted(tmp_path / "data", 3)


def test_store_of_similar_weights_is_not_filled_or_trained_on(
    fitted: tiny_training.Fitted, backbone: Backbone, later: Backbone
) -> None:
    manifest = fitted.store.manifest
    ours, theirs = ({**manifest.__dict__, "backbone": describe(each)} for each in (backbone, later))
    assert FeatureStore.open(fitted.folder, type(manifest)(**ours)).ids == fitted.store.ids
    with pytest.raises(StoreError, match=r"weights: .*similar, but not equal: digests \w{8} and \w{8}"):
        FeatureStore.open(fitted.folder, type(manifest)(**theirs))
    with pytest.raises(TrainError, match=r"the store was fitted with .*, digest \w{8}\), got .*, digest \w{8}\)"):
        StoredTargets(fitted.store, fitted.stored.photos, later)


def test_older_store_without_a_digest_is_accepted(
    fitted: tiny_training.Fitted, backbone: Backbone, later: Backbone
) -> None:
    path = fitted.folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["backbone"]["digest"], content["crc32"]  # as in older versions
    path.write_text(json.dumps(content))
    for each in (backbone, later):
        assert StoredTargets(FeatureStore.open(fitted.folder), fitted.stored.photos, each).images == (0, 1, 2)


def test_pairs_of_similar_weights_are_rejected_and_older_ones_open(
    fitted: tiny_training.Fitted, backbone: Backbone, later: Backbone, tmp_path: Path
) -> None:
    targets = StoredTargets(fitted.store, fitted.stored.photos, backbone)

    def opened(by: Backbone) -> KeptPairs:
        pairs = KeptPairs(tmp_path / "pairs", targets, targets.images, by, SIZES, tiny_training.views(keep=2), seed=5)
        pairs.open(create=True)
        return pairs

    opened(backbone).fill(targets.images)
    with pytest.raises(
        TrainError, match=r'has pairs of other settings: backbone.digest was "\w+[.]{3}, now "\w+[.]{3}[.] Choose'
    ):
        opened(later)
    lighter = copy.deepcopy(backbone)
    lighter.mean = (0.1, 0.1, 0.1)
    with pytest.raises(
        TrainError, match=r"has pairs of other settings: backbone.mean was \[0.485, 0.456, 0.406\], now \[0.1"
    ):
        opened(lighter)
    head = tmp_path / "pairs" / "pairs.json"
    content = json.loads(head.read_text())
    for name in ("digest", "mean", "std"):
        del content["backbone"][name]  # as in older versions
    head.write_text(json.dumps(content))
    assert opened(backbone).usable() == (0, 1, 2)


def test_video_records_of_similar_weights_differ(backbone: Backbone, later: Backbone) -> None:
    ours, theirs = (make_record("clip", {"every": 1}, {"backbone": describe(each)}) for each in (backbone, later))
    assert differences(ours, copy.deepcopy(ours)) == []
    assert differences(ours, theirs) == ["a different backbone or weights"]
    del theirs["backbone"]["digest"]
    assert differences(theirs, ours) == []


def test_existing_results_of_similar_weights_get_a_note(
    backbone: Backbone,
    later: Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = tiny_artifact.write_photos(tmp_path / "photos", 1)
    dvit = in_process(capsys, monkeypatch)
    monkeypatch.setattr(denoising_vit.maps, "draw_panel", lambda _photo, _result, path, **_: path.write_bytes(b"."))

    def note(by: Backbone) -> str:
        monkeypatch.setattr(BackboneSpec, "load", lambda _spec: by)
        command = ("denoise", photos, "-o", tmp_path / "out", "--views", "8", "--held-out", "2", "--json")
        return dvit(*command, "--method", "exact").rows[0]["note"]

    note(backbone)
    assert note(backbone) == "kept"
    assert note(later) == "kept, made with other settings; use --overwrite to redo it"
