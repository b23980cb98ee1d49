"""What a user may give as the artifact: a file, a name, an object, or the values themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from denoising_vit.artifact.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.errors import ArtifactError, PlanError
from denoising_vit.files import compact

#: What stands for the artifact that comes with the package.
SHIPPED = "shipped"

#: What stands for no artifact at all: no artifact is modelled.
NONE = "none"

#: An artifact, a file that holds one, ``shipped``, ``none`` for zeros, or the values (h, w, C) on the
#: grid of the views.
KnownArtifact = Artifact | Tensor | str | Path

_FOLDER = Path(__file__).parent / "shipped"


def known_artifact(given: KnownArtifact | None, backbone: Backbone, grid: tuple[int, int]) -> Tensor | None:
    """The values of a given artifact on a patch grid, (h, w, C) on the CPU; None for None.

    Raises:
        ArtifactError: if it is that of another backbone, or none comes with the package.
        FormatError: if the file is missing, damaged or something else.
        PlanError: if values come in another shape, or are not finite.
    """
    if isinstance(given, str) and given == NONE:
        return torch.zeros(*grid, backbone.embed_dim)
    if isinstance(given, str | Path):
        given = load_artifact(given, backbone)
    if isinstance(given, Artifact):
        given.require_of(backbone)
        return given.at(grid)  # resampled where the grid is another
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise PlanError(f"expected an artifact as Artifact, file name or tensor (h, w, C), got {type(given).__name__}")
    if tuple(given.shape) != (*grid, backbone.embed_dim):
        raise PlanError(
            f"the given artifact has shape {tuple(given.shape)}, expected {(*grid, backbone.embed_dim)} for "
            f"{backbone.name} on a grid of {grid[0]} x {grid[1]} patches"
        )
    if not torch.isfinite(given).all():
        raise PlanError("the given artifact has values that are not finite")
    return given.detach().cpu()


def load_artifact(source: str | Path, backbone: Backbone) -> Artifact:
    """The artifact of a backbone: from a file that `dvit calibrate` wrote, or ``shipped``.

    Raises:
        ArtifactError: if it is that of another backbone, or none comes with the package.
        FormatError: if the file is missing, damaged or something else.
    """
    if str(source) != SHIPPED:
        artifact = Artifact.load(source)
        artifact.require_of(backbone)
        return artifact
    artifact = shipped_for(backbone)
    if artifact is None:
        raise ArtifactError(
            f"no artifact of {backbone.name} with these weights ({backbone.weights}), layer {backbone.layer} and "
            f"stride {backbone.stride} comes with the package; make one by dvit calibrate PHOTOS -o FILE, "
            "and give it by --artifact FILE"
        )
    return artifact


def shipped_for(backbone: Backbone) -> Artifact | None:
    """The artifact that comes with the package for this backbone with these weights, layer and stride; None if none."""
    for path in sorted(_FOLDER.glob(f"{backbone.name.split('.')[0]}*.safetensors")):
        artifact = Artifact.load(path)
        if artifact.is_of(backbone):
            return artifact
    return None


def resampling_note(source: str | Path, backbone: Backbone, grid: tuple[int, int]) -> str | None:
    """What to tell a user whose views have another grid than the artifact; None where it is the same."""
    own = grid if source == NONE else load_artifact(source, backbone).grid
    if own == grid:
        return None
    return f"the artifact was calibrated on {own[0]} x {own[1]} patches and is resampled to {grid[0]} x {grid[1]}"


def artifact_digest(values: Tensor | None) -> str | None:
    """SHA-256 of an artifact as a file holds it, so that saving makes no difference; None for None."""
    return None if values is None else hashlib.sha256(compact(values).numpy().tobytes()).hexdigest()
