"""What a batch says while it works and when it is done: progress, a table or JSON lines, and what was skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from denoising_vit.cli.exit_codes import OK, SOME_FAILED
from denoising_vit.cli.streams import print_json
from denoising_vit.files import readable

if TYPE_CHECKING:  # it imports torch, for which the help would wait
    from denoising_vit.decomposition.neural_field.fit import Evaluation

Status = Literal["done", "kept", "failed"]


@dataclass(frozen=True)
class Row:
    """What became of one photo.

    Attributes:
        image: the photo.
        status: done, kept (a result was there already), or failed.
        output: the safetensors file.
        panel: the picture.
        seconds: time taken.
        views: crops that were fitted.
        heldout_r2: share of the variance of left-out views that is predicted.
        heldout_cosine: mean cosine to left-out views.
        note: why it failed, or what else is worth knowing.
    """

    image: str
    status: Status
    output: str | None = None
    panel: str | None = None
    seconds: float | None = None
    views: int | None = None
    heldout_r2: float | None = None
    heldout_cosine: float | None = None
    note: str | None = None


class Report:
    """Collects rows; JSON lines go to standard output at once, the table comes at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Takes one row; in JSON mode prints it."""
        self.rows.append(row)
        if self.as_json:
            print_json(asdict(row))

    def finish(self, folder: Path) -> int:
        """Prints the table, then what failed and why. Returns the exit code."""
        if not self.as_json and any(row.status != "failed" for row in self.rows):
            Console().print(self._table())
        failed = [row for row in self.rows if row.status == "failed"]
        for row in failed:
            print_skipped(row.image, str(row.note))
        good = len(self.rows) - len(failed)
        skipped = f", {len(failed)} skipped" if failed else ""
        print_note(f"{good} of {len(self.rows)} photos done{skipped}; results in {folder}")
        return SOME_FAILED if failed else OK

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("photo", overflow="fold")
        table.add_column("result", overflow="fold")
        for heading in ("views", "held-out R²", "cosine", "seconds"):
            table.add_column(heading, justify="right")
        table.add_column("")
        good = [Path(row.image) for row in self.rows if row.status != "failed"]
        alone = len({path.name for path in good}) == len(good)  # folders only where names alone would be ambiguous
        for row in self.rows:
            if row.status != "failed":
                table.add_row(
                    escape(readable(Path(row.image).name if alone else row.image)),
                    escape(Path(row.output or "").name),
                    str(row.views),
                    "-" if row.heldout_r2 is None else f"{row.heldout_r2:.3f}",
                    "-" if row.heldout_cosine is None else f"{row.heldout_cosine:.3f}",
                    "-" if row.seconds is None else f"{row.seconds:.1f}",
                    escape(row.note or ("kept" if row.status == "kept" else "")),
                )
        return table


class OnScreen:
    """A progress bar that is on the screen for as long as a block lasts, or until it is stopped."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar off the screen."""
        self._progress.stop()


class PhotoProgress(OnScreen):
    """A progress bar over the work on all photos, with the time left; on standard error.

    Args:
        photos: how many.
        each: work on one of them.
        unit: what work is counted in.
    """

    def __init__(self, photos: int, each: int, unit: str) -> None:
        self._left, self._each, self._at = photos, each, 0
        self._photo = ""
        self._progress = progress_bar(unit)
        self._task = self._progress.add_task("", total=photos * each)
        self._finished = 0

    def start(self, photo: str) -> None:
        """Begins the next photo."""
        self._at, self._photo = 0, photo
        self._progress.update(self._task, description=escape(photo))

    def watch(self, look: Evaluation) -> None:
        """Shows how well held-out views are predicted so far."""
        if look.r2 is not None:
            self._progress.update(self._task, description=f"{escape(self._photo)} held-out R² {look.r2:.3f}")

    def advance(self, done: int, _total: int) -> None:
        """Takes how much of the work on the present photo is done."""
        self._at = done
        self._progress.update(self._task, completed=self._finished + done)

    def finish(self) -> None:
        """Ends the present photo; work that was not needed leaves the total, so that the time left stays right."""
        self._left -= 1
        self._finished += self._at
        self._progress.update(self._task, total=self._finished + self._left * self._each)


class CountProgress(OnScreen):
    """A bar over things that are counted one by one.

    Args:
        total: how many; None where that is not known.
        unit: what they are.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self._progress = progress_bar(unit)
        self._task = self._progress.add_task("", total=total)

    def advance(self) -> None:
        """Takes one more."""
        self._progress.advance(self._task)


@contextlib.contextmanager
def watch(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar for as long as a block lasts; gives what is to be called after each."""
    with CountProgress(total, what) as progress:
        yield progress.advance


def progress_bar(unit: str, **settings: Any) -> Progress:
    """A bar with a description, how many of how many, the time taken and the time left; none where nobody looks.

    Args:
        unit: what is counted; ``{task.fields[name]}`` stands for a field of the task.
        **settings: of rich's `Progress`.
    """
    console = Console(stderr=True)
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
        disable=not console.is_terminal,
        **settings,
    )


def print_error(message: str, label: str = "error") -> None:
    """Prints an error to standard error, unwrapped, so that it can be searched for and copied."""
    Console(stderr=True).print(f"[bold red]{label}:[/] {escape(message)}", highlight=False, soft_wrap=True)


def print_skipped(item: str, reason: str) -> None:
    """Says of an item of a batch that it was skipped, and why; reasons that begin with its name stand as they are."""
    print_error(reason if reason.startswith(item) else f"{item}: {reason}", "skipped")


def print_note(message: str) -> None:
    """Prints something worth knowing to standard error."""
    Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)
