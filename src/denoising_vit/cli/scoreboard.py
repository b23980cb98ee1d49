"""Scores side by side, on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoising_vit.evaluation.results import METRICS, Metric

#: With more metrics than this, differences go below the table: a terminal is 80 columns wide.
_MOST_BESIDE = 3


def scoreboard(lines: Sequence[dict[str, Any]]) -> None:
    """Prints lines of results as a table: sources in rows, or metrics in rows where there are many."""
    good = [line for line in lines if not line["failed"]]
    if not good:
        return
    console = Console()
    metrics = METRICS.get(good[0]["task"])
    if metrics is None:
        console.print(_figures(good))
        return
    beside = len(metrics) <= _MOST_BESIDE
    console.print(_scores(good, metrics, beside=beside))
    if not beside:
        for line in good:
            if line["paired"] is not None:
                words = f"{line['features']}: {_heading(line['paired'], metrics[0])} {_difference(line, metrics[0])}"
                console.print(words, highlight=False, markup=False, soft_wrap=True)


def _scores(lines: Sequence[dict[str, Any]], metrics: Sequence[Metric], *, beside: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("features")
    for metric in metrics:
        table.add_column(metric.name, justify="right")
    table.add_column("seeds", justify="right")
    if beside:
        paired = next((line["paired"] for line in lines if line["paired"]), {"against": "the first"})
        table.add_column(_heading(paired, metrics[0]), justify="right")
    table.add_column("seconds", justify="right")
    for line in lines:
        values = [line["metrics"][metric.name] for metric in metrics]
        table.add_row(
            escape(line["features"]),
            *(
                "-" if value is None else f"{value:.{metric.digits}f}"
                for value, metric in zip(values, metrics, strict=True)
            ),
            str(len(line["seeds"])),
            *([_difference(line, metrics[0])] if beside else []),
            f"{line['seconds']:.0f}",
        )
    return table


def _heading(paired: dict[str, Any], metric: Metric) -> str:
    return f"{metric.name} against {paired['against']} (95 %)"


def _difference(line: dict[str, Any], metric: Metric) -> str:
    paired = line["paired"]
    if paired is None:
        return ""
    difference, groups = f"{paired['difference']:+.{metric.digits}f}", f"{paired['groups']} {paired['over']}"
    if paired["low"] is None:
        return f"{difference} (no interval: {groups})"
    low, high = (f"{paired[key]:+.{metric.digits}f}" for key in ("low", "high"))
    return f"{difference} ({low} to {high}; {groups})"


def _figures(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for line in lines:
        table.add_column(escape(line["features"]), justify="right")
    for name in lines[0]["metrics"]:
        values = [line["metrics"][name] for line in lines]
        table.add_row(name.replace("_", " "), *("-" if value is None else f"{value:.3g}" for value in values))
    return table
