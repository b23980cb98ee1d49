"""Random rotations, crops and colours of the published protocol."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.depth.images import DepthImage
from denoising_vit.evaluation.depth.protocol import DepthProtocol
from denoising_vit.evaluation.patches import centre_pads
from denoising_vit.views.crops import Crop

#: The part of a photo of NYUv2 that training crops come from: rows, then columns; its border is white.
NYU_PART = (45, 472), (43, 608)


@dataclass(frozen=True)
class Colours:
    """What is done to the colours of a crop.

    Attributes:
        gamma: exponent of values from 0 to 255.
        factors: of the three channels, brightness among them.
    """

    gamma: float
    factors: tuple[float, float, float]

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) in [0, 1] to the same."""
        factors = torch.tensor(self.factors, device=image.device)[:, None, None]
        return ((255 * image.clamp(min=0)) ** self.gamma * factors / 255).clamp(0, 1)


@dataclass(frozen=True)
class Drawn:
    """One training sample.

    Attributes:
        image: turned, or as it is.
        crop: what is shown, padded to whole patches.
        colours: what is done to them; None leaves them as they are.
    """

    image: DepthImage
    crop: Crop
    colours: Colours | None

    def truth(self) -> Tensor:
        """Depth (H, W) in metres of the crop, pads left out; 0 where it is not known."""
        metres = self.image.metres()
        left, top = round(self.crop.box[0] * metres.shape[1]), round(self.crop.box[1] * metres.shape[0])
        part = metres[top : top + self.crop.size[0], left : left + self.crop.size[1]]
        return part.flip(1) if self.crop.flip else part


def draw(
    image: DepthImage,
    protocol: DepthProtocol,
    part: tuple[tuple[int, int], tuple[int, int]] | None,
    patch: tuple[int, int],
    chance: np.random.Generator,
) -> Drawn:
    """A training sample of an image.

    Args:
        image: as it is.
        protocol: sizes, ranges and probabilities.
        part: rows and columns that crops come from; None for the whole image.
        patch: size and stride of the patches.
        chance: where draws come from.

    Raises:
        EvaluationError: if the image is smaller than a crop.
    """
    require_room(image, protocol, part)
    (top, bottom), (left, right) = part or ((0, image.height), (0, image.width))
    height, width = protocol.crop
    turned = chance.random() < 0.5
    angle = chance.uniform(-protocol.rotate, protocol.rotate)
    flip = bool(chance.random() < protocol.flip)
    top += int(chance.integers(bottom - top - height + 1))
    left += int(chance.integers(right - left - width + 1))
    box = (left / image.width, top / image.height, (left + width) / image.width, (top + height) / image.height)
    crop = Crop(box, (height, width), centre_pads(height, width, *patch), flip=flip)
    return Drawn(image.rotated(angle) if turned and protocol.rotate else image, crop, _colours(protocol, chance))


def require_room(
    image: DepthImage, protocol: DepthProtocol, part: tuple[tuple[int, int], tuple[int, int]] | None
) -> None:
    """Refuses an image, or the part of it that crops come from, that is smaller than a crop.

    Raises:
        EvaluationError: if it is.
    """
    (top, bottom), (left, right) = part or ((0, image.height), (0, image.width))
    height, width = protocol.crop
    if bottom - top < height or right - left < width:
        raise EvaluationError(
            f"{image.id}: {image.width} x {image.height} pixels are less than the crops of {width} x {height} of the "
            "published protocol; use --preset quick"
        )


def _colours(protocol: DepthProtocol, chance: np.random.Generator) -> Colours | None:
    changed = chance.random() < 0.5
    gamma, brightness = chance.uniform(*protocol.gamma), chance.uniform(*protocol.brightness)
    red, green, blue = (float(brightness * value) for value in chance.uniform(*protocol.colour, size=3))
    return Colours(float(gamma), (red, green, blue)) if changed else None
