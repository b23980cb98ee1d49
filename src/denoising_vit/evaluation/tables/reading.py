"""Results files: JSON lines, to which evaluations append; what is broken in them costs one line, not the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.errors import EvaluationError, FormatError
from denoising_vit.evaluation.tables.entries import Entry, canonical, parse_entry


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
