"""Fixed sinusoidal position features: hand-computed values and invariances."""

from __future__ import annotations

import math

import pytest
import torch

from denoising_vit.views.sampling import sinusoidal_positions


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_values_of_eight_channels_by_hand(row: int, column: int) -> None:
    """Two waves: frequencies 1 and 1/100, at row + 1/2 and column + 1/2."""
    y, x = row + 0.5, column + 0.5
    expected = [math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
    expected += [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100)]
    found = sinusoidal_positions((2, 3), 8)
    assert (found.shape, found.dtype) == ((2, 3, 8), torch.float32)
    torch.testing.assert_close(found[row, column], torch.tensor(expected))


@pytest.mark.parametrize("channels", [5, 6, 7])
def test_channels_beyond_a_multiple_of_four_are_zero(channels: int) -> None:
    found = sinusoidal_positions((3, 5), channels)
    assert found.shape == (3, 5, channels)
    assert torch.equal(found[..., :4], sinusoidal_positions((3, 5), 4))
    assert not found[..., 4:].any()


@pytest.mark.parametrize("channels", [0, 3])
def test_too_few_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 4 channels, got {channels}"):
        sinusoidal_positions((3, 5), channels)


def test_larger_grid_extends_a_smaller_one() -> None:
    assert torch.equal(sinusoidal_positions((11, 13), 12)[:3, :5], sinusoidal_positions((3, 5), 12))


def test_a_place_has_the_same_features_on_a_denser_grid() -> None:
    """With patches that overlap by half, every second centre is one of the plain grid."""
    assert torch.equal(sinusoidal_positions((5, 9), 12, step=0.5)[::2, ::2], sinusoidal_positions((3, 5), 12))


def test_rows_and_columns_are_symmetric() -> None:
    first, second = sinusoidal_positions((3, 5), 12), sinusoidal_positions((5, 3), 12)
    assert torch.equal(first[..., :6], second[..., 6:].transpose(0, 1))
    assert torch.equal(first[..., 6:], second[..., :6].transpose(0, 1))


def test_places_of_a_large_grid_are_distinct_and_have_equal_norms() -> None:
    found = sinusoidal_positions((37, 53), 64).flatten(0, 1)
    torch.testing.assert_close(found.square().mean(-1), torch.full((37 * 53,), 0.5))
    distances = torch.cdist(found, found) + torch.eye(len(found)) * 9
    assert float(distances.min()) > 0.5


def test_positions_are_created_on_the_given_device() -> None:
    assert sinusoidal_positions((3, 5), 7, device="meta").device.type == "meta"
