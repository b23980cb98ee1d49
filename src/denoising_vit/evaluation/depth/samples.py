"""Training samples of a depth probe: random crops as published, or features of whole images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationSet
from denoising_vit.evaluation.depth.data import DepthImage
from denoising_vit.evaluation.depth.probe import DepthProbe, depth_loss, within
from denoising_vit.evaluation.depth.protocol import DepthProtocol
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.patches import centre_pads, crop_at, part_of, whole_images
from denoising_vit.evaluation.probing import RandomSamples, chosen
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_count

#: Rows and columns of an image.
Part = tuple[tuple[int, int], tuple[int, int]]

#: Rows and columns of an NYUv2 photo that training crops are drawn from; its border is white.
NYU_PART: Part = (45, 472), (43, 608)

#: Number of the random stream for crops; segmentation crops and image order have their own.
_CROPS = 3


@dataclass(frozen=True)
class Colours:
    """Colour augmentation of a crop.

    Attributes:
        gamma: exponent of the values from 0 to 255.
        factors: factors of the three channels, including brightness.
    """

    gamma: float
    factors: tuple[float, float, float]

    def __call__(self, image: Tensor) -> Tensor:
        """Augment an image (3, H, W) in [0, 1]; the result has the same shape and range."""
        factors = torch.tensor(self.factors, device=image.device)[:, None, None]
        return ((255 * image.clamp(min=0)) ** self.gamma * factors / 255).clamp(0, 1)


@dataclass(frozen=True)
class Drawn:
    """A training sample: an image, possibly rotated, a crop padded to whole patches, and its colour augmentation."""

    image: DepthImage
    crop: Crop
    colours: Colours | None

    def truth(self) -> Tensor:
        """Depth (H, W) of the crop in metres without its pads, 0 where it is unknown."""
        metres = self.image.metres()
        part = metres[part_of(self.crop, *metres.shape)]
        return part.flip(1) if self.crop.flip else part


def draw(
    image: DepthImage, protocol: DepthProtocol, part: Part | None, patch: tuple[int, int], chance: np.random.Generator
) -> Drawn:
    """Draw a training sample of an image.

    The crop is drawn from the ``part`` of rows and columns, or from the whole image if that is None; either must be at
    least as large as the crop.
    """
    (top, bottom), (left, right) = _require_room(image, protocol, part)
    height, width = protocol.crop
    turned = chance.random() < 0.5
    angle = chance.uniform(-protocol.rotate, protocol.rotate)
    flip = bool(chance.random() < protocol.flip)
    top += int(chance.integers(bottom - top - height + 1))
    left += int(chance.integers(right - left - width + 1))
    crop = crop_at(top, left, protocol.crop, (image.height, image.width), centre_pads(height, width, *patch))
    crop = replace(crop, flip=flip)
    return Drawn(image.rotated(angle) if turned and protocol.rotate else image, crop, _colours(protocol, chance))


def _require_room(image: DepthImage, protocol: DepthProtocol, part: Part | None) -> Part:
    """The part of an image that crops are drawn from; raises EvaluationError if it is smaller than a crop."""
    (top, bottom), (left, right) = part or ((0, image.height), (0, image.width))
    height, width = protocol.crop
    if bottom - top < height or right - left < width:
        raise EvaluationError(
            f"{image.id}: {image.width} x {image.height} pixels are smaller than the published protocol's crops of "
            f"{width} x {height}; use --preset quick"
        )
    return (top, bottom), (left, right)


def _colours(protocol: DepthProtocol, chance: np.random.Generator) -> Colours | None:
    changed = chance.random() < 0.5
    gamma, brightness = chance.uniform(*protocol.gamma), chance.uniform(*protocol.brightness)
    red, green, blue = (float(brightness * value) for value in chance.uniform(*protocol.colour, size=3))
    return Colours(float(gamma), (red, green, blue)) if changed else None


class DepthCrops(RandomSamples[DepthImage, tuple[Tensor, Drawn, Tensor]]):
    """Random crops of images or of a part of each, rendered and passed through the model in each step, as published."""

    def __init__(
        self,
        source: FeatureSource,
        images: EvaluationSet[DepthImage],
        part: Part | None,
        protocol: DepthProtocol,
        seed: int,
    ) -> None:
        for image in images.images:  # fail before training, not during it
            _require_room(image, protocol, part)
        super().__init__(source, images.images, protocol, seed)
        self._part, self._protocol = part, protocol

    @property
    def channels(self) -> int:
        """C of features and class token combined."""
        inputs, _, _ = self._draw(0, 0, 0)
        features, token = self._source.features_and_class(inputs[None])
        return features.shape[-1] + (token.shape[-1] if self._protocol.class_token else 0)

    def loss(self, probe: DepthProbe, step: int) -> Tensor:
        """Loss on a step's crops."""
        protocol, drawn = self._protocol, self.take(step)
        features, token = self._source.features_and_class(torch.stack([inputs for inputs, _, _ in drawn]))
        crop = drawn[0][1].crop
        rows, columns = crop.places_shown(crop.size if protocol.pads == "stretched" else None)
        token = token if protocol.class_token else None
        depth = probe.at_pixels(features, token, rows, columns, self._source.patch)
        truth = torch.stack([truth for _, _, truth in drawn]).to(depth.device)
        together = protocol.together or len(truth)
        losses = [
            depth_loss(predicted, part, protocol.gradient, mean_only=step < protocol.mean_first)
            for predicted, part in zip(depth.split(together), truth.split(together), strict=True)
        ]
        return torch.stack(losses).mean()

    def _draw(self, index: int, step: int, place: int) -> tuple[Tensor, Drawn, Tensor]:
        """Input of the forward pass, the sample, and its depth (H, W)."""
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        drawn = draw(self._images[index], self._protocol, self._part, self._source.patch, chance)
        inputs = self._source.inputs(drawn.image, drawn.crop, drawn.colours)
        return inputs, drawn, within(drawn.truth(), self._protocol.farthest)


