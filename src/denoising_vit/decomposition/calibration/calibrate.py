"""G of a backbone from a few dozen photos, solved jointly: it belongs to the model, not to the image."""

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
from denoising_vit.decomposition.calibration.options import CalibrationOptions
from denoising_vit.decomposition.calibration.photos import named_pixels, telling
from denoising_vit.decomposition.calibration.stability import Stability, curve
from denoising_vit.decomposition.stage_one import Failed, Ready, StageOne
from denoising_vit.errors import ArtifactError, DenoisingVitWarning

#: Fewest photos whose halves can be compared.
LEAST_PHOTOS = 4

#: Reliability below which an artifact is not to be trusted: a fifth of its variance would be noise.
STABLE = 0.8

#: Times as many photos as there are that it makes no sense to suggest.
_ABSURD = 64

#: Share of the mean square of features below which their variance is rounding.
_ROUNDING = 1e-9

#: Called after each photo with its name, and None or why it was not used.
OnPhoto = Callable[[str, str | None], None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the photos of a calibration have in common, and how sure that is.

    Attributes:
        artifact: G; its ``info`` holds the figures of the others.
        stability: how far it depends on the photos.
        split_half: correlation between the artifacts of two halves of so many photos.
        skipped: photos that were not used, and why.
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
    """The artifact of a backbone, from a few dozen varied photos.

    Photos that cannot be used are skipped; ``info["skipped"]`` of the result says which and why.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photos: paths, PIL images or (H, W, 3) uint8 arrays; 4 at least. A folder stands for the image files in it.
        progress: called after each photo with its name, and None or why it was not used.
        options: how; the defaults where none.
        **changes: single fields of :class:`CalibrationOptions`, such as ``views=32``.

    Raises:
        ArtifactError: if fewer than 4 photos can be used.
        PlanError: if views are too few, or an option is out of range.
        SizeError: if the size does not fit the patch grid.

    Warns:
        DenoisingVitWarning: if the photos are too few for a stable artifact, saying how many it takes; or if the
            photos have nothing in common.
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
    """As :func:`calibrate`, with everything that was learned, from photos by name (pixels, or why there are none)."""
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
    """Refuses so few photos that nobody can tell whether the artifact is the same in all.

    Raises:
        ArtifactError: saying how many there are and are needed, and why others were skipped.
    """
    if len(used) >= least:
        return
    why = f" ({len(skipped)} skipped, the first: {skipped[0].item}: {skipped[0].reason})" if skipped else ""
    raise ArtifactError(
        f"{len(used)} usable photos{why}: {what} takes {least} at least, to see what is the same in all of "
        "them, and a few dozen to be sure"
    )


def energy_of(photo: Ready) -> float:
    """Typical energy of a whole photo's features, and a hair more than their rounding.

    The median squared distance of a token from the median token, so that outlier tokens do not count.
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
    """The joint artifact of photos from that of each (name and (h, w, C)), and how far they agree."""
    each = torch.stack([artifact for _, artifact in artifacts])  # (N, h, w, C); 2 MB a photo for a ViT-S at 518
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
    # For one plan the joint solution is the mean of those of single photos (docs/method.md).
    values = each.mean(0)
    about = describe(stage.backbone) | {"stride": stage.backbone.stride, "patch_size": stage.backbone.patch_size}
    artifact = Artifact(values, stage.fitted.size, about, info)
    return Calibration(artifact, stability, by_count, tuple(skipped))


def doubt_about(stability: Stability) -> str | None:
    """Why an artifact is not to be trusted, and what to do; None where it is."""
    told = f"a share of {stability.reliability:.2f} of its variance is common to all photos"
    if stability.suggested is None or stability.suggested > _ABSURD * stability.photos:
        share = "" if stability.share is None else f", {stability.share:.2%} of the features' energy"
        return (
            f"{stability.photos} photos have hardly any artifact in common{share}: either this backbone adds none, or "
            "the photos are too few to see it"
        )
    if stability.reliability >= STABLE:
        return None
    return (
        f"{stability.photos} photos are too few for a stable artifact ({told}); about {stability.suggested} would do "
        "for 0.95"
    )
