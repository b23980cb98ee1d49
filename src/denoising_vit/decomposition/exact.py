"""Stage 1 without gradient descent: semantic field and artifact by exact linear least squares.

    minimise  sum_v |Y_v - Wy_v F Wx_v^T - G|^2_v  +  lam (N / nodes) |grad F|^2  +  mu (N / positions) |G|^2

The norm of view v weights its patches by ``u_v t_v^T`` (all ones without a taper), and N is the sum of all weights. Its
normal equations are ``A F + K^T G = b`` and ``K F + D G = g``. A, K and D depend only on the crops; the image
contributes only b and g (:class:`~denoising_vit.decomposition.statistics.Statistics`). Eliminating F gives
``T G = g - K A^-1 b`` with ``T = D - K A^-1 K^T``. docs/method.md has the derivation.

With offsets, the features of each view are also shifted by an unknown constant o_v (C), with the penalty
``nu (N / views) |o|^2``. Offsets are eliminated together with F.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from denoising_vit.errors import PlanError
from denoising_vit.views.plan import ViewPlan, least_views

#: Number of rows of L^-1 K^T to gather before they enter T, and of columns of T to update at once: large enough for
#: fast matrix products, small enough to keep memory at O(nodes per side x positions).
_ROWS, _COLUMNS = 512, 512

#: nu, weight of the square of a view's offset, per observation of a view: small, so that offsets are nearly free.
_OFFSET_SHRINKAGE = 0.003


class ExactSolver:
    """Solver of stage 1 for any image seen through one plan; everything that depends only on the plan is computed once.

    Args:
        plan: the views.
        smoothness: lam, weight of the field's squared differences, per observation and node.
        shrinkage: mu, weight of the artifact's square, per observation of a position.
        offsets: also fit a constant in each view.
        device: device to compute on, in float64; statistics must be on this device.

    Raises:
        PlanError: if the views cannot determine field and artifact.
    """

    def __init__(
        self,
        plan: ViewPlan,
        *,
        smoothness: float,
        shrinkage: float,
        offsets: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (smoothness >= 0 and shrinkage >= 0):  # also rejects NaN
            raise PlanError(f"smoothness and shrinkage must be at least 0, got {smoothness} and {shrinkage}")
        self.plan = plan
        self.smoothness = smoothness
        self.shrinkage = shrinkage
        self.offsets = offsets
        self._wy, self._wx = (weight.to(device) for weight in plan.weights)
        self._uy, self._tx = (weight.to(device) for weight in plan.weighted)
        self._rows, self._columns = (window.to(device) for window in plan.windows)
        self._position_weights = self._rows.T @ self._columns  # (h, w), summed over views

    def factorise(self, *, artifact_known: bool) -> None:
        """Compute the factors now, for later calls to reuse.

        Raises:
            PlanError: if there are too few views.
        """
        _ = self._field_factor if artifact_known else self._artifact_factor
        if self.offsets:
            _ = self._offset_factor

    def solve(self, b: Tensor, g: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Field (Ry, Rx, C) and artifact (h, w, C), mean zero, float64, from the statistics of an image.

        Args:
            b: (Ry, Rx, C) float64.
            g: (h, w, C) float64.
            s: (V, C) float64; only offsets need it.
        """
        _, artifact = self.solve_apart(b, g, s)
        return self.solve_field(b, artifact, s), artifact

    def solve_field(self, b: Tensor, artifact: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """The field (Ry, Rx, C) where the artifact (h, w, C) is known, or none: ``F = A^-1 (b - K^T G)``."""
        if artifact is not None:
            b = b - self.spread(artifact)
            s = None if s is None else s - self._patch_weights @ artifact.flatten(0, 1)
        return self._field_and_offsets(b, s)[0]

    def solve_apart(self, b: Tensor, g: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The field (Ry, Rx, C) as it would be without an artifact, and the artifact (h, w, C), mean zero.

        Both are linear in the statistics: the artifact of several photos together is the mean of theirs.
        """
        field, offsets = self._field_and_offsets(b, s)
        right = g - self.project(field)
        if offsets is not None:
            right = right - (self._patch_weights.T @ offsets).view_as(g)
        artifact = torch.cholesky_solve(right.flatten(0, 1), self._artifact_factor).view_as(g)
        # The data cannot distinguish F + c, G - c from F, G for a constant c, so G is set to mean zero.
        return field, artifact - artifact.mean((0, 1))

    def _field_and_offsets(self, b: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The field (Ry, Rx, C) and the offsets (V, C), without an artifact; None if no offsets are fitted."""
        field = self._field_factor.solve(b)
        if not self.offsets:
            return field, None
        if s is None:
            raise ValueError("offsets need the sums of each view, s")
        right = s - torch.einsum("rsv,rsc->vc", self._offset_spread, field)
        offsets = torch.cholesky_solve(right, self._offset_factor)
        # Nor can the data distinguish F + c, o - c from F, o, so offsets are set to mean zero.
        offsets = offsets - offsets.mean(0)
        return field - self._offset_response @ offsets, offsets

    def project(self, field: Tensor) -> Tensor:
        """``K F``: the weighted sum over views of the field at the patches, (Ry, Rx, C) -> (h, w, C)."""
        total = sum(columns.T @ row for columns, row in zip(self._coupling_rows(), field, strict=True))
        return torch.as_tensor(total).view(*self.plan.grid, -1)

    def spread(self, artifact: Tensor) -> Tensor:
        """``K^T G``: contribution of an artifact to b, (h, w, C) -> (Ry, Rx, C)."""
        flat = artifact.flatten(0, 1)
        return torch.stack([columns @ flat for columns in self._coupling_rows()])

    @cached_property
    def _field_factor(self) -> BlockTridiagonal:
        """The factors of ``A = sum_v (Wy^T u Wy) (x) (Wx^T t Wx) + lam L``; block row k has the nodes of row k."""
        self._require_views(artifact_known=True)
        rows, columns = self.plan.resolution
        gram_y = self._uy.transpose(1, 2) @ self._wy  # (V, Ry, Ry), tridiagonal
        gram_x = (self._tx.transpose(1, 2) @ self._wx).flatten(1)  # (V, Rx Rx)
        diagonal = (gram_y.diagonal(dim1=1, dim2=2).T @ gram_x).view(rows, columns, columns)
        below = (gram_y.diagonal(offset=1, dim1=1, dim2=2).T @ gram_x).view(rows - 1, columns, columns)
        scale = self.smoothness * float(self._position_weights.sum()) / (rows * columns)
        neighbours = torch.full((rows,), 2.0, dtype=diagonal.dtype, device=diagonal.device)
        neighbours[[0, -1]] = 1.0  # the rows above and below; L is the graph Laplacian of the nodes
        identity = torch.eye(columns, dtype=diagonal.dtype, device=diagonal.device)
        diagonal += scale * (neighbours[:, None, None] * identity + _path_laplacian(columns, identity))
        below -= scale * identity
        try:
            return BlockTridiagonal(diagonal, below)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise PlanError(
                f"{len(self.plan)} views leave parts of the {rows} x {columns} field undetermined; "
                "use more views, a lower resolution, or more smoothness"
            ) from error

    @cached_property
    def _artifact_factor(self) -> Tensor:
        """The Cholesky factor of T (h w, h w), with the constant fixed.

        Adding a multiple of the all-ones matrix does not change the solution, whose mean is zero, and makes T well
        conditioned even for a small mu.
        """
        self._require_views(artifact_known=False)
        positions = math.prod(self.plan.grid)
        schur = torch.zeros(positions, positions, dtype=self._wy.dtype, device=self._wy.device)
        solved = self._field_factor.forward(self._coupling_rows())  # block rows of L^-1 K^T
        gathered = math.ceil(_ROWS / self.plan.resolution[1])
        while rows := list(itertools.islice(solved, gathered)):
            _subtract_gram(schur, torch.cat(rows))
        mean_weight = float(self._position_weights.mean())
        schur += mean_weight / positions  # fixes the constant
        schur.diagonal().add_(self._position_weights.flatten() + self.shrinkage * mean_weight)
        if self.offsets:
            coupling = self._patch_weights.T - self.project(self._offset_response).flatten(0, 1)  # (h w, V)
            schur -= coupling @ torch.cholesky_solve(coupling.T, self._offset_factor)
        try:
            return torch.linalg.cholesky(schur)  # reads the lower triangle only
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise PlanError(
                f"{len(self.plan)} views cannot separate artifact and content; use more views, more shrinkage, or give "
                "a known artifact"
            ) from error

    @cached_property
    def _patch_weights(self) -> Tensor:
        """The weight of each patch of each view, (V, h w)."""
        return (self._rows[:, :, None] * self._columns[:, None, :]).flatten(1)

    @cached_property
    def _offset_spread(self) -> Tensor:
        """Contribution of each view's unit offset to b, (Ry, Rx, V)."""
        return torch.einsum("vr,vs->rsv", self._uy.sum(1), self._tx.sum(1))

    @cached_property
    def _offset_response(self) -> Tensor:
        """Contribution of each view's unit offset to the field of a model without offsets, (Ry, Rx, V)."""
        return self._field_factor.solve(self._offset_spread)

    @cached_property
    def _offset_factor(self) -> Tensor:
        """The Cholesky factor (V, V) of the equations for the offsets after eliminating F, with the constant fixed."""
        weights = self._patch_weights.sum(1)  # (V,)
        schur = torch.diag(weights) - torch.einsum("rsv,rsw->vw", self._offset_spread, self._offset_response)
        mean_weight = float(weights.mean())
        schur += mean_weight / len(weights)  # fixes the constant
        schur.diagonal().add_(_OFFSET_SHRINKAGE * mean_weight)
        return torch.linalg.cholesky(schur)

    def _coupling_rows(self) -> Iterator[Tensor]:
        """Block rows of K^T, each (Rx, h w), created on demand, because the whole has nodes x positions entries."""
        h, w = self.plan.grid
        nodes = self.plan.resolution[1]
        across = self._tx.transpose(1, 2).flatten(1)  # (V, Rx w)
        for down in self._uy.unbind(2):  # (V, h) for each row of nodes
            row = (down.T @ across).view(h, nodes, w)
            yield row.transpose(0, 1).reshape(nodes, h * w)  # (h, Rx, w) -> (Rx, h w)

    def _require_views(self, *, artifact_known: bool) -> None:
        needed = least_views(self.plan, artifact_known)
        if len(self.plan) < needed:
            h, w = self.plan.grid
            ry, rx = self.plan.resolution
            raise PlanError(
                f"{len(self.plan)} views of {h} x {w} patches are too few for a field of {ry} x {rx} nodes"
                f"{'' if artifact_known else ' and an artifact'}; expected at least {needed}. Use more views, "
                "or a lower resolution"
            )


def _path_laplacian(nodes: int, identity: Tensor) -> Tensor:
    """Graph Laplacian of a row of nodes, (nodes, nodes)."""
    difference = identity[1:] - identity[:-1]
    return difference.T @ difference


def _subtract_gram(matrix: Tensor, rows: Tensor) -> None:
    """``matrix -= rows^T rows`` for the lower triangle, panel by panel (the upper triangle is incomplete)."""
    for start in range(0, len(matrix), _COLUMNS):
        panel = rows[:, start : start + _COLUMNS]
        matrix[start:, start : start + _COLUMNS].addmm_(rows[:, start:].T, panel, alpha=-1)


class BlockTridiagonal:
    """Cholesky factors of a block-tridiagonal, symmetric positive definite matrix.

    It is given by its blocks on the diagonal (n, m, m) and below it (n - 1, m, m). Memory is two blocks per block row.

    ``A = L L^T``, where L has the blocks L_k on its diagonal and ``E_k = A_{k+1,k} L_k^{-T}`` below it. Diagonal blocks
    are stored as inverses, which turns every substitution into matrix products (several times faster than triangular
    solves for hundreds of right-hand sides, on CPU and CUDA).

    Raises:
        torch.linalg.LinAlgError: if the matrix is not positive definite.
    """

    def __init__(self, diagonal: Tensor, below: Tensor) -> None:
        self.inverse = torch.empty_like(diagonal)  # L_k^{-1}
        self.below = torch.empty_like(below)  # E_k
        identity = torch.eye(diagonal.shape[1], dtype=diagonal.dtype, device=diagonal.device)
        block = diagonal[0]
        for k in range(len(diagonal)):
            factor = torch.linalg.cholesky(block)
            self.inverse[k] = torch.linalg.solve_triangular(factor, identity, upper=False)
            if k < len(below):
                torch.matmul(below[k], self.inverse[k].T, out=self.below[k])
                block = diagonal[k + 1] - self.below[k] @ self.below[k].T

    def forward(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Stream ``L^{-1} X``: takes and yields block rows (m, columns) one by one, keeping only the last one."""
        solved = None
        for k, row in enumerate(rows):
            if solved is not None:
                row = torch.addmm(row, self.below[k - 1], solved, alpha=-1)
            solved = self.inverse[k] @ row
            yield solved

    def solve(self, right: Tensor) -> Tensor:
        """``A^{-1} X`` for X of shape (n, m, columns)."""
        solution = torch.empty_like(right)
        for k, row in enumerate(self.forward(right)):
            solution[k] = row
        for k in reversed(range(len(right))):
            if k + 1 < len(right):
                solution[k].addmm_(self.below[k].T, solution[k + 1], alpha=-1)
            solution[k] = self.inverse[k].T @ solution[k]
        return solution
