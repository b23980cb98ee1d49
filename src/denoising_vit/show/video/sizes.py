"""How large frames are shown to the backbone, and drawn."""

from __future__ import annotations

from denoising_vit.backbones import Backbone
from denoising_vit.errors import ClipError
from denoising_vit.show.video.options import LONG_SIDE, VideoOptions
from denoising_vit.views.patch_grid import nearest_sizes


def shown_size(size: tuple[int, int], backbone: Backbone, options: VideoOptions) -> tuple[int, int]:
    """(H, W) that a frame of (H, W) pixels is shown to the backbone in: its aspect ratio, to the nearest whole patch.

    Raises:
        ClipError: if a side would be less than a patch.
    """
    measured = max(size) if options.side == "long" else min(size)
    scale = (options.size or LONG_SIDE) / measured
    ideal = tuple(side * scale for side in size)
    if min(ideal) < backbone.patch_size / 2:
        raise ClipError(
            f"frames of {size[1]} x {size[0]} pixels would be shown in {ideal[1]:.0f} x {ideal[0]:.0f}, less than one "
            f"patch of {backbone.patch_size} pixels; ask for a larger --size"
        )
    height, width = (_snapped(side, backbone) for side in ideal)
    return height, width


def panel_size(size: tuple[int, int], options: VideoOptions) -> tuple[int, int]:
    """(H, W) of a panel for frames of (H, W) pixels, at their aspect ratio; even, as H.264 wants it."""
    scale = options.panel_size / max(size)
    height, width = (max(2, 2 * round(side * scale / 2)) for side in size)
    return height, width


def _snapped(side: float, backbone: Backbone) -> int:
    sides = nearest_sizes(round(side), backbone.patch_size, backbone.stride)
    return min(sides, key=lambda fitting: abs(fitting - side))
