"""Results files: JSON lines, checked one by one; a broken line costs only itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from denoising_vit.errors import EvaluationError, FormatError
from denoising_vit.evaluation.results import METRICS

_T = TypeVar("_T")


#: Characters of a wrong value that are shown.
_SHOWN = 60


def required(line: Mapping[str, Any], key: str, within: str = "") -> Any:
    """The value of a key.

    Raises:
        FormatError: if it is missing.
    """
    if key not in line:
        raise FormatError(f"{within}{key} is missing; expected a line that `dvit evaluate` wrote")
    return line[key]


def value_or_none(line: Mapping[str, Any], key: str, check: Callable[[object, str], _T]) -> _T | None:
    """The checked value of a key, None where it is missing or null."""
    value = line.get(key)
    return None if value is None else check(value, key)


def mapping(value: object, name: str) -> Mapping[str, Any]:
    """An object of JSON.

    Raises:
        FormatError: if it is something else.
    """
    return value if isinstance(value, dict) else _refuse(value, name, "an object")


def listed(value: object, name: str) -> Sequence[Any]:
    """A list; null is an empty one.

    Raises:
        FormatError: if it is something else.
    """
    if value is None:
        return ()
    return value if isinstance(value, list) else _refuse(value, name, "a list")


def text(value: object, name: str) -> str:
    """A text that is not empty.

    Raises:
        FormatError: if it is something else.
    """
    return value if isinstance(value, str) and value else _refuse(value, name, "a text")


def number(value: object, name: str) -> float:
    """A finite number.

    Raises:
        FormatError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return _refuse(value, name, "a finite number")
    return float(value)


def count(value: object, name: str) -> int:
    """A whole number, 0 or more.

    Raises:
        FormatError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return _refuse(value, name, "a whole number")
    return value


def _refuse(value: object, name: str, expected: str) -> Any:
    shown = json.dumps(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise FormatError(f"{name}: expected {expected}, got {shown}")


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


@dataclass(frozen=True)
class BrokenLine:
    """A line that no table is made from.

    Attributes:
        file: the results file.
        line: its number, from 1.
        reason: what is wrong with it.
    """

    file: Path
    line: int
    reason: str


@dataclass(frozen=True)
class Entries:
    """What results files hold.

    Attributes:
        sources: names of the files, without folders.
        entries: one for each set of settings, in the order in which these first appear.
        broken: lines that were skipped.
    """

    sources: tuple[str, ...]
    entries: tuple[Entry, ...]
    broken: tuple[BrokenLine, ...]


def read_entries(paths: Sequence[Path]) -> Entries:
    """Reads results files in the order given; where the same settings occur twice, the later line wins.

    Raises:
        EvaluationError: if a file cannot be read, or no line of them can be used.
    """
    entries: dict[str, Entry] = {}
    broken: list[BrokenLine] = []
    for path in paths:
        for position, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                entry = parse_entry(_parsed(line))
            except FormatError as error:
                broken.append(BrokenLine(path, position, str(error)))
            else:
                entries[entry.key] = entry  # in the place of the first, so that a repeat does not reorder tables
    _drop_failures_that_passed(entries)
    if not entries:
        first = f"; {broken[0].file}:{broken[0].line}: {broken[0].reason}" if broken else ""
        raise EvaluationError(
            f"expected lines that `dvit evaluate` wrote in {', '.join(map(str, paths))}, got none that can be used"
            f"{first}; run `dvit evaluate` first"
        )
    return Entries(tuple(path.name for path in paths), tuple(entries.values()), tuple(broken))


def _drop_failures_that_passed(entries: dict[str, Entry]) -> None:
    """Drops failures from before the features were known, where the same was measured in the end."""
    passed = {_without_features(entry) for entry in entries.values() if entry.failed is None}
    for key, entry in list(entries.items()):
        if entry.failed is not None and "features" not in entry.settings and _without_features(entry) in passed:
            del entries[key]


def _without_features(entry: Entry) -> str:
    settings = {name: value for name, value in entry.settings.items() if name != "features"}
    return canonical([entry.task, entry.features, settings])


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        reason = error.strerror or error
        raise EvaluationError(f"expected a results file at {path}, but it cannot be read ({reason})") from error


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise FormatError(f"not JSON ({error}); the line may have been cut off while it was written") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
