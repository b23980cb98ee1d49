"""The denoiser, one or more transformer blocks that map raw to clean features, and its files."""

from __future__ import annotations

import contextlib
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.passes import BlockedAttention
from denoising_vit.backbones.recorded import backbone_words, require_record, require_recorded
from denoising_vit.backbones.weights import models_among, read_state_dict, the_model, without_containers
from denoising_vit.errors import DenoiserError, FormatError, WeightsError
from denoising_vit.files import KEY, compact, is_safetensors, read_record, require_version, write_tensors
from denoising_vit.hub.pretrained import Pretrained

FORMAT = "denoising-vit/denoiser"
FORMAT_VERSION = 1

#: Channels per attention head.
_HEAD = 64

#: Standard deviation of the initial position embedding.
_INITIAL_DEVIATION = 0.02


class Denoiser(nn.Module, Pretrained):
    """Map raw features (B, h, w, C) to clean features, on any grid (section 4.2 of the paper).

    Adds a learned position embedding, then applies transformer blocks with heads of 64 channels, without an outer
    residual or a final norm. Parameters are named as in the published checkpoints.

    Args:
        embed_dim: C, a multiple of 64.
        grid: (h, w) of the position embedding; it is resampled to other grids.
        blocks: number of transformer blocks.
        trained_for: record of the backbone that it was trained for; None if unknown, as for the published denoisers.
        info: record of the training; JSON values.

    Raises:
        ValueError: if C is not a multiple of 64, or blocks or grid are empty.
    """

    FORMAT = FORMAT

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int] = (37, 37),
        blocks: int = 1,
        trained_for: dict[str, Any] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < _HEAD or embed_dim % _HEAD:
            raise ValueError(f"a denoiser's width must be a multiple of {_HEAD} channels, got {embed_dim}")
        if blocks < 1:
            raise ValueError(f"a denoiser needs at least 1 block, got {blocks}")
        if min(grid) < 1:
            raise ValueError(f"a denoiser's grid must have at least 1 position per side, got {tuple(grid)}")
        self.embed_dim, self.grid, self.blocks = embed_dim, (int(grid[0]), int(grid[1])), blocks
        self.trained_for, self.info = trained_for, info or {}
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], embed_dim) * _INITIAL_DEVIATION)
        made = [_block(embed_dim) for _ in range(blocks)]
        self.denoiser = made[0] if blocks == 1 else nn.Sequential(*made)  # as published: `denoiser.0.` only with more

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of a denoiser with the same shape and record, ``Denoiser(**config)``; JSON values."""
        shape = {"embed_dim": self.embed_dim, "grid": list(self.grid), "blocks": self.blocks}
        return shape | {"trained_for": self.trained_for, "info": self.info}

    def save(self, path: str | Path) -> None:
        """Write a file; see :func:`write_denoiser`."""
        write_denoiser(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; see :func:`read_denoiser`."""
        found = read_denoiser(path)
        assert isinstance(found, cls)
        return found

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """See :meth:`Pretrained.from_pretrained`; folders of earlier versions are also supported."""
        record = Path(source).expanduser() / "config.json"
        if not record.is_file() or cls.path_in(source).is_file():
            return super().from_pretrained(source, revision=revision)
        weights = record.with_name("model.safetensors")
        try:
            head = json.loads(record.read_text()) | {"format": FORMAT, "format_version": FORMAT_VERSION}
            _check_head(head, record)
            found = _built(read_state_dict(weights), head, str(weights)).eval()
        except (WeightsError, OSError, ValueError, TypeError) as error:
            raise FormatError(f"{record.parent}: not a denoiser, or damaged ({error})") from error
        assert isinstance(found, cls)
        return found

    def require_of(self, backbone: Backbone) -> None:
        """Check that the denoiser was trained for a backbone.

        Raises:
            DenoiserError: naming both, if it was trained for another one.
        """
        if self.embed_dim != backbone.embed_dim:
            raise DenoiserError(
                f"the denoiser has {self.embed_dim} channels, but {backbone_words(backbone)} has {backbone.embed_dim}. "
                "Use a denoiser that was trained for it"
            )
        if self.trained_for is not None:
            made, remedy = "the denoiser was trained for", "Use the backbone that it was trained for"
            require_recorded(self.trained_for, backbone, made, DenoiserError, remedy=remedy)

    def forward(self, features: Tensor) -> Tensor:
        """Clean features (B, h, w, C) float32 from raw features (B, h, w, C).

        Raises:
            ValueError: if the features have a wrong shape.
        """
        if features.ndim != 4 or features.shape[-1] != self.embed_dim:
            raise ValueError(f"expected features (B, h, w, {self.embed_dim}), got {tuple(features.shape)}")
        h, w = features.shape[1:3]
        tokens = features.flatten(1, 2).to(self.pos_embed.dtype) + self.position(h, w)  # (B, h, w, C) -> (B, h w, C)
        with self._attention(tokens):
            clean = self.denoiser(tokens)
        return clean.float().unflatten(1, (h, w))

    def position(self, h: int, w: int) -> Tensor:
        """The position embedding (1, h w, C), resampled (bicubic) to other grids."""
        if (h, w) == self.grid:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, [h, w], old_size=list(self.grid), num_prefix_tokens=0)

    def _attention(self, tokens: Tensor) -> contextlib.AbstractContextManager[object]:
        """Blocked attention on a CPU in bfloat16 without gradients, where it is faster than torch's kernel."""
        fast = tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return BlockedAttention() if fast and not torch.compiler.is_compiling() else contextlib.nullcontext()

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        return f"C {self.embed_dim}, grid {self.grid[0]} x {self.grid[1]}, blocks {self.blocks}"


