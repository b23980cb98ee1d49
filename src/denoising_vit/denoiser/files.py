"""Denoisers in files: our own, and the published ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from denoising_vit.backbones.recorded import names_backbone
from denoising_vit.backbones.weights import models_among, read_state_dict, the_model, without_containers
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.errors import FormatError, WeightsError
from denoising_vit.files import KEY, compact, is_safetensors, read_record, require_version, write_tensors

FORMAT = "denoising-vit/denoiser"
FORMAT_VERSION = 1


def write_denoiser(denoiser: Denoiser, path: str | Path) -> None:
    """Writes one safetensors file (float16, where values fit) that :func:`read_denoiser` reads back.

    Raises:
        FormatError: if the name does not end in .safetensors, or a value is not finite.
        OSError: if it cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise FormatError(f"{path}: expected the name of a .safetensors file")
    state = {name: compact(value) for name, value in denoiser.state_dict().items()}
    require_finite(state, str(path))
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "grid": denoiser.grid,
        "trained_for": denoiser.trained_for,
        "info": denoiser.info,
    }
    write_tensors(state, Path(path), {KEY: json.dumps(head)})


def read_denoiser(path: str | Path) -> Denoiser:
    """Reads what :func:`write_denoiser` wrote, or a published checkpoint, whatever it keeps the denoiser in.

    Width, grid and blocks are told by the tensors. Code in a pickle is refused, never run.

    Returns:
        It, in float32 and evaluation mode.

    Raises:
        FormatError: if the file is missing, damaged, holds something else, or is of a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FormatError(f"{path}: no such denoiser file")
    head = _head(path) if is_safetensors(path) else {}
    try:
        tensors = read_state_dict(path)
        models = models_among(tensors, r"denoiser\.(?:\d+\.)?norm1\.weight")
        state = the_model(models, str(path))[1] if models else without_containers(tensors, ("model", "denoiser"))
    except WeightsError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise FormatError(f"{path}: not a denoiser, or damaged: {reason}") from error
    if models:
        state = {name: value for name, value in state.items() if not name.startswith("vit.")}  # the backbone, if along
    return _built(state, head, str(path)).eval()


def _head(path: Path) -> dict[str, Any]:
    """The metadata of a file of ours; nothing of other safetensors files."""
    try:
        head = read_record(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a denoiser, or damaged: expected a safetensors file ({error})") from error
    if head != {}:
        _check_head(head, path)
    return head


def _check_head(head: Any, path: Path) -> None:
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        kind = head.get("format") if isinstance(head, dict) else head
        raise FormatError(f"{path}: a safetensors file of {kind!r}, expected one of {FORMAT!r}")
    grid, record = head.get("grid"), head.get("trained_for")
    require_version(path, head, FORMAT_VERSION)
    sides = isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    if not sides or not isinstance(head.get("info"), dict):
        raise FormatError(f"{path}: damaged denoiser, its metadata does not hold a grid and a record")
    if record is not None and not names_backbone(record):
        raise FormatError(f"{path}: damaged denoiser, its metadata does not name a backbone and its fingerprint")


def _built(state: dict[str, Tensor], head: dict[str, Any], source: str) -> Denoiser:
    """The denoiser that a state dict is of."""
    if not head and "pos_embed" not in state and (width := _width(state)):
        # Published training can do without a position embedding: one of zeros is the same on any grid.
        state = state | {"pos_embed": torch.zeros(1, 1, width)}
    channels, grid = _shape(state, head, source)
    numbers = {int(found[1]) for name in state if (found := re.match(r"denoiser\.(\d+)\.", name))}
    blocks = max(numbers, default=0) + 1
    if numbers and numbers != set(range(blocks)):
        raise FormatError(f"{source}: not a denoiser: tensors missing, its blocks are numbered {sorted(numbers)}")
    try:
        denoiser = Denoiser(channels, grid, blocks, head.get("trained_for"), head.get("info"))
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
    require_finite(state, source)
    denoiser.load_state_dict(state)
    return denoiser


def _shape(state: dict[str, Tensor], head: dict[str, Any], source: str) -> tuple[int, tuple[int, int]]:
    """Channels, and the grid of the position embedding: square where the file does not name one."""
    position, kind = state.get("pos_embed"), _other_kind(state)
    if kind or position is None or position.ndim != 3 or len(position) != 1:
        got = kind or ", ".join(list(state)[:3]) or "nothing"
        raise FormatError(f"{source}: not a denoiser: expected pos_embed of shape (1, h w, C) and a block, got {got}")
    places, channels = position.shape[1:]
    side = math.isqrt(places)
    h, w = head.get("grid") or (side, side)
    if not places or h * w != places:
        raise FormatError(f"{source}: a position embedding of {places} places is no square grid, and none is named")
    return channels, (h, w)


def _width(state: dict[str, Tensor]) -> int:
    """Channels of the first block; 0 where there is none."""
    norm = next((state[name] for name in ("denoiser.norm1.weight", "denoiser.0.norm1.weight") if name in state), None)
    return 0 if norm is None else norm.numel()


def _other_kind(state: dict[str, Tensor]) -> str:
    """What tensors are that are no denoiser, in words; empty where that is not known."""
    if any(name.endswith("patch_embed.proj.weight") for name in state):
        return "a whole model, to be given as weights"
    if any(re.fullmatch(r"(denoiser\.)?0\.weight", name) for name in state):
        return "a denoiser of convolutions, which is not supported"
    return ""


def require_finite(state: dict[str, Tensor], source: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        FormatError: naming the first tensor that has any.
    """
    if bad := [name for name, value in state.items() if not torch.isfinite(value.float()).all()]:
        raise FormatError(
            f"{source}: {bad[0]} has values that are not finite; the file is damaged, or training diverged"
        )
