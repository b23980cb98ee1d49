"""The losses of the neural field: values by hand, and gradients against explicit formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from denoising_vit.decomposition.neural_field.model import (
    first_phase_loss,
    reconstruction_loss,
    second_phase_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, CHANNELS = 7, 5
PUBLISHED = 0.1, 0.02


def noise(seed: int, *, learns: bool = False) -> Tensor:
    drawn = torch.randn(TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_(learns)


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F, G and h, which all require gradients, and the features."""
    return noise(1, learns=True), noise(2, learns=True), noise(3, learns=True), noise(4)


def reconstruction_gradient(predicted: Tensor, target: Tensor) -> Tensor:
    """Gradient of MSE + 1 - mean cosine with respect to the prediction."""
    squares = 2 * (predicted - target) / predicted.numel()
    p, t = predicted.norm(dim=1, keepdim=True), target.norm(dim=1, keepdim=True)
    cosine = target / (p * t) - (predicted * target).sum(1, keepdim=True) * predicted / (p**3 * t)
    return (squares - cosine / len(predicted)).detach()


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# --- values ---


@pytest.mark.parametrize(
    ("predicted", "target", "loss"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.0]], [[4.0, 3.0]], 1 + 1 - 24 / 25),
        ([[1.0, 0.0]], [[0.0, 2.0]], 2.5 + 1),  # at right angles
        ([[1.0, 0.0]], [[-1.0, 0.0]], 2 + 2),  # opposite
        ([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], 3 / 4 + 1 - 1 / 2),  # means over tokens
    ],
)
def test_reconstruction_loss_by_hand(predicted: list[list[float]], target: list[list[float]], loss: float) -> None:
    assert float(reconstruction_loss(torch.tensor(predicted), torch.tensor(target))) == pytest.approx(loss, abs=1e-6)


def test_first_phase_is_the_reconstruction_by_field_plus_artifact() -> None:
    semantic, artifact, _, features = parts()
    loss = first_phase_loss(semantic, artifact, features)
    assert loss.item() == pytest.approx(reconstruction_loss(semantic + artifact, features).item())


def test_second_phase_is_the_sum_of_its_terms() -> None:
    semantic, artifact, residual, features = parts()
    left = features - semantic - artifact
    terms = (
        reconstruction_loss(semantic + artifact, features - residual)
        + 0.1 * (residual - left).square().mean()
        + 0.02 * residual.abs().mean()
    )
    loss = second_phase_loss(semantic, artifact, residual, features, *PUBLISHED)
    assert loss.item() == pytest.approx(terms.item())


def test_released_second_phase_uses_the_cosine_of_all_three_parts() -> None:
    semantic, artifact, residual, features = parts()
    left = features - semantic - artifact
    whole = semantic + artifact + residual
    cosine = (whole * features).sum(1) / (whole.norm(dim=1) * features.norm(dim=1))
    terms = (
        (whole - features).square().mean()
        + (1 - cosine.mean())
        + 0.1 * (residual - left).square().mean()
        + 0.02 * residual.abs().mean()
    )
    loss = second_phase_loss(semantic, artifact, residual, features, *PUBLISHED, "released")
    assert loss.item() == pytest.approx(terms.item())
    assert loss.item() != pytest.approx(second_phase_loss(semantic, artifact, residual, features, *PUBLISHED).item())


# --- gradients ---


def test_released_second_phase_stops_the_same_gradients() -> None:
    semantic, artifact, residual, features = parts()
    second_phase_loss(semantic, artifact, residual, features, *PUBLISHED, "released").backward()
    whole = semantic + artifact + residual
    torch.testing.assert_close(grad(semantic), reconstruction_gradient(whole, features))
    own, left = residual.detach(), (features - semantic - artifact).detach()
    torch.testing.assert_close(grad(residual), (0.2 * (own - left) + 0.02 * own.sign()) / own.numel())
    assert artifact.grad is None


def test_first_phase_gives_field_and_artifact_the_same_gradient() -> None:
    semantic, artifact, _, features = parts()
    first_phase_loss(semantic, artifact, features).backward()
    expected = reconstruction_gradient(semantic + artifact, features)
    torch.testing.assert_close(grad(semantic), expected)
    torch.testing.assert_close(grad(artifact), expected)


def test_second_phase_fits_the_field_to_features_minus_residual() -> None:
    semantic, artifact, residual, features = parts()
    second_phase_loss(semantic, artifact, residual, features, *PUBLISHED).backward()
    torch.testing.assert_close(grad(semantic), reconstruction_gradient(semantic + artifact, features - residual))


def test_second_phase_gives_the_artifact_no_gradient() -> None:
    semantic, artifact, residual, features = parts()
    second_phase_loss(semantic, artifact, residual, features, *PUBLISHED).backward()
    assert artifact.grad is None


@pytest.mark.parametrize("weights", [PUBLISHED, (0.7, 0.0), (0.0, 0.3)])
def test_gradient_of_the_residual_comes_from_its_own_terms_only(weights: tuple[float, float]) -> None:
    semantic, artifact, residual, features = parts()
    second_phase_loss(semantic, artifact, residual, features, *weights).backward()
    left = features - semantic.detach() - artifact.detach()
    own = residual.detach()
    expected = (weights[0] * 2 * (own - left) + weights[1] * own.sign()) / own.numel()
    torch.testing.assert_close(grad(residual), expected)


@pytest.mark.parametrize("weights", [PUBLISHED, (50.0, 20.0)])
def test_gradient_of_the_field_does_not_depend_on_residual_terms(weights: tuple[float, float]) -> None:
    semantic, artifact, residual, features = parts()
    second_phase_loss(semantic, artifact, residual, features, *weights).backward()
    alone = noise(1, learns=True)
    reconstruction_loss(alone + artifact.detach(), features - residual.detach()).backward()
    assert torch.equal(grad(semantic), grad(alone))


def test_networks_of_field_and_residual_learn_from_their_own_errors_only() -> None:
    torch.manual_seed(0)
    field, network = nn.Linear(CHANNELS, CHANNELS).double(), nn.Linear(CHANNELS, CHANNELS).double()
    places, artifact, features = noise(5), noise(2), noise(4)
    second_phase_loss(field(places), artifact, network(features), features, *PUBLISHED).backward()
    field_gradient, network_gradient = grad(field.weight).clone(), grad(network.weight).clone()
    with torch.no_grad():
        semantic, residual = field(places), network(features)
        to_semantic = reconstruction_gradient(semantic + artifact, features - residual)
        left = features - semantic - artifact
        to_residual = (0.2 * (residual - left) + 0.02 * residual.sign()) / residual.numel()
    torch.testing.assert_close(field_gradient, to_semantic.T @ places)
    torch.testing.assert_close(network_gradient, to_residual.T @ features)


def test_field_that_fits_exactly_has_zero_loss_in_both_phases() -> None:
    semantic, artifact, _, _ = parts()
    features, nothing = (semantic + artifact).detach(), torch.zeros(TOKENS, CHANNELS, dtype=torch.float64)
    assert first_phase_loss(semantic, artifact, features).item() == pytest.approx(0, abs=1e-12)
    assert second_phase_loss(semantic, artifact, nothing, features, *PUBLISHED).item() == pytest.approx(0, abs=1e-12)
