"""The blank-image test: remaining artifacts on images whose clean features are known, relative to raw features.

Clean features of a content-free image are the same everywhere, for any model, so any variation over positions is an
artifact. Such images need no labels, and serve as training pairs with artifact-free targets.

Four of the metrics are lower for cleaner features, and 0 for a constant map, so low values alone do not mean good
features. Read them together with ``photo_variance``: the fraction of the variance over positions that remains where
there is content. Under fine noise, patches still differ a little by chance, and heavily blurred photos still have soft
gradients, so only high frequencies are measured on the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from denoising_vit.backbones import Backbone
from denoising_vit.views.rendering import resized, to_image

#: Version of the images and metrics, recorded with results.
BLANK_TEST = 1

#: Number of photos to blur and shift.
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

#: Contrast of noise around grey, and sides of its grains in pixels. Higher contrast makes patches differ by chance.
_CONTRAST, _GRAINS = 0.01, (1, 3)

#: Side in pixels to which a photo is downscaled before it is upscaled again.
_BLUR = 4

#: Shifts of photos along both axes, as fractions of the patch stride.
_PARTS = (0.25, 0.5)

#: Raw features whose variance over positions is below this fraction of their mean square are flat: ratios are
#: undefined.
_FLAT = 1e-8

#: Number of images per forward pass.
_BATCH = 4

#: Fraction of single-coloured images among random ones, and fraction of black, grey and white among these.
_UNIFORM, _GREY = 0.6, 0.25

#: Maximum grain of noise in pixels: a patch contains many grains, so patches differ only by chance.
_WIDEST_GRAIN = 4

#: Minimum and maximum standard deviation of the noise in random images.
_RANDOM_CONTRAST = 0.01, 0.3


@dataclass(frozen=True, eq=False)
class BlankProbe:
    """Normalised images of the test, (B, 3, H, W) float32 on the CPU; or their features, (B, h, w, C).

    Attributes:
        blank: images of one colour, then fine noise.
        blurred: photos without detail; empty if no photos were given.
        shifted: the unchanged photos, then the photos with each shift.
        shifts: shifts along both axes, as fractions of the patch stride.
    """

    blank: Tensor
    blurred: Tensor
    shifted: tuple[Tensor, ...]
    shifts: tuple[float, ...]

    @classmethod
    def of(cls, backbone: Backbone, size: tuple[int, int], photos: Sequence[np.ndarray]) -> BlankProbe:
        """Images for a backbone's normalisation and patch grid.

        Args:
            backbone: the backbone.
            size: (H, W) of the images.
            photos: (H, W, 3) uint8; the first BLANK_PHOTOS of them are blurred and shifted.
        """
        steps = sorted({max(1, int(part * backbone.stride)) for part in _PARTS})
        larger = size[0] + steps[-1], size[1] + steps[-1]
        images = [to_image(photo)[None] for photo in photos[:BLANK_PHOTOS]]
        whole = torch.cat([torch.zeros(0, 3, *larger), *(resized(image, larger) for image in images)])
        few = [interpolate(image, (_BLUR, _BLUR), mode="area") for image in images]
        blurred = torch.cat([torch.zeros(0, 3, *size), *(resized(image, size) for image in few)])
        cuts = [whole[..., start : start + size[0], start : start + size[1]] for start in (0, *steps)]
        return cls(
            blank=backbone.normalise(_blank_images(size)),
            blurred=backbone.normalise(blurred),
            shifted=tuple(map(backbone.normalise, cuts)),
            shifts=tuple(step / backbone.stride for step in steps),
        )

    def through(self, extractor: Callable[[Tensor], Tensor]) -> BlankProbe:
        """Output of an extractor for all images, on the CPU: features of images, or clean features of raw ones."""
        return replace(
            self,
            blank=_through(extractor, self.blank),
            blurred=_through(extractor, self.blurred),
            shifted=tuple(_through(extractor, part) for part in self.shifted),
        )


def blank_figures(features: BlankProbe, raw: BlankProbe) -> dict[str, float | None]:
    """Metrics of features relative to raw features of the same images.

    1 is like raw; 0 is best, except for ``photo_variance``.

    Args:
        features: result of :meth:`BlankProbe.through`.
        raw: the same for the backbone itself.

    Returns:
        By name, None if raw features are flat, the grid is too small, or there are no photos:

        - ``blank_variance``: fraction of raw's variance over positions that remains on single-coloured images and
          noise;
        - ``blank_detail``: the same for high frequencies; grids of at least 3 x 3;
        - ``blurred_detail``: the same for high frequencies on heavily blurred photos;
        - ``shift_change``: squared change of features at the same position of a photo under sub-patch shifts, relative
          to raw's; both include the error of interpolating between patches;
        - ``photo_variance``: fraction of raw's variance over positions that remains on photos: the content.
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
    """Mean squared change of features (B, h, w, C) at the same position over all shifts; grids of at least 2 x 2.

    Features of the unchanged photo are interpolated linearly between patches.
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
    """Features at a fraction of the way to the next patch along both axes: (B, h, w, C) -> (B, h - 1, w - 1, C)."""
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
    """Fixed images (B, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((3,), 0.5)
    noise = [noise_image(size, grey, _CONTRAST, grain, generator) for grain in _GRAINS]
    return torch.cat([uniform_images(torch.tensor(_COLOURS), size), torch.stack(noise)])


@torch.no_grad()
def _through(extractor: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if not len(images):
        return torch.zeros(0, 1, 1, 1)
    return torch.cat([extractor(part).float().cpu() for part in images.split(_BATCH)])


def uniform_images(colours: Tensor, size: tuple[int, int]) -> Tensor:
    """Single-coloured images (B, 3, H, W) in [0, 1], from colours (B, 3) in [0, 1]."""
    return colours[:, :, None, None].expand(-1, -1, *size).clone()


def noise_image(
    size: tuple[int, int], colour: Tensor, contrast: float, grain: int, generator: torch.Generator
) -> Tensor:
    """Noise around a colour, (3, H, W) in [0, 1].

    Args:
        size: (H, W) in pixels.
        colour: (3,), in [0, 1].
        contrast: standard deviation of the noise before clamping to [0, 1].
        grain: side of a grain in pixels; wider grains are smooth.
        generator: random generator on the CPU.
    """
    drawn = torch.randn(1, 3, *(-(-side // grain) + 1 for side in size), generator=generator)
    smooth = interpolate(drawn, scale_factor=grain, mode="bicubic") if grain > 1 else drawn
    noise = smooth[0, :, : size[0], : size[1]]
    return (colour[:, None, None] + contrast * noise / noise.std()).clamp(0, 1)


def random_blank_images(
    count: int, size: tuple[int, int], seed: int, contrast: tuple[float, float] = _RANDOM_CONTRAST
) -> Tensor:
    """Random uniform colours and fine noise, (B, 3, H, W) float32 in [0, 1], on the CPU; fixed by the seed.

    The shipped denoiser was trained with the default contrast. Above about 0.01, features of noise differ between
    patches by chance, and a target that is the same everywhere also trains a denoiser to remove these differences: with
    the default, for 40 % of all images. Lower the upper limit for images without any content.

    Args:
        count: number of images.
        size: (H, W) in pixels.
        seed: seed for the colours and the noise.
        contrast: range of the noise's standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        kind, grey, shade, power, grain = torch.rand(5, generator=generator).tolist()
        colour = torch.rand(3, generator=generator)
        if grey < _GREY:
            colour = torch.full((3,), round(2 * shade) / 2)  # black, mid-grey or white
        if kind < _UNIFORM:
            images.append(uniform_images(colour[None], size)[0])
            continue
        deviation = contrast[0] * (contrast[1] / contrast[0]) ** power
        images.append(noise_image(size, colour, deviation, 1 + int(grain * _WIDEST_GRAIN), generator))
    return torch.stack(images)


def variance_over_places(features: Tensor) -> float:
    """Variance of features (B, h, w, C) over positions, averaged over images and channels."""
    return float(features.double().flatten(1, 2).var(1, correction=0).mean())


def high_frequencies(features: Tensor) -> float:
    """Mean square of features (B, h, w, C) after subtracting their 3 x 3 mean: differences between adjacent patches."""
    planes = features.double().permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
    smooth = avg_pool2d(planes, 3, stride=1)
    return float((planes[..., 1:-1, 1:-1] - smooth).square().mean())
