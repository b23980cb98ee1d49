"""Stage 1 for a stream of photos: the same results as for single photos, with any batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit import Backbone, DenoiseOptions, PlanError
from denoising_vit.data import Skipped
from denoising_vit.decomposition.stage_one import Failed, Ready, StageOne, finish_together

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = DenoiseOptions(views=9, held_out=2, seed=3)
Photos = list[tuple[int, str, np.ndarray | Skipped]]


class Counting(nn.Module):
    """One convolution that records the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 5, 8, 8)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return self.patches(images)


@pytest.fixture
def module() -> Counting:
    return Counting()


@pytest.fixture
def backbone(module: Counting) -> Backbone:
    made = dv.load_backbone(module, patch_size=8, default_size=56)
    module.batches.clear()
    return made


@pytest.fixture(scope="module")
def photos() -> Photos:
    chance = np.random.default_rng(0)
    return [(index, f"{index}.png", chance.integers(0, 255, (60, 70, 3), dtype=np.uint8)) for index in (4, 7, 8, 11)]


def run(stage: StageOne, photos: Photos) -> list[Ready | Failed]:
    return list(stage.run(iter(photos)))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16, 50])
def test_fields_and_metrics_match_single_photos(backbone: Backbone, photos: Photos, batch_size: int) -> None:
    stage = StageOne(backbone, DenoiseOptions(views=9, held_out=2, seed=3, batch_size=batch_size))
    found = run(stage, photos)
    assert [ready.index for ready in found] == [4, 7, 8, 11]
    for ready, (_, name, pixels) in zip(found, photos, strict=True):
        assert isinstance(ready, Ready) and isinstance(pixels, np.ndarray)
        done = ready.finish()
        field, record = done.field, done.record
        alone = dv.denoise_image(backbone, pixels, options=OPTIONS)
        torch.testing.assert_close(field, alone.field, rtol=1e-5, atol=1e-5)
        assert record["heldout_r2"] == pytest.approx(alone.heldout_r2)
        assert record["heldout_cosine"] == pytest.approx(alone.heldout_cosine)
        assert record["photo"]["name"] == name
        assert record["photo"]["sha256"] == alone.info["photo"]["sha256"]


def test_batches_are_filled_across_photos(backbone: Backbone, module: Counting, photos: Photos) -> None:
    stage = StageOne(backbone, DenoiseOptions(views=9, held_out=2, batch_size=16))
    run(stage, photos)
    assert stage.views == 11
    assert module.batches == [16, 16, 12]  # 4 x 11 views


def test_unusable_photos_fail_at_their_position(backbone: Backbone, photos: Photos) -> None:
    mixed: Photos = [
        (0, "a", Skipped("a", "truncated")),
        *photos[:1],
        (5, "b", np.zeros((3, 3, 3), np.uint8)),
        photos[1],
    ]
    found = run(StageOne(backbone, OPTIONS), mixed)
    assert [result.index for result in found] == [0, 4, 5, 7]
    assert found[0] == Failed(0, "a", "truncated")
    assert isinstance(found[2], Failed) and "less than one patch" in found[2].reason and found[2].name == "b"
    assert isinstance(found[1], Ready) and isinstance(found[3], Ready)


def test_non_finite_features_fail_only_their_photo(photos: Photos) -> None:
    class Poisoned(Counting):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            dark = images.amax((1, 2, 3)) < -1.5
            out[dark] = torch.nan
            return out

    backbone = dv.load_backbone(Poisoned(), patch_size=8, default_size=56)
    dark: Photos = [(1, "dark", np.zeros((60, 70, 3), np.uint8))]
    found = run(StageOne(backbone, OPTIONS), [*photos[:1], *dark, *photos[1:]])
    assert [type(result) for result in found] == [Ready, Failed, Ready, Ready, Ready]
    assert isinstance(found[1], Failed) and "not finite" in found[1].reason
    clean = run(StageOne(backbone, OPTIONS), photos)
    for ours, theirs in zip([found[0], *found[2:]], clean, strict=True):
        assert isinstance(ours, Ready) and isinstance(theirs, Ready)
        assert torch.equal(ours.finish().field, theirs.finish().field)


def test_known_artifact_is_used(backbone: Backbone, photos: Photos) -> None:
    artifact = torch.randn(7, 7, 5)
    found = run(StageOne(backbone, OPTIONS, artifact), photos[:1])[0]
    assert isinstance(found, Ready) and isinstance(photos[0][2], np.ndarray)
    alone = dv.denoise_image(backbone, photos[0][2], options=OPTIONS, artifact=artifact)
    torch.testing.assert_close(found.finish().field, alone.field, rtol=1e-5, atol=1e-5)


def test_without_held_out_views_there_are_no_metrics(backbone: Backbone, module: Counting, photos: Photos) -> None:
    stage = StageOne(backbone, DenoiseOptions(views=9, held_out=0))
    found = run(stage, photos[:1])[0]
    assert isinstance(found, Ready)
    assert "heldout_r2" not in found.finish().record
    assert sum(module.batches) == stage.views == 9


def test_error_of_the_photo_source_is_raised(backbone: Backbone, photos: Photos) -> None:
    def broken() -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
        yield photos[0]
        raise OSError("the drive is gone")

    with pytest.raises(OSError, match="the drive is gone"):
        list(StageOne(backbone, OPTIONS).run(broken()))


def test_other_methods_are_refused(backbone: Backbone) -> None:
    with pytest.raises(PlanError, match="exact method for data sets, got 'neural-field'"):
        StageOne(backbone, DenoiseOptions(method="neural-field"))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_photos_solved_together_match_those_solved_alone(
    backbone: Backbone, photos: Photos, known: bool, offsets: bool
) -> None:
    stage = StageOne(backbone, replace(OPTIONS, offsets=offsets), torch.randn(7, 7, 5) if known else None)
    ready = [result for result in run(stage, photos) if isinstance(result, Ready)]
    together = finish_together(ready)
    assert [done.index for done in together] == [4, 7, 8, 11]
    for done, photo in zip(together, ready, strict=True):
        alone = photo.finish()
        torch.testing.assert_close(done.field, alone.field, rtol=1e-6, atol=1e-6)
        assert done.name == alone.name
        assert done.record["photo"] == alone.record["photo"]
        assert done.record["heldout_r2"] == pytest.approx(alone.record["heldout_r2"])
