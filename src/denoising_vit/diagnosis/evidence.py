"""Evidence of a diagnosis, collected photo by photo: about 25 MB per photo for a ViT-S at 518 px, 75 MB for a ViT-L."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data import Skipped
from denoising_vit.data.photos import shrunk
from denoising_vit.decomposition.calibration import Calibration, OnPhoto, energy_of, joined, require_enough
from denoising_vit.decomposition.inputs import with_content
from denoising_vit.decomposition.stage_one import Failed, Ready, StageOne
from denoising_vit.decomposition.statistics import require_finite
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.errors import DenoisingVitError, EvaluationError
from denoising_vit.extractors import Extractor
from denoising_vit.metrics.blank_test import BLANK_PHOTOS, BlankProbe
from denoising_vit.views.crops import Crop
from denoising_vit.views.rendering import ViewRenderer, to_image
from denoising_vit.views.sampling import at_patches, on_nodes

#: Features in every diagnosis.
OWN = ("raw", "subtract", "exact")

#: Minimum number of photos: two halves, each with two training and two test photos.
LEAST_PHOTOS = 8

#: Longer side in pixels of the photos on the page.
_THUMBNAIL = 480


@dataclass(frozen=True, eq=False)
class Shown:
    """A photo on the page: downscaled pixels (H, W, 3) uint8, and maps (h, w, C) by source."""

    name: str
    pixels: np.ndarray
    maps: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Features by source: ``raw``, ``subtract``, ``exact`` and further extractors.

    Attributes:
        crops: features of one crop of each photo, (N, h, w, C); half of the crops are upside down. Each half of
            the photos is cleaned with the artifact of the other half.
        pairs: features at the same positions in the whole photo and in the crop, (n, h, w, C) each; upright crops only.
        calibration: the artifact of all photos, its stability, and skipped photos.
        responses: features of an all-black and an all-mean image, (2, h, w, C).
        shown: a few photos with their maps.
        blank: features of the blank-image test, without ``exact``, which is not a single pass.
    """

    crops: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]
    calibration: Calibration
    responses: Tensor
    shown: tuple[Shown, ...]
    blank: dict[str, BlankProbe] = field(default_factory=dict)


@dataclass
class _Photo:
    """A photo in progress. Maps are (h, w, C) by source, on the patch grids of the crop and of the whole photo."""

    crop: Crop
    images: tuple[Tensor, Tensor]  # crop and whole photo, (1, 3, H, W)
    pixels: np.ndarray | None  # for the page
    full: np.ndarray | None  # for the blank-image test
    name: str = ""
    artifact: Tensor = field(default_factory=lambda: torch.empty(0))
    energy: float = 0.0
    at_crop: dict[str, Tensor] = field(default_factory=dict)
    at_whole: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)  # the whole photo's maps at the crop's patches


