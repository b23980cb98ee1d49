"""Progress, tables, JSON lines and messages of the command line."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible, print_json
from denoising_vit.errors import DenoisingVitError, PlanError
from denoising_vit.files import readable
from denoising_vit.progress import duration

if TYPE_CHECKING:  # these import torch, which would delay the help
    from denoising_vit.backbones import Backbone, BackboneSpec
    from denoising_vit.data import Dataset, Skipped
    from denoising_vit.decomposition.calibration import OnPhoto
    from denoising_vit.decomposition.neural_field.fit import Evaluation

#: Minimum time between two lines of progress in a log file.
SECONDS_BETWEEN_LINES = 60.0

#: Whether progress is hidden, one value per open :func:`quiet` block.
_quiet: list[bool] = []


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """The result of one item of a batch."""

    status: Literal["done", "kept", "failed"]  # kept: a result existed
    output: str | None = None  # path of the result
    seconds: float | None = None
    note: str | None = None  # reason of a failure, or another remark

    @property
    @abstractmethod
    def item(self) -> str:
        """Path of the item."""

    @abstractmethod
    def cells(self) -> tuple[str, ...]:
        """Text of the columns after the item and its result."""


class Report:
    """Collects the rows of a batch. Prints JSON lines immediately, or a table at the end.

    ``what`` is the name of an item in the singular, ``numbers`` are headings of columns.
    """

    def __init__(self, what: str, numbers: Sequence[str], *, as_json: bool) -> None:
        self._what, self._numbers, self._as_json = what, numbers, as_json
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Add a row, and print it in JSON mode."""
        self.rows.append(row)
        if self._as_json:
            print_json(asdict(row))

    def finish(self, folder: Path) -> int:
        """Print the table and the failures, and return the exit code."""
        good = [row for row in self.rows if row.status != "failed"]
        failed = [row for row in self.rows if row.status == "failed"]
        if good and not self._as_json:
            Console().print(self._table(good))
        for row in failed:
            print_skipped(row.item, str(row.note))
        skipped = f", {len(failed)} skipped" if failed else ""
        print_note(f"{len(good)} of {len(self.rows)} {self._what}s done{skipped}; results in {folder}")
        return SOME_FAILED if failed else OK

    def _table(self, rows: Sequence[Row]) -> Table:
        table = plain_table(self._what, "result", numbers=self._numbers, fold=True)
        table.add_column("")
        names = [Path(row.item).name or row.item for row in rows]
        alone = len(set(names)) == len(names)  # show full paths only if names alone would be ambiguous
        for row, name in zip(rows, names, strict=True):
            shown = readable(name if alone else row.item)
            table.add_row(*map(escape, (shown, Path(row.output or "").name, *row.cells())))
        return table


def plain_table(*texts: str, numbers: Sequence[str] = (), fold: bool = False) -> Table:
    """An empty table without borders: columns of text, folded or cut if too long, then columns of numbers."""
    table = Table(box=None, pad_edge=False)
    for heading in texts:
        table.add_column(heading, overflow="fold" if fold else "ellipsis")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def number(value: float | None, form: str) -> str:
    """A number in this format; a dash for None."""
    return "-" if value is None else format(value, form)


class OnScreen:
    """A progress display that is shown within a block."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()


class PhotoProgress(OnScreen):
    """Progress over the work on all photos, ``each`` units such as views, with the remaining time."""

    def __init__(self, photos: int, each: int, unit: str) -> None:
        self._left, self._each, self._photo = photos, each, ""
        self.at = 0  #: work done on the current photo
        self._progress = progress_bar(unit)
        self._task = self._progress.add_task("", total=photos * each)
        self._finished = 0

    def start(self, photo: str) -> None:
        """Start the next photo."""
        self.at, self._photo = 0, photo
        self._progress.update(self._task, description=escape(photo))

    def show_score(self, look: Evaluation) -> None:
        """Show the current R² on held-out views."""
        if look.r2 is not None:
            self._progress.update(self._task, description=f"{escape(self._photo)} held-out R² {look.r2:.3f}")

    def advance(self, done: int, total: int) -> None:
        """Set the work done on the current photo; a larger total than expected raises the estimate for all photos."""
        self.at, self._each = done, max(self._each, total)
        self._progress.update(
            self._task, completed=self._finished + done, total=self._finished + self._left * self._each
        )

    def finish(self) -> None:
        """Finish the current photo; subtracts unneeded work from the total, to keep the remaining time correct."""
        self._left -= 1
        self._finished += self.at
        self._progress.update(self._task, total=self._finished + self._left * self._each)


@contextlib.contextmanager
def show_progress(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Show progress while a block runs; yields the function to call after each item."""
    with progress_bar(what) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


