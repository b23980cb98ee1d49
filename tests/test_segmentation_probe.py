"""The probe compared with batch norm and a 1 x 1 convolution of torch, and pixel scores with its interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from denoising_vit.evaluation.patches import at_places, to_image, to_pixels
from denoising_vit.evaluation.segmentation.evaluate import LinearProbe
from denoising_vit.views.crops import Crop

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS, CLASSES = 7, 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(probe: LinearProbe) -> nn.Sequential:
    """Batch norm and a 1 x 1 convolution of (B, C, h, w) with the probe's weights."""
    convolution = nn.Conv2d(CHANNELS, CLASSES, 1)
    convolution.load_state_dict(
        {"weight": probe.classify.weight.detach()[:, :, None, None].clone(), "bias": probe.classify.bias.detach()}
    )
    norm = nn.BatchNorm2d(CHANNELS)
    norm.load_state_dict({name: value.clone() for name, value in probe.norm.state_dict().items()})
    return nn.Sequential(norm, convolution)


def moved_probe() -> LinearProbe:
    """A probe with no parameter at its initial value."""
    probe = LinearProbe(CHANNELS, CLASSES, seed=1)
    with torch.no_grad():
        probe.classify.weight.copy_(noise(CLASSES, CHANNELS, seed=2))
        probe.classify.bias.copy_(noise(CLASSES, seed=3))
        probe.norm.weight.copy_(noise(CHANNELS, seed=4))
        probe.norm.bias.copy_(noise(CHANNELS, seed=5))
    return probe


def interpolated(scores: Tensor, height: int, width: int) -> Tensor:
    """Interpolated by torch: (h, w, K) -> (height, width, K)."""
    wide = nn.functional.interpolate(scores.permute(2, 0, 1)[None], (height, width), mode="bilinear")
    return wide[0].permute(1, 2, 0)


def test_probe_equals_batch_norm_and_a_1x1_convolution() -> None:
    probe = moved_probe()
    usual = reference(probe)
    for seed in (6, 7):
        features = noise(2, 3, 5, CHANNELS, seed=seed) * 3 + 1
        planes = features.permute(0, 3, 1, 2)
        torch.testing.assert_close(probe(features).permute(0, 3, 1, 2), usual(planes))
    torch.testing.assert_close(probe.norm.running_mean, usual[0].running_mean)
    torch.testing.assert_close(probe.norm.running_var, usual[0].running_var)
    probe.eval()
    usual.eval()
    features = noise(2, 3, 5, CHANNELS, seed=8)
    torch.testing.assert_close(probe(features).permute(0, 3, 1, 2), usual(features.permute(0, 3, 1, 2)))


def test_probe_accepts_tokens_and_grids() -> None:
    probe = moved_probe().eval()
    features = noise(3, 5, CHANNELS, seed=9)
    assert probe(features).shape == (3, 5, CLASSES)
    torch.testing.assert_close(probe(features.flatten(0, 1)), probe(features).flatten(0, 1))


def test_initial_weights_have_the_published_std_and_depend_on_the_seed() -> None:
    probe = LinearProbe(384, 150, seed=3)
    weights = probe.classify.weight.detach()
    assert float(weights.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(weights.mean())) < 2e-4
    assert 3.5 < float(weights.abs().max()) / 0.01 < 6.5  # 57,600 normal values, not truncated
    assert not probe.classify.bias.any()
    torch.manual_seed(99)
    assert torch.equal(LinearProbe(384, 150, seed=3).classify.weight, weights)
    assert not torch.equal(LinearProbe(384, 150, seed=4).classify.weight, weights)


def test_new_probe_has_four_trainable_parameters() -> None:
    probe = LinearProbe(CHANNELS, CLASSES, seed=0)
    assert all(parameter.requires_grad for parameter in probe.parameters())
    assert len(list(probe.parameters())) == 4  # scale, shift, weight, bias


@pytest.mark.parametrize("patch", [14, 16, 3])
def test_pixel_scores_match_bilinear_interpolation_of_torch(patch: int) -> None:
    scores = noise(3, 5, CLASSES)
    crop = Crop.whole((3 * patch, 5 * patch))
    torch.testing.assert_close(
        to_pixels(scores, crop, patch, patch), interpolated(scores, 3 * patch, 5 * patch), atol=1e-5, rtol=1e-5
    )


