"""One line of a results file, checked, so that no table can stumble over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from denoising_vit.errors import FormatError
from denoising_vit.evaluation.metrics import METRICS
from denoising_vit.evaluation.tables.checking import count, listed, mapping, number, required, text, value_or_none

#: What can be evaluated, in the order of the report.
TASKS = (*METRICS, "artifacts")


@dataclass(frozen=True)
class Paired:
    """A difference between two sources of features over the same images.

    Attributes:
        against: the reference's features.
        metric: what differs.
        difference: mean, positive where the reference has less.
        low: lower end of the 95 % interval, None where there is none.
        high: upper end of it, None likewise.
        over: what the groups are that it is taken over, such as images.
        groups: how many; None where an older version wrote the line, whose intervals are left out.
        method: how the interval was made; None likewise.
    """

    against: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    over: str
    groups: int | None
    method: str | None


@dataclass(frozen=True)
class Entry:
    """One source of features, evaluated under one set of settings.

    Attributes:
        task: one of TASKS.
        features: the source's name.
        settings: everything that the figures depend on; `data` and `backbone` are mappings with a `name`.
        metrics: name to figure; scores in percent. Empty if the evaluation failed.
        seeds: those that the metrics are means over, with the main metric of each.
        classes: name to IoU in percent; None where it is not defined.
        paired: the difference against the reference.
        curve: (step, main metric) where it was measured during training.
        images: how many of each split.
        skipped: (item, reason).
        absent: classes that never occur in the images, left out of means.
        failed: why there are no figures.
        seconds: time taken.
        command: what was run.
        hardware: on what.
        software: name to version.
        published: model and variant of the published row that this measures.
    """

    task: str
    features: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    seeds: tuple[tuple[int, float | None], ...]
    classes: Mapping[str, float | None]
    paired: Paired | None
    curve: tuple[tuple[int, float], ...]
    images: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    failed: str | None
    seconds: float | None
    command: str
    hardware: str
    software: Mapping[str, str]
    published: tuple[str, str] | None

    @property
    def data(self) -> str:
        """The data set's name."""
        return self.settings["data"]["name"]

    @property
    def backbone(self) -> Mapping[str, Any]:
        """How the backbone was built."""
        return self.settings["backbone"]

    @property
    def key(self) -> str:
        """The same for evaluations of the same features under the same settings."""
        return canonical([self.task, self.features, self.settings])


def canonical(value: object) -> str:
    """The same text for equal values."""
    return json.dumps(value, sort_keys=True)


def parse_entry(found: object) -> Entry:
    """The entry of one parsed line.

    Args:
        found: what the line holds; keys that are not known are ignored.

    Raises:
        FormatError: naming the key, what was expected of it, and what came.
    """
    line = mapping(found, "the line")
    task = text(required(line, "task"), "task")
    if task not in TASKS:
        raise FormatError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    failed = value_or_none(line, "failed", text)
    run = mapping(required(line, "run"), "run")
    return Entry(
        task=task,
        features=text(required(line, "features"), "features"),
        settings=_settings(required(line, "settings")),
        metrics={} if failed is not None else _metrics(required(line, "metrics"), task),
        seeds=_seeds(line, run, task),
        classes=_classes(line),
        paired=value_or_none(line, "paired", _paired),
        curve=_curve(line),
        images={name: count(value, f"images.{name}") for name, value in _optional(line, "images").items()},
        skipped=tuple(_skipped(pair) for pair in listed(line.get("skipped"), "skipped")),
        absent=tuple(text(name, "absent") for name in listed(line.get("absent"), "absent")),
        failed=failed,
        seconds=value_or_none(line, "seconds", number),
        command=text(required(run, "command", "run."), "run.command"),
        hardware=text(required(run, "hardware", "run."), "run.hardware"),
        software={name: str(version) for name, version in mapping(required(run, "software", "run."), "run").items()},
        published=value_or_none(line, "published", _published),
    )


def _optional(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return value_or_none(line, key, mapping) or {}


def _settings(value: object) -> Mapping[str, Any]:
    settings = mapping(value, "settings")
    for part in ("data", "backbone"):
        found = mapping(required(settings, part, "settings."), f"settings.{part}")
        text(required(found, "name", f"settings.{part}."), f"settings.{part}.name")
    return settings


def _metrics(value: object, task: str) -> Mapping[str, float | None]:
    metrics = mapping(value, "metrics")
    for metric in METRICS.get(task, ()):
        required(metrics, metric.name, "metrics.")
    return {name: value_or_none(metrics, name, number) for name in metrics}


def _seeds(line: Mapping[str, Any], run: Mapping[str, Any], task: str) -> tuple[tuple[int, float | None], ...]:
    found = [mapping(seed, "seeds") for seed in listed(line.get("seeds"), "seeds")]
    if not found:  # a task that draws only once names its seed with the run
        seed = value_or_none(run, "seed", count)
        return () if seed is None else ((seed, None),)
    main = METRICS[task][0].name if task in METRICS else ""
    return tuple(
        (count(required(seed, "seed", "seeds."), "seeds.seed"), value_or_none(seed, main, number)) for seed in found
    )


def _classes(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    classes = _optional(line, "classes")
    return {name: value_or_none(mapping(found, f"classes.{name}"), "IoU", number) for name, found in classes.items()}


def _paired(value: object, name: str) -> Paired:
    found = mapping(value, name)
    words = {key: text(required(found, key, "paired."), f"paired.{key}") for key in ("against", "metric", "over")}
    difference = number(required(found, "difference", "paired."), "paired.difference")
    groups, method = value_or_none(found, "groups", count), value_or_none(found, "method", text)
    low, high = (None if method is None else value_or_none(found, key, number) for key in ("low", "high"))
    return Paired(words["against"], words["metric"], difference, low, high, words["over"], groups, method)


def _curve(line: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    points: list[tuple[int, float]] = []
    for point in listed(line.get("curve"), "curve"):
        values = listed(point, "curve")
        if len(values) != 3:
            raise FormatError(f"curve: expected [step, loss, score], got {json.dumps(point)}")
        if values[2] is not None:  # between evaluations only the loss is known
            points.append((count(values[0], "curve"), number(values[2], "curve")))
    return tuple(points)


def _skipped(value: object) -> tuple[str, str]:
    pair = listed(value, "skipped")
    if len(pair) != 2:
        raise FormatError(f"skipped: expected [item, reason], got {json.dumps(value)}")
    return str(pair[0]), str(pair[1])


def _published(value: object, name: str) -> tuple[str, str]:
    found = mapping(value, name)
    model, variant = (text(required(found, key, "published."), f"published.{key}") for key in ("model", "variant"))
    return model, variant