class LogProgress(Progress):
    """Progress as plain lines on standard error, at most one per minute, for log files.

    A line reads ``cat.jpg: 120 / 1,000 views, 3.1 views/s, 5 min left``.
    """

    def __init__(self, unit: str, **settings: Any) -> None:
        options: dict[str, Any] = {"speed_estimate_period": 300} | settings
        super().__init__(disable=True, **options)
        self._unit, self._next_line = unit, self.get_time() + SECONDS_BETWEEN_LINES

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Update a task as rich does, and print a line when one is due."""
        super().update(task_id, **changes)
        self._print_line(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task as rich does, and print a line when one is due."""
        super().advance(task_id, advance)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        now = self.get_time()
        if now < self._next_line:
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        task = self._tasks[task_id]
        total = "" if task.total is None else f" / {task.total:,.0f}"
        named, _, unit = self._unit.rpartition(": ")  # such as "raw: images"
        words = [f"{task.completed:,.0f}{total} {unit.format(task=task)}"]
        if task.speed and "/s" not in words[0]:
            words.append(f"{task.speed:.3g} {unit.partition(',')[0]}/s")
        if task.time_remaining is not None and not task.finished:
            words.append(f"{duration(task.time_remaining)} left")
        stage = ": ".join(part for part in (Text.from_markup(task.description).plain, named) if part)
        print_note(f"{stage}: {', '.join(words)}" if stage else ", ".join(words))


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Hide progress while a block runs."""
    _quiet.append(on)
    try:
        yield
    finally:
        _quiet.pop()


def progress_bar(unit: str, *, shown: bool = True, **settings: Any) -> Progress:
    """A progress display on standard error: a bar on a terminal, otherwise a plain line at most once per minute.

    In ``unit``, ``{task.fields[name]}`` is replaced by a field of the task. Settings are those of rich's `Progress`.
    """
    console = Console(stderr=True)
    if not shown or any(_quiet):
        return Progress(disable=True, console=console, **settings)
    if not console.is_terminal:
        return LogProgress(unit, console=console, **settings)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        **settings,
    )


def print_error(message: str, label: str = "error") -> None:
    """Print an error to standard error, unwrapped, so that it can be searched and copied."""
    Console(stderr=True).print(f"[bold red]{label}:[/] {escape(message)}", highlight=False, soft_wrap=True)


def print_skipped(item: str, reason: str) -> None:
    """Print that an item was skipped, and why; a reason that starts with "ITEM: " is printed as it is."""
    print_error(reason if reason.startswith(f"{item}: ") else f"{item}: {reason}", "skipped")


def reason_of(error: Exception) -> str:
    """The message of an error; errors from outside this package are reported with their type."""
    return str(error) if isinstance(error, DenoisingVitError | OSError) else f"{type(error).__name__}: {error}"


def print_note(message: str) -> None:
    """Print a message to standard error."""
    Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)


def print_backbone(backbone: Backbone, more: str = "") -> None:
    """Print backbone, device, fingerprint, and further details of the run."""
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}{more}")


def load_backbone(model: BackboneSpec) -> Backbone:
    """Load a backbone, and print its description."""
    backbone = model.load()
    print_backbone(backbone)
    return backbone


def open_photos(data: str, photos: int) -> tuple[Dataset, list[int]]:
    """A data set, and the indices of this number of photos, spread evenly; 0 for all."""
    from denoising_vit.data import open_dataset, spread

    if photos < 0:
        raise PlanError(f"--photos must be at least 0 (all), got {photos}")
    dataset = open_dataset(data)
    return dataset, spread(len(dataset), photos)


def print_left_out(skipped: Iterable[Skipped]) -> None:
    """Print the entries of a data set that could not be used, and why."""
    for item in skipped:
        print_skipped(item.item, item.reason)


@contextlib.contextmanager
def photo_progress(count: int) -> Iterator[OnPhoto]:
    """Progress over photos whose results are written at the end; yields the function to call after each photo."""
    with interruptible("interrupted; nothing was written"), show_progress("photos", count) as advance:
        yield lambda *_: advance()
