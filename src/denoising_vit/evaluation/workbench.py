"""Comparison of feature sources: each is evaluated on the same task and recorded as one line of results.

A task is one module with an options dataclass and one function that yields lines::

    def knn(bench: Workbench, names: Sequence[str], options: KnnOptions) -> Iterator[Line]:
        options.validate()
        task = bench.untrained("knn", nearest_neighbours, bench.labelled, options)
        yield from bench.compare(names, task)

The first source is the reference for the others. A task raises PlanError if an option is out of range, SizeError if
the size does not fit the patch grid, and EvaluationError for the wrong kind of data or an unknown name.

A score has one value per item (see `outcomes`), so that the difference between two sources gets a paired interval. A
task with training creates its own :class:`Task`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import DenoisingVitError, EvaluationError
from denoising_vit.evaluation.data import EvaluationData
from denoising_vit.evaluation.features import FeatureCache, Shown, fitted_fields
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.outcomes import METHOD, Curve, Outcome, paired_interval, record_of
from denoising_vit.evaluation.patches import check_size
from denoising_vit.evaluation.results import Record, Results, main_metric
from denoising_vit.evaluation.scores import Counts
from denoising_vit.evaluation.sources import ExtractorSource, FeatureSource, Normalisation, backbone_settings
from denoising_vit.extractors import KINDS, Cleaners, Extractor
from denoising_vit.files import atomic_path, digest
from denoising_vit.progress import Progress, no_progress

#: Mean and std of images in the published evaluation, the same for every model.
IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)

#: A line of results, and True if it is from an earlier run.
Line = tuple[dict[str, Any], bool]


@dataclass(frozen=True, eq=False)
class Task:
    """Definition of a task: how each source of features is evaluated.

    Attributes:
        name: a key of `results.TASKS`.
        evaluate: yields seed, outcome and curve of a source for each given seed.
        settings: JSON values that determine the results, besides data, backbone, features, size and seeds.
        seeds: seeds to average metrics over.
        size: height and width of the model's input in pixels; None for the image's own size.
        outcome: type of the outcomes.
        over: unit of the groups that intervals are taken over.
        groups: group of each item, (items,) int64, to replace the groups of the outcomes; ``over`` is then recorded in
            the settings. Saved outcomes do not depend on it.
        normalisation: normalisation of images: the backbone's own, or ImageNet's.
        crops: crops by split, if stage 1 fits each crop as an image of its own.
        whole_fields: evaluate crops with fields of whole images; recorded in the identity of the fields.
        published: model and variant of the published row that is reproduced.
    """

    name: str
    evaluate: Callable[[FeatureSource, tuple[int, ...]], Iterator[tuple[int, Outcome, Curve]]]
    settings: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    size: int | tuple[int, int] | None = None
    outcome: type[Outcome] = Counts
    over: str = "images"
    groups: np.ndarray | None = None
    normalisation: Literal["own", "imagenet"] = "own"
    crops: Mapping[str, Sequence[Shown]] | None = None
    whole_fields: bool = False
    published: dict[str, str] | None = None


Data = TypeVar("Data", bound=EvaluationData)


@dataclass(frozen=True, eq=False)
class Workbench:
    """Data, backbone, caches and results of a comparison.

    Attributes:
        data: the data set.
        backbone: the backbone.
        spec: how the backbone was loaded, for jobs that load it again.
        results: results file.
        folder: folder for cached features, fields and outcomes, reused by later runs.
        run: command, hardware and software, for the record.
        cache_bytes: maximum total size of cached features in bytes.
        exact: options of stage 1.
        fields_of: for evaluation on crops: fit each crop as an image of its own, or fit whole images.
        cleaners: sources of denoiser, artifact and distilled weights.
        extractors: further sources by name: extractor(image (B, 3, H, W)) -> (B, h, w, C). Caches and results identify
            them by name.
        progress: progress reporting.
    """

    data: EvaluationData
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
    progress: Progress = no_progress

    @cached_property
    def cache(self) -> FeatureCache:
        """Cached features on disk."""
        return FeatureCache(self.folder / "features", self.cache_bytes)

    def data_of(self, kind: type[Data], expected: str) -> Data:
        """The data; raises EvaluationError, which names the ``expected`` kind, if they are of another kind."""
        if not isinstance(self.data, kind):
            raise EvaluationError(f"{self.data.name}: expected {expected}, got {self.data.layout}")
        return self.data

    @property
    def labelled(self) -> LabelledData:
        """The data, checked to have classes.

        Raises:
            EvaluationError: if they have no classes, or fewer than two to score.
        """
        data = self.data_of(LabelledData, "photos with masks of classes")
        data.require_two_classes()
        return data

    def images_of(
        self, source: FeatureSource, items: str = "images", count: int | None = None
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Report a source's progress over ``count`` items; by default over all images of the data."""
        total = sum(len(images.images) for images in self.data.splits) if count is None else count
        return self.progress(f"{source.name}: {items}", total)

    def untrained(
        self,
        name: str,
        score: Callable[..., Outcome],
        data: EvaluationData,
        options: Any,
        *,
        items: str = "images",
        count: int | None = None,
        **fields: Any,
    ) -> Task:
        """A task without training.

        Args:
            name: a key of `results.TASKS`.
            score: ``score(source, data, options, cache=..., progress=...)`` returns the outcome of a source.
            data: the data, of the kind that the task needs.
            options: a dataclass with a ``size`` and optionally a ``seed``; the other fields are settings.
            items: name of the items that progress counts.
            count: number of items; defaults to the number of images.
            fields: further attributes of the task.
        """
        settings = asdict(options)
        seed = settings.pop("seed", 0)

        def evaluate(source: FeatureSource, _seeds: tuple[int, ...]) -> Iterator[tuple[int, Outcome, Curve]]:
            with self.images_of(source, items, count) as advance:
                yield seed, score(source, data, options, cache=self.cache, progress=advance), []

        return Task(name, evaluate, settings, (seed,), options.size, **fields)

    def compare(self, names: Sequence[str], task: Task) -> Iterator[Line]:
        """Evaluate sources in turn, by name; the first is the reference for the others.

        Raises:
            SizeError: if the size does not fit the patch grid.
            EvaluationError: if a name is unknown.
        """
        check_size(task.size, self.backbone)
        if taken := KINDS.keys() & self.extractors.keys():
            raise EvaluationError(f"extractors must not have the built-in names {', '.join(sorted(taken))}")
        known = (*KINDS, *self.extractors)
        if unknown := [name for name in names if name not in known]:
            raise EvaluationError(f"unknown features {', '.join(unknown)}; choose from {', '.join(known)}")
        yield from self.evaluate(task, {name: functools.partial(self._source, name, task) for name in names})

    def evaluate(self, task: Task, sources: Mapping[str, Callable[[], FeatureSource]]) -> Iterator[Line]:
        """Evaluate sources in turn; a failure is recorded and does not stop the comparison."""
        reference: _Reference | None = None
        for number, (name, make) in enumerate(sources.items()):
            record = self._record(task, name)
            started = time.perf_counter()
            try:
                source = make()
                record = replace(record, settings=_as_json({**record.settings, "features": source.identity}))
                outcomes = functools.partial(self._outcomes, task, source, record)
                line = self.results.find(record)
                if line is not None and _has_reference(line, reference):
                    yield line, True
                else:
                    scored = self._scored(task, record, *outcomes(), reference)
                    seconds = round(time.perf_counter() - started, 1)
                    yield self.results.add(replace(scored, seconds=seconds)), False
                if number == 0:
                    # The line may exist without its outcomes, which are recomputed only if another source needs them.
                    reference = _Reference(record, outcomes)
            except Exception as error:  # one source must not stop the comparison
                reason = str(error) if isinstance(error, DenoisingVitError) else f"{type(error).__name__}: {error}"
                yield self.results.add(replace(record, failed=reason)), False

    def checkpoints(self, source: FeatureSource, settings: Mapping[str, Any]) -> Path:
        """Folder for checkpoints of a source's probes."""
        return self.folder / "checkpoints" / digest([self._settings | dict(settings), source.name, source.identity], 16)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        data = self.data
        content = _text_digest(" ".join(images.digest for images in data.splits), 16)
        about: dict[str, Any] = {"name": data.name, "layout": data.layout, "digest": content}
        if isinstance(data, LabelledData) and data.score:
            about["scored"] = list(data.score)
        return {"data": about, "backbone": backbone_settings(self.backbone)}

    def _record(self, task: Task, name: str) -> Record:
        splits = self.data.splits
        settings = self._settings | dict(task.settings) | {"size": task.size or "native", "seeds": task.seeds}
        if task.groups is not None:
            settings |= {"over": task.over}
        return Record(
            task=task.name,
            features=name,
            settings=_as_json(settings),
            images={images.split: len(images.images) for images in splits},
            skipped=[[f"{images.split}/{item.item}", item.reason] for images in splits for item in images.skipped],
            absent=list(self.data.absent),
            run=dict(self.run),
            published=task.published,
        )

    def _outcomes(self, task: Task, source: FeatureSource, record: Record) -> tuple[list[Outcome], Curve]:
        """Outcome of each seed, loaded if saved by an earlier run, and the curve of the first seed."""
        # The outcome of a seed depends neither on the other seeds nor on the groups.
        settings = {name: value for name, value in record.settings.items() if name not in ("seeds", "over")}
        key = replace(record, settings=settings).key
        folder = self.folder / "counts"
        paths = {seed: folder / f"{_text_digest(f'{key} {seed}', 24)}.safetensors" for seed in task.seeds}
        done = {seed: found for seed, path in paths.items() if (found := _load(path, task.outcome)) is not None}
        missing = tuple(seed for seed in task.seeds if seed not in done)
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            for seed, outcome, curve in task.evaluate(source, missing):
                if isinstance(self.data, LabelledData) and isinstance(outcome, Counts):
                    outcome = outcome.only(self.data.scored_columns)
                done[seed] = outcome, curve
                _save(paths[seed], outcome, curve)
        found = [done[seed][0] for seed in task.seeds]
        if task.groups is not None:
            found = [replace(outcome, groups=task.groups) for outcome in found]
        return found, done[task.seeds[0]][1]

    def _scored(
        self, task: Task, record: Record, found: Sequence[Outcome], curve: Curve, reference: _Reference | None
    ) -> Record:
        each = [outcome.scored() for outcome in found]
        classes = [outcome.classes(self.data) for outcome in found]
        paired = None
        if reference is not None:
            interval = paired_interval(found, reference.outcomes()[0])
            metric = main_metric(task.name).name
            paired = record_of(interval, metric, reference.record.features, reference.key, task.over)
        return replace(
            record,
            metrics={name: _mean([one[name] for one in each]) for name in each[0]},
            seeds=[
                {"seed": seed, **{name: value if np.isfinite(value) else None for name, value in metrics.items()}}
                for seed, metrics in zip(task.seeds, each, strict=True)
            ],
            classes={
                name: {key: _mean([one[name][key] for one in classes]) for key in figures}
                for name, figures in classes[0].items()
            },
            paired=paired,
            curve=curve,
        )

    def _source(self, name: str, task: Task) -> FeatureSource:
        if name in self.extractors:
            extractor, identity = self.extractors[name], {"extractor": name}
        elif KINDS[name].per_image:
            return self._fields(name, task)
        else:
            extractor, identity = self.cleaners.extractor(name, self.backbone)
        if task.normalisation == "own":
            return ExtractorSource(name, self.backbone, extractor, identity)
        return ExtractorSource(name, self.backbone, extractor, identity | {"normalisation": "imagenet"}, IMAGENET)

    def _fields(self, name: str, task: Task) -> FeatureSource:
        if self.exact.method != "exact":
            raise EvaluationError(f"expected the exact method for stage 1 of a data set, got {self.exact.method!r}")
        source = fitted_fields(
            name,
            self.data,
            self.folder / "fields",
            self.backbone,
            self.spec,
            replace(self.exact, size=self.exact.size or task.size, held_out=0),
            artifact=self.cleaners.artifact,
            crops=task.crops,
            progress=self.progress,
        )
        if task.whole_fields:
            source.identity = source.identity | {"of": "image"}
        return source


