"""Depth by a linear probe on one source of features: train for each seed and block, judge all photos."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.comparison import Curve
from denoising_vit.evaluation.data import JudgedSet
from denoising_vit.evaluation.depth.augmentation import NYU_PART
from denoising_vit.evaluation.depth.data import NYU, DepthData, block_splits
from denoising_vit.evaluation.depth.head import DepthProbe
from denoising_vit.evaluation.depth.images import DepthImage
from denoising_vit.evaluation.depth.judging import EIGEN, Depths, judge_depth
from denoising_vit.evaluation.depth.protocol import DepthOptions, DepthProtocol
from denoising_vit.evaluation.depth.samples import DepthCrops, KeptDepth
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.options import recorded
from denoising_vit.evaluation.probing import train
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import IMAGENET, Line, Workbench
from denoising_vit.progress import Progress, no_progress


@dataclass(frozen=True)
class LinearDepth:
    """What is the same for all probes of one source.

    Attributes:
        source: of the features.
        data: photos with depth.
        protocol: how probes are trained and judged.
        cache: where features of whole images are kept.
        checkpoints: folder for the state of long trainings, which go on from there.
        watch: shows progress.
    """

    source: FeatureSource
    data: DepthData
    protocol: DepthProtocol
    cache: FeatureCache | None = None
    checkpoints: Path | None = None
    watch: Progress = no_progress

    def probes(self, seeds: Sequence[int]) -> Iterator[tuple[int, Depths, Curve]]:
        """The errors of each seed's probes on all judged photos, and the curve of the first seed's first probe.

        Raises:
            EvaluationError: if features are not finite, or cannot be had as the protocol shows images, or there is no
                depth to learn from or to judge.
            FitError: if training fails.
        """
        for images in (self.data.val, *(trained for trained, _ in block_splits(self.data))):
            _require_known(images, self.protocol.farthest)
        kept = self._kept()
        for seed in seeds:
            found, groups, curve = [], [], []
            for block, (trained, judged) in enumerate(block_splits(self.data)):
                looked = kept is not None and seed == seeds[0] and block == 0
                errors, looks = self._probe(kept, trained, judged, seed, block, looked)
                found.append(errors)
                groups += [block] * len(errors) if self.data.blocks else list(range(len(errors)))
                curve = curve or looks
            yield seed, Depths(np.concatenate(found), np.array(groups, dtype=np.int64)), curve

    def _kept(self) -> KeptDepth | None:
        """Features of all images that probes are trained on; none where they see crops."""
        if self.protocol.augment:
            return None
        images = self.data.train
        with self.watch(f"{self.source.name}: images", len(images.images)) as advance:
            return KeptDepth.take(self.source, images, self.protocol, self.cache, advance)

    def _probe(
        self,
        kept: KeptDepth | None,
        trained: JudgedSet[DepthImage],
        judged: JudgedSet[DepthImage],
        seed: int,
        block: int,
        looked: bool,
    ) -> tuple[np.ndarray, Curve]:
        protocol, source = self.protocol, self.source
        nyu = self.data.layout == NYU
        of = f", block {block + 1} of {self.data.blocks}" if self.data.blocks else ""
        limits = protocol.nearest, protocol.farthest

        def judge(probe: DepthProbe) -> np.ndarray:
            return judge_depth(probe, source, judged, protocol, EIGEN if nyu else None, self.cache)

        if kept is not None:
            places = {image.id: place for place, image in enumerate(self.data.train.images)}
            kept = dataclasses.replace(kept.of([places[image.id] for image in trained.images]), seed=seed)
        samples = (
            contextlib.nullcontext(kept)
            if kept
            else DepthCrops(source, trained, NYU_PART if nyu else None, protocol, seed)
        )
        steps = self.watch(f"{source.name}, seed {seed}{of}: steps", protocol.steps)
        with samples as samples, steps as advance:
            probe = DepthProbe(samples.channels, protocol.bins, *limits, protocol.upsample, seed).to(source.device)
            curve = train(
                probe,
                samples.loss,
                protocol,
                checkpoint=None if self.checkpoints is None or kept else self.checkpoints / f"{seed}-{block}.pt",
                look=(lambda probe: _mean(judge(probe)[:, 0])) if looked else None,
                progress=advance,
            )
        looks = {step: score for step, score in curve.looks if np.isfinite(score)}
        return judge(probe), [[step, loss, looks.get(step)] for step, loss in curve.losses]


def _require_known(images: JudgedSet[DepthImage], farthest: float) -> None:
    if all(image.least >= farthest for image in images.images):
        raise EvaluationError(
            f"no depth of {len(images.images)} photos of {images.split} is below {farthest:g} m, the farthest that is "
            "judged; give the right --farthest, or --depth-scale"
        )


def _mean(errors: np.ndarray) -> float:
    """Of the images that have any; NaN where none has."""
    known = errors[~np.isnan(errors)]
    return float(known.mean()) if known.size else float("nan")


def depth(bench: Workbench, names: Sequence[str], options: DepthOptions) -> Iterator[Line]:
    """Depth by a linear probe on each source, the first one being what others are held against.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data have no depth, or fields of stage 1 are to be judged by the published protocol.
    """
    yield from by_protocol(bench, names, options.protocol(), options.seeds)


def by_protocol(
    bench: Workbench,
    names: Sequence[str],
    protocol: DepthProtocol,
    seeds: tuple[int, ...],
    published: dict[str, str] | None = None,
) -> Iterator[Line]:
    """As :func:`depth`, with every setting of the protocol given.

    Args:
        bench: with photos and their depth.
        names: of the sources.
        protocol: how probes are trained and judged.
        seeds: of the probes.
        published: model and variant of the published row that is measured, if one is.
    """
    data = bench.data
    if not isinstance(data, DepthData):
        raise EvaluationError(f"{data.name}: expected photos with depth maps, got {data.layout}")
    if protocol.augment and "exact" in names:  # before the others are judged and the fields fitted
        raise EvaluationError(
            "exact: fields of stage 1 belong to images as they are, not to rotated or recoloured ones, as the "
            "published training shows them; judge them by --preset quick, or leave them out of --features"
        )
    settings = recorded(protocol) | {"blocks": data.blocks}

    def judge(source: FeatureSource, missing: tuple[int, ...]) -> Iterator[tuple[int, Depths, Curve]]:
        checkpoints = bench.checkpoints(source, settings)
        return LinearDepth(source, data, protocol, bench.cache, checkpoints, bench.watch).probes(missing)

    yield from bench.compare(
        names,
        judge,
        task="depth",
        settings=settings,
        seeds=seeds,
        size=protocol.size,
        outcome=Depths,
        over="blocks" if data.blocks else "images",
        normalisation=None if protocol.normalisation == "own" else IMAGENET,
        published=published,
    )
