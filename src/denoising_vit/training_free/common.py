"""Helpers of the training-free methods: photos as images, and small safetensors files with a record."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import require_record, require_recorded
from denoising_vit.data import find_photos
from denoising_vit.data.photos import read_photo
from denoising_vit.errors import ArtifactError, FormatError, PhotoError
from denoising_vit.files import KEY, open_own, write_tensors
from denoising_vit.views.rendering import resized, to_image

FORMAT_VERSION = 1


def photo_images(
    photos: Iterable[Any], backbone: Backbone, size: tuple[int, int], most: int | None = None
) -> list[Tensor]:
    """Normalised images (1, 3, H, W) of whole photos, resized to ``size``.

    Args:
        photos: a folder, paths, PIL images or (H, W, 3) uint8 arrays; or normalised images (N, 3, H, W), used
            unchanged.
        backbone: backbone whose normalisation and device to use.
        size: (H, W) in pixels.
        most: maximum number of photos to read.

    Raises:
        PhotoError: if a photo cannot be read, or there are none.
    """
    if isinstance(photos, Tensor):
        return list(photos[:most].to(backbone.device).split(1))
    if isinstance(photos, str | Path):
        photos, _ = find_photos([photos])
    if isinstance(photos, Image.Image | np.ndarray):
        photos = [photos]
    images = [
        backbone.normalise(resized(to_image(read_photo(photo), backbone.device)[None], size))
        for photo in itertools.islice(photos, most)
    ]
    if not images:
        raise PhotoError("no photos given; expected a few dozen unlabelled photos")
    return images


def write(path: Path, kind: str, values: Tensor, backbone: dict[str, Any], info: dict[str, Any]) -> None:
    """Write ``values`` and the record of their backbone."""
    head = {"format": kind, "format_version": FORMAT_VERSION, "backbone": backbone, "info": info}
    write_tensors({"values": values.detach().cpu().contiguous()}, path, {KEY: json.dumps(head)})


def read(path: Path, kind: str, what: str) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Values (rows, columns), record of the backbone, and info from a file of this kind.

    Raises:
        FormatError: if the file is missing, damaged, or of another kind.
    """
    with open_own(path, kind, FORMAT_VERSION, what) as (head, file):
        values = file.get_tensor("values")
    backbone: Any = head.get("backbone")
    require_record(path, backbone)
    info = head.get("info")
    if not isinstance(info, dict):
        raise FormatError(f"{path}: damaged: info missing in its metadata")
    if values.ndim != 2 or not torch.isfinite(values).all():
        raise FormatError(f"{path}: damaged, expected a finite matrix, got shape {tuple(values.shape)}")
    return values, backbone, info


def require_same(recorded: dict[str, Any], backbone: Backbone, what: str) -> None:
    """Reject a backbone that differs from the recorded one.

    Raises:
        ArtifactError: naming both.
    """
    require_recorded(
        recorded,
        backbone,
        f"{what} found for",
        ArtifactError,
        remedy="Use that backbone, or find them again for this one",
    )
