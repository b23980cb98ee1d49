"""Frames of a video as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from denoising_vit.files import atomic_path
from denoising_vit.photos import PANEL_SOFTWARE, is_panel


def write_frame(pixels: np.ndarray, folder: Path, number: int) -> None:
    """Writes a frame (H, W, 3) uint8; it names its maker, so that it is not taken for a photo.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    about = PngInfo()
    about.add_text("Software", PANEL_SOFTWARE)
    with atomic_path(folder / f"{number:06d}.png") as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=about, compress_level=1)


def drop_frames(folder: Path, count: int) -> None:
    """Takes away frames that an earlier, longer video has left behind the last one; nothing that is not ours."""
    for path in folder.glob("[0-9]*.png"):
        if path.stem.isdigit() and int(path.stem) >= count and is_panel(path):
            path.unlink()
