"""Calibration: the artifact G of a backbone, from a few dozen photos, and its reliability.

Each photo estimates the same G with an independent error: ``G_i = G + e_i``. The products ``G_i . G_j`` are sufficient:
they average |G|^2 for different photos, and |G|^2 + |e|^2 for a photo with itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import Skipped
from denoising_vit.decomposition.inputs import named_pixels, with_content
from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.decomposition.stage_one import Failed, Ready, StageOne
from denoising_vit.errors import ArtifactError, DenoisingVitWarning

#: Minimum number of photos; fewer cannot be split into halves to compare.
LEAST_PHOTOS = 4

#: Minimum reliability of an artifact; below, more than a fifth of its variance is noise.
STABLE = 0.8

#: Maximum factor by which more photos are suggested.
_ABSURD = 64

#: Fraction of the mean square of features below which their variance is rounding error.
_ROUNDING = 1e-9

#: Target reliability of the suggested number of photos.
ENOUGH = 0.95

#: Fraction of the features' energy below which a common part does not count as an artifact.
NEGLIGIBLE = 0.001

#: Number of random splits to average a correlation over.
_SPLITS = 64

#: Called once per photo with its name, and None or the reason for skipping it.
OnPhoto = Callable[[str, str | None], None]


@dataclass(frozen=True)
class Stability:
    """Reliability of the mean of single photos' artifacts.

    Attributes:
        photos: number of photos.
        signal: mean square of the common part, summed over channels: |G|^2 per patch; can be slightly negative if there
            is no common part.
        noise: mean square of the individual errors, in the same units.
        split_half: correlation between the means of two halves of the photos, averaged over random splits.
        energy: variance of the features, in the same units; None if unknown.
    """

    photos: int
    signal: float
    noise: float
    split_half: float
    energy: float | None = None

    @classmethod
    def of(cls, products: np.ndarray, seed: int = 0, energy: float | None = None) -> Stability:
        """Compute from the products (N, N) of N photos' artifacts, per patch; N >= 4."""
        photos = len(products)
        own = float(np.trace(products)) / photos
        common = (float(products.sum()) - float(np.trace(products))) / (photos * (photos - 1))
        return cls(photos, common, max(own - common, 0.0), split_half(products, photos, seed), energy)

    def reliability_of(self, photos: int) -> float:
        """Fraction of the variance of the mean artifact of this number of photos that is G, in [0, 1]."""
        signal = max(self.signal, 0.0)
        total = signal + self.noise / photos
        return signal / total if total > 0 else 0.0

    @property
    def reliability(self) -> float:
        """Fraction of the artifact's variance that is G, in [0, 1]."""
        return self.reliability_of(self.photos)

    @property
    def share(self) -> float | None:
        """The common part relative to the features' energy; None if that is unknown."""
        if self.energy is None:
            return None
        return max(self.signal, 0.0) / self.energy if self.energy > 0 else 0.0

    @property
    def suggested(self) -> int | None:
        """Number of photos for a reliability of 0.95; None if the photos have nothing in common."""
        if self.signal <= 0 or (self.share is not None and self.share < NEGLIGIBLE):
            return None
        return max(math.ceil(ENOUGH / (1 - ENOUGH) * self.noise / self.signal - 1e-9), 4)

    def record(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self) | {
            "share": self.share,
            "reliability": self.reliability,
            "suggested": self.suggested,
        }


def split_half(products: np.ndarray, photos: int, seed: int = 0) -> float:
    """Mean correlation between the means of two disjoint halves of ``photos`` of the N photos, over random draws.

    Artifacts have mean zero in every channel, so their correlation over all positions and channels is a cosine.
    """
    chance = np.random.RandomState(seed)
    half = photos // 2
    found = []
    for _ in range(_SPLITS):
        drawn = chance.permutation(len(products))
        first, second = drawn[:half], drawn[half : 2 * half]
        across = products[np.ix_(first, second)].sum()
        within = products[np.ix_(first, first)].sum() * products[np.ix_(second, second)].sum()
        found.append(across / math.sqrt(within) if within > 0 else 0.0)
    return float(np.mean(found))


