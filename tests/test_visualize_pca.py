from __future__ import annotations

import numpy as np
import pytest
import torch

from denoising_vit.maps import PCABasis
from denoising_vit.maps.colours import settle_signs
from denoising_vit.maps.features import robust_range


def smooth_features(height: int = 11, width: int = 7, channels: int = 13, seed: int = 0) -> torch.Tensor:
    """Features with a few strong directions, like those of a ViT, and a mean larger than their spread."""
    draw = torch.Generator().manual_seed(seed)
    strengths = 3.0 * 0.6 ** torch.arange(channels)
    return torch.randn(height, width, channels, generator=draw) * strengths + 10


def difference(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def test_two_distinct_features_get_two_colours():
    features = torch.zeros(5, 7, 4)
    features[:, :3] = torch.tensor([1.0, 2.0, -1.0, 0.5])
    colours = PCABasis.fit(features).colours(features)
    assert colours.shape == (5, 7, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 2
    # All variation is in the first component; the others are the same grey everywhere.
    assert set(colours[..., 0].ravel()) == {0, 255}
    assert set(colours[..., 1:].ravel()) == {127}


def test_faint_noise_is_not_stretched_to_full_colour():
    features = torch.zeros(11, 11, 8)
    features[:, :5] = 1.0
    noisy = features + 1e-3 * torch.randn(11, 11, 8, generator=torch.Generator().manual_seed(0))
    colours = PCABasis.fit(noisy).colours(noisy)
    assert np.ptp(colours[..., 1:].astype(int)) < 30


def test_components_are_orthonormal_and_in_order_of_strength():
    features = smooth_features()
    basis = PCABasis.fit(features)
    np.testing.assert_allclose(basis.components.T @ basis.components, np.eye(3), atol=1e-10)
    spread = ((features.reshape(-1, 13).double().numpy() - basis.mean) @ basis.components).std(0)
    assert spread[0] > spread[1] > spread[2]
    assert np.all(basis.high > basis.low)


@pytest.mark.parametrize("seed", range(4))
def test_permuted_patches_keep_their_colours(seed: int):
    features = smooth_features(seed=seed)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(seed))
    shuffled = features.reshape(77, 13)[order].reshape(11, 7, 13)
    expected = PCABasis.fit(features).colours(features).reshape(77, 3)[order.numpy()].reshape(11, 7, 3)
    assert difference(PCABasis.fit(shuffled).colours(shuffled), expected) <= 1


def test_a_mirrored_image_has_mirrored_colours():
    features = smooth_features()
    mirrored = features.flip(1)
    expected = PCABasis.fit(features).colours(features)[:, ::-1]
    assert difference(PCABasis.fit(mirrored).colours(mirrored), expected) <= 1


def test_equally_strong_components_are_not_rotated_by_rounding(monkeypatch: pytest.MonkeyPatch):
    # Four clusters at the corners of a tetrahedron: any rotation of the three components is equally good.
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    features = corners.repeat(6, 1).reshape(4, 6, 3)
    expected, solve = PCABasis.fit(features).colours(features), np.linalg.eigh
    for seed in range(3):
        noise = 1e-15 * np.random.default_rng(seed).standard_normal((3, 3))
        with monkeypatch.context() as patch:
            patch.setattr(np.linalg, "eigh", lambda matrix, noise=noise: solve(matrix + noise + noise.T))
            assert difference(PCABasis.fit(features).colours(features), expected) <= 1


def test_colours_do_not_depend_on_the_eigensolvers_signs(monkeypatch: pytest.MonkeyPatch):
    features, solve = smooth_features(), np.linalg.eigh
    expected = PCABasis.fit(features).colours(features)
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (solve(matrix)[0], -solve(matrix)[1]))
    assert difference(PCABasis.fit(features).colours(features), expected) == 0


def test_settle_signs_does_not_depend_on_the_given_sign():
    directions = np.array([[0.1, 0.6], [-0.9, -0.6], [0.4, 0.5]])
    settled = settle_signs(directions)
    np.testing.assert_array_equal(settled, settle_signs(-directions))
    np.testing.assert_array_equal(settled, directions * [-1, 1])  # of two equally large entries, the first one counts


