"""What a diagnosis looks at: features of the same crops, raw and cleaned, and the artifact that photos share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.calibration import Calibration, energy_of, joined, require_enough, telling
from denoising_vit.dataset import Skipped
from denoising_vit.denoise import on_nodes
from denoising_vit.diagnosis.crops import NeutralCrop
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.evaluation.consistency import at_patches
from denoising_vit.rendering import ViewRenderer, to_image
from denoising_vit.stage_one import Failed, Ready, StageOne

Extractor = Callable[[Tensor], Tensor]

#: Called after each photo with its name, and None or why it was not used.
OnPhoto = Callable[[str, str | None], None]

#: Fewest photos: two halves, each with a training and a test side of two.
LEAST_PHOTOS = 8

#: Longer side in pixels of the photos that are kept to be shown.
_THUMBNAIL = 480


@dataclass(frozen=True, eq=False)
class Shown:
    """A photo for the page: its pixels (H, W, 3) uint8, reduced, and its maps (h, w, C) by source."""

    name: str
    pixels: np.ndarray
    maps: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Features by source: ``raw``, ``subtract``, ``exact``, and whatever else was to be judged.

    Attributes:
        crops: of one neutral crop a photo, (N, h, w, C).
        pairs: features of places as the whole photo has them, and as the crop has them, (n, h, w, C) both; of crops
            that are not turned.
        calibration: the artifact of all photos together, and how far they agree; names what was skipped.
        responses: to an all-black and an all-mean image, (2, h, w, C).
        shown: a few photos with their maps.
    """

    crops: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]
    calibration: Calibration
    responses: Tensor
    shown: tuple[Shown, ...]


@dataclass
class _Photo:
    """One photo on its way. Maps are (h, w, C): at the crop's patches, and at the whole photo's."""

    crop: NeutralCrop
    images: tuple[Tensor, Tensor]  # crop and whole photo, (1, 3, H, W)
    pixels: np.ndarray | None  # where it is to be shown
    name: str = ""
    artifact: Tensor = field(default_factory=lambda: torch.empty(0))
    energy: float = 0.0
    at_crop: dict[str, Tensor] = field(default_factory=dict)
    at_whole: dict[str, Tensor] = field(default_factory=dict)


