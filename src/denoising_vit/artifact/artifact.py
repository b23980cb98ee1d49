"""G of a backbone, apart from any image: on its own grid, at any other, in a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import backbone_words, is_recorded, names_backbone, recorded_words
from denoising_vit.errors import ArtifactError, FormatError
from denoising_vit.files import KEY, compact, read_record, require_version, write_tensors

FORMAT = "denoising-vit/artifact"
FORMAT_VERSION = 1

_REQUIRED = ("format_version", "size", "backbone", "info")


@dataclass(frozen=True, eq=False)
class Artifact:
    """The artifact that a backbone adds to every image; made by :func:`~denoising_vit.calibrate`.

    Attributes:
        values: G, (h, w, C) float32; its mean over places is zero.
        size: (H, W) in pixels of the views that it was calibrated on.
        backbone: the backbone as it is recorded with results: name, weights, fingerprint, layer, norm, stride.
        info: how it was made (photos, views, plan) and how stable it is (``reliability``, ``split_half``); JSON values.
    """

    values: Tensor = dataclasses.field(repr=False)
    size: tuple[int, int]
    backbone: dict[str, Any] = dataclasses.field(repr=False)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the grid that it was calibrated on."""
        h, w = self.values.shape[:2]
        return h, w

    def at(self, grid: tuple[int, int]) -> Tensor:
        """G on another patch grid, (h, w, C) with mean zero: bicubic, as position embeddings are resampled.

        On its own grid it comes as it is. What other grids lose is in docs/decisions.md.
        """
        if grid == self.grid:
            return self.values
        planes = self.values.permute(2, 0, 1)[None]  # (h, w, C) -> (1, C, h, w)
        resampled = interpolate(planes, size=grid, mode="bicubic", align_corners=False, antialias=True)
        resampled = resampled[0].permute(1, 2, 0)
        return resampled - resampled.mean((0, 1))

    def is_of(self, backbone: Backbone) -> bool:
        """Whether this is the artifact of a backbone: of its weights, layer, norm and stride."""
        return self.values.shape[-1] == backbone.embed_dim and is_recorded(self.backbone, backbone)

    def require_of(self, backbone: Backbone) -> None:
        """Refuses a backbone that this is not the artifact of.

        Raises:
            ArtifactError: naming both.
        """
        if self.is_of(backbone):
            return
        raise ArtifactError(
            f"this artifact was calibrated for {recorded_words(self.backbone)}; got {backbone_words(backbone)}. "
            "Use the backbone as it was calibrated, or calibrate this one: dvit calibrate PHOTOS -o FILE"
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (float16) that :meth:`load` reads back.

        Of the photos, only their file names are written: the file may be given away.
        """
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "size": self.size,
            "backbone": self.backbone,
            "info": _public(self.info),
        }
        write_tensors({"artifact": compact(self.values)}, Path(path), {KEY: json.dumps(head)})

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Reads what :meth:`save` wrote.

        Raises:
            FormatError: if the file is missing, damaged, something else, or of a newer version.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FormatError(f"{path}: no such file")
        try:
            head = read_record(path)
            _check_head(path, head)
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor("artifact").float()
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: not an artifact, or damaged: expected a safetensors file ({error})") from error
        if values.ndim != 3 or not torch.isfinite(values).all():
            raise FormatError(f"{path}: damaged artifact, expected finite values (h, w, C), got {tuple(values.shape)}")
        return cls(values, tuple(head["size"]), head["backbone"], head["info"])


def _public(info: dict[str, Any]) -> dict[str, Any]:
    """The record without the folders that photos were in."""
    photos, skipped = info.get("photos", []), info.get("skipped", [])
    short = {name: PurePath(name).name for name in [*photos, *(item for item, _ in skipped)]}

    def shortened(text: str) -> str:
        for name in sorted(short, key=len, reverse=True):  # a reason may name another photo
            text = text.replace(name, short[name])
        return text

    told = {"photos": [short[name] for name in photos], "skipped": [[short[i], shortened(why)] for i, why in skipped]}
    return info | {key: value for key, value in told.items() if key in info}


def _check_head(path: Path, head: Any) -> None:
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"{path}: a safetensors file, but not one with an artifact (no {FORMAT!r} metadata)")
    require_version(path, head, FORMAT_VERSION)
    if lacking := [key for key in _REQUIRED if key not in head]:
        raise FormatError(f"{path}: damaged artifact, its metadata lacks {', '.join(lacking)}")
    size, backbone = head["size"], head["backbone"]
    if not _is_size(size) or not isinstance(head["info"], dict):
        raise FormatError(f"{path}: damaged artifact, its metadata does not hold a size and a record")
    if not names_backbone(backbone):
        raise FormatError(f"{path}: damaged artifact, its metadata does not name a backbone and its fingerprint")


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