@dataclass(frozen=True, eq=False)
class KeptDepth:
    """Features of whole images, computed once. The true depth of a patch is the mean of its known depths.

    Attributes:
        features: (h, w, C) of each image.
        tokens: class tokens (1, 1, C); empty if the protocol has none.
        truths: (h, w) in metres, 0 for patches without known depth.
        protocol: the training protocol.
        device: device of the probes.
        seed: seed for the order of images.
    """

    features: Sequence[Tensor]
    tokens: Sequence[Tensor]
    truths: Sequence[Tensor]
    protocol: DepthProtocol
    device: torch.device
    seed: int = 0

    @classmethod
    def take(
        cls,
        source: FeatureSource,
        images: EvaluationSet[DepthImage],
        protocol: DepthProtocol,
        cache: FeatureCache | None,
        progress: Callable[[], None] = lambda: None,
    ) -> Self:
        """Compute the features of all images in a set."""
        shown = whole_images(images.images, protocol.size, source)
        features = [compact(one) for one in see(source, shown, cache, progress)]
        tokens = [compact(one) for one in see(source.class_tokens(), shown, cache)] if protocol.class_token else []
        truths = [
            _at_patches(within(image.metres(), protocol.farthest), crop.size, source.patch) for image, crop in shown
        ]
        return cls(features, tokens, truths, protocol, source.device)

    @property
    def channels(self) -> int:
        """C of features and class token combined."""
        return self.features[0].shape[-1] + (self.tokens[0].shape[-1] if self.tokens else 0)

    def of(self, places: Sequence[int], seed: int = 0) -> Self:
        """The features of some of the images, with a seed for their order."""
        features, tokens, truths = (
            [values[place] for place in places] if values else []
            for values in (self.features, self.tokens, self.truths)
        )
        return type(self)(features, tokens, truths, self.protocol, self.device, seed)

    def loss(self, probe: DepthProbe, step: int) -> Tensor:
        """Loss on a step's images, averaged over groups with the same grid."""
        batch = min(self.protocol.batch, len(self.features))
        by_grid: dict[tuple[int, ...], list[int]] = {}
        for place in chosen(len(self.features), batch, step, self.seed):
            by_grid.setdefault(tuple(self.features[place].shape), []).append(place)

        def stacked(values: Sequence[Tensor], places: Sequence[int]) -> Tensor:
            return torch.stack([values[place] for place in places]).to(self.device).float()

        total = torch.zeros((), device=self.device)
        for places in by_grid.values():
            token = stacked(self.tokens, places) if self.tokens else None
            depth = probe.at_patches(stacked(self.features, places), token)
            mean_only = step < self.protocol.mean_first
            loss = depth_loss(depth, stacked(self.truths, places), self.protocol.gradient, mean_only=mean_only)
            total = total + loss * len(places) / batch
        return total


def _at_patches(metres: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Mean of the known depths (H, W) inside each patch (h, w) of an input of ``size``, 0 where none is known."""
    known = (metres > 0).float()
    down, across = (_overlaps(have, side, *patch) for have, side in zip(metres.shape, size, strict=True))
    area, total = (down @ values @ across.T for values in (known, metres * known))
    return torch.where(area > 0, total / area.clamp(min=1e-9), torch.zeros_like(total))


def _overlaps(pixels: int, side: int, patch_size: int, stride: int) -> Tensor:
    """Fraction of each pixel in each patch along one side, (patches, pixels), with ``pixels`` resized to ``side``."""
    first = np.arange(patch_count(side, patch_size, stride))[:, None] * stride
    start, stop = first * pixels / side, (first + patch_size) * pixels / side
    edges = np.arange(pixels)
    shared = np.minimum(stop, edges + 1) - np.maximum(start, edges)
    return torch.from_numpy(np.where(shared > 1e-6, shared, 0)).float()  # smaller values are rounding errors
