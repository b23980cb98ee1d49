"""The blank-image test: what is left of a model's artifacts where the truth is known, relative to its raw features.

Four figures are lower the cleaner features are, and a constant map has 0 in all of them: no features are good for that
alone. ``photo_variance`` stands beside them: what is left of the variance over places where there is content.
Features of one-coloured images should be the same everywhere; under fine noise, patches still differ a little by
chance, and heavily blurred photos still have soft gradients, so of these only high frequencies are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from denoising_vit.backbones import Backbone
from denoising_vit.metrics.blank_images import high_frequencies, noise_image, uniform_images, variance_over_places
from denoising_vit.views.rendering import to_image

#: What results are told apart by: which images and figures there are.
BLANK_TEST = 1

#: Photos that are taken, blurred and shifted.
BLANK_PHOTOS = 4

#: Black, grey, white, and a few colours.
_COLOURS = (
    (0.0, 0.0, 0.0),
    (0.5, 0.5, 0.5),
    (1.0, 1.0, 1.0),
    (0.8, 0.2, 0.2),
    (0.2, 0.6, 0.3),
    (0.3, 0.5, 0.9),
)

#: Contrast of noise about grey, and sides of its grains in pixels. More of it lets patches differ mostly by chance.
_CONTRAST, _GRAINS = 0.01, (1, 3)

#: Pixels that a photo is reduced to, on each side, and enlarged from again.
_BLUR = 4

#: Parts of the distance between patches by which photos are shifted, along both sides.
_PARTS = (0.25, 0.5)

#: Raw features whose variance over places is below this share of their mean square are flat: nothing can be left of it.
_FLAT = 1e-8

#: Images in one pass.
_BATCH = 4


@dataclass(frozen=True, eq=False)
class BlankProbe:
    """Images of the test, normalised, (B, 3, H, W) float32 on the CPU; or features of them, (B, h, w, C).

    Attributes:
        blank: one colour each, then fine noise.
        blurred: photos without any detail; none where no photos were given.
        shifted: the photos as they are, then with each shift.
        shifts: parts of the distance between patches, along both sides.
    """

    blank: Tensor
    blurred: Tensor
    shifted: tuple[Tensor, ...]
    shifts: tuple[float, ...]

    @classmethod
    def of(cls, backbone: Backbone, size: tuple[int, int], photos: Sequence[np.ndarray]) -> BlankProbe:
        """Images for a backbone.

        Args:
            backbone: whose normalisation and patch grid count.
            size: (H, W) of the images.
            photos: (H, W, 3) uint8, to be blurred and shifted; the first BLANK_PHOTOS of them are taken.
        """
        mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
        steps = sorted({max(1, int(part * backbone.stride)) for part in _PARTS})
        larger = size[0] + steps[-1], size[1] + steps[-1]
        images = [to_image(photo)[None] for photo in photos[:BLANK_PHOTOS]]
        whole = torch.cat([torch.zeros(0, 3, *larger), *(_resized(image, larger) for image in images)])
        few = [interpolate(image, (_BLUR, _BLUR), mode="area") for image in images]
        blurred = torch.cat([torch.zeros(0, 3, *size), *(_resized(image, size) for image in few)])
        cuts = [whole[..., start : start + size[0], start : start + size[1]] for start in (0, *steps)]
        return cls(
            blank=(_blank_images(size) - mean) / std,
            blurred=(blurred - mean) / std,
            shifted=tuple((cut - mean) / std for cut in cuts),
            shifts=tuple(step / backbone.stride for step in steps),
        )

    def through(self, extractor: Callable[[Tensor], Tensor]) -> BlankProbe:
        """What an extractor makes of all of them, on the CPU: features of images, or clean features of raw ones."""
        return replace(
            self,
            blank=_through(extractor, self.blank),
            blurred=_through(extractor, self.blurred),
            shifted=tuple(_through(extractor, part) for part in self.shifted),
        )


def blank_figures(features: BlankProbe, raw: BlankProbe) -> dict[str, float | None]:
    """Figures of features beside raw ones of the same images: 1 is as raw, 0 is nothing left.

    Args:
        features: of :meth:`BlankProbe.through`.
        raw: the backbone's own, likewise.

    Returns:
        By name, None where raw features are flat, the grid is too small, or there are no photos:

        - ``blank_variance``: share of raw's variance over places that is left on one-coloured images and noise;
        - ``blank_detail``: the same of its high frequencies; grids of 3 x 3 at least;
        - ``blurred_detail``: the same on heavily blurred photos;
        - ``shift_change``: squared change of features at the same place of a photo that is shifted by part of a patch,
          relative to raw's; both hold what interpolation between patches cannot know;
        - ``photo_variance``: share of raw's variance over places that is left on photos: the content.
    """
    fine = min(raw.blank.shape[1:3]) >= 3
    return {
        "blank_variance": _left(variance_over_places, features.blank, raw.blank),
        "blank_detail": _left(high_frequencies, features.blank, raw.blank) if fine else None,
        "blurred_detail": _left(high_frequencies, features.blurred, raw.blurred) if fine else None,
        "shift_change": _shift_left(features, raw),
        "photo_variance": _left(variance_over_places, features.shifted[0], raw.shifted[0]),
    }


def shift_change(features: BlankProbe) -> float:
    """Mean squared change of features (B, h, w, C) at the same place, over shifts; grids of 2 x 2 at least.

    Between patches of the photo as it is, features are interpolated linearly.
    """
    return float(
        torch.stack(
            [
                (moved[:, :-1, :-1].double() - _between(features.shifted[0].double(), part)).square().mean()
                for moved, part in zip(features.shifted[1:], features.shifts, strict=True)
            ]
        ).mean()
    )


def _between(features: Tensor, part: float) -> Tensor:
    """Features a part of the way to the next patch on both sides: (B, h, w, C) -> (B, h - 1, w - 1, C)."""
    down = torch.lerp(features[:, :-1], features[:, 1:], part)
    return torch.lerp(down[:, :, :-1], down[:, :, 1:], part)


def _shift_left(features: BlankProbe, raw: BlankProbe) -> float | None:
    if not len(raw.blurred) or min(raw.blank.shape[1:3]) < 2:
        return None
    whole = shift_change(raw)
    return shift_change(features) / whole if whole > _FLAT * _energy(raw.shifted[0]) else None


def _left(measure: Callable[[Tensor], float], features: Tensor, raw: Tensor) -> float | None:
    if not len(raw):
        return None
    whole = measure(raw)
    return measure(features) / whole if whole > _FLAT * _energy(raw) else None


def _energy(features: Tensor) -> float:
    return float(features.double().square().mean())


def _blank_images(size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) in [0, 1], the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((3,), 0.5)
    noise = [noise_image(size, grey, _CONTRAST, grain, generator) for grain in _GRAINS]
    return torch.cat([uniform_images(torch.tensor(_COLOURS), size), torch.stack(noise)])


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) of another size, in [0, 1]."""
    return interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def _through(extractor: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if not len(images):
        return torch.zeros(0, 1, 1, 1)
    return torch.cat([extractor(part).float().cpu() for part in images.split(_BATCH)])
