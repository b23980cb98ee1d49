"""Palettes in files: one safetensors file of a few kilobytes, so that colours mean the same in all pictures."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import backbone_words, is_recorded, names_backbone, recorded_words
from denoising_vit.errors import FormatError
from denoising_vit.files import KEY, Mark, below, read_record, require_ours, require_version, write_tensors
from denoising_vit.maps.clusters import Clusters
from denoising_vit.maps.foreground import Foreground
from denoising_vit.maps.norms import NormScale
from denoising_vit.maps.palette import Palette
from denoising_vit.maps.pca import PCABasis

FORMAT = "denoising-vit/palette"
FORMAT_VERSION = 1

#: The fields of a palette that a file holds, and what they are.
_HELD = {
    "basis": PCABasis,
    "clusters": Clusters,
    "norms": NormScale,
    "foreground": Foreground,
    "foreground_basis": PCABasis,
}


def write_palette(
    palette: Palette, path: str | Path, fields: Collection[str] = tuple(_HELD), *, mark: Mark | None = None
) -> None:
    """Writes colourings of a palette, fitting those that were not asked for yet.

    Args:
        palette: where they come from.
        path: the file.
        fields: which, by their fields of the palette; all of them unless told, and a palette that is read from a file
            of fewer has only those.
        mark: of what it is made; with one, no file is replaced that has another.

    Raises:
        OutputError: if there is a file with another mark, or none.
        FormatError: if the name does not end in .safetensors.
        OSError: if it cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise FormatError(f"{path}: expected the name of a .safetensors file")
    tensors = {
        f"{name}.{field}": torch.from_numpy(np.array(value, np.float64, order="C"))
        for name in _HELD
        if name in fields
        for field, value in vars(getattr(palette, name)).items()
    }
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "backbone": palette.backbone}
    if set(fields) < _HELD.keys():
        head["fields"] = sorted(fields)
    if mark is not None:
        head["made"] = str(mark)
    new = mark is not None and not require_ours(Path(path), mark)
    write_tensors(tensors, Path(path), {KEY: json.dumps(head)}, new=new)


def read_palette(path: str | Path, backbone: Backbone | None = None) -> Palette:
    """Reads what :func:`write_palette` wrote.

    Args:
        path: the file.
        backbone: whose features are going to be coloured; a palette of another is refused.

    Raises:
        FormatError: if the file is missing, damaged, something else, of a newer version, or of another backbone.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FormatError(f"{path}: no such palette; `dvit show PHOTOS --save-palette FILE` makes one")
    try:
        head, tensors = read_record(path), load_file(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a palette, or damaged: expected a safetensors file ({error})") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"{path}: holds no palette; `dvit show PHOTOS --save-palette FILE` makes one")
    require_version(path, head, FORMAT_VERSION)
    recorded: Any = head.get("backbone")
    if backbone is not None and names_backbone(recorded) and not is_recorded(recorded, backbone):
        raise FormatError(
            f"{path}: colours of {recorded_words(recorded)}, got {backbone_words(backbone)}; directions in feature "
            "space mean something in one backbone only. Make a palette of this one: dvit show --save-palette FILE"
        )
    return Palette([], fitted=_colourings(path, tensors, head.get("fields", _HELD)), backbone=recorded)


def _colourings(path: Path, tensors: dict[str, np.ndarray], fields: Collection[str]) -> dict[str, Any]:
    shapes = {name: value.shape for name, value in tensors.items()}
    sound = all(np.isfinite(value).all() for value in tensors.values())
    channels = next((shape[-1:] for name, shape in shapes.items() if name.endswith((".mean", ".centres"))), ())
    expected = _shapes(channels, shapes.get("clusters.centres", ()))
    if shapes != {name: shape for name, shape in expected.items() if name.partition(".")[0] in fields} or not sound:
        raise FormatError(f"{path}: a damaged palette: parts are missing, do not fit together or are not finite")
    values = {name: value if value.ndim else float(value) for name, value in tensors.items()}
    return {name: kind(**below(f"{name}.", values)) for name, kind in _HELD.items() if name in fields}


def _shapes(channels: tuple[int, ...], centres: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What a file holds, given the shapes of two of its tensors."""
    basis = {"mean": channels, "components": (*channels, 3), "low": (3,), "high": (3,)}
    return {
        **{f"{name}.{field}": shape for name in ("basis", "foreground_basis") for field, shape in basis.items()},
        "clusters.centres": (*centres[:1], *channels),
        "norms.low": (),
        "norms.high": (),
        "foreground.mean": channels,
        "foreground.direction": channels,
        "foreground.threshold": (),
    }
