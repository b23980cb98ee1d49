"""The hash grid against hand-computed values, its hash in plain Python, and autograd's own gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from denoising_vit.decomposition.neural_field.model import HashGrid, level_sides, released_scales

pytestmark = pytest.mark.usefixtures("one_thread")

PRIME = 2_654_435_761

#: Levels have 2, 3, 4, 7, 11 and 17 vertices along each side; with 31 entries at most, those from 7 on are hashed.
PRIME_SIZE = 31


def small_grid(*, sparse: bool = False, table_size: int = PRIME_SIZE, channels: int = 3) -> HashGrid:
    """Float64, with entries of order one."""
    grid = HashGrid(levels=6, coarsest=2, finest=17, channels=channels, table_size=table_size, sparse=sparse).double()
    with torch.no_grad():
        grid.table.copy_(torch.randn(grid.table.shape, dtype=torch.float64, generator=generator(1)))
    return grid


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(count: int, seed: int = 0) -> Tensor:
    """Random coordinates, a few of them on the corners and edges of the square."""
    coords = torch.rand(count, 2, dtype=torch.float64, generator=generator(seed))
    edges = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0], [0.3, 1], [1, 0.7], [0.5, 0]], dtype=torch.float64)
    return torch.cat([edges, coords])


def row_of(x: int, y: int, side: int, table_size: int) -> int:
    """Row within a level, by the published formula."""
    if side * side <= table_size:
        return y * side + x
    return (x ^ (y * PRIME)) % table_size


def by_hand(grid: HashGrid, place: tuple[float, float], sides: list[int], table_size: int) -> list[float]:
    """Features of one place, in plain Python."""
    table, features, offset = grid.table.tolist(), [], 0
    for side in sides:
        x, y = (min(max(value, 0.0), 1.0) * (side - 1) for value in place)
        x0, y0 = min(math.floor(x), side - 2), min(math.floor(y), side - 2)
        sx, sy = x - x0, y - y0
        corners = {
            (x0, y0): (1 - sx) * (1 - sy),
            (x0 + 1, y0): sx * (1 - sy),
            (x0, y0 + 1): (1 - sx) * sy,
            (x0 + 1, y0 + 1): sx * sy,
        }
        rows = {corner: table[offset + row_of(*corner, side, table_size)] for corner in corners}
        for channel in range(grid.channels):
            features.append(sum(weight * rows[corner][channel] for corner, weight in corners.items()))
        offset += min(side * side, table_size)
    return features


# --- values ---


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((0.0, 0.0), 2.0),
        ((1.0, 0.0), 5.0),
        ((0.0, 1.0), 17.0),
        ((1.0, 1.0), 23.0),
        ((0.5, 0.0), 3.0),
        ((0.5, 0.5), 11.0),
        ((1.0, 0.5), 13.0),
        ((0.25, 0.0), 2.5),  # midway along an edge
        ((1.0, 0.25), 9.0),
        ((0.25, 0.75), 13.5),  # the middle of a cell: (7 + 11 + 17 + 19) / 4
        ((0.1, 0.3), 5.56),  # 0.8 0.4 2 + 0.2 0.4 3 + 0.8 0.6 7 + 0.2 0.6 11
        ((-1.0, 0.5), 7.0),  # outside: the nearest edge
        ((2.0, 3.0), 23.0),
        ((0.25, -0.2), 2.5),
    ],
)
def test_one_level_is_bilinear_between_its_vertices(place: tuple[float, float], value: float) -> None:
    grid = HashGrid(levels=1, coarsest=3, finest=3, channels=1, table_size=9).double()
    with torch.no_grad():
        grid.table[:, 0] = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23])  # row by row: y0, y1, y2
    assert grid(torch.tensor([place])).item() == pytest.approx(value, abs=1e-6)


def test_features_are_ordered_level_by_level() -> None:
    grid = HashGrid(levels=2, coarsest=2, finest=3, channels=2, table_size=9)
    assert grid.width == 4
    with torch.no_grad():
        grid.table.copy_(torch.arange(26.0).view(13, 2))
    # The last vertex of a level is the last of its rows: 3 of the first level, 4 + 8 of the second.
    assert grid(torch.tensor([[1.0, 1.0]])).tolist() == [[6, 7, 24, 25]]
    assert grid(torch.tensor([[1.0, 0.0]])).tolist() == [[2, 3, 12, 13]]  # rows 1 and 4 + 2
    assert grid(torch.tensor([[0.0, 1.0]])).tolist() == [[4, 5, 20, 21]]  # rows 2 and 4 + 6


@pytest.mark.parametrize("table_size", [PRIME_SIZE, 17 * 17, 7])
def test_dense_and_hashed_levels_equal_plain_python(table_size: int) -> None:
    grid, coords = small_grid(table_size=table_size), places(23)
    sides = level_sides(6, 2, 17)
    expected = [by_hand(grid, (x, y), sides, table_size) for x, y in coords.tolist()]
    torch.testing.assert_close(grid(coords), torch.tensor(expected, dtype=torch.float64))


def test_entries_of_a_hashed_level_follow_the_published_hash() -> None:
    size, side = 1009, 101
    grid = HashGrid(levels=1, coarsest=side, finest=side, channels=1, table_size=size).double()
    vertices = [(0, 0), (1, 0), (0, 1), (37, 91), (100, 100), (99, 100), (100, 3)]
    coords = torch.tensor(vertices, dtype=torch.float64) / (side - 1)
    entries, weights = grid.corners(coords)
    heaviest = entries.gather(2, weights.argmax(2, keepdim=True))[:, 0, 0]
    assert heaviest.tolist() == [(x ^ (y * 2654435761)) % size for x, y in vertices]


def test_corners_are_in_the_documented_order() -> None:
    grid = HashGrid(levels=1, coarsest=5, finest=5, channels=1, table_size=25)
    entries, weights = grid.corners(torch.tensor([[0.3, 0.65]]))  # 1.2 and 2.6 in cells
    assert entries.tolist() == [[[11, 12, 16, 17]]]
    torch.testing.assert_close(weights, torch.tensor([[[0.8 * 0.4, 0.2 * 0.4, 0.8 * 0.6, 0.2 * 0.6]]]))


def test_weights_are_non_negative_and_sum_to_one() -> None:
    _, weights = small_grid().corners(places(101) * 1.4 - 0.2)
    assert weights.shape == (108, 6, 4)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(108, 6, dtype=torch.float64))


def test_initial_entries_are_small_and_differ() -> None:
    grid = HashGrid(levels=2, coarsest=2, finest=31, channels=2, table_size=1024)
    assert 0.9e-4 < float(grid.table.detach().abs().max()) <= 1e-4
    assert abs(float(grid.table.detach().mean())) < 1e-5
    assert len(grid.table.detach().unique()) > grid.table.numel() / 2


# --- levels ---


def test_published_levels_grow_from_16_to_1024() -> None:
    sides = level_sides(16, 16, 1024)
    assert len(sides) == 16
    assert sides[::5] == [16, 64, 256, 1024]  # factors of 4 every 5 levels, met exactly
    assert sides == sorted(sides)
    assert all(side == math.floor(16 * 2 ** (0.4 * level) + 1e-9) for level, side in enumerate(sides))


@pytest.mark.parametrize(("levels", "coarsest", "finest"), [(1, 5, 5), (2, 3, 97), (7, 2, 129), (16, 16, 16)])
def test_first_and_last_level_have_the_given_sides(levels: int, coarsest: int, finest: int) -> None:
    sides = level_sides(levels, coarsest, finest)
    assert (len(sides), sides[0], sides[-1]) == (levels, coarsest, finest)
    assert sides == sorted(sides)


def test_levels_are_dense_if_they_fit_and_hashed_otherwise() -> None:
    grid = small_grid()
    assert grid.sides.tolist() == level_sides(6, 2, 17)
    assert grid.dense.tolist() == [side * side <= PRIME_SIZE for side in grid.sides.tolist()]
    assert True in grid.dense.tolist() and False in grid.dense.tolist()
    assert grid.sizes.tolist() == [min(side * side, PRIME_SIZE) for side in grid.sides.tolist()]
    assert len(grid.table) == int(grid.sizes.sum())


def test_level_that_just_fits_is_dense() -> None:
    for table_size, dense in ((25, True), (24, False)):
        grid = HashGrid(levels=1, coarsest=5, finest=5, channels=1, table_size=table_size)
        assert grid.dense.tolist() == [dense]
        assert len(grid.table) == table_size


def test_levels_share_no_rows_and_dense_levels_have_one_per_vertex() -> None:
    grid = small_grid()
    seen: set[int] = set()
    for level, side in enumerate(grid.sides.tolist()):
        steps = torch.arange(side, dtype=torch.float64) / (side - 1)
        coords = torch.cartesian_prod(steps, steps)
        entries, weights = grid.corners(coords)
        at = entries[:, level].gather(1, weights[:, level].argmax(1, keepdim=True))[:, 0].tolist()
        rows = set(entries[:, level].flatten().tolist())
        assert not rows & seen
        seen |= rows
        assert min(rows) >= 0 and max(rows) < len(grid.table)
        if grid.dense[level]:
            assert len(set(at)) == len(rows) == side * side
    assert max(seen) < len(grid.table)


# --- released variant ---


def released_by_hand(grid: HashGrid, place: tuple[float, float], scales: list[float], table_size: int) -> list[float]:
    """Features of one place as tiny-cuda-nn has them, in plain Python."""
    table, features, offset = grid.table.tolist(), [], 0
    for scale in scales:
        side = math.ceil(scale) + 1
        size = min((side * side + 7) // 8 * 8, table_size)
        (x0, sx), (y0, sy) = ((math.floor(at), at - math.floor(at)) for at in (value * scale + 0.5 for value in place))
        total = [0.0] * grid.channels
        for x, y, weight in (
            (x0, y0, (1 - sx) * (1 - sy)),
            (x0 + 1, y0, sx * (1 - sy)),
            (x0, y0 + 1, (1 - sx) * sy),
            (x0 + 1, y0 + 1, sx * sy),
        ):
            row = (x + y * side if side * side <= size else x ^ (y * PRIME & 0xFFFFFFFF)) % size
            total = [sum_ + weight * entry for sum_, entry in zip(total, table[offset + row], strict=True)]
        features += total
        offset += size
    return features


@pytest.mark.parametrize("table_size", [32, 16, 1024])
def test_released_levels_equal_plain_python(table_size: int) -> None:
    grid = HashGrid(levels=5, coarsest=3, finest=19, channels=3, table_size=table_size, released=True).double()
    with torch.no_grad():
        grid.table.copy_(torch.randn(grid.table.shape, dtype=torch.float64, generator=generator(1)))
    scales, coords = released_scales(5, 3, 19), places(23)
    assert scales[0] == 2
    expected = [released_by_hand(grid, (x, y), scales, table_size) for x, y in coords.tolist()]
    torch.testing.assert_close(grid(coords), torch.tensor(expected, dtype=torch.float64))


def test_released_place_beyond_the_last_vertex_mixes_in_the_next_row() -> None:
    grid = HashGrid(levels=1, coarsest=3, finest=3, channels=1, table_size=16, released=True).double()
    with torch.no_grad():
        grid.table[:, 0] = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53])
    found = grid(torch.tensor([[0.25, 0.25], [0.0, 0.25], [1.0, 0.25]])).flatten().tolist()
    assert found == pytest.approx([11, (7 + 11) / 2, (13 + 17) / 2])  # x = 2.5 lies between rows 1 and 2


def test_released_levels_match_tiny_cuda_nn_and_hash_the_finest() -> None:
    grid = HashGrid(levels=16, coarsest=16, finest=1024, channels=1, table_size=2**20, released=True)
    assert grid.sides.tolist() == [16, 22, 28, 37, 49, 65, 85, 112, 148, 195, 257, 338, 446, 589, 777, 1025]
    assert grid.dense.tolist() == [True] * 15 + [False]
    assert grid.sizes.tolist()[:3] == [256, 488, 784]  # 22 x 22 = 484 is no multiple of 8
    assert grid.sizes.tolist()[-1] == 2**20


# --- gradients ---


def test_gradient_of_the_table_passes_gradcheck() -> None:
    grid = small_grid(table_size=7, channels=2)
    coords = places(5)

    def features(table: Tensor) -> Tensor:
        return functional_call(grid, {"table": table}, (coords,))

    table = grid.table.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(features, (table,))


def test_densified_sparse_gradient_equals_the_dense_one() -> None:
    dense, sparse = small_grid(), small_grid(sparse=True)
    kept: list[int] = []
    for seed, count in ((2, 3), (3, 29), (4, 2)):  # few places last: rows of the previous step must be cleared
        coords = places(count, seed)[7 if seed == 4 else 0 :]
        direction = torch.randn(len(coords), dense.width, dtype=torch.float64, generator=generator(seed))
        for grid in (dense, sparse):
            grid.zero_grad()
            (grid(coords) * direction).sum().backward()
        assert sparse.table.grad is not None and sparse.table.grad.is_sparse
        sparse.densify_gradient()
        assert dense.table.grad is not None and not sparse.table.grad.is_sparse
        torch.testing.assert_close(sparse.table.grad, dense.table.grad)
        kept.append(sparse.table.grad.data_ptr())
    assert dense.table.grad is not None and (dense.table.grad == 0).any()
    assert len(set(kept)) == 1  # the same memory every time


def test_densify_leaves_dense_and_missing_gradients_unchanged() -> None:
    grid = small_grid()
    grid.densify_gradient()
    assert grid.table.grad is None
    grid(places(3)).sum().backward()
    assert grid.table.grad is not None
    before = grid.table.grad.clone()
    grid.densify_gradient()
    assert torch.equal(grid.table.grad, before)
