"""One decomposition in one safetensors file: the field, what follows from it, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from denoising_vit.errors import FormatError
from denoising_vit.files import KEY, compact, read_record, require_version, write_tensors
from denoising_vit.views.patch_grid import patch_count

if TYPE_CHECKING:
    from denoising_vit.decomposition.result import Decomposition

FORMAT = "denoising-vit/decomposition"
FORMAT_VERSION = 1

_REQUIRED = ("format_version", "size", "patch_size", "stride", "info")


def write_decomposition(result: Decomposition, path: Path, extra: dict[str, Tensor] | None = None) -> None:
    """Writes ``field``, ``semantic``, ``artifact``, ``raw``, a predicted ``residual`` and ``extra`` as float16."""
    tensors = {"field": result.field, "semantic": result.semantic, "artifact": result.artifact, "raw": result.raw}
    if result.predicted_residual is not None:
        tensors["residual"] = result.predicted_residual
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "size": result.size,
        "patch_size": result.patch_size,
        "stride": result.stride,
        "info": result.info,
    }
    content = {key: compact(value) for key, value in (tensors | (extra or {})).items()}
    write_tensors(content, path, {KEY: json.dumps(head)})


def read_decomposition(path: Path) -> dict[str, Any]:
    """Reads the file back as the arguments of :class:`Decomposition`; tensors become float32.

    Raises:
        FormatError: if the file is missing, damaged, something else, or of a newer version.
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    head = read_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in ("field", "artifact", "raw")}
            if "residual" in file.keys():  # noqa: SIM118, not a mapping
                tensors["predicted_residual"] = file.get_tensor("residual").float()
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: damaged decomposition ({error})") from error
    _require_shapes(path, tensors, head)
    return tensors | {
        "size": tuple(head["size"]),
        "patch_size": head["patch_size"],
        "stride": head["stride"],
        "info": head["info"],
    }


def read_head(path: Path) -> dict[str, Any]:
    """The JSON metadata alone, without reading tensors.

    Raises:
        FormatError: if the file is not a decomposition that this version reads.
    """
    try:
        head = read_record(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a decomposition: expected a safetensors file ({error})") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"{path}: a safetensors file, but not one with a decomposition (no {FORMAT!r} metadata)")
    lacking = [key for key in _REQUIRED if key not in head]
    if lacking:
        raise FormatError(f"{path}: damaged decomposition, its metadata lacks {', '.join(lacking)}")
    require_version(path, head, FORMAT_VERSION)
    size, info = head["size"], head["info"]
    sides = [*size, head["patch_size"], head["stride"]] if isinstance(size, list) and len(size) == 2 else [None]
    if not all(isinstance(side, int) and side > 0 for side in sides) or not isinstance(info, dict):
        raise FormatError(f"{path}: damaged decomposition, its metadata does not hold sizes in pixels and a record")
    return head


def _require_shapes(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Refuses tensors that do not fit together, or not the sizes in the metadata."""
    patch, stride = head["patch_size"], head["stride"]
    grid = tuple(patch_count(side, patch, stride) for side in head["size"])
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    field = shapes.pop("field")
    if len(field) != 3 or any(shape != (*grid, field[-1]) for shape in shapes.values()):
        raise FormatError(f"{path}: damaged decomposition, its tensors do not fit a grid of {grid[0]} x {grid[1]}")
