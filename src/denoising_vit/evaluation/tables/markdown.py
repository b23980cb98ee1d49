"""Markdown helpers; they escape text from files."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence

#: Placeholder for a missing value.
NONE = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table with the first ``left`` columns left-aligned and the others right-aligned."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    escaped = [[plain(cell) for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines in a collapsible block."""
    return ["<details>", f"<summary>{plain(summary)}</summary>", "", *lines, "", "</details>"]


def plain(words: str) -> str:
    """Text on one line, with HTML and column separators escaped."""
    return html.escape(" ".join(words.split()), quote=False).replace("|", r"\|")


def code(words: str) -> str:
    """Text in a code span outside of tables, fenced with more backticks than it contains."""
    words = " ".join(words.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " if "`" in words else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with fixed decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A number with three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; zero is +0.00, never -0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def flat(settings: Mapping[str, object], within: str = "") -> dict[str, str]:
    """Flatten nested settings to readable values by dotted name."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{within}{key}.")
        else:
            found[f"{within}{key}"] = readable(value, pair=key == "size")
    return found


def readable(value: object, *, pair: bool = False) -> str:
    """Format a value for readers: lists with commas (364 x 476 for a pair), yes, no, none."""
    if isinstance(value, list):
        return (" x " if pair else ", ").join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def differing(settings: Sequence[Mapping[str, str]], always: Collection[str] = ()) -> list[str]:
    """A label for each group of settings, with the values that differ; empty labels if nothing differs."""
    keys = list(dict.fromkeys(key for each in settings for key in each))
    keys = [key for key in keys if key in always or len({each.get(key) for each in settings}) > 1]
    return [", ".join(f"{key} {each.get(key, 'none')}" for key in keys) for each in settings]
