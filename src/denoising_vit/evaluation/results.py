"""Results: a file of JSON lines, one per task, source of features and setting."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from denoising_vit.errors import EvaluationError
from denoising_vit.files import flush_folder, make_folder, parse_json


@dataclass(frozen=True)
class Metric:
    """A metric: its name, the decimals shown, and whether lower is better."""

    name: str
    digits: int = 2
    lower: bool = False


@dataclass(frozen=True)
class TaskInfo:
    """A task in reports: its heading, and its metrics, the main one first."""

    heading: str
    metrics: tuple[Metric, ...] = ()


#: Mean IoU and accuracies in percent.
_CLASSES = (Metric("mIoU"), Metric("mAcc"), Metric("aAcc"))

#: RMSE in metres, relative error, log10 error, and percent of pixels within 1.25, 1.25^2, 1.25^3 of the truth.
_DEPTH = (
    *(Metric(name, 4, lower=True) for name in ("RMSE", "AbsRel", "log10")),
    *(Metric(name) for name in ("a1", "a2", "a3")),
)

#: All tasks in the order of reports; every task needs an entry here.
TASKS: dict[str, TaskInfo] = {
    "knn": TaskInfo("Nearest neighbours", _CLASSES),
    "segmentation": TaskInfo("Segmentation by a trained head", _CLASSES),
    "hummingbird": TaskInfo("Retrieval of nearest neighbours, scored at pixels", _CLASSES),
    "clustering": TaskInfo("Clusters of patches", _CLASSES),
    "depth": TaskInfo("Depth by a trained head", _DEPTH),
    # Percent of images in which the predicted box covers an object.
    "discovery": TaskInfo("Object discovery", (Metric("CorLoc"),)),
    # Percent: region similarity and contour accuracy of DAVIS, and their mean.
    "propagation": TaskInfo("Label propagation in video", (Metric("J&F"), Metric("J"), Metric("F"))),
    # Percent of keypoints within a fraction of the object's larger side: mean over pairs, and over keypoints.
    "matching": TaskInfo("Matching of keypoints", (Metric("PCK"), Metric("PCK per point"))),
    "artifacts": TaskInfo("Label-free figures of artifacts"),
}

#: Metrics of each task that has a ground truth.
METRICS = {name: task.metrics for name, task in TASKS.items() if task.metrics}


def main_metric(task: str) -> Metric:
    """The metric whose differences are reported."""
    return METRICS[task][0]


#: Beginning of every line of results.
_BEGINNING = b'{"task": '


@dataclass(frozen=True)
class Record:
    """One line of results: one source of features, evaluated on one task in one setting.

    Attributes:
        task: a key of `TASKS`.
        features: name of the source.
        settings: everything that determines the result, as JSON values: data, backbone, features, options.
        metrics: means over the seeds, by name.
        seeds: metrics of each seed.
        classes: IoU and Acc of each class, means over the seeds; None if the class never occurs.
        paired: difference from the reference source, with its interval.
        curve: [step, loss, main metric or None] during the training of the first seed.
        images: number of images of each split.
        skipped: (id, reason) of skipped images.
        absent: classes that do not occur in the evaluated images.
        failed: reason if there are no metrics.
        seconds: run time, without cached features.
        run: command, hardware, software.
        published: model and variant of the published row that this line reproduces.
    """

    task: str
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
        """Key that is equal for records of the same source and setting."""
        return _key(vars(self))

    def to_line(self) -> str:
        """The record as a line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


class Results:
    """A results file to append lines to.

    Raises:
        EvaluationError: if the file has other content or cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, dict[str, Any]] = {}
        try:
            make_folder(path.parent)
            with path.open("ab+") as file:  # fail before anything is computed
                file.seek(0)
                content = file.read()
            flush_folder(path.parent)  # so that a power failure does not lose a new file
        except OSError as error:
            reason = error.strerror or error
            raise EvaluationError(f"cannot write results to {path} ({reason}); choose another file with -o") from error
        *lines, rest = content.split(b"\n")
        if not _is_incomplete(rest):
            lines.append(rest)
        for number, line in enumerate(lines, 1):
            self._take(number, line)

    def find(self, record: Record) -> dict[str, Any] | None:
        """The line of an earlier run for the same source and setting; None if it is missing or failed."""
        return self._done.get(record.key)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The latest line of each source and setting, without failures."""
        return list(self._done.values())

    def add(self, record: Record) -> dict[str, Any]:
        """Append a line, replacing an incomplete last one; return it as parsed."""
        line = record.to_line()
        try:
            self._drop_incomplete()
            with self.path.open("ab") as file:  # one write: another run may append to the same file
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"cannot write results to {self.path} ({error.strerror or error})") from error
        plain = json.loads(line)
        self._remember(plain)
        return plain

    def _drop_incomplete(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("rb+") as file:
                if _is_incomplete(content[whole:]):
                    file.truncate(whole)
                else:  # a result without its line break
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")

    def _take(self, number: int, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._remember(parse_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{self.path}, line {number}: not a result of `dvit evaluate` ({type(error).__name__}: {error}); "
                "choose another file with -o"
            ) from error

    def _remember(self, plain: dict[str, Any]) -> None:
        key = _key(plain)
        if plain["failed"] is None:
            self._done[key] = plain


def _key(record: Mapping[str, Any]) -> str:
    identity = [record["task"], record["features"], record["settings"], record.get("published")]
    return json.dumps(identity, sort_keys=True)


def _is_incomplete(rest: bytes) -> bool:
    """True if the text after the last line break is a result that was only partly written, by a killed run."""
    try:
        parse_json(rest)
    except ValueError:
        return rest.startswith(_BEGINNING[: len(rest)])
    return False
