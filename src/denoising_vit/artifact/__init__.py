"""The artifact G of a backbone: its values, its file, and the one in the package."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import is_recorded, mismatch, require_record
from denoising_vit.errors import ArtifactError, FormatError, PlanError
from denoising_vit.files import KEY, compact, open_own, write_tensors
from denoising_vit.hub.pretrained import Pretrained

FORMAT = "denoising-vit/artifact"
FORMAT_VERSION = 1

#: Names for the artifact in the package, and for no artifact.
SHIPPED, NONE = "shipped", "none"

_FOLDER = Path(__file__).parent / "shipped"

_REQUIRED = ("size", "backbone", "info")


@dataclass(frozen=True, eq=False)
class Artifact(Pretrained):
    """The artifact that a backbone adds to every image; created by :func:`~denoising_vit.calibrate`.

    Attributes:
        values: G, (h, w, C) float32; its mean over positions is zero.
        size: (H, W) of the calibration views in pixels.
        backbone: record of the backbone: name, weights, fingerprint, layer, norm, stride.
        info: provenance (photos, views, plan) and stability (``reliability``, ``split_half``); JSON values.
    """

    FORMAT = FORMAT

    values: Tensor = dataclasses.field(repr=False)
    size: tuple[int, int]
    backbone: dict[str, Any] = dataclasses.field(repr=False)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the calibration grid."""
        h, w = self.values.shape[:2]
        return h, w

    def at(self, grid: tuple[int, int]) -> Tensor:
        """G on another patch grid, (h, w, C) with mean zero: bicubic, like position embeddings.

        On the calibration grid, the values are unchanged. docs/decisions.md has the loss on other grids.
        """
        if grid == self.grid:
            return self.values
        planes = self.values.permute(2, 0, 1)[None]  # (h, w, C) -> (1, C, h, w)
        resampled = interpolate(planes, size=grid, mode="bicubic", align_corners=False, antialias=True)
        resampled = resampled[0].permute(1, 2, 0)
        return resampled - resampled.mean((0, 1))

    def is_of(self, backbone: Backbone) -> bool:
        """True if this artifact belongs to a backbone with the same weights, layer, norm and stride."""
        return self.values.shape[-1] == backbone.embed_dim and is_recorded(self.backbone, backbone)

    def require_of(self, backbone: Backbone) -> None:
        """Check that this artifact belongs to a backbone.

        Raises:
            ArtifactError: naming both backbones, if it does not.
        """
        if not self.is_of(backbone):
            remedy = "Use the same backbone, or calibrate this one: dvit calibrate PHOTOS -o FILE"
            raise ArtifactError(mismatch("this artifact was calibrated for", self.backbone, backbone, remedy))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (float16) for :meth:`load`.

        Photos are recorded by file name without folders, so that the file can be shared.
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
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: if the file is missing, damaged, of another type, or from a newer version.
        """
        path = Path(path).expanduser()
        with open_own(path, FORMAT, FORMAT_VERSION, "an artifact", _REQUIRED) as (head, file):
            size, info = head["size"], head["info"]
            is_size = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
            if not is_size or not isinstance(info, dict):
                raise FormatError(f"{path}: damaged artifact: size or record missing in its metadata")
            require_record(path, head["backbone"])
            values = file.get_tensor("artifact").float()
        if values.ndim != 3 or not torch.isfinite(values).all():
            raise FormatError(f"{path}: damaged artifact: expected finite values (h, w, C), got {tuple(values.shape)}")
        return cls(values, tuple(size), head["backbone"], info)


def _public(info: dict[str, Any]) -> dict[str, Any]:
    """The record with file names of photos instead of paths."""
    photos, skipped = info.get("photos", []), info.get("skipped", [])
    short = {name: PurePath(name).name for name in [*photos, *(item for item, _ in skipped)]}

    def shortened(text: str) -> str:
        for name in sorted(short, key=len, reverse=True):  # a reason may name another photo
            text = text.replace(name, short[name])
        return text

    shared = {"photos": [short[name] for name in photos], "skipped": [[short[i], shortened(why)] for i, why in skipped]}
    return info | {key: value for key, value in shared.items() if key in info}


#: An artifact, its file, ``shipped``, ``none`` for zeros, or values (h, w, C) on the grid of the views.
KnownArtifact = Artifact | Tensor | str | Path


def known_artifact(given: KnownArtifact | None, backbone: Backbone, grid: tuple[int, int]) -> Tensor | None:
    """Values of the given artifact on a patch grid, (h, w, C) on the CPU; None if None is given.

    Raises:
        ArtifactError: if it belongs to another backbone, or the package has none.
        FormatError: if the file is missing, damaged or of another type.
        PlanError: if values have a wrong shape, or are not finite.
    """
    if isinstance(given, str) and given == NONE:
        return torch.zeros(*grid, backbone.embed_dim)
    if isinstance(given, str | Path):
        given = load_artifact(given, backbone)
    if isinstance(given, Artifact):
        given.require_of(backbone)
        return given.at(grid)
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise PlanError(f"expected an Artifact, a file name or a tensor (h, w, C), got {type(given).__name__}")
    if tuple(given.shape) != (*grid, backbone.embed_dim):
        raise PlanError(
            f"expected an artifact of shape {(*grid, backbone.embed_dim)} for {backbone.name} on a grid of "
            f"{grid[0]} x {grid[1]} patches, got {tuple(given.shape)}"
        )
    if not torch.isfinite(given).all():
        raise PlanError("the given artifact has values that are not finite")
    return given.detach().cpu()


def load_artifact(source: str | Path, backbone: Backbone) -> Artifact:
    """Load the artifact of a backbone from a file of `dvit calibrate`, or from the package for ``shipped``.

    Raises:
        ArtifactError: if it belongs to another backbone, or the package has none.
        FormatError: if the file is missing, damaged or of another type.
    """
    if str(source) != SHIPPED:
        artifact = Artifact.load(source)
        artifact.require_of(backbone)
        return artifact
    artifact = shipped_for(backbone)
    if artifact is None:
        raise ArtifactError(
            f"the package has no artifact for {backbone.name} with these weights ({backbone.weights}), layer "
            f"{backbone.layer} and stride {backbone.stride}; create one with dvit calibrate PHOTOS -o FILE, and "
            "pass it with --artifact FILE"
        )
    return artifact


def shipped_for(backbone: Backbone) -> Artifact | None:
    """The artifact in the package for this backbone, its weights, layer and stride; None if there is none."""
    for path in sorted(_FOLDER.glob(f"{backbone.name.split('.')[0]}*.safetensors")):
        artifact = Artifact.load(path)
        if artifact.is_of(backbone):
            return artifact
    return None


def resampling_note(source: str | Path, backbone: Backbone, grid: tuple[int, int]) -> str | None:
    """Note for the user if an artifact is resampled to the grid of the views; else None."""
    own = grid if source == NONE else load_artifact(source, backbone).grid
    if own == grid:
        return None
    return f"the artifact was calibrated on {own[0]} x {own[1]} patches and is resampled to {grid[0]} x {grid[1]}"


def artifact_digest(values: Tensor | None) -> str | None:
    """SHA-256 of an artifact in the precision of its file, so that saving does not change it; None if None is given."""
    return None if values is None else hashlib.sha256(compact(values).numpy().tobytes()).hexdigest()
