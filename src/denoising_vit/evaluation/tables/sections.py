"""Sections of the report: entries that differ only in their features, with their tables and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from denoising_vit.evaluation.outcomes import MIN_GROUPS
from denoising_vit.evaluation.results import METRICS, main_metric
from denoising_vit.evaluation.tables.entries import Entry, Paired, canonical
from denoising_vit.evaluation.tables.markdown import (
    NONE,
    code,
    differing,
    fixed,
    flat,
    folded,
    plain,
    readable,
    signed,
    significant,
    table,
)

#: Features to list first.
FIRST = "raw"

#: Settings in every title.
_IN_TITLE = ("data.name", "backbone.name", "backbone.weights")

#: Maximum number of skipped items to name.
_SHOWN = 10


@dataclass(frozen=True)
class Section:
    """Entries that differ only in their features.

    Attributes:
        task: the task.
        title: data, backbone, and the settings that differ from other sections with the same data and backbone.
        settings: values by dotted name, without settings of the features and those in every title.
        rows: label of the features, unique within the section, and entry; raw features come first.
    """

    task: str
    title: str
    settings: Mapping[str, str]
    rows: tuple[tuple[str, Entry], ...]

    @property
    def measured(self) -> list[tuple[str, Entry]]:
        """Rows with metrics."""
        return [(label, entry) for label, entry in self.rows if entry.failed is None]

    @property
    def paired(self) -> list[Paired]:
        """Differences from the reference."""
        return [entry.paired for _, entry in self.measured if entry.paired is not None]

    @property
    def failed(self) -> list[tuple[str, Entry]]:
        """Rows with a reason instead of metrics."""
        return [(label, entry) for label, entry in self.rows if entry.failed is not None]


def sections(entries: Sequence[Entry]) -> list[Section]:
    """Group entries into sections, in order of first appearance."""
    groups = grouped(entries)
    return [
        Section(group[0].task, title, _settings(group[0], ("features",)), _rows(group))
        for group, title in zip(groups, section_titles(groups), strict=True)
    ]


def grouped(entries: Sequence[Entry], without: Sequence[str] = ("features",)) -> list[list[Entry]]:
    """Group entries by task and settings, except the settings named in ``without``."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(canonical([entry.task, _kept(entry.settings, without)]), []).append(entry)
    return list(groups.values())


def section_titles(groups: Sequence[Sequence[Entry]], without: Sequence[str] = ("features",)) -> list[str]:
    """A title for each group; groups with the same data and backbone get the settings that differ."""
    titles: dict[int, str] = {}
    same_title: dict[tuple[str, str], list[int]] = {}
    for index, group in enumerate(groups):
        same_title.setdefault((group[0].task, data_title(group[0])), []).append(index)
    for (_, title), indices in same_title.items():
        labels = differing(_comparable([groups[index][0] for index in indices], without))
        titles |= {index: f"{title}: {label}" if label else title for index, label in zip(indices, labels, strict=True)}
    return [titles[index] for index in range(len(groups))]


def _comparable(entries: Sequence[Entry], without: Sequence[str]) -> list[dict[str, str]]:
    """Settings for titles: data sets are distinguished by number of images, or by digest if that is not unique."""
    settings = [_settings(entry, without) for entry in entries]
    sizes = [_images(entry) for entry in entries]
    digests = [each.get("data.digest") for each in settings]
    if len(set(zip(digests, sizes, strict=True))) == len(set(sizes)) == len(set(digests)):
        settings = [
            {key: value for key, value in each.items() if key != "data.digest"} | {"images": size}
            for each, size in zip(settings, sizes, strict=True)
        ]
    return settings


def data_title(entry: Entry) -> str:
    """Start of every title: data and backbone."""
    return f"{entry.data}, {entry.backbone_name} ({readable(entry.backbone.get('weights'))})"


def _kept(settings: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in without}


def _settings(entry: Entry, without: Sequence[str]) -> dict[str, str]:
    return {key: value for key, value in flat(_kept(entry.settings, without)).items() if key not in _IN_TITLE}


def feature_settings(entry: Entry) -> dict[str, str]:
    """Settings of the features; empty if their name is enough."""
    found = entry.settings.get("features")
    return flat(found) if isinstance(found, dict) else {}


def _rows(group: Sequence[Entry]) -> tuple[tuple[str, Entry], ...]:
    """Label rows by features; features with the same name also get the settings that differ."""
    by_name: dict[str, list[Entry]] = {}
    for entry in group:
        by_name.setdefault(entry.features, []).append(entry)
    labels: dict[str, str] = {}
    for name, entries in by_name.items():
        for entry, label in zip(entries, differing([feature_settings(entry) for entry in entries]), strict=True):
            labels[entry.key] = f"{name} ({label})" if label else name
    ordered = sorted(group, key=lambda entry: entry.features != FIRST)
    return tuple((labels[entry.key], entry) for entry in ordered)


