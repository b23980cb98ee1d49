"""Linear segmentation: training a probe on each source of features, and the task that compares sources."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol as Interface
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation import outcomes
from denoising_vit.evaluation.features import FeatureCache, see, whole_images
from denoising_vit.evaluation.labelled import LabelledData, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import recorded
from denoising_vit.evaluation.patches import patch_counts, to_pixels
from denoising_vit.evaluation.probing import Curve, chosen, train
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.segmentation.crops import distort, labels_of, training_crop
from denoising_vit.evaluation.segmentation.protocol import Protocol, SegmentationOptions
from denoising_vit.evaluation.segmentation.scoring import LinearProbe, evaluate_probe
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.step_samples import StepSamples
from denoising_vit.evaluation.workbench import IMAGENET, Line, Task, Workbench
from denoising_vit.files import compact
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop

#: Random stream of the crops; the order of images has 1.
_CROPS = 2

#: Inputs of the forward pass, the crop, and its labels (H, W).
_Drawn = tuple[Tensor, Crop, Tensor]


def segmentation(bench: Workbench, names: Sequence[str], options: SegmentationOptions) -> Iterator[Line]:
    """Linear segmentation by each source; the first is the reference of the others.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data have no classes, or a name is unknown.
    """
    yield from by_protocol(bench, names, options.protocol(), options.seeds)


def by_protocol(
    bench: Workbench,
    names: Sequence[str],
    protocol: Protocol,
    seeds: tuple[int, ...],
    published: dict[str, str] | None = None,
) -> Iterator[Line]:
    """As :func:`segmentation`, with a complete protocol, and the model and variant of the published row, if any."""
    data = bench.labelled
    settings = recorded(protocol)

    def evaluate(source: FeatureSource, missing: tuple[int, ...]) -> Iterator[tuple[int, Counts, outcomes.Curve]]:
        probes = linear_segmentation(
            source,
            data,
            protocol,
            missing,
            cache=bench.cache,
            checkpoints=bench.checkpoints(source, settings | {"size": protocol.size or "native"}),
            progress=bench.progress,
        )
        for probe in probes:
            scored = dict(probe.curve.looks)
            yield probe.seed, probe.counts, [[step, loss, scored.get(step)] for step, loss in probe.curve.losses]

    normalisation = None if protocol.normalisation == "own" else IMAGENET
    task = Task(
        "segmentation", evaluate, settings, seeds, protocol.size, normalisation=normalisation, published=published
    )
    yield from bench.compare(names, task)


class Samples(Interface):
    """Training samples of a probe."""

    @property
    def channels(self) -> int:
        """Number of feature channels, C."""
        ...

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """Cross-entropy of a step's batch, the mean over all pixels; pixels without a label count as 0.

        It depends on the step alone, so that training can resume at any step.
        """
        ...


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Features of whole images, computed once.

    Each patch is one sample with the labels of all its pixels: the cross-entropy of one prediction for all of them is
    that of their counts, so training needs no interpolation.

    Attributes:
        features: (h, w, C) of each image.
        counts: (h, w, K + 1) labels in each image's patches.
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
        """Compute the features of all images; ``progress`` is called after each.

        Raises:
            EvaluationError: if features are not finite.
        """
        shown = whole_images(images.images, protocol.size, source)
        classes, patch = len(images.class_names), (source.patch_size, source.stride)
        features = [compact(one) for one in see(source, shown, cache, progress)]
        counts = [patch_counts(image.labels(), crop, classes, *patch) for image, crop in shown]
        return cls(features, counts, min(protocol.batch, len(shown)), source.device)

    @property
    def channels(self) -> int:
        """Number of feature channels, C."""
        return self.features[0].shape[-1]

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """Cross-entropy of a step's images."""
        places = chosen(len(self.features), self.batch, step, self.seed)
        features = torch.cat([self.features[index].flatten(0, 1) for index in places])  # (h, w, C) each -> (N, C)
        counts = torch.cat([self.counts[index].flatten(0, 1) for index in places])  # (N, K + 1)
        scores = probe(features.to(self.device).float())
        counts = counts.to(scores)
        return -(scores.log_softmax(-1) * counts[:, :-1]).sum() / counts.sum()


