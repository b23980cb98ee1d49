"""Project features onto the complement of the directions that encode position; no training.

Directions come from one of three sources:

- ``blank``: principal directions of the features of a black image, which differ only by position, as in INSID3 (CVPR
  2026): SVD of the normalised, centred tokens.
- ``artifact``: principal directions of a calibrated G.
- ``place``: directions of a ridge regression from features to (x, y), removed and refitted, round by round, as in
  RASA (Franca, 2025).

The rank is chosen on unlabelled photos, see :func:`choose_rank`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.errors import PlanError
from denoising_vit.hub.pretrained import Pretrained
from denoising_vit.metrics.position import linear_position_r2
from denoising_vit.training_free import common

KIND = "denoising-vit/subspace"

Source = Literal["blank", "artifact", "place"]

#: Default rank without photos.
DEFAULT_RANK = 16

_RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

#: Singular values below this fraction of the first are rounding errors.
_ROUNDING = 1e-5


class Subspace(nn.Module, Pretrained):
    """Orthogonal projection that removes a subspace: ``subspace(features)`` maps (..., C) to (..., C) in float32.

    Args:
        directions: orthonormal rows (rank, C).
        backbone: record of the backbone that they belong to.
        info: source, rank and its selection; JSON values.
    """

    FORMAT = KIND

    directions: Tensor

    def __init__(self, directions: Tensor, backbone: dict[str, Any], info: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.register_buffer("directions", directions.detach().float())
        self.backbone, self.info = backbone, info or {}

    @property
    def rank(self) -> int:
        """Number of removed directions."""
        return len(self.directions)

    @property
    def digest(self) -> str:
        """SHA-256 of the directions."""
        return hashlib.sha256(self.directions.float().cpu().numpy().tobytes()).hexdigest()

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., C) without their components along the directions; float32, also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            features, directions = features.float(), self.directions.float()
            return features - features @ directions.T @ directions

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the directions without rounding them."""
        directions = self.directions
        super()._apply(fn, recurse)
        self.directions = directions.to(self.directions.device)
        return self

    def require_of(self, backbone: Backbone) -> None:
        """Reject another backbone.

        Raises:
            ArtifactError: naming both.
        """
        common.require_same(self.backbone, backbone, "these positional directions were")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file for :meth:`load`."""
        common.write(Path(path), KIND, self.directions, self.backbone, self.info)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: if the file is missing, damaged, or of another type.
        """
        return cls(*common.read(Path(path), KIND, "a subspace"))

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        return f"{self.rank} of {self.directions.shape[1]} directions, from {self.info.get('source', 'given')}"


