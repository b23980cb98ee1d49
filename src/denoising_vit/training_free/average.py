"""Average shifted and mirrored passes; no training, k times the cost.

An artifact stays at its position in the input while content moves, so aligned features of moved inputs agree only on
content. PH-Reg (Chen et al., NeurIPS 2025) creates its teacher in this way; here it is the plain baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from denoising_vit.backbones import Backbone, Intermediates
from denoising_vit.errors import PlanError

DEFAULT_PASSES = 5

#: Directions of the shifts: diagonal ones first, then along one side.
_DIRECTIONS = ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))

#: Shifts are the grid's sides divided by this number.
_SHARE = 8

#: A move of the input: rows down and columns right, in patches; and whether it is first mirrored left to right.
Move = tuple[int, int, bool]


def moves(passes: int, grid: tuple[int, int]) -> list[Move]:
    """The moves of ``passes`` passes over a grid: unchanged, mirrored, then shifted by an eighth of the grid.

    Shifts are whole patches (at least one), so that grids are aligned without resampling; every second pass is
    mirrored.

    Raises:
        PlanError: if there are not 2 to 10 passes.
    """
    require_passes(passes)
    down, right = (min(max(side // _SHARE, 1), side - 1) for side in grid)
    shifts = [(a * down, b * right, n % 2 == 1) for n, (a, b) in enumerate(_DIRECTIONS)]
    return [(0, 0, False), (0, 0, True), *shifts][:passes]


def require_passes(passes: int) -> None:
    """Reject a number of passes outside 2 to 10.

    Raises:
        PlanError: with the range.
    """
    if not 2 <= passes <= len(_DIRECTIONS) + 2:
        raise PlanError(f"passes must be 2 to {len(_DIRECTIONS) + 2}, got {passes}")


def moved(image: Tensor, move: Move, stride: int) -> Tensor:
    """The image (B, 3, H, W) after a move; border pixels are repeated into uncovered areas."""
    down, right, mirrored = move[0] * stride, move[1] * stride, move[2]
    image = image.flip(3) if mirrored else image
    if not (down or right):
        return image
    height, width = image.shape[2:]
    wide = pad(image, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode="replicate")
    top, left = max(-down, 0), max(-right, 0)
    return wide[:, :, top : top + height, left : left + width]


def aligned_mean(grids: Sequence[Tensor], done: Sequence[Move]) -> Tensor:
    """Mean over moved passes of features (B, h, w, C), moved back; each position averages the passes that show it."""
    total, count = torch.zeros_like(grids[0]), torch.zeros_like(grids[0][:1, :, :, :1])
    h, w = grids[0].shape[1:3]
    for grid, (down, right, mirrored) in zip(grids, done, strict=True):
        seen = grid[:, max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)]
        # Shift back, with zeros where this pass did not show the position.
        sides = (0, 0, max(-right, 0), max(right, 0), max(-down, 0), max(down, 0))
        back, here = pad(seen, sides), pad(torch.ones_like(seen[:1, :, :, :1]), sides)
        total = total + (back.flip(2) if mirrored else back)
        count = count + (here.flip(2) if mirrored else here)
    return total / count


def averaged(run: Callable[[Tensor], Tensor], image: Tensor, grid: tuple[int, int], stride: int, passes: int) -> Tensor:
    """Mean of ``run(image) -> (B, h, w, C)`` over moved passes."""
    plan = moves(passes, grid)
    return aligned_mean([run(moved(image, move, stride)) for move in plan], plan)


class AveragedViT(nn.Module):
    """An extractor that averages 2 to 10 passes over shifted and mirrored images: (B, 3, H, W) -> (B, h, w, C) float32.

    Raises:
        PlanError: if the number of passes is out of range.
    """

    def __init__(self, backbone: Backbone, passes: int = DEFAULT_PASSES) -> None:
        super().__init__()
        require_passes(passes)
        self.backbone, self.passes = backbone, passes

    def forward(self, image: Tensor) -> Tensor:
        """Averaged features (B, h, w, C) of normalised images (B, 3, H, W)."""
        return self.forward_with_prefix(image)[0]

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Averaged features (B, h, w, C), and the prefix tokens (B, P, C) of the unchanged image."""
        first, prefix = self.backbone.forward_with_prefix(image)
        return self.averaged_with(image, first), prefix

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        """Averaged features, with prefix tokens and raw features of other layers; see :class:`Backbone`."""
        found = self.backbone.forward_intermediates(image, layers)
        return found._replace(features=self.averaged_with(image, found.features))

    def averaged_with(self, image: Tensor, first: Tensor) -> Tensor:
        """Averaged features of images, given the backbone's features of the unchanged images, (B, h, w, C)."""
        plan = moves(self.passes, (first.shape[1], first.shape[2]))
        others = [self.backbone(moved(image, move, self.backbone.stride)) for move in plan[1:]]
        return aligned_mean([first, *others], plan)

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        return f"mean of {self.passes} passes"
