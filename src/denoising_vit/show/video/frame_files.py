"""Frames of a video as PNG files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from denoising_vit.data.photos import PANEL_SOFTWARE
from denoising_vit.errors import OutputError
from denoising_vit.files import Mark, owned_path, require_ours


def mark_of(source: str) -> Mark:
    """What frames of a clip with this digest are marked as."""
    return Mark("frame", source)


def require_frames(folder: Path, source: str, clip: Path) -> None:
    """Refuses a folder for frames in which any would replace a file that is not a frame of the same clip.

    Args:
        folder: for the frames; it need not be there.
        source: digest of the clip.
        clip: the file or folder that it is read from.

    Raises:
        OutputError: naming the folder or the file.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or (clip.exists() and clip.samefile(folder)):
        told = "the clip's own folder" if folder.is_dir() else "a file"
        raise OutputError(f"{folder}: frames would go there, and it is {told}; name another folder with -o")
    for path in _numbered(folder):
        require_ours(path, mark_of(source))


def write_frame(pixels: np.ndarray, folder: Path, number: int, source: str) -> None:
    """Writes a frame (H, W, 3) uint8; it names its maker, so that it is not taken for a photo, and its clip.

    Raises:
        OutputError: if there is a file that is not a frame of the same clip.
        OSError: if it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    about = PngInfo()
    about.add_text("Software", PANEL_SOFTWARE)
    with owned_path(folder / f"{number:06d}.png", mark_of(source)) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=about, compress_level=1)


def drop_frames(folder: Path, count: int, source: str) -> None:
    """Removes frames that an earlier, longer video of the same clip has left behind the last one, and nothing else."""
    for path in _numbered(folder):
        if int(path.stem) >= count and Mark.read(path) == mark_of(source):
            path.unlink()


def _numbered(folder: Path) -> list[Path]:
    """Files that have the names of frames."""
    return [path for path in folder.glob("[0-9]*.png") if path.stem.isdecimal()]