# --- provenance ---


def settings_line(section: Section) -> str:
    """Settings shared by all rows, and those of each row's features."""
    own = [(label, _listed(feature_settings(entry))) for label, entry in section.rows]
    features = "; ".join(f"{label} ({words})" for label, words in own if words)
    parts = {"Settings": _listed(section.settings), "Features": features}
    return " ".join(f"{name}: {plain(words)}." for name, words in parts.items() if words)


def provenance_line(section: Section) -> str:
    """Command, hardware, software, precision, images, seeds, and skipped images; shared values appear once."""
    entries = [entry for _, entry in section.rows]
    parts = {
        "Hardware": _distinct(entry.hardware for entry in entries),
        "Software": _distinct(_listed(entry.software) for entry in entries),
        "Precision": _distinct(readable(entry.backbone.get("dtype", "not recorded")) for entry in entries),
        "Images": _distinct(map(_images, entries)),
        "Seeds": _distinct(", ".join(str(seed) for seed, _ in entry.seed_scores) for entry in entries),
        "Skipped": _first([f"{item} ({reason})" for entry in entries for item, reason in entry.skipped]),
    }
    if section.task != "artifacts":  # artifacts have no classes
        absent = dict.fromkeys(name for entry in entries for name in entry.absent)
        parts["Never occurs in val, left out of the means"] = ", ".join(absent)
    figures = " ".join(f"{name}: {plain(words) or 'none'}." for name, words in parts.items())
    return f"Command: {commands_of(entries)}. {figures}"


def commands_of(entries: Iterable[Entry]) -> str:
    """The distinct commands, as code."""
    return " and ".join(code(command) for command in dict.fromkeys(entry.command for entry in entries))


def failed_lines(section: Section) -> list[str]:
    """Failures with their reasons, as a list."""
    return [f"- failed: {plain(label)}: {plain(entry.failed or '')}" for label, entry in section.failed]


def _first(items: Sequence[str]) -> str:
    """The first items, and how many more there are."""
    items = list(dict.fromkeys(items))
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _images(entry: Entry) -> str:
    return ", ".join(f"{count} {split}" for split, count in entry.images.items())


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))


# --- tables ---

#: Labels of the fields of ArtifactMetrics.
ARTIFACT_LABELS = {
    "shared": "same in all photos (energy)",
    "linear_position": "position, linear probe (R²)",
    "neighbour_position": "position, nearest neighbours (R²)",
    "mic": "position, information coefficient",
    "leakage": "leakage of empty images",
    "outliers_high": "outlier tokens, high norm",
    "outliers_low": "outlier tokens, low norm",
    "consistency": "agreement of views (R²)",
    "effective_rank": "effective rank",
    "neighbour_similarity": "similarity of neighbours",
    "detail": "detail",
    "blank_variance": "blank images, variance left",
    "blank_detail": "blank images, high frequencies left",
    "blurred_detail": "blurred photos, high frequencies left",
    "shift_change": "change under shifts, relative to raw",
    "photo_variance": "photos, variance left (content)",
}


def figure_tables(section: Section) -> list[list[str]]:
    """Blocks of lines: metrics, meaning of the differences, curves and classes."""
    if not section.measured:
        return []
    if section.task == "artifacts":
        return [_artifact_table(section)]
    return [
        block
        for block in (_score_table(section), _meaning(section.measured), _curve_table(section), _class_table(section))
        if block
    ]


def _score_table(section: Section) -> list[str]:
    names = [metric.name for metric in METRICS[section.task]]
    header = ("features", *names, "spread over seeds", "difference (95 % interval)", "seconds")
    return table(header, [_score_row(label, entry) for label, entry in section.measured])


def _score_row(label: str, entry: Entry) -> list[str]:
    metrics = METRICS[entry.task]
    scores = [fixed(entry.metrics[metric.name], metric.digits) for metric in metrics]
    digits = metrics[0].digits
    values = [value for _, value in entry.seed_scores if value is not None]
    spread = fixed(max(values) - min(values), digits) if len(values) > 1 else NONE
    difference = NONE if entry.paired is None else with_interval(entry.paired, digits)
    return [label, *scores, spread, difference, fixed(entry.seconds, 1)]