@dataclass(frozen=True, eq=False)
class _Reference:
    """The reference source: its record, and a function that returns its outcomes and curve."""

    record: Record
    outcomes: Callable[[], tuple[list[Outcome], Curve]]

    @property
    def key(self) -> str:
        """Key that is equal for the same features in the same setting."""
        return _text_digest(self.record.key, 16)


def _has_reference(line: dict[str, Any], reference: _Reference | None) -> bool:
    """True if a line was compared with this reference, with the current interval method."""
    paired = line["paired"]
    if reference is None or paired is None:
        return reference is None and paired is None
    return paired.get("reference") == reference.key and paired.get("method") == METHOD


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Convert values to what JSON reads back, so that they compare equal to values from a file."""
    return json.loads(json.dumps(values))


def _text_digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _save(path: Path, outcome: Outcome, curve: Curve) -> None:
    looks = np.array([[step, loss, np.nan if score is None else score] for step, loss, score in curve]).reshape(-1, 3)
    # safetensors writes bytes in memory order, ignoring strides.
    arrays = {name: np.ascontiguousarray(values) for name, values in (outcome.arrays() | {"curve": looks}).items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary)


def _load(path: Path, outcome: type[Outcome]) -> tuple[Outcome, Curve] | None:
    try:
        arrays = load_file(path)
        found, looks = outcome.of(arrays), arrays["curve"].tolist()
    except (OSError, SafetensorError, KeyError):
        return None
    return found, [[int(step), loss, None if np.isnan(score) else score] for step, loss, score in looks]
