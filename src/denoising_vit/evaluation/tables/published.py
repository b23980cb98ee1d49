"""Published figures next to measured ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from denoising_vit.denoiser.published import (
    DiscoveryRow,
    PublishedRow,
    published_discovery,
    published_row,
    published_rows,
)
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.results import METRICS
from denoising_vit.evaluation.tables.entries import Entry, Published
from denoising_vit.evaluation.tables.markdown import NONE, differing, fixed, flat, plain, table


@dataclass(frozen=True)
class _Benchmark:
    """A data set with published figures: its heading, a pattern for its names, its task, and its metrics by key."""

    heading: str
    names: re.Pattern[str]
    task: str
    figures: dict[str, str]


_VOC = re.compile(r"(pascal[^a-z]*)?voc(?!ab)", re.IGNORECASE)
_ADE = re.compile(r"ade(?![a-z])", re.IGNORECASE)
_NYU = re.compile(r"nyu", re.IGNORECASE)
_BENCHMARKS = (
    _Benchmark("VOC", _VOC, "segmentation", {"voc_miou": "mIoU", "voc_macc": "mAcc"}),
    _Benchmark("ADE20K", _ADE, "segmentation", {"ade_miou": "mIoU", "ade_macc": "mAcc"}),
    _Benchmark("NYU depth", _NYU, "depth", {"nyu_rmse": "RMSE", "nyu_absrel": "AbsRel", "nyu_a1": "a1"}),
)

#: Settings to show for every measurement.
_ALWAYS = ("size", "crops", "preset", "steps")


def comparison(entries: Sequence[Entry]) -> list[list[str]]:
    """Blocks of lines: a table per benchmark with every published row, then unmatched entries with reasons.

    Only trained heads are compared, because nearest neighbours measure something else.
    """
    placed: dict[str, list[Entry]] = {benchmark.heading: [] for benchmark in _BENCHMARKS}
    unplaced: list[str] = []
    for entry in entries:
        if entry.published is not None and entry.failed is None:
            try:
                placed[_benchmark_of(entry, entry.published).heading].append(entry)
            except EvaluationError as error:
                reason = f"{entry.task} on {entry.data}, {entry.features}: {error}"
                unplaced.append(f"- not compared: {plain(reason)}")
    blocks: list[list[str]] = []
    for benchmark in _BENCHMARKS:
        blocks += [[f"### {benchmark.heading}"], _benchmark_table(benchmark, placed[benchmark.heading])]
    return [*blocks, unplaced] if unplaced else blocks


def _benchmark_of(entry: Entry, published: Published) -> _Benchmark:
    """The benchmark of an entry that reproduces a published row; EvaluationError if there is none."""
    published_row(published.model, published.variant)
    benchmark = next((one for one in _BENCHMARKS if one.names.match(entry.data)), None)
    if benchmark is None:
        names = ", ".join(one.heading for one in _BENCHMARKS)
        raise EvaluationError(f"expected a data set named {names}, got {entry.data}")
    if entry.task != benchmark.task:
        raise EvaluationError(f"expected the published task {benchmark.task}, got {entry.task}")
    return benchmark


def _benchmark_table(benchmark: _Benchmark, entries: Sequence[Entry]) -> list[str]:
    """One row per published row, or per measurement of it."""
    header = ["model", "variant", *_columns(benchmark.figures.values()), "measured as"]
    rows: list[list[str]] = []
    for row in published_rows():
        found = [entry for entry in entries if entry.published == Published(model=row.model, variant=row.variant)]
        ways = [f"{entry.features}{_way(entry, found)}" for entry in found] or [NONE]
        rows += [
            [row.model, row.variant, *_cells(benchmark, row, entry), way]
            for entry, way in zip(found or [None], ways, strict=True)
        ]
    return table(header, rows, left=2)


def _columns(names: Iterable[str]) -> list[str]:
    return [f"{name}{which}" for name in names for which in (" published", " measured")]


def _way(entry: Entry, others: Sequence[Entry]) -> str:
    label = differing([flat(other.settings) for other in others], _ALWAYS)[others.index(entry)]
    return f" ({label})" if label else ""


def _cells(benchmark: _Benchmark, row: PublishedRow, entry: Entry | None) -> list[str]:
    cells: list[str] = []
    digits = {metric.name: metric.digits for metric in METRICS[benchmark.task]}
    for key, name in benchmark.figures.items():
        measured = None if entry is None else entry.metrics.get(name)
        cells += [fixed(row.figures[key], digits[name]), fixed(measured, digits[name])]
    return cells


#: Columns of published discovery: key, heading, name of the data, number of images.
_DISCOVERED = (
    ("voc07", "VOC07", "VOC 2007 trainval", 5_011),
    ("voc12", "VOC12", "VOC 2012 trainval", 11_540),
    ("coco20k", "COCO20k", "COCO train2014", 19_817),
)

#: Settings of the published results.
_DISCOVERY_SETTINGS = {"size": "native", "seed_by": "norm", "k": 100, "iou": 0.5, "centred": False, "features": {}}
_DISCOVERY_BACKBONE = {"weights": "hub", "layer": 11, "norm": True, "stride": 14}


def discovery_comparison(entries: Sequence[Entry]) -> list[list[str]]:
    """A table of published object discovery (LOST seeded by feature norms, CorLoc) next to measured results.

    An entry counts only if all its settings are the published ones and all images were evaluated. Entries of denoised
    features never count, because they do not record whether the denoiser is the published one.
    """
    header = ["model", "variant", *_columns(heading for _, heading, *_ in _DISCOVERED)]
    rows = [[row.model, row.variant, *_discovered(row, entries)] for row in published_discovery()]
    return [["### Object discovery (CorLoc)"], table(header, rows, left=2)]


def _discovered(row: DiscoveryRow, entries: Sequence[Entry]) -> list[str]:
    cells: list[str] = []
    for key, _, data, images in _DISCOVERED:
        found = [entry for entry in entries if _is_of(entry, row, data, images)]
        cells += [fixed(row.figures[key], 1), fixed(found[-1].metrics["CorLoc"], 1) if found else NONE]
    return cells


def _is_of(entry: Entry, row: DiscoveryRow, data: str, images: int) -> bool:
    """True if an entry measures a published row on this data set."""
    backbone = _DISCOVERY_BACKBONE | {"name": row.model}
    return (
        (entry.task, entry.features, entry.failed, row.variant) == ("discovery", "raw", None, "baseline")
        and (entry.data, dict(entry.images), len(entry.skipped)) == (data, {"val": images}, 0)
        and all(entry.settings.get(key) == value for key, value in _DISCOVERY_SETTINGS.items())
        and all(entry.backbone.get(key) == value for key, value in backbone.items())
    )
