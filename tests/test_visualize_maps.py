from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from denoising_vit.maps import Clusters, NormScale, similarity_maps


def norm_maps(*features: torch.Tensor) -> tuple[list[np.ndarray], tuple[float, float]]:
    scale = NormScale.fit(*features)
    return [scale.colours(item) for item in features], (scale.low, scale.high)


def cluster_maps(*features: torch.Tensor, **options: int) -> list[np.ndarray]:
    clusters = Clusters.fit(*features, **options)
    return [clusters.colours(item) for item in features]


def quarters(side: int = 6, channels: int = 8, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Four regions with one feature vector each, (side, side, C)."""
    draw = torch.Generator().manual_seed(7)
    features = torch.randn(2, 2, channels, generator=draw).repeat_interleave(side // 2, 0)
    features = features.repeat_interleave(side // 2, 1)
    return features + noise * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))


def colour(name: str, share: float) -> np.ndarray:
    return np.array(colormaps[name](share, bytes=True)[:3])


def unique(picture: np.ndarray) -> np.ndarray:
    return np.unique(picture.reshape(-1, 3), axis=0)


def test_norms_share_one_scale():
    short, long = torch.zeros(3, 5, 4), torch.zeros(3, 5, 4)
    short[..., 1], long[..., 2] = 2.0, 6.0
    short[0, 0, 1] = 4.0
    (left, right), (low, high) = norm_maps(short, long)
    assert (low, high) == pytest.approx((2.0, 6.0))
    np.testing.assert_array_equal(left[1, 1], colour("magma", 0.0))
    np.testing.assert_array_equal(left[0, 0], colour("magma", 0.5))
    np.testing.assert_array_equal(right[1, 1], colour("magma", 1.0))
    assert left.dtype == np.uint8 and left.shape == (3, 5, 3)


def test_norm_outliers_are_clipped():
    features = torch.linspace(1, 2, 400).reshape(20, 20, 1).repeat(1, 1, 3)
    features[0, 0] = 1e4
    _, (low, high) = norm_maps(features)
    assert 1 < low / 3**0.5 < 1.1 and 1.9 < high / 3**0.5 < 2.1


@pytest.mark.parametrize("value", [0.0, 0.3, 1e25])
def test_constant_norms_get_the_middle_colour(value: float):
    (picture,), (low, high) = norm_maps(torch.full((4, 3, 5), value))
    assert low == pytest.approx(high) and np.isfinite([low, high]).all()
    np.testing.assert_array_equal(unique(picture), [colour("magma", 0.5)])


def test_clusters_match_the_regions():
    (picture,) = cluster_maps(quarters(noise=0.01), clusters=4)
    assert len(unique(picture)) == 4
    for row in (slice(0, 3), slice(3, 6)):
        for column in (slice(0, 3), slice(3, 6)):
            assert len(unique(picture[row, column])) == 1


def test_cluster_colours_match_between_maps_and_sizes():
    raw, semantic = quarters(noise=0.01, seed=1), quarters(noise=0.01, seed=2)
    fine = semantic.repeat_interleave(4, 0).repeat_interleave(4, 1)
    left, right, finer = cluster_maps(raw, semantic, fine, clusters=4)
    np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(finer[::4, ::4], right)


def test_cluster_colours_do_not_depend_on_positions_or_seed():
    features = quarters(noise=0.01)
    (expected,) = cluster_maps(features, clusters=4)
    order = np.random.default_rng(0).permutation(36)
    shuffled = features.reshape(36, 8)[torch.from_numpy(order)].reshape(6, 6, 8)
    np.testing.assert_array_equal(
        cluster_maps(shuffled, clusters=4)[0], expected.reshape(36, 3)[order].reshape(6, 6, 3)
    )
    np.testing.assert_array_equal(cluster_maps(features.flip(1), clusters=4)[0], expected[:, ::-1])
    np.testing.assert_array_equal(cluster_maps(features, clusters=4, seed=5)[0], expected)


def test_mirrored_maps_without_clear_clusters_match_too():
    features = torch.randn(9, 11, 5, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(cluster_maps(features.flip(1))[0], cluster_maps(features)[0][:, ::-1])


@pytest.mark.parametrize(("features", "expected"), [(quarters(), 4), (torch.full((3, 5, 2), 0.1), 1)])
def test_no_more_clusters_than_distinct_vectors(features: torch.Tensor, expected: int):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = cluster_maps(features, features + 1e-9, clusters=6)
    assert [len(unique(picture)) for picture in pictures] == [expected, expected]


@pytest.mark.parametrize("clusters", [1, 10, 15, 25])
def test_every_cluster_has_a_colour_of_its_own(clusters: int):
    features = torch.arange(30.0).reshape(5, 6, 1)
    assert len(unique(cluster_maps(features, clusters=clusters)[0])) == clusters


def test_similarity_to_the_centre():
    features = torch.zeros(3, 5, 2)
    features[:, 1:4, 0], features[:, 0, 0], features[:, 4, 0] = 1.0, -1.5, -1.5  # the mean is zero
    (picture,) = similarity_maps(features)
    np.testing.assert_array_equal(unique(picture[:, 1:4]), [colour("RdBu_r", 1.0)])
    np.testing.assert_array_equal(unique(picture[:, [0, 4]]), [colour("RdBu_r", 0.0)])


def test_similarity_ignores_a_large_shared_mean_and_scale():
    features = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    expected = similarity_maps(features, at=(1, 2))[0].astype(int)
    offset = similarity_maps(features * 50 + 1000, at=(1, 2))[0].astype(int)
    assert np.abs(offset - expected).max() <= 3
    np.testing.assert_array_equal(expected[1, 2], colour("RdBu_r", 1.0))


def test_similarity_uses_the_same_place_in_maps_of_other_sizes():
    coarse = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    fine = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for place in [(0, 0), (2, 4), (1, 3), None]:
        left, right = similarity_maps(coarse, fine, at=place)
        assert np.abs(right[::4, ::4].astype(int) - left).max() <= 1


def test_similarity_in_a_constant_map_is_zero():
    (picture,) = similarity_maps(torch.full((4, 3, 5), 0.3))
    np.testing.assert_array_equal(unique(picture), [colour("RdBu_r", 0.5)])


@pytest.mark.parametrize("draw", [norm_maps, cluster_maps, similarity_maps])
def test_wrong_features(draw):
    features = quarters()
    with pytest.raises(ValueError, match="at least one feature map"):
        draw()
    with pytest.raises(ValueError, match=r"\(h, w, C\)"):
        draw(features[0])
    with pytest.raises(ValueError, match="same number of channels"):
        draw(features, features[..., :3])
    features[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 288 values are not"):
        draw(features)


def test_wrong_options():
    with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
        cluster_maps(quarters(), clusters=0)
    with pytest.raises(ValueError, match=r"within the 6 x 6 grid of the first map, got \(6, 0\)"):
        similarity_maps(quarters(), at=(6, 0))
