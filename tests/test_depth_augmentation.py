"""Training crops of the published protocol: their distributions, and the alignment of photo and depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationSet
from denoising_vit.evaluation.depth import PAPER, RELEASED, DepthImage
from denoising_vit.evaluation.depth.probe import DepthProbe, depth_loss, scale_invariant_loss
from denoising_vit.evaluation.depth.samples import NYU_PART, Colours, DepthCrops, Drawn, draw
from denoising_vit.evaluation.sources import ExtractorSource
from tiny_depth import RED, backbone, blocky, pooled, red_of, set_of

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH = (14, 14)

#: The published protocol, smaller and shorter.
TINY = replace(PAPER, steps=6, warmup=2, batch=3, crop=(21, 33))


def image_of(height: int = 480, width: int = 640) -> DepthImage:
    """An image whose files are not read."""
    path = Path("nowhere.png")
    return DepthImage(
        "train", "a", path, height, width, "digest", depth=path, scale=1000, depth_digest="digest", least=1
    )


@pytest.fixture(scope="module")
def many() -> list[Drawn]:
    return [draw(image_of(), PAPER, NYU_PART, PATCH, np.random.default_rng(seed)) for seed in range(2000)]


def test_half_of_the_photos_are_rotated_by_up_to_2_5_degrees(many: list[Drawn]) -> None:
    angles = np.array([drawn.image.angle for drawn in many])
    assert (angles != 0).mean() == pytest.approx(0.5, abs=0.04)
    assert np.abs(angles).max() == pytest.approx(2.5, abs=0.02)
    assert np.abs(angles).max() <= 2.5
    assert angles[angles != 0].mean() == pytest.approx(0, abs=0.15)
    assert np.abs(angles[angles != 0]).mean() == pytest.approx(1.25, abs=0.07)


def test_half_of_the_crops_are_mirrored(many: list[Drawn]) -> None:
    flips = np.array([drawn.crop.flip for drawn in many])
    assert flips.mean() == pytest.approx(0.5, abs=0.04)
    turned = np.array([drawn.image.angle != 0 for drawn in many])
    assert flips[turned].mean() == pytest.approx(0.5, abs=0.06)  # flips and rotations are independent


def test_crops_cover_all_positions_in_the_published_part(many: list[Drawn]) -> None:
    boxes = np.array([drawn.crop.box for drawn in many]) * (640, 480, 640, 480)
    np.testing.assert_allclose(boxes, np.round(boxes), atol=1e-9)
    x0, y0, x1, y1 = np.round(boxes).astype(int).T
    assert set((y1 - y0).tolist()) == {416} and set((x1 - x0).tolist()) == {544}
    assert {drawn.crop.size for drawn in many} == {(416, 544)}
    assert set(y0.tolist()) == set(range(45, 472 - 416 + 1))
    assert set(x0.tolist()) == set(range(43, 608 - 544 + 1))


def test_without_a_part_crops_come_from_the_whole_image() -> None:
    some = [draw(image_of(420, 550), PAPER, None, PATCH, np.random.default_rng(seed)) for seed in range(200)]
    boxes = np.round(np.array([drawn.crop.box for drawn in some]) * (550, 420, 550, 420)).astype(int)
    assert set(boxes[:, 1].tolist()) == set(range(5)) and set(boxes[:, 0].tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("patch", "pads"),
    [((14, 14), (1, 2, 1, 2)), ((16, 16), (0, 0, 0, 0)), ((14, 7), (1, 2, 1, 2)), ((9, 5), (0, 1, 0, 2))],
)
def test_crops_are_padded_evenly_to_whole_patches(patch: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    crop = draw(image_of(), PAPER, None, patch, np.random.default_rng(0)).crop
    assert crop.pads == pads
    assert all((side - patch[0]) % patch[1] == 0 for side in crop.padded)


def test_half_of_the_crops_have_colours_changed_in_published_ranges(many: list[Drawn]) -> None:
    colours = [drawn.colours for drawn in many if drawn.colours is not None]
    assert len(colours) / len(many) == pytest.approx(0.5, abs=0.04)
    gammas = np.array([each.gamma for each in colours])
    assert gammas.min() == pytest.approx(0.9, abs=0.002) and gammas.max() == pytest.approx(1.1, abs=0.002)
    assert gammas.min() >= 0.9 and gammas.max() <= 1.1
    factors = np.array([each.factors for each in colours])
    assert 0.75 * 0.9 <= factors.min() < 0.70 and 1.25 * 1.1 >= factors.max() > 1.33
    ratios = factors.max(1) / factors.min(1)  # brightness is shared by the channels
    assert 1.18 < ratios.max() <= 1.1 / 0.9
    # Variance of the mean logarithm: that of brightness plus a third of that of a channel.
    spread = np.std(np.log(np.random.default_rng(0).uniform(0.75, 1.25, 9999)))
    channel = np.std(np.log(np.random.default_rng(1).uniform(0.9, 1.1, 9999)))
    assert np.log(factors).mean(1).std() == pytest.approx(math.hypot(spread, channel / math.sqrt(3)), rel=0.06)


def test_colours_are_changed_on_a_scale_of_0_to_255() -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = Colours(1.07, (0.8, 1.3, 1.0))(image)
    numbers = 255 * image.double().numpy()
    wanted = np.clip(numbers**1.07 * np.array([0.8, 1.3, 1.0])[:, None, None], 0, 255) / 255
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)
    assert (found == 1).any() and (found < 1).any()
    assert Colours(0.9, (1, 1, 1))(torch.tensor([[[-0.1, 0.0]]]).expand(3, 1, 2)).tolist() == [[[0, 0]]] * 3


@pytest.mark.parametrize(("height", "width"), [(415, 640), (480, 543)])
def test_photos_smaller_than_a_crop_are_refused(height: int, width: int) -> None:
    with pytest.raises(EvaluationError, match=rf"a: {width} x {height} pixels .* crops of 544 x 416; .*--preset quick"):
        draw(image_of(height, width), PAPER, None, PATCH, np.random.default_rng(0))


# --- Photo and depth


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet[DepthImage]:
    """Slopes of depth, without steps that interpolation would smooth."""
    rows, columns = np.meshgrid(np.linspace(0, 1, 30), np.linspace(0, 1, 41), indexing="ij")
    slopes = [1 + 3 * rows + 2 * columns, 6 - 2 * rows - 3 * columns, 2 + 4 * rows * columns]
    return set_of(tmp_path_factory.mktemp("slopes"), [(red_of(metres), metres) for metres in slopes])


@pytest.mark.parametrize("seed", range(12))
def test_photo_and_depth_of_a_crop_are_aligned(images: EvaluationSet[DepthImage], seed: int) -> None:
    chance = np.random.default_rng(seed)
    drawn = draw(images.images[seed % 3], replace(TINY, rotate=20.0), None, (6, 6), chance)
    shown = ExtractorSource("red", backbone(pooled(6), 6)).inputs(drawn.image, drawn.crop)
    left, top, _, _ = drawn.crop.pads
    assert not shown[:, :top].any() and not shown[:, :, :left].any()
    red = 255 * shown[0, top : top + 21, left : left + 33]
    truth = drawn.truth()
    assert truth.shape == (21, 33)
    known = F.max_pool2d(-(truth > 0).float()[None], 3, 1, 1)[0] == -1  # and so are all neighbours: red is interpolated
    assert known.sum() > 300
    # One grey level, plus the change over one pixel, by which the nearest neighbour may be off.
    assert (red - RED * truth)[known].abs().max() < 1 + 0.75 * RED * 4 / 30
    assert (red - RED * truth)[known].mean().abs() < 1


def test_rotation_fills_in_black_and_unknown_depth(images: EvaluationSet[DepthImage]) -> None:
    turned = images.images[0].rotated(30.0)
    metres, pixels = turned.metres(), turned.pixels()
    assert metres.shape == (30, 41) and pixels.shape == (30, 41, 3)
    for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert metres[place] == 0 and not pixels[place].any()
    assert (metres == 0).float().mean() > 0.1
    assert metres[15, 20] == pytest.approx(float(images.images[0].metres()[15, 20]), abs=0.2)


def test_rotated_depth_has_only_measured_values(tmp_path: Path) -> None:
    """Nothing is interpolated between different depths, or between known and unknown depth."""
    metres = np.full((24, 32), 2.0)
    metres[:, 13:] = 5
    metres[5:9, 4:20] = 0
    (image,) = set_of(tmp_path, [(red_of(metres), metres)]).images
    for angle in (-5.0, 4.0, 11.0):
        found = image.rotated(angle).metres()
        assert set(found.unique().tolist()) == {0, 2, 5}
        assert not torch.equal(found, image.metres())


def test_rotation_by_0_changes_nothing(images: EvaluationSet[DepthImage]) -> None:
    image = images.images[0]
    assert image.angle == 0 and np.array_equal(image.rotated(0.0).pixels(), image.pixels())
    assert torch.equal(image.rotated(0.0).metres(), image.metres())


def test_model_input_is_normalised_before_padding(images: EvaluationSet[DepthImage]) -> None:
    imagenet = (IMAGENET_MEAN, IMAGENET_STD)
    source = ExtractorSource("raw", backbone(pooled(6), 6), None, {}, imagenet)
    drawn = draw(images.images[0], replace(TINY, rotate=0.0, flip=0.0), None, (6, 6), np.random.default_rng(2))
    shown = source.inputs(drawn.image, drawn.crop)
    left, top, right, bottom = drawn.crop.pads
    assert (left, top, right, bottom) == (1, 1, 2, 2)
    x0, y0 = round(drawn.crop.box[0] * 41), round(drawn.crop.box[1] * 30)
    part = torch.from_numpy(drawn.image.pixels()[y0 : y0 + 21, x0 : x0 + 33].copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in imagenet)
    wanted = F.pad((part - mean) / std, (left, right, top, bottom))
    torch.testing.assert_close(shown, wanted, atol=1e-4, rtol=0)


# --- Samples of a step


class Witness(ExtractorSource):
    """Records its inputs, in order."""

    def __init__(self, patch: int, stride: int) -> None:
        super().__init__("witness", backbone(pooled(patch, stride), patch, stride))
        self.asked: list[tuple[DepthImage, Drawn]] = []
        self.passed: list[Tensor] = []

    def features_and_class(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        self.passed.append(inputs)
        return super().features_and_class(inputs)


def crops_of(
    images: EvaluationSet[DepthImage], seed: int, use: Callable[[DepthCrops], list[float]], patch: int = 6
) -> list[float]:
    with DepthCrops(Witness(patch, patch), images, None, TINY, seed) as samples:
        return use(samples)


def losses_of(images: EvaluationSet[DepthImage], seed: int, steps: range) -> list[float]:
    probe = DepthProbe(6, 16, 0.001, 10.0, 4, seed=0)
    return crops_of(images, seed, lambda samples: [float(samples.loss(probe, step).detach()) for step in steps])


def test_crops_depend_only_on_seed_and_step(images: EvaluationSet[DepthImage]) -> None:
    straight = losses_of(images, 1, range(4))
    assert losses_of(images, 1, range(4)) == straight
    assert losses_of(images, 1, range(2, 4)) == straight[2:]
    assert losses_of(images, 2, range(4)) != straight
    assert len(set(straight)) == 4


@pytest.mark.parametrize(
    ("patch", "stride", "released"), [(6, 6, False), (8, 4, False), (7, 5, False), (6, 6, True), (8, 8, True)]
)
@pytest.mark.parametrize("step", [1, 150])
def test_loss_of_a_step_matches_its_crops_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: int, stride: int, released: bool, step: int
) -> None:
    """Features are upsampled with the class token and weighed, and depth is interpolated to every pixel of the crop."""
    images = set_of(tmp_path, blocky(4, 5))
    drawn: dict[int, Drawn] = {}
    usual = DepthCrops._draw

    def kept(self: DepthCrops, index: int, step: int, place: int) -> tuple[Tensor, Drawn, Tensor]:
        made = usual(self, index, step, place)
        drawn[place] = made[1]
        return made

    monkeypatch.setattr(DepthCrops, "_draw", kept)
    source, probe = Witness(patch, stride), DepthProbe(6, 16, 0.001, 10.0, 4, seed=0)
    protocol = replace(TINY, farthest=4.0)
    if released:
        protocol = replace(protocol, pads=RELEASED.pads, together=RELEASED.together, gradient=RELEASED.gradient)
    with DepthCrops(source, images, None, protocol, seed=3) as samples:
        assert samples.channels == 6
        found = float(samples.loss(probe, step).detach())
    inputs = source.passed[-1]
    assert len(inputs) == len(drawn) == 3

    features = pooled(patch, stride)(inputs).permute(0, 3, 1, 2)
    token = features.mean((2, 3), keepdim=True).expand_as(features)  # the model has no class token of its own
    fine = F.interpolate(torch.cat([features, token], 1), scale_factor=4, mode="bilinear")
    weights = (F.conv2d(fine, probe.weigh.weight[:, :, None, None], probe.weigh.bias).relu() + 0.1).detach()
    depth = torch.einsum("bkyx,k->byx", weights / weights.sum(1, keepdim=True), torch.linspace(0.001, 10, 16)).numpy()
    left, top, _, _ = drawn[0].crop.pads
    rows, columns = np.arange(21) + 0.5 + top, np.arange(33) + 0.5 + left
    down, across = (
        patch / 2 + stride * ((np.arange(cells) + 0.5) / 4 - 0.5) for cells in depth.shape[1:]
    )  # centres of the finer cells
    wide = np.stack([np.stack([np.interp(columns, across, row) for row in one]) for one in depth])
    wide = np.stack([np.stack([np.interp(rows, down, column) for column in one.T], -1) for one in wide])
    truth = torch.stack([drawn[place].truth() for place in range(3)])
    truth[truth >= 4] = 0
    wanted = depth_loss(torch.from_numpy(wide).float(), truth, 0.5, mean_only=step < 100)
    if released:  # the whole grid is resized to the crop; groups of two images, the third alone; no gradient loss
        wide = F.interpolate(torch.from_numpy(depth)[:, None], (21, 33), mode="bilinear")[:, 0]
        parts = [slice(0, 2), slice(2, 3)]
        losses = [scale_invariant_loss(wide[part], truth[part], mean_only=step < 100) for part in parts]
        wanted = torch.stack(losses).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)
