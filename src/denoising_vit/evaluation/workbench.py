"""Everything that a comparison of features needs: data, backbone, caches, results; and the tasks that use it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.comparison import Comparison, Curve, Judge
from denoising_vit.evaluation.data import JudgedData
from denoising_vit.evaluation.features import FeatureCache, Shown, check_size
from denoising_vit.evaluation.knn import crops_of, nearest_neighbours
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.named_sources import NamedSources, Normalisation
from denoising_vit.evaluation.options import KnnOptions, recorded
from denoising_vit.evaluation.outcomes import Outcome
from denoising_vit.evaluation.results import Results, Task
from denoising_vit.evaluation.scores import Counts
from denoising_vit.evaluation.segmentation import Protocol, SegmentationOptions, Trained, linear_segmentation
from denoising_vit.evaluation.sources import FeatureSource, backbone_settings
from denoising_vit.extractors import Cleaners, Extractor
from denoising_vit.files import digest
from denoising_vit.progress import Progress, no_progress

#: Mean and deviation that the published evaluation gives images of every model.
IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)

#: A line of results, and whether it was there already.
Line = tuple[dict[str, Any], bool]


@dataclass(frozen=True, eq=False)
class Workbench:
    """What sources of features are compared on, and with.

    Attributes:
        data: what they are judged on.
        backbone: whose features are judged.
        spec: the same in words.
        results: where lines go.
        folder: for features, fields and counts, which later runs find again.
        run: command, hardware and software, for the record.
        cache_bytes: most that cached features may take.
        exact: options of stage 1.
        fields_of: where crops are judged, whether stage 1 fits each crop as an image of its own, or whole images.
        cleaners: what cleans the features.
        extractors: further sources: extractor(image (B, 3, H, W)) -> (B, h, w, C), by names that stand for their
            features in caches and results.
        watch: shows progress.
    """

    data: JudgedData
    backbone: Backbone
    spec: BackboneSpec
    results: Results
    folder: Path
    run: Mapping[str, Any]
    cache_bytes: float = 10e9
    exact: DenoiseOptions = field(default_factory=DenoiseOptions)
    fields_of: Literal["crop", "image"] = "crop"
    cleaners: Cleaners = Cleaners()  # noqa: RUF009, frozen
    extractors: Mapping[str, Extractor] = field(default_factory=dict)
    watch: Progress = no_progress

    @cached_property
    def cache(self) -> FeatureCache:
        """Features on disk."""
        return FeatureCache(self.folder / "features", self.cache_bytes)

    def compare(
        self,
        names: Sequence[str],
        judge: Judge,
        *,
        task: Task,
        settings: Mapping[str, Any],
        seeds: tuple[int, ...],
        size: int | tuple[int, int] | None,
        outcome: type[Outcome] = Counts,
        over: str = "images",
        normalisation: Normalisation | None = None,
        crops: Mapping[str, Sequence[Shown]] | None = None,
        beyond: bool = False,
        published: dict[str, str] | None = None,
    ) -> Iterator[Line]:
        """Each source judged alike, the first one being what others are held against.

        Args:
            names: of the sources.
            judge: does one of them.
            task: what it is called in results.
            settings: what decides the results besides data, backbone and features, as JSON values.
            seeds: of the judge.
            size: at which images are shown; None for their own.
            outcome: of what kind the judge's outcomes are.
            over: what the groups are that intervals are taken over.
            normalisation: of images, where it is not the backbone's own.
            crops: by split, what is shown, where stage 1 is to fit each crop as an image of its own.
            beyond: whether crops are judged and stage 1 has seen the images beyond them.
            published: model and variant of the published row that is measured, if one is.

        Raises:
            SizeError: if the size does not fit the patch grid.
            EvaluationError: if a name is unknown.
        """
        check_size(size, self.backbone.patch_size, self.backbone.stride)
        comparison = Comparison(
            task=task,
            data=self.data,
            settings=self._settings() | dict(settings) | {"size": size or "native"},
            seeds=seeds,
            judge=self._limited(judge),
            results=self.results,
            counts=self.folder / "counts",
            run=self.run,
            published=published,
            outcome=outcome,
            over=over,
        )
        yield from comparison.compare(self._makers(names, size, normalisation, crops, beyond))

    def measure(
        self,
        names: Sequence[str],
        find: Callable[[FeatureSource, Callable[[], None]], Outcome],
        options: Any,
        *,
        task: Task,
        looks: str,
        count: int,
        outcome: type[Outcome] = Counts,
        over: str = "images",
        crops: Mapping[str, Sequence[Shown]] | None = None,
        beyond: bool = False,
    ) -> Iterator[Line]:
        """Each source judged alike by a task that trains nothing.

        Args:
            names: of the sources.
            find: the outcome of a source; it calls what it is given after each look.
            options: of the task, a dataclass with a size and perhaps a seed.
            task: what it is called in results.
            looks: what is looked at, for the progress.
            count: how many looks there are.
            outcome: of what kind the outcome is.
            over: what the groups are that intervals are taken over.
            crops: as for :meth:`compare`.
            beyond: as for :meth:`compare`.

        Raises:
            SizeError: if the size does not fit the patch grid.
            EvaluationError: if a name is unknown.
        """
        settings = asdict(options)
        seed = settings.pop("seed", 0)

        def judge(source: FeatureSource, _seeds: tuple[int, ...]) -> Iterator[tuple[int, Outcome, Curve]]:
            with self.watch(f"{source.name}: {looks}", count) as advance:
                yield seed, find(source, advance), []

        yield from self.compare(
            names,
            judge,
            task=task,
            settings=settings,
            seeds=(seed,),
            size=options.size,
            outcome=outcome,
            over=over,
            crops=crops,
            beyond=beyond,
        )

    def knn(self, names: Sequence[str], options: KnnOptions) -> Iterator[Line]:
        """Nearest-neighbour segmentation of each source, the first one being what others are held against.

        Raises:
            PlanError: if an option is out of range.
            SizeError: if the size does not fit the patch grid.
            EvaluationError: if the data have no classes.
        """
        options.validate()
        data = self.labelled
        check_size(options.size, self.backbone.patch_size, self.backbone.stride)
        crops, neutral = None, options.crops == "neutral"
        if neutral and self.fields_of == "crop":
            crops = {images.split: crops_of(images, self.backbone, options) for images in (data.train, data.val)}
        yield from self.measure(
            names,
            lambda source, advance: nearest_neighbours(source, data, options, cache=self.cache, progress=advance),
            options,
            task="knn",
            looks="images",
            count=len(data.train.images) + len(data.val.images),
            crops=crops,
            beyond=neutral and crops is None,
        )

    def segmentation(
        self, names: Sequence[str], options: SegmentationOptions, published: dict[str, str] | None = None
    ) -> Iterator[Line]:
        """Linear segmentation of each source, the first one being what others are held against.

        Args:
            names: of the sources.
            options: how the probe is trained.
            published: model and variant of the published row that is measured, if one is.

        Raises:
            PlanError: if an option is out of range.
        """
        yield from self.by_protocol(names, options.protocol(), options.seeds, published)

    def by_protocol(
        self, names: Sequence[str], protocol: Protocol, seeds: tuple[int, ...], published: dict[str, str] | None = None
    ) -> Iterator[Line]:
        """As :meth:`segmentation`, with every setting of the protocol given."""
        data = self.labelled
        settings = recorded(protocol)

        def judge(source: FeatureSource, missing: tuple[int, ...]) -> Iterator[tuple[int, Counts, Curve]]:
            probes = linear_segmentation(
                source,
                data,
                protocol,
                missing,
                cache=self.cache,
                checkpoints=self.checkpoints(source, settings | {"size": protocol.size or "native"}),
                watch=self.watch,
            )
            for probe in probes:
                yield probe.seed, probe.counts, _looks(probe)

        yield from self.compare(
            names,
            judge,
            task="segmentation",
            settings=settings,
            seeds=seeds,
            size=protocol.size,
            normalisation=None if protocol.normalisation == "own" else IMAGENET,
            published=published,
        )

    def checkpoints(self, source: FeatureSource, settings: Mapping[str, Any]) -> Path:
        """Where probes of a source in these settings are kept while they are trained."""
        key = [self._settings() | dict(settings), source.name, source.identity]
        return self.folder / "checkpoints" / digest(key, 16)

    @property
    def labelled(self) -> LabelledData:
        """The data, where they have classes.

        Raises:
            EvaluationError: if they have none, or fewer than two to score.
        """
        if not isinstance(self.data, LabelledData):
            raise EvaluationError(f"{self.data.name}: expected photos with masks of classes, got {self.data.layout}")
        self.data.require_two_classes()
        return self.data

    def _limited(self, judge: Judge) -> Judge:
        """The same with counts of the classes that are scored alone."""
        data = self.data
        if not isinstance(data, LabelledData) or not data.score:
            return judge
        columns = [number for number, name in enumerate(data.val.class_names) if name in data.score]

        def limited(source: FeatureSource, seeds: tuple[int, ...]) -> Iterator[tuple[int, Outcome, Curve]]:
            for seed, outcome, curve in judge(source, seeds):
                yield seed, outcome.only(columns) if isinstance(outcome, Counts) else outcome, curve

        return limited

    def _settings(self) -> dict[str, Any]:
        data = self.data
        digest = hashlib.sha256(" ".join(images.digest for images in data.splits).encode()).hexdigest()[:16]
        about: dict[str, Any] = {"name": data.name, "layout": data.layout, "digest": digest}
        if isinstance(data, LabelledData) and data.score:
            about["scored"] = list(data.score)
        return {"data": about, "backbone": backbone_settings(self.backbone)}

    def _makers(
        self,
        names: Sequence[str],
        size: int | tuple[int, int] | None,
        normalisation: Normalisation | None,
        crops: Mapping[str, Sequence[Shown]] | None,
        beyond: bool,
    ) -> dict[str, Callable[[], FeatureSource]]:
        sources = NamedSources(
            data=self.data,
            backbone=self.backbone,
            spec=self.spec,
            folder=self.folder / "fields",
            exact=replace(self.exact, size=self.exact.size or size),
            cleaners=self.cleaners,
            extractors=self.extractors,
            watch=self.watch,
            normalisation=normalisation,
            crops=crops,
            beyond=beyond,
        )
        return sources.makers(names)


def _looks(probe: Trained) -> Curve:
    """[step, loss, mIoU or None] at each look."""
    judged = dict(probe.curve.looks)
    return [[step, loss, judged.get(step)] for step, loss in probe.curve.losses]
