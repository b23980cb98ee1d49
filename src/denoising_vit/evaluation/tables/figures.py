"""The tables of one section, and the leaderboard over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from denoising_vit.evaluation.outcomes import MIN_GROUPS
from denoising_vit.evaluation.results import METRICS, main_metric
from denoising_vit.evaluation.tables.entries import Entry, Paired
from denoising_vit.evaluation.tables.markdown import (
    NONE,
    fixed,
    flat,
    folded,
    plain,
    readable,
    signed,
    significant,
    table,
)
from denoising_vit.evaluation.tables.sections import FIRST, Section, commands_of, data_title, feature_settings

#: Labels of the fields of ArtifactMetrics.
ARTIFACT_LABELS = {
    "shared": "same in all photos (energy)",
    "linear_position": "place, linear probe (R²)",
    "neighbour_position": "place, nearest neighbours (R²)",
    "mic": "place, information coefficient",
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
    "shift_change": "change by shifts, of raw's",
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
    paired = entry.paired
    difference = NONE
    if paired is not None:
        difference = with_interval(paired, digits)
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
    """How the interval was made, or why there is none."""
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
    """Features by size and crops, for sections that differ in these only: mIoU (difference).

    Notes below the table name features that were made with other settings than in most columns.
    """
    header = ["features", *(_overview_label(section) for section in members)]
    by_section = [dict(section.rows) for section in members]
    features = {label: entry.features for section in members for label, entry in section.rows}
    labels = sorted(features, key=lambda label: features[label] != FIRST)
    cells = [[label, *(_overview_cell(rows.get(label)) for rows in by_section)] for label in labels]
    notes = [note for label in labels for note in _made_otherwise(label, header[1:], by_section)]
    return [*table(header, cells), *([""] if notes else []), *notes]


def _made_otherwise(label: str, columns: Sequence[str], by_section: Sequence[dict[str, Entry]]) -> list[str]:
    """Columns in which the features have other settings than in most, and what differs."""
    made = {
        column: feature_settings(rows[label]) for column, rows in zip(columns, by_section, strict=True) if label in rows
    }
    seen = [tuple(sorted(settings.items())) for settings in made.values()]
    usual = dict(max(seen, key=seen.count)) if seen else {}
    return [
        f"- {plain(f'{label}, {column}')}: {plain(', '.join(f'{key} {value}' for key, value in sorted(others)))}"
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
    value = fixed(entry.metrics["mIoU"])
    paired = entry.paired
    return value if paired is None or paired.metric != "mIoU" else f"{value} ({signed(paired.difference)})"


_MEANING = (
    "Each cell gives the score and, in parentheses, its difference from the reference on the same images, with a 95 % "
    "interval if there are enough groups. **Bold** differences are significant: the interval excludes zero. Of twenty "
    "comparisons without a true difference, about one looks significant by chance. Details follow below."
)


def leaderboard(found: Sequence[Section]) -> list[list[str]]:
    """Blocks of Markdown: a table for each backbone, a row for each task and data, a column for each kind of features."""
    tasks = [section for section in found if section.task in METRICS and section.measured]
    if not tasks:
        return [["No labelled task has been evaluated yet; run `dvit evaluate` first."]]
    blocks = [[_MEANING]]
    for backbone in dict.fromkeys(map(_backbone, tasks)):
        members = [section for section in tasks if _backbone(section) == backbone]
        blocks += [[f"### {plain(backbone)}"], _table(members), _commands(members)]
    return blocks


def _table(members: Sequence[Section]) -> list[str]:
    labels = dict.fromkeys(label for section in members for label, _ in section.measured)
    ordered = sorted(labels, key=lambda label: label != FIRST)
    rows = []
    for number, section in enumerate(members, start=1):
        cells = dict(section.measured)
        groups = list(dict.fromkeys(_groups(entry) for _, entry in section.measured if entry.paired is not None))
        rows.append([f"{number}. {_task(section)}", *(_cell(cells.get(each)) for each in ordered), "; ".join(groups)])
    return table(("task", *ordered, "groups"), rows)


def _task(section: Section) -> str:
    metric, entry = main_metric(section.task), section.rows[0][1]
    own = section.title.removeprefix(data_title(entry)).removeprefix(": ")
    words = f"{section.task}, {entry.data}: {metric.name}{', lower is better' if metric.lower else ''}"
    return f"{words} ({own})" if own else words


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return NONE
    metric, paired = main_metric(entry.task), entry.paired
    value = fixed(entry.metrics[metric.name], metric.digits)
    if paired is None or paired.metric != metric.name:
        return value
    difference, ends = with_interval(paired, metric.digits), paired.interval
    certain = ends is not None and (ends[0] > 0 or ends[1] < 0)
    return f"{value} (**{difference}**)" if certain else f"{value} ({difference})"


def _groups(entry: Entry) -> str:
    paired = entry.paired
    assert paired is not None
    return NONE if paired.groups is None else f"{paired.groups} {paired.over}"


def _commands(members: Sequence[Section]) -> list[str]:
    """For each row: its settings, the meaning of its differences, and the commands."""
    lines = []
    for number, section in enumerate(members, start=1):
        entries = [entry for _, entry in section.measured]
        against = dict.fromkeys(
            f"against {entry.paired.against}, {interval_words(entry.paired)}" for entry in entries if entry.paired
        )
        words = "; ".join([section.title, *against])
        lines.append(f"{number}. {plain(words)}. Command: {commands_of(entries)}.")
    return lines


def _backbone(section: Section) -> str:
    entry = section.rows[0][1]
    weights, layer = (readable(entry.backbone.get(key)) for key in ("weights", "layer"))
    return f"{entry.backbone_name} ({weights}), layer {layer}"
