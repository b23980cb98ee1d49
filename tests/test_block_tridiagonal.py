"""The block-tridiagonal factorisation against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from denoising_vit.decomposition.exact import BlockTridiagonal


def random_system(blocks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal blocks, blocks below the diagonal, and the dense positive definite matrix."""
    generator = torch.Generator().manual_seed(blocks)
    below = torch.randn(blocks - 1, size, size, generator=generator, dtype=torch.float64)
    diagonal = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    diagonal = diagonal @ diagonal.transpose(1, 2) + 4 * size * torch.eye(size, dtype=torch.float64)
    dense = torch.block_diag(*diagonal)
    for k, block in enumerate(below):
        dense[(k + 1) * size : (k + 2) * size, k * size : (k + 1) * size] = block
        dense[k * size : (k + 1) * size, (k + 1) * size : (k + 2) * size] = block.T
    return diagonal, below, dense


@pytest.mark.parametrize(("blocks", "size"), [(1, 3), (2, 5), (7, 3), (5, 11)])
def test_solve_equals_a_dense_solve(blocks: int, size: int) -> None:
    diagonal, below, dense = random_system(blocks, size)
    right = torch.randn(blocks, size, 2, dtype=torch.float64)
    solution = BlockTridiagonal(diagonal, below).solve(right)
    assert torch.allclose(dense @ solution.flatten(0, 1), right.flatten(0, 1), atol=1e-10)


def test_forward_streams_the_inverse_of_the_cholesky_factor() -> None:
    diagonal, below, dense = random_system(4, 3)
    right = torch.randn(4, 3, 5, dtype=torch.float64)
    streamed = torch.cat(list(BlockTridiagonal(diagonal, below).forward(iter(right))))
    expected = torch.linalg.solve_triangular(torch.linalg.cholesky(dense), right.flatten(0, 1), upper=False)
    assert torch.allclose(streamed, expected, atol=1e-12)


def test_forward_reads_one_row_at_a_time() -> None:
    diagonal, below, _ = random_system(4, 3)
    asked = []

    def rows():
        for k in range(4):
            asked.append(k)
            yield torch.ones(3, 1, dtype=torch.float64)

    stream = BlockTridiagonal(diagonal, below).forward(rows())
    next(stream)
    assert asked == [0]


def test_solve_does_not_modify_its_inputs() -> None:
    diagonal, below, _ = random_system(3, 3)
    right = torch.randn(3, 3, 2, dtype=torch.float64)
    before = [tensor.clone() for tensor in (diagonal, below, right)]
    BlockTridiagonal(diagonal, below).solve(right)
    assert all(torch.equal(a, b) for a, b in zip((diagonal, below, right), before, strict=True))


def test_an_indefinite_matrix_is_an_error() -> None:
    diagonal = -torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(RuntimeError, match="positive-definite"):
        BlockTridiagonal(diagonal, diagonal[:0])
