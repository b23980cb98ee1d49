"""Several sources of features judged alike: each against the first of them, one line of results each."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation.data import JudgedData
from denoising_vit.evaluation.outcomes import METHOD, Outcome, paired_interval, record_of
from denoising_vit.evaluation.results import Record, Results, Task, main_metric
from denoising_vit.evaluation.scores import Counts
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import atomic_path

#: Looks of a training at its loss and at the validation images: [step, loss, mIoU or None].
Curve = list[list[Any]]


@dataclass(frozen=True, eq=False)
class _Reference:
    """What others are held against: its record, and what gives its outcomes for each seed."""

    record: Record
    counted: Callable[[], tuple[list[Outcome], Curve]]

    @property
    def key(self) -> str:
        """The same for the same features in the same setting."""
        return hashlib.sha256(self.record.key.encode()).hexdigest()[:16]


#: Yields the seed, the outcome and the curve of each probe that is still to be done.
Judge = Callable[[FeatureSource, tuple[int, ...]], Iterator[tuple[int, Outcome, Curve]]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is the same for all sources.

    Attributes:
        task: what they are judged by.
        data: what they are judged on.
        settings: what decides the results besides the features and the seeds, as JSON values.
        seeds: of the probes.
        judge: does a source for the seeds it is given.
        results: where lines go.
        counts: folder for what each item contributed, so that a later run can compare with it.
        run: command, hardware, software.
        published: model and variant, where a published row is measured.
        outcome: of what kind the outcomes are.
        over: what the groups of items are that a difference's interval is taken over.
    """

    task: Task
    data: JudgedData
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    judge: Judge
    results: Results
    counts: Path
    run: Mapping[str, Any]
    published: dict[str, str] | None = None
    outcome: type[Outcome] = Counts
    over: str = "images"

    def compare(self, sources: Mapping[str, Callable[[], FeatureSource]]) -> Iterator[tuple[dict[str, Any], bool]]:
        """Judges sources in turn; what fails is recorded, and the next is done.

        Args:
            sources: by name, made when their turn comes. The first is what the others are held against.

        Yields:
            The line of results, and whether it was there already.
        """
        reference: _Reference | None = None
        for number, (name, make) in enumerate(sources.items()):
            record = self._blank(name)
            started = time.perf_counter()
            try:
                source = make()
                record = replace(record, settings=_plain({**record.settings, "features": source.identity}))
                there = self.results.find(record)
                if there is not None and _against(there, reference):
                    yield there, True
                else:
                    scored = self._scored(record, *self._counted(source, record), reference)
                    seconds = round(time.perf_counter() - started, 1)
                    yield self.results.add(replace(scored, seconds=seconds)), False
                if number == 0:
                    # Counted only where another is held against it: its line may be there, and its counts gone.
                    reference = _Reference(record, functools.partial(self._counted, source, record))
            except Exception as error:  # one source must not end the comparison, whatever is wrong with it
                reason = str(error) if isinstance(error, DenoisingVitError) else f"{type(error).__name__}: {error}"
                yield self.results.add(replace(record, failed=reason)), False

    def _blank(self, name: str) -> Record:
        splits = self.data.splits
        return Record(
            task=self.task,
            features=name,
            settings=_plain({**self.settings, "seeds": self.seeds}),
            images={images.split: len(images.images) for images in splits},
            skipped=[[f"{images.split}/{item.item}", item.reason] for images in splits for item in images.skipped],
            absent=list(self.data.absent),
            run=dict(self.run),
            published=self.published,
        )

    def _counted(self, source: FeatureSource, record: Record) -> tuple[list[Outcome], Curve]:
        """Outcomes for each seed, kept ones where there are any, and the first seed's curve."""
        # Which other seeds there are changes nothing in what a seed gives.
        alone = replace(record, settings={key: value for key, value in record.settings.items() if key != "seeds"})
        paths = {seed: self.counts / f"{_digest(alone.key, seed)}.safetensors" for seed in self.seeds}
        kept = {seed: found for seed, path in paths.items() if (found := self._load(path)) is not None}
        missing = tuple(seed for seed in self.seeds if seed not in kept)
        if missing:
            self.counts.mkdir(parents=True, exist_ok=True)
            for seed, outcome, curve in self.judge(source, missing):
                kept[seed] = outcome, curve
                _save(paths[seed], outcome, curve)
        return [kept[seed][0] for seed in self.seeds], kept[self.seeds[0]][1]

    def _scored(self, record: Record, found: Sequence[Outcome], curve: Curve, reference: _Reference | None) -> Record:
        each = [one.scored() for one in found]
        seeds = [
            {"seed": seed, **{name: value if np.isfinite(value) else None for name, value in metrics.items()}}
            for seed, metrics in zip(self.seeds, each, strict=True)
        ]
        classes = [one.classes(self.data) for one in found]
        paired = None
        if reference is not None:
            interval = paired_interval(found, reference.counted()[0])
            metric = main_metric(self.task).name
            paired = record_of(interval, metric, reference.record.features, reference.key, self.over)
        return replace(
            record,
            metrics={name: _mean([one[name] for one in each]) for name in each[0]},
            seeds=seeds,
            classes={
                name: {key: _mean([one[name][key] for one in classes]) for key in figures}
                for name, figures in classes[0].items()
            },
            paired=paired,
            curve=curve,
        )

    def _load(self, path: Path) -> tuple[Outcome, Curve] | None:
        try:
            arrays = load_file(path)
            outcome, looks = self.outcome.of(arrays), arrays["curve"].tolist()
        except (OSError, SafetensorError, KeyError):
            return None
        return outcome, [[int(step), loss, None if np.isnan(score) else score] for step, loss, score in looks]


def _against(there: dict[str, Any], reference: _Reference | None) -> bool:
    """Whether a line was held against this reference, its interval made as it would be now."""
    if reference is None or there["paired"] is None:
        return reference is None and there["paired"] is None
    return there["paired"].get("reference") == reference.key and there["paired"].get("method") == METHOD


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As they are after a way through JSON, so that equal means equal."""
    return json.loads(json.dumps(values))


def _digest(key: str, seed: int) -> str:
    return hashlib.sha256(f"{key} {seed}".encode()).hexdigest()[:24]


def _save(path: Path, outcome: Outcome, curve: Curve) -> None:
    looks = np.array([[step, loss, np.nan if score is None else score] for step, loss, score in curve]).reshape(-1, 3)
    # Bytes are written in the order of memory, whatever the strides.
    arrays = {name: np.ascontiguousarray(values) for name, values in (outcome.arrays() | {"curve": looks}).items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary)
