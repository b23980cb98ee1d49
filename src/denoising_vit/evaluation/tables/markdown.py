"""Pieces of Markdown; whatever comes from a file is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence

#: Stands where there is no figure.
NONE = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table.

    Args:
        header: of each column.
        rows: cells, as many as there are columns.
        left: this many columns are aligned to the left, the others to the right.
    """
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    escaped = [[plain(cell) for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines that are shown on a click."""
    return ["<details>", f"<summary>{plain(summary)}</summary>", "", *lines, "", "</details>"]


def plain(words: str) -> str:
    """Text on one line that neither ends a cell nor opens a tag."""
    return html.escape(" ".join(words.split()), quote=False).replace("|", r"\|")


def code(words: str) -> str:
    """Text in a code span, outside of tables; longer fences than any run of backticks within."""
    words = " ".join(words.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " if "`" in words else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A figure with a fixed number of decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A figure with three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """A difference; one that rounds to zero is +0.00, not -0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def flat(settings: Mapping[str, object], within: str = "") -> dict[str, str]:
    """Settings as dotted name and readable value."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{within}{key}.")
        else:
            found[f"{within}{key}"] = readable(value, pair=key == "size")
    return found


def readable(value: object, *, pair: bool = False) -> str:
    """A setting's value: lists with commas, or as 364 x 476 where they are a pair; yes, no, none."""
    if isinstance(value, list):
        return (" x " if pair else ", ").join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def differing(settings: Sequence[Mapping[str, str]], always: Collection[str] = ()) -> list[str]:
    """What tells settings from each other, one label for each of them; empty where nothing does.

    Args:
        settings: dotted name to value, as from `flat`.
        always: names that labels hold although they are the same, unless none of the settings has them.
    """
    keys = list(dict.fromkeys(key for each in settings for key in each))
    keys = [key for key in keys if key in always or len({each.get(key) for each in settings}) > 1]
    return [", ".join(f"{key} {each.get(key, 'none')}" for key in keys) for each in settings]