def test_one_basis_gives_equal_features_equal_colours():
    raw, other = smooth_features(), smooth_features(seed=1)
    other[2, 3] = raw[5, 6]
    basis = PCABasis.fit(raw, other)
    assert difference(basis.colours(raw)[5, 6], basis.colours(other)[2, 3]) == 0
    alone = PCABasis.fit(torch.cat([raw, other]))
    np.testing.assert_allclose(basis.mean, alone.mean)
    np.testing.assert_allclose(basis.components, alone.components)


def test_maps_of_different_sizes_share_a_basis():
    coarse, fine = smooth_features(3, 5), smooth_features(12, 20, seed=1)
    basis = PCABasis.fit(coarse, fine)
    assert basis.colours(coarse).shape == (3, 5, 3)
    assert basis.colours(fine).shape == (12, 20, 3)


@pytest.mark.parametrize("value", [0.0, 0.1, -300.7, 1e30])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 1), (4, 4, 2), (6, 5, 7)])
def test_constant_features_are_mid_grey(value: float, shape: tuple[int, int, int]):
    features = torch.full(shape, value)
    assert set(PCABasis.fit(features).colours(features).ravel()) == {127}


def test_constant_channels_do_not_matter():
    features = smooth_features(channels=5)
    padded = torch.cat([torch.full((11, 7, 2), 4.0), features], -1)
    assert difference(PCABasis.fit(features).colours(features), PCABasis.fit(padded).colours(padded)) <= 1


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels_leave_grey_colours(channels: int):
    features = smooth_features(channels=channels)
    colours = PCABasis.fit(features).colours(features)
    assert set(colours[..., channels:].ravel()) == {127}
    assert np.ptp(colours[..., 0]) == 255


def test_one_patch_among_equal_ones_is_visible():
    features = torch.zeros(20, 20, 4)
    features[3, 4] = 1.0
    colours = PCABasis.fit(features).colours(features)
    assert tuple(colours[3, 4]) != tuple(colours[0, 0])


def test_outliers_do_not_set_the_range():
    features = smooth_features(30, 30)
    spiked = features.clone()
    spiked[0, 0] += 100 * torch.nn.functional.one_hot(torch.tensor(0), 13)
    colours = PCABasis.fit(spiked).colours(spiked)
    assert np.std(colours[..., 0]) > 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_requires_grad_are_accepted(dtype: torch.dtype):
    features = smooth_features().to(dtype).requires_grad_()
    plain = features.detach().float().numpy()
    assert difference(PCABasis.fit(features).colours(features), PCABasis.fit(plain).colours(plain)) == 0


def test_non_finite_values_raise_with_their_count():
    features = smooth_features()
    features[0, 0, :2] = float("nan")
    features[1, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="3 of 1,001 values are not"):
        PCABasis.fit(features)
    with pytest.raises(ValueError, match="3 of 1,001 values are not"):
        PCABasis.fit(smooth_features()).colours(features)


def test_wrong_arguments():
    features = smooth_features()
    with pytest.raises(ValueError, match="at least one feature map"):
        PCABasis.fit()
    with pytest.raises(ValueError, match="same number of channels"):
        PCABasis.fit(features, features[..., :4])
    with pytest.raises(ValueError, match="expected non-empty features"):
        PCABasis.fit(features[:0])
    with pytest.raises(ValueError, match="percentiles"):
        PCABasis.fit(features, bounds=(99, 1))
    basis = PCABasis.fit(features)
    with pytest.raises(ValueError, match="fitted on 13 channels"):
        basis.colours(features[..., :4])
    with pytest.raises(ValueError, match=r"\(h, w, C\)"):
        basis.colours(features[0])


def test_robust_range_falls_back_to_extremes():
    assert robust_range(np.arange(101.0), (1, 99)) == (1.0, 99.0)
    assert robust_range(np.array([2.0] * 999 + [5.0])) == (2.0, 5.0)
