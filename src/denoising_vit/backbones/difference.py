"""Weights as low-rank differences from other weights, in a few megabytes.

Fine-tuning a ViT at a low learning rate, as stage 3 does, changes each matrix by approximately a low-rank matrix: rank
32 keeps 98 % of the effect (docs/decisions.md) at a ninth of the size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from denoising_vit.backbones.recorded import require_record
from denoising_vit.backbones.weights import read_state_dict
from denoising_vit.errors import FormatError
from denoising_vit.files import (
    DISTILLED,
    KEY,
    below,
    compact,
    is_safetensors,
    read_record,
    require_version,
    write_tensors,
)

#: Format versions of a file with whole weights, and of one with a difference.
WHOLE_VERSION, FORMAT_VERSION = 1, 2

#: Prefixes of the two factors of a matrix, and of a whole difference.
_LEFT, _RIGHT, _WHOLE = "left.", "right.", "whole."


def write_difference(
    path: Path, base: dict[str, Tensor], state: dict[str, Tensor], rank: int, record: dict[str, Any]
) -> None:
    """Write ``state`` as a difference from ``base``: for each tensor two factors, or all values if they are fewer.

    ``base`` (float32) and ``state`` have the same names and shapes. ``record``, in JSON values, is that of the weights,
    with that of the base under ``backbone``.
    """
    tensors = {}
    for name, value in base.items():
        if not value.is_floating_point() or torch.equal(state[name], value):
            continue
        change = _matrix(state[name].float() - value)
        rows, columns = change.shape
        if rank * (rows + columns) < rows * columns:
            left, sizes, right = torch.linalg.svd(change, full_matrices=False)
            roots = sizes[:rank].sqrt()
            tensors[_LEFT + name] = compact(left[:, :rank] * roots)
            tensors[_RIGHT + name] = compact(roots[:, None] * right[:rank])
        else:
            tensors[_WHOLE + name] = compact(change)
    head = record | {"format": DISTILLED, "format_version": FORMAT_VERSION, "difference": {"rank": rank}}
    write_tensors(tensors, path, {KEY: json.dumps(head)})


def base_of(path: Path) -> dict[str, Any] | None:
    """The record of the backbone that a file is a difference from; None for files with whole weights.

    Raises:
        FormatError: if its record is damaged, or from a newer version.
    """
    if not path.is_file() or not is_safetensors(path):
        return None
    try:
        record = read_record(path)
    except (SafetensorError, OSError, ValueError):
        return None  # read_state_dict reports the damage
    if not isinstance(record, dict) or "difference" not in record:
        return None
    require_version(path, record, FORMAT_VERSION)
    require_record(path, record.get("backbone"))
    return record["backbone"]


def whole_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record for whole weights that were loaded from a file with this record, which may be a difference."""
    if "difference" not in record:
        return record
    return {key: value for key, value in record.items() if key != "difference"} | {"format_version": WHOLE_VERSION}


def with_difference(path: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights given to :func:`write_difference`, restored from those of the base, float32.

    Raises:
        WeightsError: if the file cannot be read.
        FormatError: if it is damaged, or does not fit the base.
    """
    tensors = read_state_dict(path)
    lefts, rights = below(_LEFT, tensors), below(_RIGHT, tensors)
    if lefts.keys() != rights.keys():
        raise FormatError(f"{path}: damaged difference of weights: factors missing")
    if other := [name for name in tensors if not name.startswith((_LEFT, _RIGHT, _WHOLE))]:
        raise FormatError(f"{path}: damaged difference of weights: {len(other)} unexpected tensors ({other[0]})")
    changes = below(_WHOLE, tensors) | {name: left.float() @ rights[name].float() for name, left in lefts.items()}
    state = dict(base)
    for name, change in changes.items():
        if name not in base or change.shape != _matrix(base[name]).shape:
            raise FormatError(
                f"{path}: damaged difference of weights, or for another model: {name} {tuple(change.shape)}"
            )
        state[name] = base[name].float() + change.to(base[name].device).float().reshape(base[name].shape)
    return state


def _matrix(value: Tensor) -> Tensor:
    """A tensor as a matrix: dimensions of size 1 are dropped, and all but the first of the others joined."""
    flat = value.squeeze()  # (1, N, C) -> (N, C)
    return flat.reshape(len(flat), -1) if flat.ndim else flat.reshape(1, 1)