def with_interval(paired: Paired, digits: int) -> str:
    """The difference, with its interval if there is one."""
    difference = signed(paired.difference, digits)
    if paired.interval is None:
        return difference
    low, high = paired.interval
    return f"{difference} [{signed(low, digits)}, {signed(high, digits)}]"


def _meaning(rows: Sequence[tuple[str, Entry]]) -> list[str]:
    """Explain the differences, once if all rows share the explanation."""
    by_words: dict[str, list[str]] = {}
    for label, entry in rows:
        if entry.paired is not None:
            paired = entry.paired
            better = "; lower is better" if main_metric(entry.task).lower else ""
            words = f"{paired.metric} minus that of {paired.against}, {interval_words(paired)}{better}"
            by_words.setdefault(words, []).append(label)
    if len(by_words) == 1:
        return [f"Difference: {plain(next(iter(by_words)))}."]
    return [f"Difference of {plain(', '.join(labels))}: {plain(words)}.  " for words, labels in by_words.items()]


def interval_words(paired: Paired) -> str:
    """Method of the interval, or the reason why there is none."""
    if paired.method is None:
        return "interval of an older version not shown; evaluate again (quick if the counts are cached)"
    if paired.interval is None:
        return f"no interval: {paired.groups} {paired.over}, at least {MIN_GROUPS} are needed"
    return f"95 % interval over {paired.groups} {paired.over} ({paired.method})"


def _curve_table(section: Section) -> list[str]:
    curves = {label: entry.scores_by_step for label, entry in section.measured if entry.scores_by_step}
    steps = sorted({step for curve in curves.values() for step in curve})
    metric = main_metric(section.task)
    rows = [[str(step), *(fixed(curve.get(step), metric.digits) for curve in curves.values())] for step in steps]
    return table((f"{metric.name} at step (first seed)", *curves), rows, left=0) if rows else []


def _class_table(section: Section) -> list[str]:
    columns = [(label, entry.iou) for label, entry in section.measured if entry.classes]
    names = list(dict.fromkeys(name for _, classes in columns for name in classes))
    rows = [[name, *(fixed(classes.get(name)) for _, classes in columns)] for name in names]
    return folded("IoU of each class", table(("class", *(label for label, _ in columns)), rows)) if rows else []


def _artifact_table(section: Section) -> list[str]:
    found = [entry.metrics for _, entry in section.measured]
    others = dict.fromkeys(name for metrics in found for name in metrics if name not in ARTIFACT_LABELS)
    names = ARTIFACT_LABELS | {name: name for name in others}
    rows = [
        [words, *(significant(metrics.get(name)) for metrics in found)]
        for name, words in names.items()
        if any(name in metrics for metrics in found)
    ]
    seconds = ["seconds", *(fixed(entry.seconds, 1) for _, entry in section.measured)]
    return table(("", *(label for label, _ in section.measured)), [*rows, seconds])


def overview_table(members: Sequence[Section]) -> list[str]:
    """Features by size and crops, for sections that differ only in these: mIoU (difference).

    Notes below the table list features whose settings differ from those in most columns.
    """
    header = ["features", *(_overview_label(section) for section in members)]
    by_section = [dict(section.rows) for section in members]
    features = {label: entry.features for section in members for label, entry in section.rows}
    labels = sorted(features, key=lambda label: features[label] != FIRST)
    cells = [[label, *(_overview_cell(rows.get(label)) for rows in by_section)] for label in labels]
    notes = [note for label in labels for note in _made_otherwise(label, header[1:], by_section)]
    return [*table(header, cells), *([""] if notes else []), *notes]


def _made_otherwise(label: str, columns: Sequence[str], by_section: Sequence[dict[str, Entry]]) -> list[str]:
    """Columns in which the features' settings differ from most columns, and the differences."""
    made = {
        column: feature_settings(rows[label]) for column, rows in zip(columns, by_section, strict=True) if label in rows
    }
    seen = [tuple(sorted(settings.items())) for settings in made.values()]
    usual = dict(max(seen, key=seen.count)) if seen else {}
    return [
        f"- {plain(f'{label}, {column}')}: {plain(_listed(dict(sorted(others))))}"
        for column, settings in made.items()
        if (others := settings.items() - usual.items())
    ]


def _overview_label(section: Section) -> str:
    settings = section.rows[0][1].settings
    return ", ".join(flat({key: settings[key] for key in ("size", "crops") if key in settings}).values()) or NONE


def _overview_cell(entry: Entry | None) -> str:
    if entry is None:
        return NONE
    if entry.failed is not None:
        return "failed"
    value, paired = fixed(entry.metrics["mIoU"]), entry.paired
    return value if paired is None or paired.metric != "mIoU" else f"{value} ({signed(paired.difference)})"
