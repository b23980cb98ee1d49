"""Results files: JSON lines, validated one by one; a broken line does not affect the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasPath, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from denoising_vit.errors import EvaluationError, FormatError
from denoising_vit.evaluation.results import METRICS, TASKS

#: Maximum length in characters of a wrong value in a message.
_SHOWN = 60


def _known_task(task: str) -> str:
    if task not in TASKS:
        raise PydanticCustomError("task", "Input should be one of {names}", {"names": ", ".join(TASKS)})
    return task


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Pair = Annotated[tuple[Any, Any], Field(strict=False)]
Point = Annotated[tuple[Count, float | None, float | None], Field(strict=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Paired(_Part):
    """Difference from the reference over the same items.

    Attributes:
        against: features of the reference.
        metric: name of the metric.
        difference: mean difference, positive if the reference is lower.
        low: lower end of the 95 % interval, if there is one.
        high: upper end.
        over: unit of the groups that the interval is over, such as images.
        groups: number of groups; None in lines of older versions, whose intervals are ignored.
        method: method of the interval; None in lines of older versions.
    """

    against: Text
    metric: Text
    difference: float
    low: float | None = None
    high: float | None = None
    over: Text
    groups: Count | None = None
    method: Text | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if missing, or computed by an older version."""
        if self.method is None or self.low is None or self.high is None:
            return None
        return self.low, self.high


class _Class(_Part):
    IoU: float | None = None


class _Seed(_Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    seed: Count


class Published(_Part):
    """Model and variant of a published row."""

    model: Text
    variant: Text


class Entry(_Part):
    """One line of results, with the attributes of `results.Record` except for the following.

    Attributes:
        data: name of the data set.
        backbone: settings of the backbone.
        backbone_name: name of the backbone.
        metrics: scores by name, in percent; empty if the evaluation failed.
        command: the command that was run.
        hardware: description of the hardware.
        software: version by name.
        run_seed: seed of a task without repeated runs.
    """

    task: Annotated[Text, AfterValidator(_known_task)]
    features: Text
    settings: dict[str, Any]
    data: Text = Field(validation_alias=AliasPath("settings", "data", "name"))
    backbone: dict[str, Any] = Field(validation_alias=AliasPath("settings", "backbone"))
    backbone_name: Text = Field(validation_alias=AliasPath("settings", "backbone", "name"))
    failed: Text | None = None
    metrics: dict[str, float | None] = {}
    seeds: list[_Seed] = []
    classes: dict[str, _Class] = {}
    paired: Paired | None = None
    curve: list[Point] = []
    images: dict[str, Count] = {}
    skipped: list[Pair] = []
    absent: list[Text] = []
    seconds: float | None = None
    command: Text = Field(validation_alias=AliasPath("run", "command"))
    hardware: Text = Field(validation_alias=AliasPath("run", "hardware"))
    software: dict[str, Any] = Field(validation_alias=AliasPath("run", "software"))
    run_seed: Count | None = Field(default=None, validation_alias=AliasPath("run", "seed"))
    published: Published | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, line: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in line.items() if value is not None}
        return known | {"metrics": {}} if "failed" in known else known

    @model_validator(mode="after")
    def _has_metrics(self) -> Self:
        for metric in METRICS.get(self.task, ()):
            if self.failed is None and metric.name not in self.metrics:
                raise PydanticCustomError("metric", "metrics.{name} is missing", {"name": metric.name})
        return self

    @property
    def key(self) -> str:
        """Key that is equal for the same features, evaluated in the same setting for the same published row."""
        published = None if self.published is None else self.published.model_dump()
        return canonical([self.task, self.features, self.settings, published])

    @property
    def seed_scores(self) -> list[tuple[int, float | None]]:
        """Each seed and its main metric; tasks without repeated runs record their seed with the run."""
        if not self.seeds:
            return [] if self.run_seed is None else [(self.run_seed, None)]
        main = METRICS[self.task][0].name if self.task in METRICS else ""
        return [(one.seed, one.__pydantic_extra__.get(main)) for one in self.seeds]

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each class in percent, None if undefined."""
        return {name: metrics.IoU for name, metrics in self.classes.items()}

    @property
    def scores_by_step(self) -> dict[int, float]:
        """Main metric by training step, where it was measured."""
        return {step: score for step, _, score in self.curve if score is not None}


def canonical(value: object) -> str:
    """Canonical JSON text: equal for equal values."""
    return json.dumps(value, sort_keys=True)


def parse_entry(line: object) -> Entry:
    """Validate one parsed line; unknown keys are ignored.

    Raises:
        FormatError: naming the key, what was expected, and what was found.
    """
    if not isinstance(line, dict):
        raise FormatError(f"the line: expected an object, got {_shown(line)}")
    try:
        return Entry.model_validate(line)
    except ValidationError as error:
        raise FormatError(_reason(error)) from error


def _reason(error: ValidationError) -> str:
    """Message for the first error of a line."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name} is missing; expected a line written by `dvit evaluate`"
    if not name:
        return first["msg"]
    return f"{name}: {first['msg'].replace('Input should be', 'expected')}, got {_shown(first['input'])}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class BrokenLine:
    """An unusable line: its file, its number from 1, and the reason."""

    file: Path
    line: int
    reason: str


@dataclass(frozen=True)
class Entries:
    """Contents of results files.

    Attributes:
        sources: file names without folders.
        entries: one per set of settings, in order of first appearance.
        broken: skipped lines.
    """

    sources: tuple[str, ...]
    entries: tuple[Entry, ...]
    broken: tuple[BrokenLine, ...]


def read_entries(paths: Sequence[Path]) -> Entries:
    """Read results files in order; if lines have the same settings, the last one counts.

    Raises:
        EvaluationError: if a file cannot be read, or no line is usable.
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
                entries[entry.key] = entry  # keeps the first position, so that a repeated run does not reorder tables
    _drop_retried_failures(entries)
    if not entries:
        first = f"; {broken[0].file}:{broken[0].line}: {broken[0].reason}" if broken else ""
        raise EvaluationError(
            f"expected lines written by `dvit evaluate` in {', '.join(map(str, paths))}, got no usable line"
            f"{first}; run `dvit evaluate` first"
        )
    return Entries(tuple(path.name for path in paths), tuple(entries.values()), tuple(broken))


def _drop_retried_failures(entries: dict[str, Entry]) -> None:
    """Drop failures that occurred before the features were known, if a later run succeeded."""
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
    except (ValueError, RecursionError) as error:  # includes text that is not UTF-8
        raise FormatError(f"not JSON ({error}); the line may have been cut off while it was written") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
