"""Training linear probes: random crops in every step, or cached features of whole images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.labelled import LabelledData, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.patches import patch_counts, to_pixels
from denoising_vit.evaluation.probing import Curve, chosen, train
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.segmentation.crops import distort, labels_of, training_crop
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.evaluation.segmentation.scoring import LinearProbe, judge
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.step_samples import StepSamples
from denoising_vit.files import compact
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop

#: What a stream of draws is for; the order has 1, so that no two share their numbers.
_CROPS = 2


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
        self._samples = StepSamples(
            self._draw,
            images=len(images.images),
            batch=protocol.batch,
            steps=protocol.steps,
            seed=seed,
            device=source.device,
        )

    @property
    def channels(self) -> int:
        """C."""
        return self._channels

    def __enter__(self) -> RandomCrops:
        return self

    def __exit__(self, *exception: object) -> None:
        self._samples.__exit__(*exception)

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """The cross-entropy of a step's crops."""
        drawn = self._samples.take(step)
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

    def _draw(self, index: int, step: int, place: int) -> _Drawn:
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        image = self._images[index]
        labels = image.labels()
        crop = training_crop(labels, self._protocol, (self._source.patch_size, self._source.stride), chance)
        colour = functools.partial(distort, chance=chance) if self._protocol.distort else None
        return self._source.inputs(image, crop, colour), crop, labels_of(crop, labels)


@dataclass(frozen=True, eq=False)
class Trained:
    """One probe, trained and judged.

    Attributes:
        seed: of the probe.
        counts: over the labelled pixels of each validation image.
        curve: how training went; of the first seed alone, and where features are kept, with looks at the images of
            ``val``, which decide nothing.
    """

    seed: int
    counts: Counts
    curve: Curve


def linear_segmentation(
    source: FeatureSource,
    data: LabelledData,
    protocol: Protocol,
    seeds: Sequence[int],
    *,
    cache: FeatureCache | None = None,
    checkpoints: Path | None = None,
    watch: Progress = no_progress,
) -> Iterator[Trained]:
    """A linear probe on the images of ``train``, judged on those of ``val``, for each seed in turn.

    Args:
        source: of the features.
        data: the labelled images.
        protocol: how the probe is trained.
        seeds: of the probes.
        cache: where features of whole images are kept.
        checkpoints: folder for the state of long trainings, which go on from there.
        watch: shows progress.

    Raises:
        EvaluationError: if features are not finite, or nothing has a label.
        FitError: if training fails.
    """
    for images in (data.train, data.val):
        if not sum(images.pixels):
            raise EvaluationError(f"no pixel of the {images.split} images has a label; expected masks with classes")
    classes = len(data.train.class_names)

    def watched(probe: LinearProbe) -> float:
        return scores(judge(probe, source, data.val, protocol, cache)).miou

    kept = None
    if not protocol.augment:
        with watch(f"{source.name}: train images", len(data.train.images)) as advance:
            kept = KeptFeatures.take(source, data.train, protocol, cache, advance)
    for seed in seeds:
        steps = watch(f"{source.name}, seed {seed}: steps", protocol.steps)
        with _samples(kept, source, data, protocol, seed) as samples, steps as advance:
            probe = LinearProbe(samples.channels, classes, seed).to(source.device)
            curve = train(
                probe,
                samples.loss,
                protocol,
                checkpoint=None if checkpoints is None or kept is not None else checkpoints / f"{seed}.pt",
                look=watched if kept is not None and seed == seeds[0] else None,
                progress=advance,
            )
        with watch(f"{source.name}, seed {seed}: val images", len(data.val.images)) as advance:
            counts = judge(probe, source, data.val, protocol, cache, advance)
        yield Trained(seed, counts, curve)


def _samples(
    kept: KeptFeatures | None, source: FeatureSource, data: LabelledData, protocol: Protocol, seed: int
) -> contextlib.AbstractContextManager[Samples]:
    if kept is not None:
        return contextlib.nullcontext(dataclasses.replace(kept, seed=seed))
    first = data.train.images[0]
    (features,) = see(source, [(first, Crop.whole(shown_size(None, first, source)))])
    return RandomCrops(source, data.train, protocol, seed, features.shape[-1])
