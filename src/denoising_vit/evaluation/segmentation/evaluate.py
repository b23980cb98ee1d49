"""Linear segmentation: a probe per seed, trained and scored on the validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation import outcomes
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.labelled import LabelledData, LabelledSet
from denoising_vit.evaluation.options import recorded
from denoising_vit.evaluation.patches import at_places, centre_pads, crop_at, part_of, to_image, to_pixels, whole_images
from denoising_vit.evaluation.probing import Curve, train
from denoising_vit.evaluation.scores import Counts, count, scores
from denoising_vit.evaluation.segmentation.protocol import Protocol, SegmentationOptions
from denoising_vit.evaluation.segmentation.samples import KeptFeatures, RandomCrops, scaled_size
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Task, Workbench
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop

#: Standard deviation of the initial weights of the published head.
_INITIAL_DEVIATION = 0.01


class LinearProbe(nn.Module):
    """Batch norm and a 1 x 1 convolution: features (..., C) -> class scores (..., K); ``seed`` sets the weights."""

    def __init__(self, channels: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.classify = nn.Linear(channels, classes)  # a 1 x 1 convolution on flattened tokens
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classify.weight.normal_(0, _INITIAL_DEVIATION, generator=generator)
            self.classify.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        tokens = self.norm(features.flatten(0, -2))  # (..., C) -> (N, C)
        return self.classify(tokens).unflatten(0, features.shape[:-1])


@torch.no_grad()
def evaluate_probe(
    probe: LinearProbe,
    source: FeatureSource,
    images: LabelledSet,
    protocol: Protocol,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Counts:
    """Counts over the labelled pixels of each image."""
    predict = _by_windows if protocol.augment else _at_once
    found = []
    for image, predicted in zip(images.images, predict(probe, source, images, protocol, cache), strict=True):
        found.append(count(predicted.argmax(-1), image.labels(), image.classes))
        progress()
    return Counts.joined(found)


def windows(height: int, width: int, protocol: Protocol, patch: tuple[int, int]) -> list[Crop]:
    """Windows of an image scaled to H x W pixels; the last windows end at its border."""
    side, step = protocol.window, protocol.window_stride
    tops, lefts = (
        [max(min(start, full - side), 0) for start in range(0, max(full - side + step - 1, 0) // step * step + 1, step)]
        for full in (height, width)
    )
    shown = min(side, height), min(side, width)
    pads = centre_pads(*shown, *patch)
    return [crop_at(top, left, shown, (height, width), pads) for top in tops for left in lefts]


def _at_once(
    probe: LinearProbe, source: FeatureSource, images: LabelledSet, protocol: Protocol, cache: FeatureCache | None
) -> Iterator[Tensor]:
    """Scores (H, W, K) at the pixels of each mask from features of the whole image."""
    shown = whole_images(images.images, protocol.size, source)
    for (image, crop), features in zip(shown, see(source, shown, cache), strict=True):
        patches = probe(features.to(source.device)).cpu()
        yield at_places(patches, *crop.places(image.height, image.width), *source.patch)


def _by_windows(
    probe: LinearProbe, source: FeatureSource, images: LabelledSet, protocol: Protocol, _cache: FeatureCache | None
) -> Iterator[Tensor]:
    """Scores (H, W, K) at the pixels of each mask, averaged over overlapping windows of the scaled image."""
    for image in images.images:
        height, width = scaled_size(image.height, image.width, protocol.short_side, protocol.long_side)
        crops = windows(height, width, protocol, source.patch)
        total = torch.zeros(height, width, image.classes)
        times = torch.zeros(height, width, 1)
        stacked = source.features(torch.stack([source.inputs(image, crop) for crop in crops]))
        for crop, features in zip(crops, stacked, strict=True):
            rows, columns = part_of(crop, height, width)
            frame = crop.size if protocol.pads == "stretched" else None
            total[rows, columns] += to_pixels(probe(features), crop, *source.patch, frame).cpu()
            times[rows, columns] += 1
        yield to_image(total / times, image.height, image.width)


# --- the task ---


def segmentation(bench: Workbench, names: Sequence[str], options: SegmentationOptions) -> Iterator[Line]:
    """Evaluate linear segmentation on each source, with the first as the reference."""
    yield from by_protocol(bench, names, options.protocol(), options.seeds)


def by_protocol(
    bench: Workbench,
    names: Sequence[str],
    protocol: Protocol,
    seeds: tuple[int, ...],
    published: dict[str, str] | None = None,
) -> Iterator[Line]:
    """Like :func:`segmentation`, with every setting of the protocol given."""
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
            yield probe.seed, probe.counts, probe.curve.entries

    task = Task("segmentation", evaluate, settings, seeds, protocol.size)
    yield from bench.compare(names, replace(task, normalisation=protocol.normalisation, published=published))


@dataclass(frozen=True, eq=False)
class Trained:
    """A probe's counts of each validation image, and its training curve."""

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

    Interrupted trainings resume from their files in ``checkpoints``.

    Raises:
        EvaluationError: if features are not finite, or no pixel has a label.
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
        if kept is None:
            samples = RandomCrops(source, data.train, protocol, seed)
        else:
            samples = nullcontext(replace(kept, seed=seed))
        steps = progress(f"{source.name}, seed {seed}: steps", protocol.steps)
        with samples as samples, steps as advance:
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