def _block(embed_dim: int) -> Block:
    return Block(
        dim=embed_dim,
        num_heads=embed_dim // _HEAD,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
    )


def write_denoiser(denoiser: Denoiser, path: str | Path) -> None:
    """Write a denoiser to a safetensors file, in float16 unless values exceed its range.

    Raises:
        FormatError: if the name does not end in .safetensors, or a value is not finite.
        OSError: if it cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise FormatError(f"{path}: expected a name ending in .safetensors")
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
    """Read a file of :func:`write_denoiser`, or a published checkpoint in any of its containers.

    Width, grid and blocks are inferred from the tensors. Pickles are read without executing code.

    Returns:
        The denoiser in float32 and evaluation mode.

    Raises:
        FormatError: if the file is missing, damaged, of another type, or from a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise no_such_file(path)
    head = _head(path) if is_safetensors(path) else {}
    try:
        tensors = read_state_dict(path)
        models = models_among(tensors, r"denoiser\.(?:\d+\.)?norm1\.weight")
        state = the_model(models, str(path))[1] if models else without_containers(tensors, ("model", "denoiser"))
    except WeightsError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise FormatError(f"{path}: not a denoiser, or damaged: {reason}") from error
    if models:
        state = {name: value for name, value in state.items() if not name.startswith("vit.")}  # the backbone
    return _built(state, head, str(path)).eval()


def no_such_file(source: str | Path) -> FormatError:
    """The error for a denoiser that is neither a file nor a known name."""
    return FormatError(f"{source}: no such denoiser file; expected a file, or the name of a model or variant")


def _head(path: Path) -> dict[str, Any]:
    """The package's metadata in a safetensors file; empty for other files."""
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
        raise FormatError(f"{path}: expected a safetensors file of {FORMAT!r}, got {kind!r}")
    grid, record = head.get("grid"), head.get("trained_for")
    require_version(path, head, FORMAT_VERSION)
    sides = isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    if not sides or not isinstance(head.get("info"), dict):
        raise FormatError(f"{path}: damaged denoiser: grid or record missing in its metadata")
    if record is not None:
        require_record(path, record)


def _built(state: dict[str, Tensor], head: dict[str, Any], source: str) -> Denoiser:
    """The denoiser of a state dict."""
    if not head and "pos_embed" not in state and (width := _width(state)):
        # The published code can train without a position embedding, which equals zeros on any grid.
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
            f"({', '.join(missing[:2]) or '-'}), {len(unknown)} unexpected ({', '.join(unknown[:2]) or '-'}), "
            f"{len(shapes)} of another shape ({', '.join(shapes[:2]) or '-'})"
        )
    require_finite(state, source)
    denoiser.load_state_dict(state)
    return denoiser


def _shape(state: dict[str, Tensor], head: dict[str, Any], source: str) -> tuple[int, tuple[int, int]]:
    """Channels and grid of the position embedding; the grid is square unless the file has one."""
    position, kind = state.get("pos_embed"), _other_kind(state)
    if kind or position is None or position.ndim != 3 or len(position) != 1:
        got = kind or ", ".join(list(state)[:3]) or "nothing"
        raise FormatError(f"{source}: not a denoiser: expected pos_embed of shape (1, h w, C) and a block, got {got}")
    places, channels = position.shape[1:]
    side = math.isqrt(places)
    h, w = head.get("grid") or (side, side)
    if not places or h * w != places:
        raise FormatError(f"{source}: a position embedding of {places} positions does not fit a grid of {h} x {w}")
    return channels, (h, w)


def _width(state: dict[str, Tensor]) -> int:
    """Channels of the first block; 0 if there is none."""
    norm = next((state[name] for name in ("denoiser.norm1.weight", "denoiser.0.norm1.weight") if name in state), None)
    return 0 if norm is None else norm.numel()


def _other_kind(state: dict[str, Tensor]) -> str:
    """Description of a known state dict that is not a denoiser's; empty if unknown."""
    if any(name.endswith("patch_embed.proj.weight") for name in state):
        return "a whole model (load it with weights=FILE or --weights FILE)"
    if any(re.fullmatch(r"(denoiser\.)?0\.weight", name) for name in state):
        return "a convolutional denoiser, which is not supported"
    return ""


def require_finite(state: dict[str, Tensor], source: str) -> None:
    """Check tensors for NaN and infinity.

    Raises:
        FormatError: naming the first tensor with such values.
    """
    if bad := [name for name, value in state.items() if not torch.isfinite(value.float()).all()]:
        raise FormatError(
            f"{source}: {bad[0]} has values that are not finite; the file is damaged, or training diverged"
        )
