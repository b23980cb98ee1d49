"""The shipped denoiser: the backbone that it is for, and its effect on photos that it was not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F

import denoising_vit as dv
from denoising_vit.denoiser import find_shipped
from denoising_vit.metrics.blank_test import high_frequencies, uniform_images, variance_over_places
from denoising_vit.metrics.tokens import effective_rank
from denoising_vit.views.crops import Crop
from denoising_vit.views.rendering import to_image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MODEL = "vit_small_patch14_dinov2.lvd142m"

SIZE = (364, 476)

#: The middle of the photo, mirrored.
CROP = Crop((0.25, 0.2, 0.75, 0.8), SIZE, flip=True)


@pytest.fixture(scope="module")
def backbone() -> dv.Backbone:
    return dv.load_backbone(MODEL, weights="bundled", device="cpu")


@pytest.fixture(scope="module")
def clean(backbone: dv.Backbone) -> dv.DenoisedViT:
    found = find_shipped(backbone)
    assert found is not None
    return dv.DenoisedViT(backbone, found.denoiser)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Photos of kinds that it was not trained on."""
    return [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut(), skimage.data.rocket()]


def seen(extractor: dv.Backbone | dv.DenoisedViT, photo: np.ndarray, crop: Crop) -> torch.Tensor:
    """Features (h, w, C) of a crop."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        return extractor(crop.render(to_image(photo), mean, std)[None])[0]


def agreement(extractor: dv.Backbone | dv.DenoisedViT, photo: np.ndarray) -> float:
    """Mean cosine of the features of the same places in the whole photo and in a mirrored crop."""
    expected = CROP.sample(seen(extractor, photo, Crop.whole(SIZE)), 14, 14)
    return float(F.cosine_similarity(expected, seen(extractor, photo, CROP), dim=-1).mean())


def test_denoised_views_agree_better_than_raw_ones(
    backbone: dv.Backbone, clean: dv.DenoisedViT, photos: list[np.ndarray]
) -> None:
    for photo in photos:
        raw, denoised = agreement(backbone, photo), agreement(clean, photo)
        assert 1 - denoised < 0.85 * (1 - raw), (raw, denoised)


def test_effective_rank_stays_close_to_that_of_raw_features(
    backbone: dv.Backbone, clean: dv.DenoisedViT, photos: list[np.ndarray]
) -> None:
    """Agreement alone is not enough: constant features agree perfectly."""
    raw, denoised = (
        effective_rank(torch.stack([seen(extractor, photo, Crop.whole(SIZE)) for photo in photos]))
        for extractor in (backbone, clean)
    )
    assert denoised > 0.85 * raw


def test_other_weights_of_the_same_model_are_refused(backbone: dv.Backbone) -> None:
    other = dv.load_backbone(MODEL, weights="random", device="cpu", dtype="float32")
    assert find_shipped(other) is None
    with pytest.raises(dv.DenoiserError, match="was trained for"):
        dv.load_denoiser(MODEL, backbone=other)


def test_record_names_the_backbone_and_recipe() -> None:
    made = dv.load_denoiser(MODEL)
    assert made.trained_for is not None and made.trained_for["name"] == MODEL
    assert made.info["recipe"] == "recipes/second_teacher.py"
    assert (made.info["count"], made.info["steps"], made.info["share"]) == (420, 450, 0.5)
    start = made.info["start"]
    assert start["recipe"] == "recipes/shipped_denoiser.py"
    assert (start["photos"], start["views"], start["blank"]) == (2231, 12, 0.5)


def test_uniform_images_have_hardly_any_artifact_left(backbone: dv.Backbone, clean: dv.DenoisedViT) -> None:
    colours = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.8, 0.2, 0.2]])
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    images = (uniform_images(colours, (518, 518)) - mean) / std
    raw, denoised = backbone(images), clean(images)
    assert variance_over_places(denoised) < 0.15 * variance_over_places(raw)
    assert high_frequencies(denoised) < 0.25 * high_frequencies(raw)
