"""The linear probe: bins and weights by hand, the published order of steps, and positions of predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.depth import PAPER, QUICK, DepthProtocol
from denoising_vit.evaluation.depth.evaluate import evaluate_probe
from denoising_vit.evaluation.depth.probe import DepthProbe
from denoising_vit.evaluation.depth.samples import DepthCrops, KeptDepth
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.views.crops import Crop
from tiny_depth import RED, backbone, linear_depth, linear_probe, pooled, ramp, set_of

pytestmark = pytest.mark.usefixtures("one_thread")


def probe_of(channels: int = 8, bins: int = 256, upsample: int = 4, seed: int = 0) -> DepthProbe:
    return DepthProbe(channels, bins, 0.001, 10.0, upsample, seed).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Bins and weights


def test_bins_are_the_published_ones() -> None:
    probe = DepthProbe(8, PAPER.bins, PAPER.nearest, PAPER.farthest, PAPER.upsample, 0)
    np.testing.assert_allclose(probe.depths.numpy(), np.linspace(0.001, 10, 256), rtol=1e-6)
    assert (PAPER.bins, PAPER.nearest, PAPER.farthest, PAPER.upsample, PAPER.class_token) == (256, 1e-3, 10, 4, True)
    assert (QUICK.bins, QUICK.nearest, QUICK.farthest, QUICK.upsample, QUICK.class_token) == (256, 1e-3, 10, 4, True)
    assert [name for name, _ in probe.named_parameters()] == ["weigh.weight", "weigh.bias"]


def test_depth_is_the_mean_of_bins_weighted_by_positive_scores() -> None:
    probe, scores = probe_of(bins=5), random(3, 2, 5)
    for found, score in zip(probe.depth(scores).flatten().tolist(), scores.view(-1, 5).tolist(), strict=True):
        weights = [max(value, 0) + 0.1 for value in score]
        depths = np.linspace(0.001, 10, 5)
        assert found == pytest.approx(sum(w / sum(weights) * d for w, d in zip(weights, depths, strict=True)), rel=1e-5)


def test_scores_below_zero_weigh_all_bins_alike() -> None:
    assert probe_of(bins=256).depth(torch.full((1, 256), -7.0)).item() == pytest.approx((0.001 + 10) / 2, rel=1e-5)


def test_weights_are_initialised_like_a_convolution() -> None:
    probe = probe_of(channels=64)
    theirs = torch.nn.Conv2d(64, 256, 1)
    for ours, usual in ((probe.weigh.weight, theirs.weight), (probe.weigh.bias, theirs.bias)):
        assert usual is not None
        assert ours.abs().max() <= 1 / math.sqrt(64)
        assert ours.std().item() == pytest.approx(usual.std().item(), rel=0.15)
        assert ours.mean().item() == pytest.approx(0, abs=0.02)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (probe_of(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.weigh.weight, again.weigh.weight) and torch.equal(first.weigh.bias, again.weigh.bias)
    assert not torch.equal(first.weigh.weight, other.weigh.weight)


# --- The published order


def published(probe: DepthProbe, features: Tensor, token: Tensor | None) -> Tensor:
    """Concatenate, upsample, 1 x 1 convolution, relu, add 0.1, normalise, mean of bins: (B, 4h, 4w)."""
    maps = features.permute(0, 3, 1, 2)
    if token is not None:
        beside = token[:, 0, 0, :, None, None].expand(-1, -1, *maps.shape[2:])
        maps = torch.cat([maps, beside], 1)
    fine = F.interpolate(maps, [4 * side for side in maps.shape[2:]], mode="bilinear", align_corners=False)
    scores = F.conv2d(fine, probe.weigh.weight[:, :, None, None], probe.weigh.bias)
    weights = torch.relu(scores) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("bkyx,k->byx", weights, torch.linspace(0.001, 10, scores.shape[1]))


@pytest.mark.parametrize(("patch", "stride"), [(14, 14), (16, 8), (8, 3)])
@pytest.mark.parametrize("token", [True, False], ids=["token", "no token"])
def test_depth_matches_the_published_order_of_steps(patch: int, stride: int, token: bool) -> None:
    """At the centres of the upsampled cells nothing is interpolated."""
    features, own = random(2, 5, 7, 6), random(2, 1, 1, 6, seed=1) if token else None
    probe = probe_of(12 if token else 6, bins=32)
    with torch.no_grad():
        probe.weigh.weight.mul_(5)
    wanted = published(probe, features, own)
    # Four cells for each patch, evenly around its centre, a quarter of a stride apart.
    rows, columns = (
        np.concatenate([patch / 2 + stride * k + stride / 4 * np.array([-1.5, -0.5, 0.5, 1.5]) for k in range(side)])
        for side in (5, 7)
    )
    found = probe.at_pixels(features, own, rows, columns, (patch, stride))
    assert found.shape == (2, 20, 28)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float(wanted.detach().std()) > 0.1


def test_depth_is_bilinear_between_cell_centres() -> None:
    features, probe = random(1, 3, 4, 2), probe_of(2, bins=16)
    fine = published(probe, features, None)[0].detach().numpy()
    rows, columns = np.linspace(-3, 30, 41), np.linspace(-3, 40, 47)
    found = probe.at_pixels(features, None, rows, columns, (8, 8))[0].detach().numpy()
    cells = [1 + 2 * np.arange(side) for side in fine.shape]  # patches of 8, cells of 2 pixels
    along = np.stack([np.interp(columns, cells[1], row) for row in fine])
    wanted = np.stack([np.interp(rows, cells[0], column) for column in along.T], -1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_at_patches_gives_one_depth_per_patch_without_upsampling() -> None:
    features, token, probe = random(2, 3, 4, 6), random(2, 1, 1, 6, seed=1), probe_of(12)
    beside = torch.cat([features, token.expand(-1, 3, 4, -1)], -1)
    weights = (beside @ probe.weigh.weight.T + probe.weigh.bias).relu() + 0.1
    wanted = (weights * torch.linspace(0.001, 10, 256)).sum(-1) / weights.sum(-1)
    torch.testing.assert_close(probe.at_patches(features, token), wanted)


def test_each_image_uses_its_own_class_token() -> None:
    features, probe = random(1, 3, 4, 6).expand(2, -1, -1, -1), probe_of(12)
    depth = probe.at_patches(features, random(2, 1, 1, 6, seed=1))
    assert not torch.allclose(depth[0], depth[1])


# --- Positions


GRIDS = [(8, 8), (14, 14), (16, 16), (8, 4), (12, 5), (14, 7), (6, 1)]


@pytest.mark.parametrize(("patch", "stride"), GRIDS)
@pytest.mark.parametrize("upsample", [4, 1])
def test_linear_depth_is_recovered_at_inner_pixels(patch: int, stride: int, upsample: int) -> None:
    h, w = 6, 9
    down, across = (patch / 2 + stride * torch.arange(side) for side in (h, w))
    features = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1)[None] / 200
    rows, columns = (np.arange(0.5, patch + stride * (side - 1)) for side in (h, w))
    for channel, places in ((0, rows), (1, columns)):
        probe = linear_probe(channel, 1.0, 1.0, 5.0, channels=2, upsample=upsample)
        found = probe.at_pixels(features, None, rows, columns, (patch, stride))[0].detach().numpy()
        wanted = np.broadcast_to(
            linear_depth(places / 200, 1.0, 1.0, 5.0)[:, None] if channel == 0 else linear_depth(places / 200, 1, 1, 5),
            found.shape,
        )
        edge = math.ceil((patch + stride) / 2)  # beyond the centres of the outermost patches depth is unknown
        np.testing.assert_allclose(found[edge:-edge, edge:-edge], wanted[edge:-edge, edge:-edge], atol=1e-5)


def ramp_metres(size: tuple[int, int], channel: int, patch: int) -> np.ndarray:
    """Depth that a linear probe predicts for the pixels of the ramp; 0 (unknown) near the border."""
    place = ramp(size)[..., channel] / 255
    metres = linear_depth(place, 1.0, 1.0, 8.0)
    edge = 2 * patch
    known = np.zeros(size)
    known[edge : size[0] - edge, edge : size[1] - edge] = 1
    return metres * known


@pytest.mark.parametrize(("patch", "stride"), [(8, 8), (12, 4), (10, 5)])
@pytest.mark.parametrize("size", [(72, 96), (70, 101)])
@pytest.mark.parametrize("protocol", [QUICK, PAPER], ids=["quick", "paper"])
@pytest.mark.parametrize("channel", [0, 1], ids=["columns", "rows"])
def test_ramp_is_evaluated_without_a_shift(
    tmp_path: Path, patch: int, stride: int, size: tuple[int, int], protocol: DepthProtocol, channel: int
) -> None:
    """Sizes on and off the patch grid; the latter are resized or padded."""
    photo, metres = ramp(size), ramp_metres(size, channel, patch)
    images = set_of(tmp_path, [(photo, metres)], scale=5000)
    source = ExtractorSource("ramp", backbone(pooled(patch, stride), patch, stride))
    probe = linear_probe(channel, 1.0, 1.0, 8.0, channels=6)
    ((rmse, *_),) = evaluate_probe(probe, source, images, replace(protocol, flip_test=False), None)
    slope = 7 / 1.2 / 255  # of depth, in metres per pixel
    assert rmse < slope / 20
    if channel == 0:  # the mean with the mirror image is right only if its depths are mirrored back
        mirrored = replace(protocol, flip_test=True)
        assert evaluate_probe(probe, source, images, mirrored, None)[0, 0] < slope / 20


@pytest.mark.parametrize(("patch", "stride"), [(8, 8), (6, 6), (12, 4), (10, 5), (6, 3)])
@pytest.mark.parametrize("size", [(72, 96), (70, 101)])
def test_the_truth_of_a_patch_is_the_mean_over_its_area(
    tmp_path: Path, patch: int, stride: int, size: tuple[int, int]
) -> None:
    rows, columns = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    metres = 0.5 + rows / 25 + columns / 50
    images = set_of(tmp_path, [(ramp(size), metres)], scale=5000)
    source = ExtractorSource("ramp", backbone(pooled(patch, stride), patch, stride))
    kept = KeptDepth.take(source, images, QUICK, None)
    (h, w), (height, width) = kept.truths[0].shape, size
    assert kept.features[0].shape[:2] == (h, w)
    # Patch centres, in pixels of the photo, whose sides are resized to patch + (h - 1) strides.
    down, across = (
        (patch / 2 + stride * np.arange(count)) * side / (patch + stride * (count - 1))
        for count, side in ((h, height), (w, width))
    )
    wanted = 0.5 + down[:, None] / 25 + across / 50
    np.testing.assert_allclose(kept.truths[0].numpy(), wanted, atol=2e-3)


@pytest.mark.parametrize(("patch", "stride"), [(8, 8), (12, 4), (10, 5)])
@pytest.mark.parametrize("size", [(72, 96), (70, 101)])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_correct_probe_of_a_ramp_has_almost_no_loss(
    tmp_path: Path, patch: int, stride: int, size: tuple[int, int], preset: str
) -> None:
    """A probe that is off by one pixel has a loss."""
    photo = ramp(size)
    # The mean over a partly known patch is not the depth at its centre.
    metres = ramp_metres(size, 0, patch if preset == "paper" else 0)
    images = set_of(tmp_path, [(photo, metres)], scale=5000)
    source = ExtractorSource("ramp", backbone(pooled(patch, stride), patch, stride))
    plain = replace(PAPER, crop=size, rotate=0.0, gamma=(1, 1), brightness=(1, 1), colour=(1, 1), batch=4)
    losses = []
    for moved in (0, 1, -1):
        probe = linear_probe(0, 1.0, 1.0, 8.0, channels=6)
        with torch.no_grad():
            probe.weigh.bias.add_(moved / 255 * torch.tensor([-1.0, 1.0]))
        if preset == "quick":
            kept = KeptDepth.take(source, images, replace(QUICK, batch=1), None)
            losses.append(float(kept.loss(probe, 200).detach()))
        else:
            with DepthCrops(source, images, None, plain, seed=0) as crops:
                losses.append(float(crops.loss(probe, 200).detach()))
    assert losses[0] < 1e-3 < min(losses[1:]) / 2


def test_truth_of_a_patch_ignores_unknown_pixels(tmp_path: Path) -> None:
    metres = np.full((8, 12), 2.0)
    metres[:4, :4] = [[0, 0, 0, 0], [0, 1, 3, 0], [0, 12, 10, 0], [0, 0, 0, 0]]
    metres[4:, 4:8] = 0
    metres[4:, 8:] = 20
    images = set_of(tmp_path, [(ramp((8, 12)), metres)])
    kept = KeptDepth.take(ExtractorSource("ramp", backbone()), images, QUICK, None)
    torch.testing.assert_close(kept.truths[0], torch.tensor([[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]]))


def test_places_of_a_crop_exclude_its_pads() -> None:
    rows, columns = Crop((0, 0, 1, 1), (3, 4), (2, 5, 1, 6)).places_shown()
    assert rows.tolist() == [5.5, 6.5, 7.5]
    assert columns.tolist() == [2.5, 3.5, 4.5, 5.5]


def test_red_channel_encodes_depth_up_to_six_metres() -> None:
    assert 6 * RED < 255
