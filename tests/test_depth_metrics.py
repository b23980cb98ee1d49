"""Depth errors, compared with loops and by hand, and the pixels and images that they cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.depth import (
    PAPER,
    QUICK,
    DepthData,
    DepthProtocol,
    Depths,
    LinearDepth,
    depth_errors,
    open_depth,
)
from denoising_vit.evaluation.depth.evaluate import evaluate_probe
from denoising_vit.evaluation.depth.probe import DepthProbe
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.views.crops import Crop
from tiny_depth import Picture, backbone, blocky, flat, pooled, red_of, set_of, source_of, write_nyu, write_splits

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR, FAR = 0.001, 10.0

#: Evaluated area of a photo of NYUv2.
TOP, BOTTOM, LEFT, RIGHT = 45, 471, 41, 601


def by_hand(predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    pairs = [(p, t) for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True) if NEAR < t < FAR]
    count = len(pairs)
    ratios = [max(p / t, t / p) for p, t in pairs]
    return [
        math.sqrt(sum((p - t) ** 2 for p, t in pairs) / count),
        sum(abs(p - t) / t for p, t in pairs) / count,
        sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / count,
        *(100 * sum(ratio < 1.25**power for ratio in ratios) / count for power in (1, 2, 3)),
    ]


def tensors(predicted: list[float], truth: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(predicted), torch.tensor(truth)


@pytest.mark.parametrize("seed", range(4))
def test_errors_of_random_maps_match_a_loop(seed: int) -> None:
    chance = np.random.default_rng(seed)
    truth = chance.uniform(0, 11, (31, 17)).astype(np.float32)
    truth[chance.random(truth.shape) < 0.2] = 0
    predicted = (truth * chance.uniform(0.5, 2, truth.shape)).clip(NEAR, FAR).astype(np.float32)
    found = depth_errors(torch.from_numpy(predicted), torch.from_numpy(truth), NEAR, FAR)
    np.testing.assert_allclose(found, by_hand(predicted, truth), rtol=1e-6)


def test_errors_of_two_pixels_by_hand() -> None:
    found = depth_errors(*tensors([3, 4], [2, 4]), NEAR, FAR)
    assert found == pytest.approx([math.sqrt(0.5), 0.25, math.log10(1.5) / 2, 50, 100, 100])
    assert Depths.METRICS == ("RMSE", "AbsRel", "log10", "a1", "a2", "a3")


def test_abs_rel_divides_by_the_truth_and_rmse_is_a_root_of_the_mean() -> None:
    assert depth_errors(*tensors([1, 5], [2, 2]), NEAR, FAR)[:2] == pytest.approx([math.sqrt(5), 1.0])


def test_ratio_equal_to_a_threshold_does_not_count() -> None:
    assert depth_errors(*tensors([5, 4], [4, 5]), NEAR, FAR)[3:] == [0, 100, 100]
    assert depth_errors(*tensors([6.25], [4]), NEAR, FAR)[3:] == [0, 0, 100]


def test_pixels_at_the_limits_are_not_evaluated() -> None:
    predicted, truth = tensors([9, 9, 9, 2], [0.001, 10, 0, 2])
    assert depth_errors(predicted, truth, NEAR, FAR) == [0, 0, 0, 100, 100, 100]


@pytest.mark.parametrize(("limit", "rmse"), [(NEAR, 1.999), (FAR, 8.0)])
def test_pixels_just_within_the_limits_are_evaluated(limit: float, rmse: float) -> None:
    within = torch.nextafter(torch.tensor([limit]), torch.tensor(1.0))
    assert depth_errors(torch.tensor([2.0]), within, NEAR, FAR)[0] == pytest.approx(rmse, abs=1e-4)


@pytest.mark.parametrize("truth", [[0.0, 0.0], [10.0, 12.0], [0.001, 0.0005]])
def test_image_without_valid_pixels_has_nan_errors(truth: list[float]) -> None:
    assert all(math.isnan(error) for error in depth_errors(*tensors([1, 2], truth), NEAR, FAR))


# --- evaluation


def constant(metres: float, far: float = FAR) -> DepthProbe:
    """A probe with one bin, which predicts the same depth everywhere."""
    return DepthProbe(6, 1, metres, far, 4, seed=0).eval()


def test_images_with_nan_errors_are_excluded_from_the_means(tmp_path: Path) -> None:
    images = set_of(tmp_path, [flat(3), flat(20), flat(5)])
    values = evaluate_probe(constant(2), source_of(), images, QUICK, None)
    assert np.isnan(values[1]).all() and not np.isnan(values[[0, 2]]).any()
    scored = Depths(values, np.arange(3)).scored()
    assert scored["RMSE"] == pytest.approx(2)
    assert scored["AbsRel"] == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert scored["a2"] == pytest.approx(50)
    with pytest.raises(EvaluationError, match="none of 1 items has a value of RMSE"):
        Depths(values[1:2], np.arange(1)).scored()


@pytest.mark.parametrize("protocol", [QUICK, PAPER], ids=["quick", "paper"])
@pytest.mark.parametrize(("predicted", "clamped"), [(9.0, 4.0), (0.2, 1.0), (2.0, 2.0)])
def test_predictions_are_clamped_to_the_limits(
    tmp_path: Path, protocol: DepthProtocol, predicted: float, clamped: float
) -> None:
    narrow = replace(protocol, nearest=1.0, farthest=4.0)
    ((rmse, *_),) = evaluate_probe(constant(predicted), source_of(), set_of(tmp_path, [flat(3)]), narrow, None)
    assert rmse == pytest.approx(abs(3 - clamped), abs=1e-5)


def halves(image: Tensor) -> Tensor:
    """(1, 0, 0) in the left half of an image and (0, 1, 0) in the right half, whatever the content."""
    h, w = image.shape[2] // 4, image.shape[3] // 4
    left = (torch.arange(w) < w / 2).float()[None, None, :, None]
    return torch.cat([left, 1 - left, left * 0], -1).expand(len(image), h, w, 3)


def two_depths(left: float, right: float) -> DepthProbe:
    """A probe that predicts one depth in the left half and another in the right; one bin has nearly all the weight."""
    probe = DepthProbe(6, 2, left, right, 4, seed=0)
    with torch.no_grad():
        probe.weigh.weight.zero_()
        probe.weigh.bias.zero_()
        probe.weigh.weight[0, 0] = probe.weigh.weight[1, 1] = 1e6
    return probe.eval()


def test_flip_test_averages_clamped_predictions(tmp_path: Path) -> None:
    metres = np.full((32, 48), 3.0)
    metres[:, 16:32] = 0  # where one half blends into the other
    images = set_of(tmp_path, [(red_of(metres), metres)])
    narrow, probe = replace(PAPER, nearest=1.0, farthest=4.0), two_depths(2, 8)
    values = evaluate_probe(probe, source_of(halves), images, narrow, None)
    # Clamped first, the mean of 2 and 4 is 3; averaged first, the mean of 2 and 8 is 5, which is clamped to 4.
    np.testing.assert_allclose(values[0, :3], 0, atol=1e-4)
    once = evaluate_probe(probe, source_of(halves), images, replace(narrow, flip_test=False), None)
    assert once[0, 0] == pytest.approx(1, abs=1e-4)  # 2 on one side, 4 on the other
    quick = evaluate_probe(probe, source_of(halves), images, replace(QUICK, nearest=1.0, farthest=4.0), None)
    assert quick[0, 0] == pytest.approx(1, abs=1e-4)


def test_only_the_given_area_is_evaluated(tmp_path: Path) -> None:
    metres = np.full((32, 48), 7.0)
    metres[5:20, 9:31] = 3
    images = set_of(tmp_path, [(red_of(metres), metres)])
    for protocol in (QUICK, PAPER):
        inside = evaluate_probe(constant(2), source_of(), images, protocol, ((5, 20), (9, 31)))
        assert inside[0, 0] == pytest.approx(1)
        beyond = evaluate_probe(constant(2), source_of(), images, protocol, ((5, 20), (9, 32)))
        assert beyond[0, 0] > 1.1


# --- NYUv2

#: With this protocol, a probe predicts 2 m everywhere and learns nothing from its one step.
ONE_BIN = replace(QUICK, steps=1, warmup=0, bins=1, nearest=2.0)


def framed(ring: bool) -> Picture:
    """3 m in the evaluated area and 7 m around it; with a ring, the outermost pixels of the area have 5 m."""
    metres = np.full((480, 640), 7.0)
    metres[TOP:BOTTOM, LEFT:RIGHT] = 5.0
    inner = int(ring)
    metres[TOP + inner : BOTTOM - inner, LEFT + inner : RIGHT - inner] = 3.0
    return red_of(metres), metres


def rmse_of(source: ExtractorSource, data: DepthData, protocol: DepthProtocol = ONE_BIN) -> list[float]:
    ((_, found, _),) = LinearDepth(source, data, protocol).probes([0])
    return found.values[:, 0].tolist()


@pytest.fixture(scope="module")
def coarse() -> ExtractorSource:
    """Patches of 32 pixels, so that large photos cost little."""
    return ExtractorSource("raw", backbone(pooled(32), 32))


def test_nyu_is_evaluated_in_the_published_area_and_others_everywhere(tmp_path: Path, coarse: ExtractorSource) -> None:
    pictures = [framed(False), framed(True)]
    plain, ringed = rmse_of(coarse, open_depth(write_nyu(tmp_path / "nyu", pictures[:1], pictures)))
    assert plain == pytest.approx(1, abs=1e-6)
    height, width = BOTTOM - TOP, RIGHT - LEFT
    ring = 2 * height + 2 * width - 4
    assert ringed == pytest.approx(math.sqrt((9 * ring + height * width - ring) / (height * width)), abs=1e-6)
    folders = rmse_of(coarse, open_depth(write_splits(tmp_path / "folders", pictures[:1], pictures[:1])))
    outside = 480 * 640 - height * width
    assert folders == [pytest.approx(math.sqrt((25 * outside + height * width) / (480 * 640)), abs=1e-6)]


class Witness(ExtractorSource):
    """Records the requested crops."""

    def __init__(self, source: ExtractorSource) -> None:
        super().__init__("witness", source._of)
        self.crops: list[Crop] = []

    def inputs(self, image: EvaluationImage, crop: Crop, colour: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.crops.append(crop)
        return super().inputs(image, crop, colour)


def test_nyu_crops_come_from_the_published_part_and_others_anywhere(tmp_path: Path, coarse: ExtractorSource) -> None:
    pictures = [framed(False)]
    paper = replace(PAPER, steps=2, warmup=0, batch=4, bins=1, nearest=2.0)
    data = open_depth(write_nyu(tmp_path / "nyu", pictures, pictures))
    folders = open_depth(write_splits(tmp_path / "folders", pictures, pictures))
    within = []
    for each in (data, folders):
        witness = Witness(coarse)
        ((rmse,), crops) = rmse_of(witness, each, paper), [crop for crop in witness.crops if crop.size == (416, 544)]
        assert (rmse == pytest.approx(1, abs=1e-6)) == (each is data)
        assert len(crops) >= 8
        boxes = np.round([np.array(crop.box) * (640, 480, 640, 480) for crop in crops])
        x0, y0, x1, y1 = boxes.T
        within.append((x0 >= 43) & (y0 >= 45) & (x1 <= 608) & (y1 <= 472))
    assert within[0].all()
    assert not within[1].all()


def test_images_are_evaluated_in_order(tmp_path: Path) -> None:
    steps: list[int] = []
    images = set_of(tmp_path, [flat(metres) for metres in (3, 4, 6)])
    for protocol in (QUICK, PAPER):
        values = evaluate_probe(constant(2), source_of(), images, protocol, None, progress=lambda: steps.append(1))
        np.testing.assert_allclose(values[:, 0], [1, 2, 4], atol=1e-5)
    assert len(steps) == 6


def test_evaluation_does_not_change_the_probe(tmp_path: Path) -> None:
    images, probe = set_of(tmp_path, blocky(2, 0)), DepthProbe(6, 16, NEAR, FAR, 4, seed=1).eval()
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    first = evaluate_probe(probe, source_of(), images, QUICK, None)
    assert np.array_equal(first, evaluate_probe(probe, source_of(), images, QUICK, None))
    assert all(torch.equal(before[name], value) for name, value in probe.state_dict().items())