def test_scores_of_a_padded_crop_exclude_the_pads() -> None:
    scores = noise(3, 4, CLASSES)
    crop = Crop((0.1, 0.2, 0.6, 0.9), (23, 40), (3, 2, 13, 17))  # left, top, right, bottom
    assert crop.padded == (42, 56)
    wanted = interpolated(scores, 42, 56)[2:25, 3:43]
    torch.testing.assert_close(to_pixels(scores, crop, 14, 14), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shown", [(512, 512), (300, 512), (411, 77)])
def test_released_scores_are_resized_to_the_size_of_the_crop(shown: tuple[int, int]) -> None:
    """37 patches of 14 cover 518 pixels; their scores are resized to the 512 of the crop."""
    scores = noise(37, 37, CLASSES)
    crop = Crop((0, 0, 1, 1), shown, (3, 3, 3 + 512 - shown[1], 3 + 512 - shown[0]))
    assert crop.padded == (518, 518)
    wanted = interpolated(scores, 512, 512)[: shown[0], : shown[1]]
    torch.testing.assert_close(to_pixels(scores, crop, 14, 14, (512, 512)), wanted, atol=1e-4, rtol=1e-4)


def test_scores_of_a_mirrored_crop_stay_mirrored() -> None:
    scores = noise(2, 3, CLASSES)
    plain = Crop((0, 0, 0.5, 1), (9, 12), (1, 2, 2, 0))
    mirrored = Crop((0, 0, 0.5, 1), (9, 12), (1, 2, 2, 0), flip=True)
    assert torch.equal(to_pixels(scores, plain, 5, 5), to_pixels(scores, mirrored, 5, 5))


def test_overlapping_patches_are_interpolated_between_their_centres() -> None:
    # Patches of 6 pixels every 2: their centres are at 3, 5, 7, and at 3, 5.
    scores = torch.tensor([[[0.0], [10.0]], [[4.0], [14.0]], [[6.0], [16.0]]])  # (3, 2, 1)
    rows = np.array([0.5, 3.0, 3.5, 4.0, 5.0, 6.0, 6.5, 7.0, 9.5])
    down = [0, 0, 1, 2, 4, 5, 5.5, 6, 6]
    columns = np.array([2.5, 3.0, 3.5, 5.0, 7.5])
    across = [0, 0, 2.5, 10, 10]
    found = at_places(scores, rows, columns, 6, 2)
    assert found.shape == (9, 5, 1)
    np.testing.assert_allclose(found[..., 0].numpy(), np.add.outer(down, across), atol=1e-5)


def test_overlapping_patches_of_a_padded_crop_are_shifted_by_the_pads() -> None:
    scores = torch.arange(4.0)[None, :, None]  # one row of patches of 4 pixels every 2: centres at 2, 4, 6, 8
    crop = Crop((0, 0, 1, 1), (2, 6), (2, 1, 2, 1))
    # Pixel centres of the crop are at 2.5, 3.5, ..., 7.5 of the padded input.
    wanted = [0.25, 0.75, 1.25, 1.75, 2.25, 2.75]
    np.testing.assert_allclose(to_pixels(scores, crop, 4, 2)[..., 0].numpy(), [wanted, wanted], atol=1e-6)


def test_a_single_patch_has_its_scores_everywhere() -> None:
    scores = noise(1, 1, CLASSES)
    found = to_pixels(scores, Crop.whole((14, 14)), 14, 14)
    torch.testing.assert_close(found, scores.expand(14, 14, CLASSES))


@pytest.mark.parametrize("size", [(11, 17), (5, 7), (3, 2), (26, 31)])
def test_scores_of_an_image_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    scores = noise(11, 17, CLASSES)
    torch.testing.assert_close(to_image(scores, *size), interpolated(scores, *size), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_probe_through_pixels() -> None:
    probe = moved_probe()
    pixels = to_pixels(probe(noise(2, 3, CHANNELS)), Crop.whole((28, 42)), 14, 14)
    pixels.square().mean().backward()
    gradients = [parameter.grad for parameter in probe.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
