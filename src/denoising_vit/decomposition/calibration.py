"""Calibration: the artifact G of a backbone, from a few dozen photos."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import Skipped, find_photos
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.decomposition.stability import Stability, curve
from denoising_vit.decomposition.stage_one import Failed, Ready, StageOne
from denoising_vit.errors import ArtifactError, DenoisingVitWarning, PhotoError

#: Minimum number of photos; fewer cannot be split into halves to compare.
LEAST_PHOTOS = 4

#: Minimum reliability of an artifact; below, more than a fifth of its variance is noise.
STABLE = 0.8

#: Maximum factor by which more photos are suggested.
_ABSURD = 64

#: Fraction of the mean square of features below which their variance is rounding error.
_ROUNDING = 1e-9

#: Called once per photo with its name, and None or the reason for skipping it.
OnPhoto = Callable[[str, str | None], None]

#: Deviation (of 255) of pixels below which a photo has no content that moves from crop to crop.
_CONTENT = 1.0

#: Approximate number of pixel rows and columns to check for content.
_LOOKED_AT = 512


def named_pixels(photos: Iterable[Any]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Photos in any form, as (name, pixels (H, W, 3) uint8 or the reason for skipping)."""
    if isinstance(photos, Image.Image) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
        photos = [photos]  # a single photo
    if isinstance(photos, str | Path):
        photos, missing = find_photos([photos])
        yield from ((item.item, item) for item in missing)
    for number, photo in enumerate(photos):
        name = f"photo {number}" if isinstance(photo, np.ndarray | Image.Image) else str(photo)
        try:
            yield name, read_photo(photo)
        except PhotoError as error:
            yield name, Skipped(name, str(error).removeprefix(f"{name}: "))
        except TypeError:
            kind = type(photo).__name__
            yield (f"photo {number}", Skipped(f"photo {number}", f"expected a path, PIL image or array, got {kind}"))


def telling(photos: Iterable[tuple[str, np.ndarray | Skipped]]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Skip photos of a single colour, and duplicates.

    Photos of a single colour look the same in every crop, so they cannot separate G and F; duplicates agree trivially.
    """
    seen: dict[str, str] = {}
    for name, pixels in photos:
        if isinstance(pixels, Skipped):
            yield name, pixels
            continue
        digest = photo_digest(pixels)
        if not _has_content(pixels):
            yield name, Skipped(name, "no content: all pixels are the same")
        elif digest in seen:
            yield name, Skipped(name, f"a duplicate of {seen[digest]}")
        else:
            seen[digest] = name
            yield name, pixels


def _has_content(pixels: np.ndarray) -> bool:
    """True if pixels differ; checked on a subset, because large photos would take gigabytes."""
    rows, columns = (max(side // _LOOKED_AT, 1) for side in pixels.shape[:2])
    return pixels.size > 0 and float(pixels[::rows, ::columns].std(axis=(0, 1)).max()) >= _CONTENT


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
    numbered = ((index, name, pixels) for index, (name, pixels) in enumerate(telling(photos)))
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
