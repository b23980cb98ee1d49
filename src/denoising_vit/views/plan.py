"""The views of an image: the position of each crop, and how the patches of its grid sample the image.

A view is an axis-aligned crop of the photo, rendered to a fixed size. Boxes are relative to the image, so one plan
applies to every photo. The centres of a view's patches are a product grid of image coordinates, so bilinear
interpolation of a field at these centres is separable, ``Wy_v F Wx_v^T``, which makes stage 1 exactly solvable.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import PlanError
from denoising_vit.views.options import Coverage, CropOptions
from denoising_vit.views.patch_grid import patch_centres, patch_count

#: Changes whenever the same seed would give other views, so that digests of different versions never match.
PLAN_VERSION = 1

#: Weight of a patch at the border of a tapered view, relative to 1 inside.
_BORDER_WEIGHT = 0.2

#: Boxes are multiples of the inverse of this number.
_GRAIN = 2.0**32


def random_stream(seed: int | Sequence[int]) -> np.random.RandomState:
    """Random numbers of a seed. RandomState is the only NumPy generator whose streams are guaranteed not to change."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def linear_weights(positions: np.ndarray, nodes: int) -> np.ndarray:
    """Weights of linear interpolation at ``positions`` (..., n) in [0, 1] from nodes at cell centres: (..., n, nodes).

    Positions outside the outermost node centres take that node's value; every row sums to one.
    """
    place = np.clip(positions * nodes - 0.5, 0, nodes - 1)
    lower = np.minimum(np.floor(place).astype(np.int64), max(nodes - 2, 0))
    upper = np.minimum(lower + 1, nodes - 1)
    share = place - lower
    weights = np.zeros((*positions.shape, nodes))
    np.put_along_axis(weights, lower[..., None], (1 - share)[..., None], axis=-1)
    # A single node is both neighbours; adding keeps the row sum at one.
    there = np.take_along_axis(weights, upper[..., None], axis=-1)
    np.put_along_axis(weights, upper[..., None], there * (lower == upper)[..., None] + share[..., None], axis=-1)
    return weights


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """V views of any image: boxes, flips, and the geometry of their patch grids. Created by :meth:`make`; hashable.

    Attributes:
        boxes: (V, 4) float64, x0 y0 x1 y1 in [0, 1] of the image.
        flips: (V,) bool, True if the view is mirrored left to right.
        size: (H, W) of a rendered view in pixels.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        resolution: (Ry, Rx) nodes of the semantic field.
        taper: fraction of a view's side over which patch weights rise from the border inwards; with 0, all weights are
            equal.
        released: views as in the released code. The photo is resized to ``size`` before it is cropped, and the patches
            of a view are placed from edge to edge of its box, up to half a patch from their true centres.
    """

    boxes: np.ndarray = field(repr=False)
    flips: np.ndarray = field(repr=False)
    size: tuple[int, int]
    patch_size: int
    stride: int
    resolution: tuple[int, int]
    taper: float = 0.0
    released: bool = False

    @classmethod
    def make(
        cls,
        views: int,
        *,
        size: tuple[int, int],
        patch_size: int,
        stride: int | None = None,
        resolution: int | tuple[int, int] | None = None,
        seed: int = 0,
        full_image: bool = True,
        taper: float = 0.0,
        crops: CropOptions | None = None,
    ) -> ViewPlan:
        """Draw the crops of a plan; the same arguments always give the same plan.

        Args:
            views: number of views, including the full image.
            size: (H, W) of a rendered view.
            patch_size: side of a patch.
            stride: distance between patches; defaults to the patch size.
            resolution: nodes of the field, one number for a square or (Ry, Rx); defaults to twice the patch grid.
            seed: seed for the crops, at least 0.
            full_image: make view 0 the whole image, not flipped.
            taper: see the attribute; in [0, 0.5].
            crops: options for drawing crops.

        Raises:
            PlanError: if there is no view, or an argument is out of range.
        """
        if views < 1:
            raise PlanError(f"a plan needs at least 1 view, got {views}")
        if not 0 <= taper <= 0.5:
            raise PlanError(f"taper must be a fraction of a view's side in [0, 0.5], got {taper}")
        if seed < 0:
            raise PlanError(f"seed must be at least 0, got {seed}")
        stride = patch_size if stride is None else stride
        if patch_size < 1 or not 1 <= stride <= patch_size:
            raise PlanError(f"patch_size must be positive and stride 1 to patch_size, got {patch_size} and {stride}")
        grid = tuple(patch_count(side, patch_size, stride) for side in size)
        if min(grid) < 1:
            raise PlanError(f"views of {size[0]} x {size[1]} pixels are smaller than one patch of {patch_size}")
        if resolution is None:
            resolution = (2 * grid[0], 2 * grid[1])
        elif isinstance(resolution, int):
            resolution = (resolution, resolution)
        if min(resolution) < 2:
            raise PlanError(f"the field needs at least 2 x 2 nodes, got {resolution[0]} x {resolution[1]}")
        crops = crops or CropOptions()
        boxes, flips = _draw_crops(views, size, crops, seed)
        if full_image:
            boxes[0], flips[0] = (0, 0, 1, 1), False
        return cls(boxes, flips, size, patch_size, stride, resolution, taper, crops.coverage == "released")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of a view's patch grid."""
        h, w = (patch_count(side, self.patch_size, self.stride) for side in self.size)
        return h, w

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that defines the plan; equal digests mean equal sampling matrices."""
        head = [PLAN_VERSION, self.size, self.patch_size, self.stride, self.resolution, self.taper, len(self)]
        head += ["released"] if self.released else []
        content = json.dumps(head).encode() + self.boxes.astype("<f8").tobytes() + self.flips.astype("u1").tobytes()
        return hashlib.sha256(content).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewPlan) and self.digest == other.digest

    def subset(self, index: slice) -> ViewPlan:
        """The plan of the selected views."""
        return replace(self, boxes=self.boxes[index], flips=self.flips[index])

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Image coordinates of the patch centres, rows (V, h) and columns (V, w); mirrored views run right to left.

        For a released plan, they are those of the released code.
        """
        if self.released:
            rows, columns = (np.linspace(0, 1, count) for count in self.grid)
        else:
            rows, columns = (patch_centres(side, self.patch_size, self.stride) for side in self.size)
        x0, y0, x1, y1 = self.boxes.T[:, :, None]  # each (V, 1)
        columns = np.where(self.flips[:, None], 1 - columns, columns)
        return y0 + rows * (y1 - y0), x0 + columns * (x1 - x0)

    def coords_of_nodes(self, resolution: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions at which to sample a field fitted to this plan for nodes at cell centres: (Ry,) and (Rx,).

        These are the nodes themselves; for a released plan, the positions that it assigns to the whole image's patches.
        """
        nodes = [patch_centres(count, 1, 1) for count in resolution]
        if self.released:
            own = [patch_centres(side, self.patch_size, self.stride) for side in self.size]
            nodes = [
                np.interp(at, centres, np.linspace(0, 1, len(centres))) for at, centres in zip(nodes, own, strict=True)
            ]
        rows, columns = nodes
        return rows, columns

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Sampling matrices Wy (V, h, Ry) and Wx (V, w, Rx), float64: ``features of view v ~ Wy_v F Wx_v^T``."""
        rows, columns = self.centres()
        wy = linear_weights(rows, self.resolution[0])
        wx = linear_weights(columns, self.resolution[1])
        return torch.from_numpy(wy), torch.from_numpy(wx)

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Weights of the rows (V, h) and columns (V, w) of patches, float64; a patch's weight is their product.

        The features of a patch depend on its surroundings, which the border of a view cuts off; borders that coincide
        with the image's border keep their full weight.
        """
        x0, y0, x1, y1 = self.boxes.T[:, :, None]
        rows, columns = self.centres()
        return self._window(rows, y0, y1), self._window(columns, x0, x1)

    def _window(self, centres: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Tensor:
        if not self.taper:
            return torch.ones(centres.shape, dtype=torch.float64)
        place = (centres - start) / (stop - start)  # in [0, 1] of the view, along the image's axis
        before = np.where(start <= 0, np.inf, place)
        after = np.where(stop >= 1, np.inf, 1 - place)
        rise = np.minimum(np.minimum(before, after) / self.taper, 1)
        return torch.from_numpy(_BORDER_WEIGHT + (1 - _BORDER_WEIGHT) * (1 - np.cos(np.pi * rise)) / 2)

    @cached_property
    def weighted(self) -> tuple[Tensor, Tensor]:
        """Sampling matrices times the weights of their patches, ``u Wy`` (V, h, Ry) and ``t Wx`` (V, w, Rx)."""
        (wy, wx), (rows, columns) = self.weights, self.windows
        return wy * rows[..., None], wx * columns[..., None]

    def coverage(self) -> Tensor:
        """Total weight of the observations of each node, ``K^T 1`` of shape (Ry, Rx), float64."""
        wy, wx = self.weighted
        return wy.sum(1).T @ wx.sum(1)  # sum over views of outer(Wy^T 1, Wx^T 1)


def _draw_crops(views: int, size: tuple[int, int], crops: CropOptions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (V, 4) and flips (V,), drawn view by view, so that additional views extend a plan."""
    stream = random_stream(seed)
    if crops.coverage != "even":
        draws = stream.random_sample((views, 5))
    else:
        # With independent draws, 1 in 15 plans of 64 views covers some corner less than 0.15 of the mean; with this
        # sequence, the worst of 200 seeds is 0.24.
        draws = (stream.random_sample(5) + np.arange(views)[:, None] * _kronecker_steps(5)) % 1
    area, ratio = areas_and_ratios(crops.area, crops.ratio, draws[:, :2])
    frame = size[1] / size[0]
    width = np.minimum(np.sqrt(area * ratio / frame), 1)
    height = np.minimum(np.sqrt(area / ratio * frame), 1)
    if crops.coverage == "released":
        return _whole_pixels(width, height, draws, size), draws[:, 4] < crops.flip
    left, top = (_positions(draws[:, 2 + i], side, crops.coverage) for i, side in enumerate((width, height)))
    boxes = np.stack([left, top, left + width, top + height], axis=1)
    # exp, log and powers differ in their last bit between processors; the digest of a plan must not.
    boxes = np.round(np.clip(boxes, 0, 1) * _GRAIN) / _GRAIN
    return boxes, draws[:, 4] < crops.flip


def _whole_pixels(width: np.ndarray, height: np.ndarray, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (V, 4) of relative sides that start and end on whole pixels of a view; all positions are equally likely."""
    spans = []
    for relative, draw, pixels in ((width, draws[:, 2], size[1]), (height, draws[:, 3], size[0])):
        side = np.round(relative * pixels)
        start = np.floor(draw * (pixels - side + 1))
        spans.append((start / pixels, (start + side) / pixels))
    (left, right), (top, bottom) = spans
    return np.stack([left, top, right, bottom], axis=1)


def areas_and_ratios(
    area: tuple[float, float], ratio: tuple[float, float], draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Areas and ratios (width / height) of crops, (...) each, from ranges of both and draws (..., 2) in [0, 1)."""
    low, high = np.log(ratio)
    areas = area[0] + draws[..., 0] * (area[1] - area[0])
    return areas, np.exp(low + draws[..., 1] * (high - low))  # log-uniform: wide and tall are equally likely


def _kronecker_steps(dimensions: int) -> np.ndarray:
    """Steps of an additive recurrence that fills the unit cube evenly: powers of 1 / phi, phi^(d+1) = phi + 1."""
    phi = 1.0
    for _ in range(64):
        phi = (1 + phi) ** (1 / (dimensions + 1))
    # The assignment of steps to dimensions maximises the worst-case coverage of the corners over seeds.
    return (phi ** -np.arange(1, dimensions + 1))[[3, 4, 2, 1, 0]]


def _positions(draw: np.ndarray, side: np.ndarray, coverage: Coverage) -> np.ndarray:
    """Start of boxes of relative ``side``. Even: from one side before the image to its end, moved back inside."""
    if coverage == "plain":
        return draw * (1 - side)
    return np.clip(draw * (1 + side) - side, 0, 1 - side)


def least_views(plan: ViewPlan, artifact_known: bool) -> int:
    """Minimum number of views for as many observations as unknowns per channel: ``V h w >= Ry Rx (+ h w)``."""
    positions, nodes = math.prod(plan.grid), math.prod(plan.resolution)
    return math.ceil((nodes + (0 if artifact_known else positions)) / positions)