class RandomCrops(StepSamples[_Drawn]):
    """Random crops of images, rendered and passed through the model in every step, as published."""

    def __init__(
        self, source: FeatureSource, images: LabelledSet, protocol: Protocol, seed: int, channels: int
    ) -> None:
        super().__init__(len(images.images), protocol.batch, protocol.steps, seed, source.device)
        self.channels = channels
        self._source, self._images, self._protocol = source, images.images, protocol

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        """Cross-entropy of a step's crops."""
        drawn = self.take(step)
        features = self._source.features(torch.stack([inputs for inputs, _, _ in drawn]))
        scores = probe(features)
        total = torch.zeros((), device=scores.device)
        side = self._protocol.crop
        frame = (side, side) if self._protocol.pads == "stretched" else None
        for patches, (_, crop, labels) in zip(scores, drawn, strict=True):
            pixels = to_pixels(patches, crop, self._source.patch_size, self._source.stride, frame).flatten(0, 1)
            truth = labels.flatten().to(pixels.device)
            total = total + F.cross_entropy(pixels, truth, ignore_index=NO_LABEL, reduction="sum")
        return total / (len(drawn) * side**2)

    def _draw(self, index: int, step: int, place: int) -> _Drawn:
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        image = self._images[index]
        labels = image.labels()
        crop = training_crop(labels, self._protocol, (self._source.patch_size, self._source.stride), chance)
        colour = functools.partial(distort, chance=chance) if self._protocol.distort else None
        return self._source.inputs(image, crop, colour), crop, labels_of(crop, labels)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained and evaluated probe.

    Attributes:
        seed: seed of the probe.
        counts: counts over the labelled pixels of each validation image.
        curve: training history; for the first seed on cached features with scores on ``val``, which decide nothing.
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
    progress: Progress = no_progress,
) -> Iterator[Trained]:
    """Train a linear probe on ``train`` and evaluate it on ``val``, for each seed in turn.

    Long trainings resume from their files in ``checkpoints``.

    Raises:
        EvaluationError: if features are not finite, or nothing has a label.
        FitError: if training fails.
    """
    for images in (data.train, data.val):
        if not sum(images.pixels):
            raise EvaluationError(f"no pixel of the {images.split} images has a label; expected masks with classes")
    classes = len(data.train.class_names)

    def miou(probe: LinearProbe) -> float:
        return scores(evaluate_probe(probe, source, data.val, protocol, cache)).miou

    kept = None
    if not protocol.augment:
        with progress(f"{source.name}: train images", len(data.train.images)) as advance:
            kept = KeptFeatures.take(source, data.train, protocol, cache, advance)
    for seed in seeds:
        steps = progress(f"{source.name}, seed {seed}: steps", protocol.steps)
        with _samples(kept, source, data, protocol, seed) as samples, steps as advance:
            probe = LinearProbe(samples.channels, classes, seed).to(source.device)
            curve = train(
                probe,
                samples.loss,
                protocol,
                checkpoint=None if checkpoints is None or kept is not None else checkpoints / f"{seed}.pt",
                look=miou if kept is not None and seed == seeds[0] else None,
                progress=advance,
            )
        with progress(f"{source.name}, seed {seed}: val images", len(data.val.images)) as advance:
            counts = evaluate_probe(probe, source, data.val, protocol, cache, advance)
        yield Trained(seed, counts, curve)


def _samples(
    kept: KeptFeatures | None, source: FeatureSource, data: LabelledData, protocol: Protocol, seed: int
) -> contextlib.AbstractContextManager[Samples]:
    if kept is not None:
        return contextlib.nullcontext(replace(kept, seed=seed))
    (features,) = see(source, whole_images(data.train.images[:1], None, source))
    return RandomCrops(source, data.train, protocol, seed, features.shape[-1])