@torch.no_grad()
def find_subspace(
    backbone: Backbone,
    photos: Iterable[Any] | None = None,
    *,
    source: Source = "blank",
    rank: int | Literal["auto"] = "auto",
    artifact: Artifact | None = None,
    size: tuple[int, int] | None = None,
) -> Subspace:
    """Find the directions of a backbone's features that encode position.

    Args:
        backbone: the extractor.
        photos: a few dozen unlabelled photos: paths, PIL images or (H, W, 3) uint8 arrays. The rank is selected on
            them, and ``place`` fits its directions to them (at least 8 photos, because the rank for directions of one
            half is evaluated on the other). Without photos, ``auto`` is 16.
        source: source of the directions, see the module's docstring.
        rank: number of directions, or ``auto`` for :func:`choose_rank`.
        artifact: G of the backbone, for the source ``artifact``.
        size: (H, W) in pixels; defaults to the backbone's default size.

    Raises:
        PlanError: if the source is unknown, its input is missing, or there are fewer directions than the rank.
        ArtifactError: if the artifact belongs to another backbone.
    """
    size = size or (backbone.default_size, backbone.default_size)
    images = (
        [] if photos is None or (source != "place" and rank != "auto") else common.photo_images(photos, backbone, size)
    )
    features = torch.cat([backbone(image).cpu() for image in images]) if images else None
    if source == "blank":
        directions = blank_directions(backbone, size)
    elif source == "artifact":
        if artifact is None:
            raise PlanError("source='artifact' needs the artifact: find_subspace(..., artifact=dv.load_artifact(...))")
        artifact.require_of(backbone)
        directions = principal_directions(artifact.values)
    elif source == "place":
        if features is None:
            raise PlanError("source='place' fits directions to photos; give a few dozen photos")
        directions = place_directions(features, min(max(_RANKS), backbone.embed_dim // 2))
    else:
        raise PlanError(f"unknown source {source!r}; choose from {', '.join(get_args(Source))}")
    info: dict[str, Any] = {"source": source, "size": list(size)}
    if rank == "auto" and features is not None:
        info["photos"] = len(features)
        if source == "place":  # evaluated on other photos, because the fitted ones keep no trace of position
            half = len(features) // 2
            rank, info["ranks"] = choose_rank(features[half:], place_directions(features[:half], len(directions)))
        else:
            rank, info["ranks"] = choose_rank(features, directions)
    elif rank == "auto":
        rank = min(DEFAULT_RANK, len(directions), backbone.embed_dim // 4)
    if not 0 <= rank <= len(directions):
        raise PlanError(f"rank must be 0 to {len(directions)}, the number of directions of {source!r}, got {rank}")
    return Subspace(directions[:rank], describe(backbone), info | {"rank": rank})


def principal_directions(features: Tensor, *, unit: bool = False) -> Tensor:
    """Principal directions (n, C) over positions of features (h, w, C), strongest first, without rounding errors.

    Args:
        features: (h, w, C).
        unit: scale tokens to unit norm first.
    """
    tokens = features.flatten(0, 1).double().cpu()  # (h, w, C) -> (h w, C)
    tokens = normalize(tokens, dim=-1) if unit else tokens
    _, values, directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    return directions[values > _ROUNDING * values[0].clamp(min=1e-12)].float()


def blank_directions(backbone: Backbone, size: tuple[int, int]) -> Tensor:
    """Principal directions (n, C) of the normalised, centred tokens of a black image (INSID3)."""
    return principal_directions(backbone(backbone.normalise(torch.zeros(1, 3, *size)))[0], unit=True)


def place_directions(features: Tensor, most: int, *, ridge: float = 0.3) -> Tensor:
    """Directions from which a ridge regression predicts position, two per round, refitted after each round (RASA).

    Args:
        features: (N, h, w, C).
        most: approximate number of directions.
        ridge: weight of the squared coefficients, relative to the mean variance of a channel.
    """
    _, h, w, channels = features.shape
    tokens = features.flatten(0, 2).double().cpu()  # (N, h, w, C) -> (N h w, C)
    tokens = tokens - tokens.mean(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    place = torch.stack([x, y], dim=-1).flatten(0, 1).double().repeat(len(features), 1)  # (N h w, 2)
    gram, cross = tokens.T @ tokens / len(tokens), tokens.T @ place / len(tokens)
    penalty = ridge * gram.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    found = torch.zeros(0, channels, dtype=torch.float64)
    while len(found) + 2 <= most:
        left = torch.eye(channels, dtype=torch.float64) - found.T @ found
        weights = left @ torch.linalg.solve(left @ gram @ left + penalty, left @ cross)  # (C, 2)
        new, strength = torch.linalg.qr(weights)
        if strength.diagonal().abs().min() < 1e-9:
            break  # no linear trace is left
        found = torch.cat([found, new.T])
    return found.float()


def choose_rank(features: Tensor, directions: Tensor) -> tuple[int, list[dict[str, float]]]:
    """The rank with the best trade-off between position and content, and the metrics of every candidate.

    For each rank k (0, 1, 2, 4, ...): ``place`` is the R^2 of a linear position probe on held-out photos after the
    projection, as a fraction of its value before, and ``lost`` is the fraction of content variance in the subspace,
    where content is the tokens minus their mean over photos at each position. The rank minimises ``place + lost``; ties
    go to the smaller rank. No labels are used.

    Args:
        features: (N, h, w, C) of N >= 4 photos.
        directions: orthonormal rows (n, C), strongest first.
    """
    if len(features) < 4:
        raise PlanError(f"selecting the rank needs at least 4 photos, got {len(features)}; give more, or rank=16")
    content = (features - features.mean(0)).flatten(0, 2).double().cpu()  # (N h w, C)
    total = float(content.square().sum())
    lost = (content @ directions.double().T).square().sum(0).cumsum(0) / total  # (n,)
    most = min(len(directions), features.shape[-1] // 2)
    tried: list[dict[str, float]] = []
    before = 0.0
    for rank in [rank for rank in _RANKS if rank <= most]:
        left = features - features @ directions[:rank].T @ directions[:rank]
        place = max(linear_position_r2(left, train=len(features) // 2), 0.0)
        before = before if rank else max(place, 1e-6)
        gone = float(lost[rank - 1]) if rank else 0.0
        tried.append({"rank": rank, "place": round(place, 4), "lost": round(gone, 4), "score": place / before + gone})
    best = min(tried, key=lambda row: row["score"])
    return int(best["rank"]), tried
