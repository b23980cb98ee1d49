"""Resampling of grids inside a graph whose sides are not known: one product of matrices for each axis.

Bicubic resampling is linear and separable. Its weights depend on the two sides alone, so a graph can compute them from
the shape of the image, with operations that every runtime has. ``interpolate`` with ``antialias`` has no counterpart in
most of them. The results are torch's own, to rounding; a test holds them together.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_PATCHING = threading.Lock()


def resample(grid: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """A grid (h, w, C) at another size: what ``interpolate(mode="bicubic", align_corners=False)`` makes of it.

    At its own size it comes as it is, without a branch.
    """
    down, across = (
        bicubic_matrix(int(grid.shape[axis]), size[axis], antialias=antialias, like=grid) for axis in range(2)
    )
    rows = torch.einsum("ip,pqc->iqc", down, grid)  # (h, w, C) -> (new h, w, C)
    return torch.einsum("jq,iqc->ijc", across, rows)  # -> (new h, new w, C)


def bicubic_matrix(old: int, new: int, *, antialias: bool, like: Tensor) -> Tensor:
    """Weights (new, old) of bicubic resampling along one axis; ``new`` may be symbolic.

    Antialiased, the kernel widens with the reduction, is cut off at the border and normalised, and is Keys' with
    a = -1/2; otherwise it has a = -3/4, and the border is repeated: so torch has it.
    """
    places = torch.arange(new, dtype=torch.float32, device=like.device) + 0.5
    scale = old / torch.full((), 1.0, device=like.device).mul(new)  # a tensor: a number would be fixed in the graph
    centres = (places * scale)[:, None]  # (new, 1), in cells of the old grid
    if antialias:
        cells = torch.arange(old, dtype=torch.float32, device=like.device) + 0.5
        weights = _keys((cells - centres) / scale.clamp(min=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    # Cells beyond the border, two on each side, stand for the ones at it.
    cells = torch.arange(-2, old + 2, dtype=torch.float32, device=like.device) + 0.5
    weights = _keys(cells - centres, -0.75)  # (new, old + 4)
    first, last = weights[:, :3].sum(1, keepdim=True), weights[:, -3:].sum(1, keepdim=True)
    if old == 1:
        return weights.sum(1, keepdim=True)
    return torch.cat([first, weights[:, 3:-3], last], dim=1)


def _keys(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel, zero from 2 on."""
    distance = distance.abs()
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def resample_positions(
    positions: Tensor, size: tuple[int, int], *, old: Sequence[int] | None = None, prefix: int, antialias: bool = True
) -> Tensor:
    """A position embedding (1, prefix + h w, C) for another grid; entries of prefix tokens stay."""
    kept, places = positions[:, :prefix], positions[:, prefix:]
    side = math.isqrt(places.shape[1])
    h, w = old or (side, side)
    grid = places[0].float().unflatten(0, (h, w))  # (1, h w, C) -> (h, w, C)
    made = resample(grid, size, antialias=antialias).flatten(0, 1)[None].to(places.dtype)  # -> (1, new h new w, C)
    return torch.cat([kept, made], dim=1) if prefix else made


@contextlib.contextmanager
def timm_resamples_in_graph() -> Iterator[None]:
    """While it lasts, timm's models resample their position embeddings by :func:`resample_positions`."""
    from timm.models import eva, vision_transformer

    def ours(
        posemb: Tensor,
        new_size: Sequence[int],
        old_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 1,
        **_: Any,
    ) -> Tensor:
        return resample_positions(posemb, (new_size[0], new_size[1]), old=old_size, prefix=num_prefix_tokens)

    modules: tuple[Any, ...] = (eva, vision_transformer)
    with _PATCHING:
        before = [module.resample_abs_pos_embed for module in modules]
        for module in modules:
            module.resample_abs_pos_embed = ours
        try:
            yield
        finally:
            for module, function in zip(modules, before, strict=True):
                module.resample_abs_pos_embed = function
