"""Linear segmentation of one source of features: train a probe for each seed, judge it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.probing import Curve, train
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.seeing import FeatureCache, see
from denoising_vit.evaluation.segmentation.judging import judge
from denoising_vit.evaluation.segmentation.probe import LinearProbe
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.evaluation.segmentation.samples import KeptFeatures, RandomCrops, Samples
from denoising_vit.evaluation.sizes import shown_size
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop


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
