"""Training samples of a segmentation probe: random crops as published, or features of whole images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.labelled import LabelledImage, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.patches import centre_pads, crop_at, patch_counts, to_pixels, whole_images
from denoising_vit.evaluation.probing import RandomSamples, chosen
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact
from denoising_vit.views.crops import Crop

#: Number of the random stream for crops; the order of images uses stream 1.
_CROPS = 2

#: Inputs of the forward pass, the crop, and its labels (H, W).
_Drawn = tuple[Tensor, Crop, Tensor]

#: Number of crops to try before accepting one that a single class dominates.
_TRIES = 10


def scaled_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """(H, W) of an image scaled to the largest size within both limits, with its aspect ratio kept."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def training_crop(labels: Tensor, protocol: Protocol, patch: tuple[int, int], chance: np.random.Generator) -> Crop:
    """Draw a crop of a randomly scaled image, padded at the right and bottom to the crop size and to whole patches."""
    scale = chance.uniform(*protocol.scale)
    limits = int(protocol.short_side * scale), int(protocol.long_side * scale)
    height, width = scaled_size(labels.shape[0], labels.shape[1], *limits)
    crop = _crop_at(height, width, protocol.crop, patch, chance)
    for _ in range(_TRIES):
        if _mixed(labels_of(crop, labels), protocol.most):
            break
        crop = _crop_at(height, width, protocol.crop, patch, chance)
    return replace(crop, flip=bool(chance.random() < protocol.flip))


def labels_of(crop: Crop, labels: Tensor) -> Tensor:
    """Labels (H, W) of a crop without pads, by nearest neighbour."""
    rows, columns = (torch.from_numpy(found[found >= 0]) for found in crop.pixels(*labels.shape))
    return labels[rows][:, columns]


def distort(image: Tensor, chance: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image (3, H, W) in [0, 1], each with probability 1/2.

    Contrast changes before or after saturation and hue. Saturation blends with grey; the published code scales it in
    HSV.
    """
    brightness, contrast, saturation, hue, early = chance.random(5) < 0.5
    delta, factor = chance.uniform(-32, 32) / 255, chance.uniform(0.5, 1.5)
    richness, turn = chance.uniform(0.5, 1.5), chance.uniform(-18, 18) / 180
    if brightness:
        image = (image + delta).clamp(0, 1)
    if contrast and early:
        image = (image * factor).clamp(0, 1)
    if saturation:
        image = TF.adjust_saturation(image, richness)
    if hue:
        image = TF.adjust_hue(image, turn)
    if contrast and not early:
        image = (image * factor).clamp(0, 1)
    return image


def _crop_at(height: int, width: int, side: int, patch: tuple[int, int], chance: np.random.Generator) -> Crop:
    shown = min(side, height), min(side, width)
    top, left = (int(chance.integers(full - part + 1)) for full, part in zip((height, width), shown, strict=True))
    before_x, before_y, after_x, after_y = centre_pads(side, side, *patch)
    pads = before_x, before_y, after_x + side - shown[1], after_y + side - shown[0]
    return crop_at(top, left, shown, (height, width), pads)


def _mixed(labels: Tensor, most: float) -> bool:
    """True if there are at least two classes, none with more than the fraction ``most`` of the labels."""
    counts = torch.bincount(labels[labels != NO_LABEL].flatten())
    return int((counts > 0).sum()) > 1 and float(counts.max()) < most * float(counts.sum())


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Features of whole images, computed once.

    Each patch is one sample with the labels of all its pixels. The cross-entropy of one prediction for all these pixels
    equals that of their counts, so training needs no interpolation.

    Attributes:
        features: (h, w, C) of each image.
        counts: (h, w, K + 1) label counts of each image's patches.
        batch: images per step.
        device: device of the probes.
        seed: seed for the order of images.
    """

    features: Sequence[Tensor]
    counts: Sequence[Tensor]
    batch: int
    device: torch.device
    seed: int = 0

    @classmethod
    def take(
        cls,
        source: FeatureSource,
        images: LabelledSet,
        protocol: Protocol,
        cache: FeatureCache | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> Self:
        """Compute the features of all images; ``progress`` is called once per image."""
        shown = whole_images(images.images, protocol.size, source)
        classes = len(images.class_names)
        features = [compact(one) for one in see(source, shown, cache, progress)]
        counts = [patch_counts(image.labels(), crop, classes, *source.patch) for image, crop in shown]
        return cls(features, counts, min(protocol.batch, len(shown)), source.device)

    @property
    def channels(self) -> int:
        """Number of feature channels, C."""
        return self.features[0].shape[-1]

    def loss(self, probe: nn.Module, step: int) -> Tensor:
        """Cross-entropy on a step's images."""
        places = chosen(len(self.features), self.batch, step, self.seed)
        features = torch.cat([self.features[index].flatten(0, 1) for index in places])  # (h, w, C) each -> (N, C)
        counts = torch.cat([self.counts[index].flatten(0, 1) for index in places])  # (N, K + 1)
        likely = probe(features.to(self.device).float()).log_softmax(-1)  # log-probabilities (N, K)
        counts = counts.to(likely)
        return -(likely * counts[:, :-1]).sum() / counts.sum()


class RandomCrops(RandomSamples[LabelledImage, _Drawn]):
    """Random crops of images, rendered and passed through the model in every step, as published."""

    def __init__(self, source: FeatureSource, images: LabelledSet, protocol: Protocol, seed: int) -> None:
        super().__init__(source, images.images, protocol, seed)
        self._protocol = protocol

    @property
    def channels(self) -> int:
        """Number of feature channels, C."""
        inputs, _, _ = self._draw(0, 0, 0)
        return self._source.features(inputs[None]).shape[-1]

    def loss(self, probe: nn.Module, step: int) -> Tensor:
        """Cross-entropy on a step's crops, averaged over all pixels; pixels without a label contribute 0."""
        drawn = self.take(step)
        features = self._source.features(torch.stack([inputs for inputs, _, _ in drawn]))
        scores = probe(features)
        side, total = self._protocol.crop, torch.zeros((), device=scores.device)
        frame = (side, side) if self._protocol.pads == "stretched" else None
        for patches, (_, crop, labels) in zip(scores, drawn, strict=True):
            pixels = to_pixels(patches, crop, *self._source.patch, frame).flatten(0, 1)
            truth = labels.flatten().to(pixels.device)
            total = total + F.cross_entropy(pixels, truth, ignore_index=NO_LABEL, reduction="sum")
        return total / (len(drawn) * side**2)

    def _draw(self, index: int, step: int, place: int) -> _Drawn:
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        image = self._images[index]
        labels = image.labels()
        crop = training_crop(labels, self._protocol, self._source.patch, chance)
        colour = functools.partial(distort, chance=chance) if self._protocol.distort else None
        return self._source.inputs(image, crop, colour), crop, labels_of(crop, labels)
