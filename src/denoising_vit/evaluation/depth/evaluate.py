"""Depth evaluation: train a linear probe per seed and block, then measure its errors as on NYUv2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationSet
from denoising_vit.evaluation.depth.data import NYU, DepthData, DepthImage, block_splits
from denoising_vit.evaluation.depth.probe import DepthProbe
from denoising_vit.evaluation.depth.protocol import DepthOptions, DepthProtocol
from denoising_vit.evaluation.depth.samples import NYU_PART, DepthCrops, KeptDepth, Part
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.options import recorded
from denoising_vit.evaluation.outcomes import Curve, Measured
from denoising_vit.evaluation.patches import centre_pads, whole_images
from denoising_vit.evaluation.probing import train
from denoising_vit.evaluation.sources import FeatureSource, no_augmented_fields
from denoising_vit.evaluation.workbench import Line, Task, Workbench
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop

#: Evaluated rows and columns of NYUv2 photos (Eigen et al. 2014).
EIGEN: Part = (45, 471), (41, 601)


@dataclass(frozen=True, eq=False)
class Depths(Measured):
    """Errors of each image; published figures are means over images."""

    METRICS: ClassVar[tuple[str, ...]] = ("RMSE", "AbsRel", "log10", "a1", "a2", "a3")


def depth_errors(predicted: Tensor, truth: Tensor, nearest: float, farthest: float) -> list[float]:
    """Errors of one image from depths in metres of any shape, in the order of :attr:`Depths.METRICS`.

    Root mean squared error in metres; mean of |error| / truth; mean of |log10 error|; percentage of pixels where the
    ratio of the larger depth to the smaller is below 1.25, 1.25^2 and 1.25^3 (Eigen et al. 2014). NaN if no pixel
    has a known depth between ``nearest`` and ``farthest``.
    """
    from torchmetrics.functional.regression import (  # takes a second to import
        mean_absolute_error,
        mean_absolute_percentage_error,
        mean_squared_error,
    )

    known = (truth > nearest) & (truth < farthest)
    if not known.any():
        return [float("nan")] * len(Depths.METRICS)
    ours, theirs = predicted[known].double(), truth[known].double()
    larger = torch.maximum(ours / theirs, theirs / ours)
    errors = (
        mean_squared_error(ours, theirs, squared=False),
        mean_absolute_percentage_error(ours, theirs),
        mean_absolute_error(ours.log10(), theirs.log10()),
        *(100 * (larger < 1.25**power).double().mean() for power in (1, 2, 3)),
    )
    return [float(error) for error in errors]


@torch.no_grad()
def evaluate_probe(
    probe: DepthProbe,
    source: FeatureSource,
    images: EvaluationSet[DepthImage],
    protocol: DepthProtocol,
    part: Part | None,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Errors of each image, (images, metrics); if ``part`` is given, only of its rows and columns."""
    rows, columns = (slice(*part[0]), slice(*part[1])) if part else (slice(None), slice(None))
    if protocol.augment:
        predicted = _padded(probe, source, images, protocol)
    else:
        predicted = _resized(probe, source, images, protocol, cache)
    errors = []
    for image, depth in zip(images.images, predicted, strict=True):
        depth = depth.clamp(protocol.nearest, protocol.farthest).cpu()
        truth = image.metres()
        errors.append(depth_errors(depth[rows, columns], truth[rows, columns], protocol.nearest, protocol.farthest))
        progress()
    return np.array(errors)


def _resized(
    probe: DepthProbe,
    source: FeatureSource,
    images: EvaluationSet[DepthImage],
    protocol: DepthProtocol,
    cache: FeatureCache | None,
) -> Iterator[Tensor]:
    """Depth (H, W) of each image, from features of the whole image resized to the patch grid."""
    shown = whole_images(images.images, protocol.size, source)
    features = see(source, shown, cache)
    tokens = see(source.class_tokens(), shown, cache) if protocol.class_token else iter([None] * len(shown))
    for (image, crop), one, token in zip(shown, features, tokens, strict=True):
        token = None if token is None else token[None].to(source.device)
        places = crop.places(image.height, image.width)
        yield probe.at_pixels(one[None].to(source.device), token, *places, source.patch)[0]


def _padded(
    probe: DepthProbe, source: FeatureSource, images: EvaluationSet[DepthImage], protocol: DepthProtocol
) -> Iterator[Tensor]:
    """Depth (H, W) of each image at its own size, padded; averaged with its mirror image for ``flip_test``."""
    for image in images.images:
        size = image.height, image.width
        crop = Crop((0.0, 0.0, 1.0, 1.0), size, centre_pads(*size, *source.patch))
        crops = [crop, replace(crop, flip=True)] if protocol.flip_test else [crop]
        features, token = source.features_and_class(torch.stack([source.inputs(image, one) for one in crops]))
        places = crop.places_shown(crop.size if protocol.pads == "stretched" else None)
        depth = probe.at_pixels(features, token if protocol.class_token else None, *places, source.patch)
        # Both are clamped before averaging, as published.
        depth = depth.clamp(protocol.nearest, protocol.farthest)
        yield depth[0] if len(depth) == 1 else (depth[0] + depth[1].flip(1)) / 2


