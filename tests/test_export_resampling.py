"""Resampling in a graph: equal to torch's interpolate and timm's resampling, as products of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import eva, vision_transformer
from torch.nn.functional import interpolate

from denoising_vit.export.traceable import bicubic_matrix, resample, resample_positions, timm_resamples_in_graph

SIZES = [(7, 5), (3, 4), (1, 1), (23, 11), (2, 31), (7, 6)]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resample_matches_interpolate(size: tuple[int, int], antialias: bool) -> None:
    grid = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    planes = grid.permute(2, 0, 1)[None]  # (h, w, C) -> (1, C, h, w)
    expected = interpolate(planes, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    assert torch.allclose(resample(grid, size, antialias=antialias), expected[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_single_patch_is_repeated(antialias: bool) -> None:
    grid = torch.tensor([[[3.0, -1.0]]])
    assert torch.allclose(resample(grid, (2, 3), antialias=antialias), grid.expand(2, 3, 2), atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
def test_own_size_returns_the_grid_unchanged(antialias: bool) -> None:
    grid = torch.randn(37, 13, 2)
    assert torch.equal(resample(grid, (37, 13), antialias=antialias), grid)


@pytest.mark.parametrize("new", [1, 3, 8, 20])
@pytest.mark.parametrize("antialias", [True, False])
def test_weights_sum_to_one(new: int, antialias: bool) -> None:
    weights = bicubic_matrix(8, new, antialias=antialias, like=torch.zeros(1))
    assert weights.shape == (new, 8)
    assert torch.allclose(weights.sum(1), torch.ones(new), atol=1e-6)


def test_halving_by_hand() -> None:
    """From 4 to 2 without antialiasing: centres at 1 and 3, the four nearest with Keys' weights at 1/2 and 3/2."""
    near, far = 0.59375, -0.09375  # for a = -3/4
    expected = torch.tensor([[far + near, near, far, 0.0], [0.0, far, near, near + far]])
    assert torch.allclose(bicubic_matrix(4, 2, antialias=False, like=torch.zeros(1)), expected, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(6, 6), (3, 9)], ids=str)
def test_resampled_positions_match_timm(prefix: int, size: tuple[int, int]) -> None:
    positions = torch.randn(1, prefix + 36, 4)
    expected = resample_abs_pos_embed(positions, list(size), num_prefix_tokens=prefix)
    assert torch.allclose(resample_positions(positions, size, prefix=prefix), expected, atol=1e-5)


def test_timm_functions_are_restored_afterwards() -> None:
    modules: list[Any] = [vision_transformer, eva]
    before = [module.resample_abs_pos_embed for module in modules]
    with pytest.raises(RuntimeError, match="halfway"), timm_resamples_in_graph():
        assert modules[0].resample_abs_pos_embed is not before[0]
        raise RuntimeError("halfway")
    assert [module.resample_abs_pos_embed for module in modules] == before
