"""Results as JSON lines, one per task, source of features and setting."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from denoising_vit.errors import EvaluationError


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in results and tables.
        digits: decimals that are told.
        lower: whether less is better.
    """

    name: str
    digits: int = 2
    lower: bool = False


#: Mean intersection over union, mean accuracy of classes, accuracy of pixels; in percent.
_CLASSES = (Metric("mIoU"), Metric("mAcc"), Metric("aAcc"))


#: Of each task that compares with a truth; the first is what differences are told of.
METRICS: dict[str, tuple[Metric, ...]] = {
    "knn": _CLASSES,
    "segmentation": _CLASSES,
    "hummingbird": _CLASSES,
    "clustering": _CLASSES,
    # Metres; relative; decades; percent of pixels within 1.25, 1.25^2, 1.25^3 of the truth.
    "depth": (
        Metric("RMSE", 4, lower=True),
        Metric("AbsRel", 4, lower=True),
        Metric("log10", 4, lower=True),
        Metric("a1"),
        Metric("a2"),
        Metric("a3"),
    ),
    # Percent of images whose one box covers an object.
    "discovery": (Metric("CorLoc"),),
    # Percent: region similarity and contour accuracy of DAVIS, and their mean.
    "propagation": (Metric("J&F"), Metric("J"), Metric("F")),
    # Percent of keypoints within a share of the object's larger side: mean over pairs, and of all keypoints.
    "matching": (Metric("PCK"), Metric("PCK per point")),
}


def main_metric(task: str) -> Metric:
    """What differences are told of."""
    return METRICS[task][0]


Task = Literal[
    "knn", "segmentation", "hummingbird", "clustering", "depth", "discovery", "propagation", "matching", "artifacts"
]


#: What every line of results begins with.
_BEGINNING = b'{"task": '


@dataclass(frozen=True)
class Record:
    """One source of features, judged in one setting.

    Attributes:
        task: what was done.
        features: the source's name.
        settings: everything that decides the result, as JSON values: data, backbone, features, options.
        metrics: by name, as `METRICS` has them; means over the seeds.
        seeds: the metrics of each seed.
        classes: IoU and Acc by class, means over the seeds; None where the class never occurs.
        paired: difference to another source with its interval over images, or groups of them.
        curve: [step, loss, main metric or None] along the training of the first seed.
        images: how many of each split.
        skipped: (id, why) of images that were left out.
        absent: classes that no judged pixel has.
        failed: why there are no metrics, if there are none.
        seconds: that it took, features that were there already not included.
        run: command, hardware, software.
        published: model and variant, where a published row is measured.
    """

    task: Task
    features: str
    settings: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    seeds: list[dict[str, Any]] = field(default_factory=list)
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    paired: dict[str, Any] | None = None
    curve: list[list[Any]] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    failed: str | None = None
    seconds: float = 0.0
    run: dict[str, Any] = field(default_factory=dict)
    published: dict[str, str] | None = None

    @property
    def key(self) -> str:
        """Equal for records of the same thing."""
        return json.dumps([self.task, self.features, self.settings, self.published], sort_keys=True)

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


class Results:
    """A file of JSON lines that grows.

    Args:
        path: made where it does not exist.

    Raises:
        EvaluationError: if it is there and holds something else, or cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:  # whether it can be written to shows before anything is computed
                file.seek(0)
                content = file.read()
        except OSError as error:
            reason = error.strerror or error
            raise EvaluationError(f"cannot write results to {path} ({reason}); choose another file with -o") from error
        *lines, rest = content.split(b"\n")
        if not _is_cut_off(rest):
            lines.append(rest)
        for number, line in enumerate(lines, 1):
            self._take(number, line)

    def find(self, record: Record) -> dict[str, Any] | None:
        """What an earlier run wrote of the same thing; None where there is nothing, or where it failed."""
        return self._done.get(record.key)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was written and did not fail, the latest of each."""
        return list(self._done.values())

    def add(self, record: Record) -> dict[str, Any]:
        """Appends a line, in place of one that was cut off; returns it as it is read back.

        Raises:
            EvaluationError: if it cannot be written.
        """
        line = record.to_line()
        try:
            self._drop_what_was_cut_off()
            with self.path.open("ab") as file:  # one write at the end: another run may add to the same file
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"cannot write results to {self.path} ({error.strerror or error})") from error
        plain = json.loads(line)
        self._remember(plain)
        return plain

    def _drop_what_was_cut_off(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("rb+") as file:
                if _is_cut_off(content[whole:]):
                    file.truncate(whole)
                else:  # a result without its line break
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")

    def _take(self, number: int, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._remember(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{self.path}, line {number}: not a result of `dvit evaluate` ({type(error).__name__}: {error}); "
                "choose another file with -o"
            ) from error

    def _remember(self, plain: dict[str, Any]) -> None:
        key = json.dumps([plain["task"], plain["features"], plain["settings"], plain.get("published")], sort_keys=True)
        if plain["failed"] is None:
            self._done[key] = plain


def _is_cut_off(rest: bytes) -> bool:
    """Whether what follows the last line break is a result that a killed run did not finish."""
    try:
        json.loads(rest)
    except ValueError:
        return rest.startswith(_BEGINNING[: len(rest)])
    return False
