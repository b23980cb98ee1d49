"""Teachers: a denoiser on layers of a frozen backbone, or the fields of stage 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_distillation as tiny
import tiny_fit
import tiny_training
from denoising_vit import Backbone, DenoisedViT, Denoiser
from denoising_vit.backbones.loading import with_weights
from denoising_vit.backbones.recorded import describe, is_recorded
from denoising_vit.data import open_dataset
from denoising_vit.denoiser import find_denoiser, loading
from denoising_vit.denoiser.job import Stored
from denoising_vit.distilled.models import DenoiserTeacher, FieldTeacher
from denoising_vit.distilled.weights import DistilledWeights
from denoising_vit.errors import BackboneError, DenoiserError, FormatError, TrainError
from denoising_vit.store import FeatureStore
from denoising_vit.training.loop import own_batches
from denoising_vit.training.photos import Batch
from denoising_vit.training.samples import Sample
from denoising_vit.views.crops import Crop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


def batch(images: Tensor, fields: Tensor | None = None) -> Batch:
    samples = [Sample(number, 0, None, Crop.whole((48, 64))) for number in range(len(images))]
    return Batch(samples, images, fields, torch.ones(len(images), dtype=torch.bool))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


# --- a denoiser ---


def test_targets_match_the_denoised_vit(images: Tensor) -> None:
    backbone = tiny.backbone(3)
    denoiser = tiny.denoiser(backbone)
    lesson = DenoiserTeacher.of(backbone, denoiser)(batch(images))
    with torch.no_grad():
        assert torch.equal(lesson.features[0], DenoisedViT(backbone, denoiser)(images))
        raw, prefix = backbone.forward_with_prefix(images)
    assert torch.equal(lesson.raw[0], raw)
    assert torch.equal(lesson.prefixes[0], prefix)
    assert [len(part) for part in lesson] == [1, 1, 1]
    assert not torch.allclose(lesson.features[0], raw, atol=0.1)


def test_each_layer_matches_its_own_backbone_and_denoiser(images: Tensor) -> None:
    backbone = tiny.backbone(4)
    layers = (3, 2, 0)
    denoisers = [tiny.denoiser(backbone.at_layer(layer), seed=layer) for layer in layers]
    teacher = DenoiserTeacher.of(backbone, denoisers[0], denoisers[1:])
    assert teacher.layers == (2, 0)
    lesson = teacher(batch(images))
    for place, layer in enumerate(layers):
        alone = tiny.backbone(4, layer)
        with torch.no_grad():
            raw, prefix = alone.forward_with_prefix(images)
            torch.testing.assert_close(lesson.features[place], DenoisedViT(alone, denoisers[place])(images))
        torch.testing.assert_close(lesson.raw[place], raw)
        torch.testing.assert_close(lesson.prefixes[place], prefix)


def test_further_layer_may_come_after_the_backbone_layer(images: Tensor) -> None:
    backbone = tiny.backbone(4, 1)
    denoisers = [tiny.denoiser(backbone), tiny.denoiser(backbone.at_layer(3), seed=3)]
    lesson = DenoiserTeacher.of(backbone, denoisers[0], denoisers[1:])(batch(images))
    with torch.no_grad():
        torch.testing.assert_close(lesson.features[1], DenoisedViT(tiny.backbone(4, 3), denoisers[1])(images))


def test_targets_are_float32_without_gradients(images: Tensor) -> None:
    backbone = tiny.backbone().to(torch.bfloat16)
    lesson = DenoiserTeacher.of(backbone, tiny.denoiser(None).to(torch.bfloat16))(batch(images))
    for value in (part for parts in lesson for part in parts):
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_denoisers_may_be_objects_or_paths(tmp_path: Path, images: Tensor) -> None:
    backbone = tiny.backbone(3)
    own, other = tiny.denoiser(backbone), tiny.denoiser(backbone.at_layer(1), seed=1)
    files = [tiny.write(made, tmp_path / f"{number}.safetensors") for number, made in enumerate((own, other))]
    found = find_denoiser(other, backbone.at_layer(1))
    teachers = [
        DenoiserTeacher.of(backbone, own, [other]),
        DenoiserTeacher.of(backbone, files[0], [str(files[1])]),
        DenoiserTeacher.of(backbone, str(files[0]), [found]),
    ]
    first, *others = [teacher(batch(images)) for teacher in teachers]
    for lesson in others:
        for there, here in zip(first.features, lesson.features, strict=True):
            torch.testing.assert_close(here, there)
    assert teachers[0].identity == teachers[1].identity == teachers[2].identity


def test_identity_depends_on_denoisers_and_layers() -> None:
    backbone = tiny.backbone(3)
    denoisers = [tiny.denoiser(backbone.at_layer(layer)) for layer in (2, 1)]
    teacher = DenoiserTeacher.of(backbone, denoisers[0], denoisers[1:])
    digests = [loading.denoiser_digest(made) for made in denoisers]
    assert teacher.identity == {"denoisers": digests, "layers": [1]}
    other = DenoiserTeacher.of(backbone, tiny.denoiser(backbone, seed=1), denoisers[1:])
    assert other.identity["denoisers"] != digests


def test_shipped_denoiser_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    backbone = tiny.backbone()
    made = tiny.denoiser(backbone)
    monkeypatch.setattr(loading, "_SHIPPED", tmp_path)
    with pytest.raises(DenoiserError, match=r"no denoiser for vit_tiny.* train one with dvit train and pass"):
        DenoiserTeacher.of(backbone, None)
    tiny.write(made, tmp_path / f"{tiny.MODEL}.safetensors")
    lesson = DenoiserTeacher.of(backbone, None)(batch(images))
    with torch.no_grad():
        torch.testing.assert_close(lesson.features[0], DenoisedViT(backbone, made)(images))


# --- denoisers that do not match ---


def test_a_denoiser_of_other_weights_is_refused() -> None:
    with pytest.raises(DenoiserError, match=r"trained for .*seed 1.*, got .*seed 0.* Use the backbone that it was"):
        DenoiserTeacher.of(tiny.backbone(), tiny.denoiser(tiny.backbone(seed=1)))


def test_a_denoiser_of_another_layer_is_refused() -> None:
    backbone = tiny.backbone(3)
    with pytest.raises(DenoiserError, match=r"trained for .*layer 1.*, got .*layer 2"):
        DenoiserTeacher.of(backbone, tiny.denoiser(backbone.at_layer(1)))


def test_a_denoiser_of_another_width_is_refused() -> None:
    with pytest.raises(DenoiserError, match=r"has 384 channels, but .* has 192. Use a denoiser that was trained"):
        DenoiserTeacher.of(tiny.backbone(), tiny.denoiser(None, channels=384))


def wider(layer: int) -> Denoiser:
    """A denoiser recorded for a layer of the tiny ViT, but with the width of another model."""
    made = tiny.denoiser(None, channels=384)
    made.trained_for = describe(tiny.backbone(3, layer))
    return made


def recorded(**changes: Any) -> Denoiser:
    """A denoiser for layer 1 of the ViT with three blocks, with changes in its record."""
    made = tiny.denoiser(tiny.backbone(3, 1))
    assert made.trained_for is not None
    made.trained_for |= changes
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny.denoiser(None),
            r"given does not record its layer of vit_tiny_patch16_224; expected",
        ),
        (lambda: recorded(layer=None), r"does not record its layer .* was trained with --layer"),
        (lambda: tiny.denoiser(tiny.backbone(3)), r"given: duplicate denoiser for layer 2; expected one each"),
        (lambda: tiny.denoiser(tiny.backbone(3, 1, seed=1)), r"trained for .*seed 1.*, got .*seed 0"),
        (lambda: recorded(layer=0), r"trained for .*layer 0.*, got .*layer 0.*fingerprint"),  # the fingerprint counts
        (lambda: wider(1), r"the denoiser has 384 channels, but .*layer 1.* has 192"),
    ],
    ids=["no record", "no layer", "own layer", "other weights", "wrong layer", "other width"],
)
def test_further_denoisers_that_do_not_fit_are_refused(make: Any, message: str) -> None:
    backbone = tiny.backbone(3)
    with pytest.raises(DenoiserError, match=message):
        DenoiserTeacher.of(backbone, tiny.denoiser(backbone), [make()])


def test_two_further_denoisers_of_one_layer_are_refused(tmp_path: Path) -> None:
    backbone = tiny.backbone(3)
    further = [tiny.denoiser(backbone.at_layer(1), seed=1), tiny.denoiser(backbone.at_layer(1), seed=2)]
    files = [tiny.write(made, tmp_path / f"d{number}.safetensors") for number, made in enumerate(further)]
    with pytest.raises(DenoiserError, match=r"^d1.safetensors: duplicate denoiser for layer 1; expected one each"):
        DenoiserTeacher.of(backbone, tiny.denoiser(backbone), files)


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    backbone = tiny.backbone(2)
    with pytest.raises(BackboneError, match=r"vit_tiny_patch16_224 has 2 blocks: layers must be -2 to 1, got 3"):
        DenoiserTeacher.of(backbone, tiny.denoiser(backbone), [tiny.denoiser(tiny.backbone(4))])


def test_further_layers_of_a_module_are_refused() -> None:
    backbone = tiny.tokens()
    further = tiny.denoiser(tiny.backbone(), channels=64)
    with pytest.raises(BackboneError, match=r"Tokens is a module with unknown blocks"):
        DenoiserTeacher.of(backbone, tiny.denoiser(backbone, channels=64), [further])


@pytest.mark.parametrize("also", [False, True])
def test_a_damaged_file_is_refused(tmp_path: Path, also: bool) -> None:
    backbone = tiny.backbone()
    good, bad = tiny.denoiser(backbone), tmp_path / "bad.safetensors"
    bad.write_bytes(b"words")
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        DenoiserTeacher.of(backbone, good if also else bad, [bad] if also else [])


# --- another layer of the same weights ---


def test_at_layer_shares_weights_and_keeps_the_original(images: Tensor) -> None:
    backbone = tiny.backbone(4)
    before = backbone.fingerprint
    other = backbone.at_layer(-3)
    assert (backbone.layer, other.layer) == (3, 1)
    assert {value.data_ptr() for value in other.parameters()} == {value.data_ptr() for value in backbone.parameters()}
    assert other.fingerprint == tiny.backbone(4, 1).fingerprint != before
    assert backbone.fingerprint == before
    with torch.no_grad():
        assert torch.equal(other(images), tiny.backbone(4, 1)(images))
        torch.testing.assert_close(other(images), backbone.forward_intermediates(images, (1,)).layers[0])
        assert torch.equal(backbone(images), tiny.backbone(4)(images))


@pytest.mark.parametrize("layer", [4, -5])
def test_at_layer_out_of_range_is_refused(layer: int) -> None:
    with pytest.raises(BackboneError, match=rf"has 4 blocks: layers must be -4 to 3, got {layer}"):
        tiny.backbone(4).at_layer(layer)


def test_at_layer_of_a_module_is_refused() -> None:
    with pytest.raises(BackboneError, match="with unknown blocks"):
        tiny.tokens().at_layer(0)


# --- fields ---


@pytest.fixture(scope="module")
def fitted(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path, Path]:
    """A backbone, photos, and the store of their fields."""
    folder = tmp_path_factory.mktemp("fitted")
    backbone, photos = tiny.backbone(), tiny_fit.write_photos(folder / "photos", 5)
    tiny_training.fit(photos, folder / "store", backbone, size=tiny.SIZE)
    return backbone, photos, folder / "store"


def stored(fitted: tuple[Backbone, Path, Path]) -> Stored:
    return Stored(FeatureStore.open(fitted[2]), open_dataset(fitted[1]))


def test_fields_are_sampled_at_the_patches_of_each_view(fitted: tuple[Backbone, Path, Path], tmp_path: Path) -> None:
    backbone, store = fitted[0], FeatureStore.open(fitted[2])
    views = tiny.views(whole=0.3, inverted=0.5, sizes="64x48")
    job = tiny.prepared(stored(fitted), tmp_path / "run", backbone, tiny.options(batch_size=5, held_out=1), views)
    run = job.training()
    samples = run.sampler.step(0)
    assert len({sample.crop.flip for sample in samples}) == 2
    (found,) = run.reader.batches([samples])
    lesson = run.teacher(found)
    for place, sample in enumerate(samples):
        field = torch.from_numpy(store.read(sample.image)[0]).float()
        expected = sample.crop.sample(field, backbone.patch_size, backbone.stride)
        assert expected.shape == (4, 3, tiny.CHANNELS)
        assert torch.equal(lesson.features[0][place], expected)
    with torch.no_grad():
        raw, prefix = backbone.forward_with_prefix(found.images)
    assert torch.equal(lesson.raw[0], raw)
    assert torch.equal(lesson.prefixes[0], prefix)


def test_training_on_fields_approaches_them(fitted: tuple[Backbone, Path, Path], tmp_path: Path) -> None:
    training = tiny.options(steps=20, batch_size=4, held_out=1, learning_rate=1e-3, evaluate_every=20)
    job, progress = tiny.distilled(stored(fitted), tmp_path / "run", fitted[0], training)
    assert isinstance(job.teacher, FieldTeacher)
    assert job.teacher.identity == {"fields": True}
    assert job.photos.identity["ids"] == FeatureStore.open(fitted[2]).manifest.ids_digest
    (figures,) = tiny.rows(job.folder.path, "held_out")
    assert figures["ratio"] < 0.9
    assert figures["cosine"] > figures["raw_cosine"] + 0.01
    assert progress.best == pytest.approx(figures["cosine"])
    assert job.skipped == {}


@pytest.mark.parametrize("more", ["denoiser", "also"])
def test_fields_with_a_denoiser_are_refused(fitted: tuple[Backbone, Path, Path], tmp_path: Path, more: str) -> None:
    denoiser = tiny.denoiser(fitted[0])
    given: dict[str, Any] = {"denoiser": denoiser} if more == "denoiser" else {"also": [denoiser]}
    with pytest.raises(TrainError, match="with --fields, the targets are the store's fields; omit the denoiser"):
        tiny.prepared(stored(fitted), tmp_path / "run", fitted[0], **given)
    assert not (tmp_path / "run").exists()


def test_fields_of_another_backbone_are_refused(fitted: tuple[Backbone, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"the store was fitted with .*seed 0.*, got .*seed 1"):
        tiny.prepared(stored(fitted), tmp_path / "run", tiny.backbone(seed=1))
    assert not (tmp_path / "run").exists()


def test_second_round_learns_fields_of_the_weights_that_it_starts_from(
    fitted: tuple[Backbone, Path, Path], tmp_path: Path
) -> None:
    raw, photos, _ = fitted
    training = tiny.options(steps=2, held_out=1, learning_rate=1e-3)
    first, _ = tiny.distilled(stored(fitted), tmp_path / "first", raw, training)
    start = first.folder.last
    again = tiny_training.fit(photos, tmp_path / "again", with_weights(raw, start), size=tiny.SIZE)
    source = Stored(again, open_dataset(photos))
    with pytest.raises(TrainError, match=r"the store was fitted with .*last.safetensors.*, got .*seed 0"):
        tiny.prepared(source, tmp_path / "second", raw)
    job, progress = tiny.distilled(source, tmp_path / "second", raw, training, start=start)
    assert progress.step == 2
    assert job.photos.identity["fitted with"] == "the weights to start from"
    record = DistilledWeights.load(job.folder.last).record
    assert is_recorded(record["backbone"], raw)  # like the first, so that its difference from raw can be taken


def test_fields_on_the_patch_grid_are_too_coarse_for_crops(fitted: tuple[Backbone, Path, Path], tmp_path: Path) -> None:
    backbone, photos, _ = fitted
    coarse = tiny_training.fit(photos, tmp_path / "store", backbone, grid="patch", size=tiny.SIZE)
    source = Stored(coarse, open_dataset(photos))
    with pytest.raises(TrainError, match=r"has the patch grid only.*--grid field, or train on whole photos"):
        tiny.prepared(source, tmp_path / "run", backbone, shown=tiny.views(whole=0.9))
    assert not (tmp_path / "run").exists()
    tiny.prepared(source, tmp_path / "run", backbone, shown=tiny.views(whole=1))


def test_views_of_fields_are_drawn_lazily(fitted: tuple[Backbone, Path, Path], tmp_path: Path) -> None:
    run = tiny.prepared(stored(fitted), tmp_path / "run", fitted[0], tiny.options(steps=500)).training()
    drawn: list[list[Sample]] = []
    plan = own_batches(run.sampler, range(run.options.last_step), run.options.batch_size, run.accelerator)
    batches = run.reader.batches(drawn.append(samples) or samples for samples in plan)
    next(batches)
    assert len(drawn) < 50
