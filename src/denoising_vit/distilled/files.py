"""Distilled models in files: plain timm names, so that every tool that loads a timm model takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoising_vit.errors import TrainError
from denoising_vit.files import DISTILLED, KEY, compact, write_tensors

FORMAT_VERSION = 1


def write_distilled(state: dict[str, Tensor], path: Path, record: dict[str, Any]) -> None:
    """Writes weights (float16, where values fit) that `load_backbone(name, weights=path)` takes.

    ``timm.create_model(name, num_classes=0, checkpoint_path=path)`` takes them as well.

    Args:
        state: by the names of the model.
        path: ends in .safetensors.
        record: the backbone it was and how it was distilled; JSON values.

    Raises:
        TrainError: if a value is not finite, or the file cannot be written.
    """
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise TrainError(f"{path}: {bad[0]} has values that are not finite; the run diverged")
    head = {"format": DISTILLED, "format_version": FORMAT_VERSION, **record}
    tensors = {name: compact(value) if value.is_floating_point() else value for name, value in state.items()}
    try:
        write_tensors(tensors, path, {KEY: json.dumps(head)})
    except OSError as error:
        raise TrainError(f"{path}: the model could not be written ({error}); --resume goes on") from error
