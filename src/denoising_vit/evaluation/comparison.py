"""Several sources of features judged alike: each against the first of them, one line of results each."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.records import Record, Results, Task
from denoising_vit.evaluation.scores import DRAWS, Counts, paired_interval, scores
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import atomic_path

#: Looks of a training at its loss and at the validation images: [step, loss, mIoU or None].
Curve = list[list[Any]]


@dataclass(frozen=True, eq=False)
class _Reference:
    """What others are held against: its record, and what gives its counts for each seed."""

    record: Record
    counted: Callable[[], tuple[list[Counts], Curve]]

    @property
    def key(self) -> str:
        """The same for the same features in the same setting."""
        return hashlib.sha256(self.record.key.encode()).hexdigest()[:16]


#: Yields the seed, the counts and the curve of each probe that is still to be done.
Judge = Callable[[FeatureSource, tuple[int, ...]], Iterator[tuple[int, Counts, Curve]]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is the same for all sources.

    Attributes:
        task: what they are judged by.
        data: labelled images.
        settings: what decides the results besides the features and the seeds, as JSON values.
        seeds: of the probes.
        judge: does a source for the seeds it is given.
        results: where lines go.
        counts: folder for what each image contributed, so that a later run can compare with it.
        run: command, hardware, software.
        published: model and variant, where a published row is measured.
    """

    task: Task
    data: LabelledData
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    judge: Judge
    results: Results
    counts: Path
    run: Mapping[str, Any]
    published: dict[str, str] | None = None

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
        splits = self.data.train, self.data.val
        return Record(
            task=self.task,
            features=name,
            settings=_plain({**self.settings, "seeds": self.seeds}),
            images={images.split: len(images.images) for images in splits},
            skipped=[[f"{images.split}/{item.item}", item.reason] for images in splits for item in images.skipped],
            absent=list(self.data.val.absent),
            run=dict(self.run),
            published=self.published,
        )

    def _counted(self, source: FeatureSource, record: Record) -> tuple[list[Counts], Curve]:
        """Counts for each seed, kept ones where there are any, and the first seed's curve."""
        # Which other seeds there are changes nothing in a seed's counts.
        alone = replace(record, settings={key: value for key, value in record.settings.items() if key != "seeds"})
        paths = {seed: self.counts / f"{_digest(alone.key, seed)}.safetensors" for seed in self.seeds}
        kept = {seed: counts for seed, path in paths.items() if (counts := _load(path)) is not None}
        missing = tuple(seed for seed in self.seeds if seed not in kept)
        if missing:
            self.counts.mkdir(parents=True, exist_ok=True)
            for seed, counts, curve in self.judge(source, missing):
                kept[seed] = counts, curve
                _save(paths[seed], counts, curve)
        return [kept[seed][0] for seed in self.seeds], kept[self.seeds[0]][1]

    def _scored(self, record: Record, found: Sequence[Counts], curve: Curve, reference: _Reference | None) -> Record:
        each = [scores(counts) for counts in found]
        seeds = [
            {"seed": seed, "mIoU": one.miou, "mAcc": one.macc, "aAcc": one.aacc}
            for seed, one in zip(self.seeds, each, strict=True)
        ]
        names = self.data.train.class_names
        classes = {
            name: {"IoU": _mean([one.iou[k] for one in each]), "Acc": _mean([one.acc[k] for one in each])}
            for k, name in enumerate(names)
        }
        paired = None
        if reference is not None and found[0].images > 1:  # of one image nothing can be drawn
            interval = paired_interval(found, reference.counted()[0])
            paired = {"against": reference.record.features, "reference": reference.key, "metric": "mIoU"}
            paired |= {**asdict(interval), "over": "images", "draws": DRAWS}
        metrics = {key: float(np.mean([one[key] for one in seeds])) for key in ("mIoU", "mAcc", "aAcc")}
        return replace(record, metrics=metrics, seeds=seeds, classes=classes, paired=paired, curve=curve)


def _against(there: dict[str, Any], reference: _Reference | None) -> bool:
    """Whether a line was held against this reference; those of a single image are against none."""
    if there["images"]["val"] < 2:
        return True
    return (there["paired"] or {}).get("reference") == (None if reference is None else reference.key)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As they are after a way through JSON, so that equal means equal."""
    return json.loads(json.dumps(values))


def _digest(key: str, seed: int) -> str:
    return hashlib.sha256(f"{key} {seed}".encode()).hexdigest()[:24]


def _save(path: Path, counts: Counts, curve: Curve) -> None:
    arrays = {"hits": counts.hits, "truth": counts.truth, "predicted": counts.predicted}
    looks = np.array([[step, loss, np.nan if miou is None else miou] for step, loss, miou in curve]).reshape(-1, 3)
    with atomic_path(path) as temporary:
        save_file(arrays | {"curve": looks}, temporary)


def _load(path: Path) -> tuple[Counts, Curve] | None:
    try:
        arrays = load_file(path)
        counts = Counts(arrays["hits"], arrays["truth"], arrays["predicted"])
        looks = arrays["curve"].tolist()
    except (OSError, SafetensorError, KeyError):
        return None
    return counts, [[int(step), loss, None if np.isnan(miou) else miou] for step, loss, miou in looks]