class Gathering:
    """Gathers evidence photo by photo.

    Args:
        backbone: the backbone to diagnose.
        options: how much is looked at.
        others: further extractors to judge, by name.
    """

    def __init__(self, backbone: Backbone, options: DiagnoseOptions, others: Mapping[str, Extractor]) -> None:
        self._backbone, self._options, self._others = backbone, options, dict(others)
        self._calibration = options.calibration()
        self._stage = StageOne(backbone, self._calibration.denoising())
        self._whole = self._stage.fitted.subset(slice(1))
        self._waiting: dict[int, _Photo] = {}
        self._solving = torch.device("cpu")
        self._kept = 0

    def run(self, photos: Iterable[tuple[str, np.ndarray | Skipped]], progress: OnPhoto) -> Evidence:
        """Sees all photos (by name: pixels, or why there are none).

        Raises:
            ArtifactError: if fewer than 8 photos can be used.
        """
        skipped: list[Skipped] = []
        seen: list[_Photo] = []
        for result in self._stage.run(self._opened(photos)):
            photo = self._waiting.pop(result.index, None)
            if isinstance(result, Failed):
                skipped.append(Skipped(result.name, result.reason))
                progress(result.name, result.reason)
                continue
            assert photo is not None
            photo.name = result.about["name"]
            self._take(photo, result)
            seen.append(photo)
            progress(photo.name, None)
        require_enough(seen, skipped, LEAST_PHOTOS, "a diagnosis")
        artifacts = {photo.name: photo.artifact for photo in seen}
        energies = [photo.energy for photo in seen]
        return self._evidence(seen, joined(self._stage, self._calibration, artifacts, energies, skipped))

    def _opened(
        self, photos: Iterable[tuple[str, np.ndarray | Skipped]]
    ) -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
        """Numbers photos, and renders what is needed of them besides their views."""
        for index, (name, pixels) in enumerate(telling(photos)):
            if not isinstance(pixels, Skipped) and min(pixels.shape[:2]) >= self._backbone.patch_size:
                crop = NeutralCrop.draw(index, self._stage.fitted, self._options.seed)
                image = to_image(pixels, self._backbone.device)
                whole = ViewRenderer(image, self._whole, self._backbone.mean, self._backbone.std)(slice(1))
                kept = _thumbnail(pixels) if self._kept < self._options.shown else None
                self._kept += kept is not None
                self._waiting[index] = _Photo(crop, (crop.render(image, self._backbone), whole), kept)
            yield index, name, pixels

    @torch.no_grad()
    def _take(self, photo: _Photo, result: Ready) -> None:
        """Looks at a photo whose views have been seen."""
        crop, whole = photo.images
        photo.images = (torch.empty(0), torch.empty(0))
        assert result.raw is not None
        field, artifact = result.solve_apart()
        self._solving = field.device
        photo.at_crop = {"raw": self._backbone(crop)[0].cpu(), "exact": photo.crop.sample(field).float().cpu()}
        photo.at_whole = {"raw": result.raw.cpu(), "exact": at_patches(field, self._whole).float().cpu()}
        for name, extractor in self._others.items():
            photo.at_crop[name], photo.at_whole[name] = (extractor(image)[0].float().cpu() for image in (crop, whole))
        photo.artifact = artifact.float().cpu()
        photo.energy = energy_of(result)

    def _evidence(self, seen: list[_Photo], calibration: Calibration) -> Evidence:
        own = torch.stack([photo.artifact for photo in seen])
        halves = [range(0, len(seen), 2), range(1, len(seen), 2)]
        for half, other in (halves, halves[::-1]):
            # Each half is cleaned with what the other half found, as new photos would be.
            self._clean([seen[index] for index in half], own[list(other)].mean(0))
        names = ["raw", "subtract", "exact", *self._others]
        ordered = [seen[index] for half in halves for index in half]
        upright = [photo for photo in ordered if not photo.crop.inverted]
        return Evidence(
            crops={name: torch.stack([photo.at_crop[name] for photo in ordered]) for name in names},
            pairs={name: self._pairs(name, upright) for name in names} if len(upright) > 1 else {},
            calibration=calibration,
            responses=self._responses(),
            shown=tuple(
                Shown(photo.name, photo.pixels, {name: photo.at_whole[name] for name in names})
                for photo in seen
                if photo.pixels is not None
            ),
        )

    def _clean(self, photos: list[_Photo], artifact: Tensor) -> None:
        """Takes an artifact (h, w, C) away from raw features and from the fields."""
        # F was solved as if there were none; the problem is linear, so what an artifact changes is the same in all.
        nothing = torch.zeros(*self._stage.fitted.resolution, artifact.shape[-1], dtype=torch.float64)
        change = self._stage.solver.solve_field(nothing.to(self._solving), artifact.double().to(self._solving)).cpu()
        for photo in photos:
            photo.at_crop["exact"] += photo.crop.sample(change).float()
            photo.at_whole["exact"] += at_patches(change, self._whole).float()
            photo.at_crop["subtract"] = photo.at_crop["raw"] - artifact
            photo.at_whole["subtract"] = photo.at_whole["raw"] - artifact

    def _pairs(self, name: str, upright: list[_Photo]) -> tuple[Tensor, Tensor]:
        """F is the same in every view by construction; what it can be held against is what a new view shows of it."""
        if name == "exact":
            expected, features = "exact", "subtract"
            return _stack(upright, expected), _stack(upright, features)
        sampled = [photo.crop.sample(on_nodes(photo.at_whole[name], self._whole)) for photo in upright]
        return torch.stack(sampled), _stack(upright, name)

    @torch.no_grad()
    def _responses(self) -> Tensor:
        """Features of an all-black and an all-mean image, (2, h, w, C)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self._backbone.mean, self._backbone.std))
        black = (torch.zeros(3, *self._whole.size) - mean) / std
        return self._backbone(torch.stack([black, torch.zeros_like(black)])).cpu()


def _stack(photos: list[_Photo], name: str) -> Tensor:
    return torch.stack([photo.at_crop[name] for photo in photos])


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(image)