def curve(products: np.ndarray, seed: int = 0) -> dict[int, float]:
    """Split-half correlation by number of photos: 4, 8, 16, ... and all."""
    counts = [2**k for k in range(2, int(math.log2(len(products))) + 1)]
    if counts[-1] != len(products):
        counts.append(len(products))
    return {count: split_half(products, count, seed) for count in counts}


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of a calibration.

    Attributes:
        artifact: G; its ``info`` has the other metrics.
        stability: dependence of the artifact on the photos.
        split_half: correlation between the artifacts of two halves of the photos, by number of photos.
        skipped: skipped photos, with reasons.
    """

    artifact: Artifact
    stability: Stability
    split_half: dict[int, float]
    skipped: tuple[Skipped, ...]


def calibrate(
    backbone: Backbone,
    photos: Iterable[Any],
    *,
    progress: OnPhoto | None = None,
    options: CalibrationOptions | None = None,
    **changes: Any,
) -> Artifact:
    """Calibrate the artifact of a backbone on a few dozen varied photos.

    Unusable photos are skipped and listed in ``info["skipped"]`` with the reason.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photos: at least 4 paths, PIL images or (H, W, 3) uint8 arrays; or a folder of image files.
        progress: called once per photo with its name, and None or the reason for skipping it.
        options: options of the calibration; None uses the defaults.
        **changes: individual fields of :class:`CalibrationOptions`, such as ``views=32``.

    Raises:
        ArtifactError: if fewer than 4 photos are usable.
        PlanError: if there are too few views, or an option is out of range.
        SizeError: if the size does not fit the patch grid.

    Warns:
        DenoisingVitWarning: if there are too few photos for a stable artifact, with the number needed; or if the photos
            have nothing in common.
    """
    found = run_calibration(backbone, named_pixels(photos), progress=progress, options=options, **changes)
    if doubt := doubt_about(found.stability):
        warnings.warn(doubt, DenoisingVitWarning, stacklevel=2)
    return found.artifact


def run_calibration(
    backbone: Backbone,
    photos: Iterable[tuple[str, np.ndarray | Skipped]],
    *,
    progress: OnPhoto | None = None,
    options: CalibrationOptions | None = None,
    **changes: Any,
) -> Calibration:
    """Like :func:`calibrate`, from :func:`named_pixels`, with all metrics."""
    options = replace(options or CalibrationOptions(), **changes)
    stage = StageOne(backbone, options.denoising())
    skipped: list[Skipped] = []
    artifacts: list[tuple[str, Tensor]] = []
    energies: list[float] = []
    numbered = ((index, name, pixels) for index, (name, pixels) in enumerate(with_content(photos)))
    for result in stage.run(numbered):
        if isinstance(result, Failed):
            name, reason = result.name, result.reason
            skipped.append(Skipped(name, reason))
        else:
            name, reason = result.about["name"], None
            artifacts.append((name, result.solve_apart()[1].float().cpu()))
            energies.append(energy_of(result))
        if progress is not None:
            progress(name, reason)
    require_enough(artifacts, skipped, LEAST_PHOTOS, "an artifact")
    return joined(stage, options, artifacts, energies, skipped)


def require_enough(used: Sized, skipped: Sequence[Skipped], least: int, what: str) -> None:
    """Check that there are enough photos to compare.

    Raises:
        ArtifactError: with the number of photos, the number needed, and the reason why others were skipped.
    """
    if len(used) >= least:
        return
    why = f" ({len(skipped)} skipped; first: {skipped[0].item}: {skipped[0].reason})" if skipped else ""
    raise ArtifactError(f"{len(used)} usable photos{why}; {what} needs at least {least}, preferably a few dozen")


def energy_of(photo: Ready) -> float:
    """Typical energy of a photo's features: the median squared distance of a token from the median token.

    The median ignores outlier tokens. A small fraction of the mean square keeps it above rounding errors.
    """
    assert photo.raw is not None
    tokens = photo.raw.cpu().double().flatten(0, 1)  # (h w, C)
    spread = (tokens - tokens.median(0).values).square().sum(1).median()
    return float(spread + _ROUNDING * tokens.square().sum(1).mean())


def joined(
    stage: StageOne,
    options: CalibrationOptions,
    artifacts: Sequence[tuple[str, Tensor]],
    energies: Sequence[float],
    skipped: list[Skipped],
) -> Calibration:
    """The joint artifact of photos from the artifact (h, w, C) of each, and their agreement."""
    each = torch.stack([artifact for _, artifact in artifacts])  # (N, h, w, C); 2 MB per photo for a ViT-S at 518
    flat = each.flatten(1)
    products = (flat @ flat.T).double().numpy() / math.prod(stage.fitted.grid)
    stability = Stability.of(products, options.seed, sum(energies) / len(energies))
    by_count = curve(products, options.seed)
    info = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()},
        "plan": stage.fitted.digest,
        "stability": stability.record(),
        "split_half": {str(count): value for count, value in by_count.items()},
        "photos": [name for name, _ in artifacts],
        "skipped": [[item.item, item.reason] for item in skipped],
    }
    # For one plan, the joint solution is the mean over the photos' solutions (docs/method.md).
    values = each.mean(0)
    about = describe(stage.backbone) | {"stride": stage.backbone.stride, "patch_size": stage.backbone.patch_size}
    artifact = Artifact(values, stage.fitted.size, about, info)
    return Calibration(artifact, stability, by_count, tuple(skipped))


def doubt_about(stability: Stability) -> str | None:
    """The reason why an artifact is unreliable, and a remedy; None if it is reliable."""
    reliability = f"a fraction of {stability.reliability:.2f} of its variance is common to all photos"
    if stability.suggested is None or stability.suggested > _ABSURD * stability.photos:
        share = "" if stability.share is None else f", {stability.share:.2%} of the features' energy"
        return (
            f"{stability.photos} photos have hardly any artifact in common{share}: either this backbone adds none, or "
            "the photos are too few to see it"
        )
    if stability.reliability >= STABLE:
        return None
    return (
        f"{stability.photos} photos are too few for a stable artifact ({reliability}); use about "
        f"{stability.suggested} for 0.95"
    )
