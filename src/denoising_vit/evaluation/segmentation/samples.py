"""What a probe is trained on, step by step: random crops of images, or features of whole images that are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.labelled import NO_LABEL, LabelledSet
from denoising_vit.evaluation.ordering import chosen
from denoising_vit.evaluation.patch_labels import patch_counts
from denoising_vit.evaluation.seeing import FeatureCache, see
from denoising_vit.evaluation.segmentation.augmentation import distort, labels_of, training_crop
from denoising_vit.evaluation.segmentation.probe import LinearProbe, to_pixels
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.evaluation.sizes import shown_size
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact
from denoising_vit.views.crops import Crop

#: What a stream of draws is for; the order has 1, so that no two share their numbers.
_CROPS = 2

#: Threads that decode and render crops.
_RENDERERS = 4


#: Inputs of the forward pass, the crop, and its labels (H, W).
_Drawn = tuple[Tensor, Crop, Tensor]


class Samples(Interface):
    """Where losses come from."""

    @property
    def channels(self) -> int:
        """C."""
        ...

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """The cross-entropy of a step's batch, a mean over all pixels; those without a label count as 0.

        It depends on the step alone, so that training can go on from any of them.
        """
        ...


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Features of whole images, taken once.

    A patch is one sample of as many labels as it shows pixels: the cross-entropy of one prediction for all pixels of a
    patch is that of their counts, and no interpolation is needed in training.

    Attributes:
        features: (h, w, C) of each image.
        counts: labels of each image's patches, (h, w, K + 1).
        batch: images a step.
        device: where probes are.
        seed: of the order.
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
    ) -> KeptFeatures:
        """Sees all images.

        Args:
            source: of the features.
            images: to train on.
            protocol: size and batch.
            cache: where features are kept on disk.
            progress: called after each image.

        Raises:
            EvaluationError: if features are not finite.
        """
        shown = [(image, Crop.whole(shown_size(protocol.size, image, source))) for image in images.images]
        classes, patch = len(images.class_names), (source.patch_size, source.stride)
        features = [compact(one) for one in see(source, shown, cache, progress)]
        counts = [patch_counts(image.labels(), crop, classes, *patch) for image, crop in shown]
        return cls(features, counts, min(protocol.batch, len(shown)), source.device)

    @property
    def channels(self) -> int:
        """C."""
        return self.features[0].shape[-1]

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """The cross-entropy of a step's images."""
        places = chosen(len(self.features), self.batch, step, self.seed)
        features = torch.cat([self.features[index].flatten(0, 1) for index in places])  # (h, w, C) each -> (N, C)
        counts = torch.cat([self.counts[index].flatten(0, 1) for index in places])  # (N, K + 1)
        scores = probe(features.to(self.device).float())
        counts = counts.to(scores)
        return -(scores.log_softmax(-1) * counts[:, :-1]).sum() / counts.sum()


class RandomCrops:
    """Random crops of images, rendered and passed through the model in every step, as published.

    Args:
        source: of the features.
        images: to train on.
        protocol: sizes and probabilities.
        seed: of the order, the crops and the colours.
        channels: C.
    """

    def __init__(
        self, source: FeatureSource, images: LabelledSet, protocol: Protocol, seed: int, channels: int
    ) -> None:
        self._channels = channels
        self._source, self._images, self._protocol, self._seed = source, images.images, protocol, seed
        self._pool = ThreadPoolExecutor(_RENDERERS, "render", torch.set_num_threads, (torch.get_num_threads(),))
        self._ahead: dict[int, list[Future[_Drawn]]] = {}

    @property
    def channels(self) -> int:
        """C."""
        return self._channels

    def __enter__(self) -> RandomCrops:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """The cross-entropy of a step's crops."""
        self._render(step)
        if self._source.device.type != "cpu" and step + 1 < self._protocol.steps:
            self._render(step + 1)  # while the accelerator works on this one
        drawn = [future.result() for future in self._ahead.pop(step)]
        features = self._source.features(torch.stack([inputs for inputs, _, _ in drawn]))
        scores = probe(features)
        total = torch.zeros((), device=scores.device)
        side = self._protocol.crop
        frame = (side, side) if self._protocol.pads == "stretched" else None
        for patches, (_, crop, labels) in zip(scores, drawn, strict=True):
            pixels = to_pixels(patches, crop, self._source.patch_size, self._source.stride, frame).flatten(0, 1)
            truth = labels.flatten().to(pixels.device)
            total = total + F.cross_entropy(pixels, truth, ignore_index=NO_LABEL, reduction="sum")
        return total / (len(drawn) * self._protocol.crop**2)

    def _render(self, step: int) -> None:
        if step not in self._ahead:
            batch = chosen(len(self._images), self._protocol.batch, step, self._seed)
            self._ahead[step] = [self._pool.submit(self._draw, index, step, place) for place, index in enumerate(batch)]

    def _draw(self, index: int, step: int, place: int) -> _Drawn:
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        image = self._images[index]
        labels = image.labels()
        crop = training_crop(labels, self._protocol, (self._source.patch_size, self._source.stride), chance)
        colour = functools.partial(distort, chance=chance) if self._protocol.distort else None
        return self._source.inputs(image, crop, colour), crop, labels_of(crop, labels)
