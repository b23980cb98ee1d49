"""Comparison of feature sources on the command line: shared options, progress, and tables of results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import (
    load_backbone,
    number,
    plain_table,
    print_error,
    print_note,
    print_skipped,
    show_progress,
)
from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible, print_json
from denoising_vit.environment import run_info
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.options import FieldOptions
from denoising_vit.evaluation.results import METRICS, Metric, Results, main_metric
from denoising_vit.extractors import KINDS, Cleaners, features_arg, parse_names

if TYPE_CHECKING:
    from denoising_vit.evaluation.data import EvaluationData
    from denoising_vit.evaluation.workbench import Line, Workbench

#: Maximum number of metrics in a table with differences; with more, differences go below, because terminals have 80
#: columns.
_MOST_BESIDE = 3


@dataclass(frozen=True)
class EvaluateOptions(ABC):
    """Data, features and results of `dvit evaluate`.

    Attributes:
        data: folder of the data, in one of the layouts above.
        features: names of features.
        out: results file to append lines to. The same command resumes an interrupted run.
        cache: folder for cached features and fields. Defaults to a folder next to the results.
        cache_gb: maximum size of cached features in GB, not counting fields of stage 1.
        images: maximum number of images per split, spread evenly; 0 uses all.
        json: print the result lines instead of a table.
        cleaners: sources of the artifact, denoiser and other cleaners.
        exact: options of stage 1 for exact features.
        model: the backbone and its options.
    """

    data: Path
    features: Annotated[str, features_arg("The first is the reference for the others.")] = "raw,subtract,exact"
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("results.jsonl")
    cache: Path | None = None
    cache_gb: float = 10.0
    images: int = 0
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    cleaners: tyro.conf.OmitArgPrefixes[Cleaners] = Cleaners()  # noqa: RUF009, frozen
    exact: FieldOptions = FieldOptions()  # noqa: RUF009, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec()  # noqa: RUF009, frozen

    @abstractmethod
    def open(self, progress: Callable[[], None]) -> EvaluationData:
        """The data; ``progress`` is called after each image."""


def compare_sources(
    options: EvaluateOptions, compare: Callable[[Workbench, Sequence[str]], Iterator[Line]], varied: Sequence[str] = ()
) -> int:
    """Run a task on each source, and report each result and then a table. Returns the exit code.

    ``compare`` yields the result lines of the named sources. ``varied`` names settings that differ between the lines of
    one command: there is one table per value.
    """
    names = parse_names(options.features, KINDS)
    options.exact.denoising()  # fail before the model is loaded
    found: list[Line] = []
    with interruptible("interrupted; finished results are kept, run the command again to resume"):
        for line, kept in compare(_bench(options), names):
            found.append((line, kept))
            if options.json:
                print_json(line)
            if not line["failed"]:
                label = ", ".join([line["features"], *filter(None, [_setting(line, varied)])])
                kept_words = " (kept from an earlier run)" if kept else ""
                print_note(f"{label}: {main_value(line)} in {line['seconds']:.0f} s{kept_words}")
    return finish(found, options.out, as_json=options.json, varied=varied)


def main_value(line: dict[str, Any]) -> str:
    """The main metric of a result line, with its value."""
    metric = main_metric(line["task"])
    return f"{metric.name} {line['metrics'][metric.name]:.{metric.digits}f}"


def _bench(options: EvaluateOptions) -> Workbench:
    """Open data and results, then load the model, so that file errors come first."""
    from denoising_vit.evaluation.workbench import Workbench

    if not options.cache_gb >= 0:
        raise EvaluationError(f"cache_gb must be at least 0, got {options.cache_gb}")
    with show_progress("images read", None) as advance:
        data = options.open(advance)
    if data.note:
        print_note(data.note)
    if data.absent:
        print_note(f"classes without pixels in val, excluded from means unless predicted: {', '.join(data.absent)}")
    results = Results(options.out)
    bench = Workbench(
        data=data,
        backbone=load_backbone(options.model),
        spec=options.model,
        results=results,
        folder=options.cache or options.out.with_suffix(".cache"),
        run=run_info(),
        cache_bytes=options.cache_gb * 1e9,
        exact=options.exact.denoising(),
        fields_of=options.exact.of,
        cleaners=options.cleaners,
        progress=show_progress,
    )
    _ = bench.cache  # fail now if the folder is not writable
    return bench


def finish(found: Sequence[Line], out: Path, *, as_json: bool, varied: Sequence[str] = ()) -> int:
    """Print tables of results, failures and skipped items. Returns the exit code."""
    lines = [line for line, _ in found]
    for setting in dict.fromkeys(_setting(line, varied) for line in lines if not as_json):
        if setting:
            print(f"\n{setting}")
        print_scores([line for line in lines if _setting(line, varied) == setting])
    for line in lines:
        if line["failed"]:
            print_error(line["failed"], f"{line['features']} failed")
    skipped = lines[0]["skipped"] if lines else []
    for name, reason in skipped:
        print_skipped(name, reason)
    print_note(f"results in {out}; create tables with `dvit report {out} -o results.md`")
    return SOME_FAILED if skipped or any(line["failed"] for line in lines) else OK


def _setting(line: dict[str, Any], varied: Sequence[str]) -> str:
    from denoising_vit.evaluation.tables.markdown import readable

    settings = line["settings"]
    return ", ".join(f"{name} {readable(settings[name])}" for name in varied if name in settings)


def print_scores(lines: Sequence[dict[str, Any]]) -> None:
    """Print results as a table with one source per row, or one metric per row for label-free metrics."""
    good = [line for line in lines if not line["failed"]]
    if not good:
        return
    console = Console()
    metrics = METRICS.get(good[0]["task"])
    if metrics is None:
        figures = {line["features"]: line["metrics"] for line in good}
        console.print(figures_table(figures, {name: name.replace("_", " ") for name in good[0]["metrics"]}))
        return
    beside = len(metrics) <= _MOST_BESIDE
    console.print(_scores(good, metrics, beside=beside))
    if not beside:
        for line in good:
            if line["paired"] is not None:
                words = f"{line['features']}: {_heading(line['paired'], metrics[0])} {_difference(line, metrics[0])}"
                console.print(words, highlight=False, markup=False, soft_wrap=True)


def _scores(lines: Sequence[dict[str, Any]], metrics: Sequence[Metric], *, beside: bool) -> Table:
    headings = [*(metric.name for metric in metrics), "seeds"]
    if beside:
        paired = next((line["paired"] for line in lines if line["paired"]), {"against": "the first"})
        headings.append(_heading(paired, metrics[0]))
    table = plain_table("features", numbers=[*headings, "seconds"])
    for line in lines:
        table.add_row(
            escape(line["features"]),
            *(number(line["metrics"][metric.name], f".{metric.digits}f") for metric in metrics),
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


def figures_table(figures: Mapping[str, Mapping[str, float | None]], labels: Mapping[str, str]) -> Table:
    """Label-free metrics: one source per column, and one row per metric with its label."""
    table = plain_table("", numbers=[*map(escape, figures)])
    for name, label in labels.items():
        table.add_row(label, *(number(values[name], ".3g") for values in figures.values()))
    return table
