"""Content-free images, and metrics of a model's response to them."""

from __future__ import annotations

import pytest
import torch

from denoising_vit.metrics.blank_test import (
    high_frequencies,
    noise_image,
    random_blank_images,
    uniform_images,
    variance_over_places,
)


def test_uniform_images_have_one_colour() -> None:
    colours = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]])
    images = uniform_images(colours, (5, 7))
    assert images.shape == (2, 3, 5, 7)
    assert torch.equal(images, colours[:, :, None, None].expand(2, 3, 5, 7))


@pytest.mark.parametrize("grain", [1, 3])
def test_noise_has_the_given_colour_and_contrast(grain: int) -> None:
    image = noise_image((211, 223), torch.tensor([0.4, 0.5, 0.6]), 0.05, grain, torch.Generator().manual_seed(0))
    assert image.shape == (3, 211, 223)
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([0.4, 0.5, 0.6]), atol=0.005, rtol=0)
    assert float((image - image.mean((1, 2), keepdim=True)).std()) == pytest.approx(0.05, rel=0.05)


def test_random_images_are_the_same_for_a_seed_and_in_range() -> None:
    images = random_blank_images(40, (28, 42), 1)
    assert images.shape == (40, 3, 28, 42)
    assert torch.equal(images, random_blank_images(40, (28, 42), 1))
    assert not torch.equal(images, random_blank_images(40, (28, 42), 4))
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    varying = images.flatten(2).var(2).sum(1) > 0
    assert 0 < int(varying.sum()) < 40  # both kinds


def test_variance_over_places_by_hand() -> None:
    features = torch.zeros(1, 2, 2, 3)
    features[0, 0, 0, 0] = 4  # channel 0: mean 1, variance (9 + 1 + 1 + 1) / 4 = 3; the others 0
    assert variance_over_places(features) == pytest.approx(1)
    assert variance_over_places(features + 7) == pytest.approx(1)


def test_a_checkerboard_is_high_frequency_and_a_ramp_is_not() -> None:
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(11.0), indexing="ij")
    ramp = (rows + 2 * columns)[None, :, :, None]
    board = ((rows + columns) % 2)[None, :, :, None]
    assert high_frequencies(ramp) == pytest.approx(0, abs=1e-12)
    assert high_frequencies(board) == pytest.approx((4 / 9) ** 2)  # from the mean of 5 ones and 4 zeros, or 4 and 5
