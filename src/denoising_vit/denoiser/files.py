"""Denoisers in files: our own, and the published ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoising_vit.backbones.weights import read_state_dict
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.errors import FormatError, WeightsError
from denoising_vit.files import atomic_path

FORMAT = "denoising-vit/denoiser"
FORMAT_VERSION = 1

_KEY = "denoising_vit"


def write_denoiser(denoiser: Denoiser, path: str | Path) -> None:
    """Writes one safetensors file (float16) that :func:`read_denoiser` reads back.

    Raises:
        OSError: if it cannot be written.
    """
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "grid": denoiser.grid,
        "trained_for": denoiser.trained_for,
        "info": denoiser.info,
    }
    state = {name: value.detach().cpu().half().contiguous() for name, value in denoiser.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        try:
            save_file(state, temporary, metadata={_KEY: json.dumps(head)})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{path}: could not be written ({error})") from error


def read_denoiser(path: str | Path) -> Denoiser:
    """Reads what :func:`write_denoiser` wrote, or a published checkpoint: ``{"denoiser": ...}``, as ``.pth``.

    Width, grid and blocks are told by the tensors. Code in a pickle is refused, never run.

    Returns:
        It, in float32 and evaluation mode.

    Raises:
        FormatError: if the file is missing, damaged, holds something else, or is of a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FormatError(f"{path}: no such denoiser file")
    head = _head(path) if path.suffix == ".safetensors" else {}
    try:
        state = read_state_dict(path, ("denoiser",))
    except WeightsError as error:
        raise FormatError(str(error)) from error
    state = {name: value for name, value in state.items() if not name.startswith("vit.")}  # the backbone, if along
    return _built(state, head, str(path)).eval()


def _head(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a denoiser, or damaged: expected a safetensors file ({error})") from error
    if head and head.get("format") != FORMAT:
        raise FormatError(f"{path}: holds {head.get('format')!r}, expected {FORMAT!r}")
    if head.get("format_version", 0) > FORMAT_VERSION:
        raise FormatError(
            f"{path}: written in format version {head['format_version']}, this release reads up to {FORMAT_VERSION}; "
            "upgrade denoising-vit"
        )
    return head


def _built(state: dict[str, Tensor], head: dict[str, Any], source: str) -> Denoiser:
    """The denoiser that a state dict is of."""
    position = state.get("pos_embed")
    if position is None or position.ndim != 3 or len(position) != 1:
        named = ", ".join(list(state)[:3])
        raise FormatError(
            f"{source}: not a denoiser: expected pos_embed of shape (1, h w, C), got {named or 'nothing'}"
        )
    places, channels = position.shape[1:]
    grid = tuple(head.get("grid") or (math.isqrt(places), math.isqrt(places)))
    numbers = {int(found[1]) for name in state if (found := re.match(r"denoiser\.(\d+)\.", name))}
    if grid[0] * grid[1] != places:
        raise FormatError(f"{source}: a position embedding of {places} places is no square grid, and none is named")
    try:
        blocks = max(numbers, default=0) + 1
        denoiser = Denoiser(channels, (grid[0], grid[1]), blocks, head.get("trained_for"), head.get("info"))
    except ValueError as error:
        raise FormatError(f"{source}: {error}") from error
    own = denoiser.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or shapes:
        raise FormatError(
            f"{source}: not a denoiser of {channels} channels: {len(missing)} tensors missing "
            f"({', '.join(missing[:2]) or '-'}), {len(unknown)} left over ({', '.join(unknown[:2]) or '-'}), "
            f"{len(shapes)} of another shape ({', '.join(shapes[:2]) or '-'})"
        )
    if bad := [name for name, value in state.items() if not torch.isfinite(value.float()).all()]:
        raise FormatError(f"{source}: {bad[0]} has values that are not finite; the file is damaged")
    denoiser.load_state_dict(state)
    return denoiser
