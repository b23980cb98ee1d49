"""Depth losses: against hand computations, with pixels of unknown depth, and with no known depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.evaluation.depth import PAPER, QUICK
from denoising_vit.evaluation.depth.probe import depth_loss, gradient_loss, scale_invariant_loss, within

EPSILON = 0.001


def maps(seed: int = 0, shape: tuple[int, int, int] = (2, 21, 18)) -> tuple[Tensor, Tensor]:
    """Predicted depth, and true depth that is known for four pixels in five."""
    chance = np.random.default_rng(seed)
    truth = chance.uniform(0.2, 9, shape)
    predicted = truth * chance.uniform(0.7, 1.6, shape)
    truth[chance.random(shape) < 0.2] = 0
    return torch.from_numpy(predicted).float(), torch.from_numpy(truth).float()


def logs(predicted: Tensor, truth: Tensor) -> list[float]:
    known = zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True)
    return [math.log(p + EPSILON) - math.log(t + EPSILON) for p, t in known if t > 0]


def test_scale_invariant_loss_is_the_root_of_variance_and_mean() -> None:
    predicted, truth = maps()
    g = logs(predicted, truth)
    mean = sum(g) / len(g)
    variance = sum((value - mean) ** 2 for value in g) / (len(g) - 1)
    found = float(scale_invariant_loss(predicted, truth))
    assert found == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-4)
    first = float(scale_invariant_loss(predicted, truth, mean_only=True))
    assert first == pytest.approx(math.sqrt(0.15 * mean**2), rel=1e-4)
    assert first < found / 2


def test_common_factor_is_only_partly_penalised() -> None:
    _, truth = maps()
    doubled = float(scale_invariant_loss(2 * truth, truth))
    assert doubled == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-2)


def by_loop(predicted: Tensor, truth: Tensor) -> float:
    """Every pair of pixels two apart, in maps with every pixel, every second, fourth and sixth."""
    total = 0.0
    for step in (1, 2, 4, 6):
        ours, theirs = (values[:, ::step, ::step].double().numpy() for values in (predicted, truth))
        images, height, width = theirs.shape
        sum_, count = 0.0, 0

        def error(place: tuple[int, int, int], ours: np.ndarray = ours, theirs: np.ndarray = theirs) -> float:
            return math.log(ours[place] + EPSILON) - math.log(theirs[place] + EPSILON)

        for image in range(images):
            for y in range(height):
                for x in range(width):
                    if theirs[image, y, x] <= 0:
                        continue
                    count += 1
                    if y + 2 < height and theirs[image, y + 2, x] > 0:
                        sum_ += abs(error((image, y + 2, x)) - error((image, y, x)))
                    if x + 2 < width and theirs[image, y, x + 2] > 0:
                        sum_ += abs(error((image, y, x + 2)) - error((image, y, x)))
        total += sum_ / count
    return total


@pytest.mark.parametrize("seed", range(2))
def test_gradient_loss_matches_a_loop(seed: int) -> None:
    predicted, truth = maps(seed)
    assert float(gradient_loss(predicted, truth)) == pytest.approx(by_loop(predicted, truth), rel=1e-4)


def test_gradient_loss_compares_rows_and_columns_not_images() -> None:
    truth = torch.full((2, 8, 8), 2.0)
    predicted = truth * torch.tensor([1.0, 3.0])[:, None, None]
    assert float(gradient_loss(predicted, truth)) == 0
    for axis in (1, 2):
        tilted = truth * torch.linspace(1, 2, 8).view([8 if index == axis else 1 for index in range(3)])
        assert float(gradient_loss(tilted, truth)) > 0.1


def test_total_loss_adds_half_of_the_gradient_loss() -> None:
    predicted, truth = maps()
    plain, gradient = float(scale_invariant_loss(predicted, truth)), float(gradient_loss(predicted, truth))
    assert (PAPER.gradient, QUICK.gradient) == (0.5, 0.5)
    assert float(depth_loss(predicted, truth, 0.5)) == pytest.approx(plain + gradient / 2)
    assert float(depth_loss(predicted, truth, 0.0)) == pytest.approx(plain)
    mean = float(scale_invariant_loss(predicted, truth, mean_only=True))
    assert float(depth_loss(predicted, truth, 0.5, mean_only=True)) == pytest.approx(mean + gradient / 2)


@pytest.mark.parametrize("known", [0, 1])
def test_loss_and_gradients_are_zero_with_at_most_one_known_pixel(known: int) -> None:
    predicted = maps()[0].requires_grad_()
    truth = torch.zeros_like(predicted)
    truth.view(-1)[:known] = 3.0
    loss = depth_loss(predicted, truth, 0.5)
    loss.backward()
    assert float(loss.detach()) == 0 and predicted.grad is not None and not predicted.grad.any()


def test_perfect_depth_has_finite_gradients() -> None:
    truth = maps()[1]
    predicted = truth.clamp(min=0.5).requires_grad_()
    for mean_only in (True, False):
        depth_loss(predicted, predicted.detach() * (truth > 0), 0.5, mean_only=mean_only).backward()
    assert predicted.grad is not None and torch.isfinite(predicted.grad).all()


def test_unknown_pixels_have_no_gradient() -> None:
    predicted, truth = maps()
    predicted.requires_grad_()
    depth_loss(predicted, truth, 0.5).backward()
    assert predicted.grad is not None
    assert not predicted.grad[truth == 0].any()
    assert (predicted.grad[truth > 0] != 0).float().mean() > 0.95


def test_depth_beyond_the_last_bin_is_unknown() -> None:
    assert within(torch.tensor([0.0, 3.0, 9.99, 10.0, 12.0]), 10.0).tolist() == pytest.approx([0, 3, 9.99, 0, 0])
