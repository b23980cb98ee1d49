"""Scores side by side, on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoising_vit.evaluation.metrics import METRICS


def scoreboard(lines: Sequence[dict[str, Any]]) -> None:
    """Prints lines of results as a table: sources in rows, or metrics in rows where there are many."""
    good = [line for line in lines if not line["failed"]]
    if good:
        Console().print(_scores(good) if good[0]["task"] in METRICS else _figures(good))


def _scores(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("features")
    reference = next((line["paired"]["against"] for line in lines if line["paired"]), "the first")
    shown = METRICS[lines[0]["task"]]
    digits = shown[0].digits
    names = [metric.name for metric in shown]
    for heading in (*names, "seeds", f"{names[0]} against {reference} (95 %)", "seconds"):
        table.add_column(heading, justify="right")
    for line in lines:
        metrics, paired = line["metrics"], line["paired"]
        difference = (
            f"{paired['difference']:+.{digits}f} ({paired['low']:+.{digits}f} to {paired['high']:+.{digits}f})"
            if paired is not None
            else ""
        )
        table.add_row(
            escape(line["features"]),
            *("-" if metrics[metric.name] is None else f"{metrics[metric.name]:.{metric.digits}f}" for metric in shown),
            str(len(line["seeds"])),
            difference,
            f"{line['seconds']:.0f}",
        )
    return table


def _figures(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for line in lines:
        table.add_column(escape(line["features"]), justify="right")
    for name in lines[0]["metrics"]:
        values = [line["metrics"][name] for line in lines]
        table.add_row(name.replace("_", " "), *("-" if value is None else f"{value:.3g}" for value in values))
    return table