class EvidenceCollector:
    """Collects the evidence of photos; ``others`` are further extractors to evaluate, by name."""

    def __init__(self, backbone: Backbone, options: DiagnoseOptions, others: Mapping[str, Extractor]) -> None:
        if taken := sorted(set(others) & set(OWN)):
            raise EvaluationError(f"extractors must not be named {', '.join(OWN)}; got {', '.join(taken)}")
        self._backbone, self._options, self._others = backbone, options, dict(others)
        self._calibration = options.calibration()
        self._stage = StageOne(backbone, self._calibration.denoising())
        self._whole = self._stage.fitted.subset(slice(1))
        self._waiting: dict[int, _Photo] = {}
        self._accepted = 0
        self._solving = torch.device("cpu")

    def run(self, photos: Iterable[tuple[str, np.ndarray | Skipped]], progress: OnPhoto) -> Evidence:
        """The evidence of photos, given as name and pixels, or the reason why a photo was skipped.

        Raises:
            ArtifactError: if fewer than 8 photos are usable.
            EvaluationError: if an extractor's features are not on the backbone's grid, or not finite.
        """
        skipped: list[Skipped] = []
        seen: list[_Photo] = []
        for result in self._stage.run(self._opened(photos)):
            photo = self._waiting.pop(result.index, None)
            reason = result.reason if isinstance(result, Failed) else None
            name = result.name if isinstance(result, Failed) else result.about["name"]
            if isinstance(result, Ready) and photo is not None:
                reason = self._take(photo, result)
            if reason is None and photo is not None:
                seen.append(photo)
            else:
                skipped.append(Skipped(name, reason or ""))
            progress(name, reason)
        require_enough(seen, skipped, LEAST_PHOTOS, "a diagnosis")
        own = [(photo.name, photo.artifact) for photo in seen]
        calibration = joined(self._stage, self._calibration, own, [photo.energy for photo in seen], skipped)
        return self._evidence(seen, calibration)

    def _opened(
        self, photos: Iterable[tuple[str, np.ndarray | Skipped]]
    ) -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
        """Number photos, and render crop and whole photo."""
        for index, (name, pixels) in enumerate(with_content(photos)):
            if not isinstance(pixels, Skipped) and min(pixels.shape[:2]) >= self._backbone.patch_size:
                # Only used photos are numbered, so that upright and upside-down crops stay balanced.
                crop = Crop.neutral(self._accepted, self._whole.size, self._options.seed)
                image = to_image(pixels, self._backbone.device)
                whole = ViewRenderer(image, self._whole, self._backbone.mean, self._backbone.std)(slice(1))
                kept = shrunk(pixels, _THUMBNAIL) if self._accepted < self._options.shown else None
                full = pixels if self._accepted < BLANK_PHOTOS else None
                shown = crop.render(image, self._backbone.mean, self._backbone.std)[None]
                self._waiting[index] = _Photo(crop, (shown, whole), kept, full)
                self._accepted += 1
            yield index, name, pixels

    @torch.no_grad()
    def _take(self, photo: _Photo, result: Ready) -> str | None:
        """Add the features of a photo after its stage 1; returns the reason if it is unusable, else None."""
        crop, whole = photo.images
        photo.images = (torch.empty(0), torch.empty(0))
        photo.name = result.about["name"]
        raw = self._backbone(crop)
        try:
            require_finite(raw)
        except DenoisingVitError as error:
            return str(error)
        assert result.raw is not None
        nodes, artifact = result.solve_apart()
        self._solving = nodes.device
        photo.at_crop = {"raw": raw[0].cpu(), "exact": self._at_crop(photo, nodes).float().cpu()}
        photo.at_whole = {"raw": result.raw.cpu(), "exact": at_patches(nodes, self._whole).float().cpu()}
        for name, extractor in self._others.items():
            photo.at_crop[name], photo.at_whole[name] = (
                _checked(name, extractor(image), raw.shape) for image in (crop, whole)
            )
        photo.artifact = artifact.float().cpu()
        photo.energy = energy_of(result)
        return None

    def _at_crop(self, photo: _Photo, nodes: Tensor) -> Tensor:
        """A field (Ry, Rx, C) at the patches of the photo's crop, (h, w, C)."""
        return photo.crop.sample(nodes, self._backbone.patch_size, self._backbone.stride)

    def _evidence(self, seen: list[_Photo], calibration: Calibration) -> Evidence:
        halves = [seen[::2], seen[1::2]]
        # Each half is cleaned with the artifact of the other half, like new photos.
        found = [torch.stack([photo.artifact for photo in half]).mean(0) for half in halves]
        for half, artifact in zip(halves, found[::-1], strict=True):
            self._clean(half, artifact)
        names = [*OWN, *self._others]
        ordered = [photo for half in halves for photo in half]
        upright = [photo for photo in ordered if not photo.crop.inverted]
        return Evidence(
            crops={name: torch.stack([photo.at_crop[name] for photo in ordered]) for name in names},
            pairs={name: _pairs(name, upright) for name in names} if len(upright) > 1 else {},
            calibration=calibration,
            responses=self._responses(),
            shown=tuple(
                Shown(photo.name, photo.pixels, {name: photo.at_whole[name] for name in names})
                for photo in seen
                if photo.pixels is not None
            ),
            blank=self._blank([photo.full for photo in seen if photo.full is not None], calibration.artifact.values),
        )

    def _clean(self, photos: list[_Photo], artifact: Tensor) -> None:
        """Remove an artifact (h, w, C) from raw features and fields."""
        # F was solved without an artifact. The problem is linear, so an artifact changes all fields by the same amount.
        b, s = (
            torch.zeros(*shape, artifact.shape[-1], dtype=torch.float64, device=self._solving)
            for shape in (self._stage.fitted.resolution, (len(self._stage.fitted),))
        )
        change = self._stage.solver.solve_field(b, artifact.double().to(self._solving), s).cpu()
        for photo in photos:
            photo.at_crop["exact"] += self._at_crop(photo, change).float()
            photo.at_whole["exact"] += at_patches(change, self._whole).float()
            photo.at_crop["subtract"] = photo.at_crop["raw"] - artifact
            photo.at_whole["subtract"] = photo.at_whole["raw"] - artifact
            if not photo.crop.inverted:
                photo.expected = {
                    name: self._at_crop(photo, on_nodes(features, self._whole))
                    for name, features in photo.at_whole.items()
                }
            if photo.pixels is None:
                photo.at_whole.clear()

    def _blank(self, photos: list[np.ndarray], artifact: Tensor) -> dict[str, BlankProbe]:
        """Features of the blank-image test by source, without `exact`, which would fit every image."""
        images = BlankProbe.of(self._backbone, self._whole.size, photos)
        raw = images.through(self._backbone)
        others = {name: images.through(extractor) for name, extractor in self._others.items()}
        return {"raw": raw, "subtract": raw.through(lambda features: features - artifact), **others}

    @torch.no_grad()
    def _responses(self) -> Tensor:
        black = self._backbone.normalise(torch.zeros(3, *self._whole.size))
        return self._backbone(torch.stack([black, torch.zeros_like(black)])).cpu()


def _pairs(name: str, upright: list[_Photo]) -> tuple[Tensor, Tensor]:
    """Pairs on the patch grid, so that a finer field has no advantage."""
    # F is the same in every view by construction, so it is compared with a new view minus G.
    new = "subtract" if name == "exact" else name
    return torch.stack([photo.expected[name] for photo in upright]), torch.stack([p.at_crop[new] for p in upright])


def _checked(name: str, features: Tensor, shape: torch.Size) -> Tensor:
    """Features (h, w, C) of one image from a given extractor, checked."""
    if features.shape != shape:
        raise EvaluationError(
            f"{name}: expected features of shape {tuple(shape)} like the backbone's, got {tuple(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise EvaluationError(f"{name}: features are not finite")
    return features[0].float().cpu()