@dataclass(frozen=True)
class LinearDepth:
    """Depth by linear probes on a source; interrupted trainings resume from their files in ``checkpoints``."""

    source: FeatureSource
    data: DepthData
    protocol: DepthProtocol
    cache: FeatureCache | None = None
    checkpoints: Path | None = None
    progress: Progress = no_progress

    def probes(self, seeds: Sequence[int]) -> Iterator[tuple[int, Depths, Curve]]:
        """For each seed, the errors of its probes on all evaluated photos, and the training curve of its first probe.

        Raises:
            EvaluationError: if features are not finite, if the source does not support the protocol's inputs, or if a
                split has no known depth.
            FitError: if training fails.
        """
        splits = block_splits(self.data)
        for images in (self.data.val, *(train_set for train_set, _ in splits)):
            _require_known(images, self.protocol.farthest)
        kept = None
        if not self.protocol.augment:
            with self.progress(f"{self.source.name}: images", len(self.data.train.images)) as advance:
                kept = KeptDepth.take(self.source, self.data.train, self.protocol, self.cache, advance)
        for seed in seeds:
            found, groups, curve = [], [], []
            for block, (train_set, val_set) in enumerate(splits):
                first = kept is not None and seed == seeds[0] and block == 0
                errors, looks = self._probe(kept, train_set, val_set, seed, block, curve_with_scores=first)
                found.append(errors)
                groups += [block] * len(errors) if self.data.blocks else list(range(len(errors)))
                curve = curve or looks
            yield seed, Depths(np.concatenate(found), np.array(groups, dtype=np.int64)), curve

    def _probe(
        self,
        kept: KeptDepth | None,
        train_set: EvaluationSet[DepthImage],
        val_set: EvaluationSet[DepthImage],
        seed: int,
        block: int,
        *,
        curve_with_scores: bool,
    ) -> tuple[np.ndarray, Curve]:
        """Train a probe and evaluate it: errors (images, metrics), and its training curve."""
        protocol, source = self.protocol, self.source
        nyu = self.data.layout == NYU

        def errors_of(probe: DepthProbe) -> np.ndarray:
            return evaluate_probe(probe, source, val_set, protocol, EIGEN if nyu else None, self.cache)

        if kept is not None:
            places = {image.id: place for place, image in enumerate(self.data.train.images)}
            samples = contextlib.nullcontext(kept.of([places[image.id] for image in train_set.images], seed))
            checkpoint = None
        else:
            samples = DepthCrops(source, train_set, NYU_PART if nyu else None, protocol, seed)
            checkpoint = self.checkpoints and self.checkpoints / f"{seed}-{block}.pt"
        what = f", block {block + 1} of {self.data.blocks}" if self.data.blocks else ""
        steps = self.progress(f"{source.name}, seed {seed}{what}: steps", protocol.steps)
        with samples as samples, steps as advance:
            limits = protocol.nearest, protocol.farthest
            probe = DepthProbe(samples.channels, protocol.bins, *limits, protocol.upsample, seed).to(source.device)
            curve = train(
                probe,
                samples.loss,
                protocol,
                checkpoint=checkpoint,
                look=(lambda probe: _mean(errors_of(probe)[:, 0])) if curve_with_scores else None,
                progress=advance,
            )
        return errors_of(probe), curve.entries


def _require_known(images: EvaluationSet[DepthImage], farthest: float) -> None:
    if all(image.least >= farthest for image in images.images):
        raise EvaluationError(
            f"none of the {len(images.images)} photos of {images.split} has a depth below {farthest:g} m, the farthest "
            "evaluated depth; correct --farthest or --depth-scale"
        )


def _mean(errors: np.ndarray) -> float:
    """Mean of the errors that are not NaN; NaN if there are none."""
    known = errors[~np.isnan(errors)]
    return float(known.mean()) if known.size else float("nan")


def depth(bench: Workbench, names: Sequence[str], options: DepthOptions) -> Iterator[Line]:
    """Evaluate depth by a linear probe on each source, with the first as the reference."""
    yield from by_protocol(bench, names, options.protocol(), options.seeds)


def by_protocol(
    bench: Workbench,
    names: Sequence[str],
    protocol: DepthProtocol,
    seeds: tuple[int, ...],
    published: dict[str, str] | None = None,
) -> Iterator[Line]:
    """Like :func:`depth`, with every setting of the protocol given."""
    data = bench.data_of(DepthData, "photos with depth maps")
    if protocol.augment and "exact" in names:  # fail before other sources are evaluated and fields fitted
        raise no_augmented_fields("exact")
    settings = recorded(protocol) | {"blocks": data.blocks}

    def evaluate(source: FeatureSource, missing: tuple[int, ...]) -> Iterator[tuple[int, Depths, Curve]]:
        checkpoints = bench.checkpoints(source, settings)
        return LinearDepth(source, data, protocol, bench.cache, checkpoints, bench.progress).probes(missing)

    task = Task(
        "depth",
        evaluate,
        settings,
        seeds,
        protocol.size,
        outcome=Depths,
        over=data.over,
        groups=data.groups,
        normalisation=protocol.normalisation,
        published=published,
    )
    yield from bench.compare(names, task)
