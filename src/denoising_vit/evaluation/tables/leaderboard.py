"""The leaderboard: features by tasks, one table for each backbone, with which differences are certain."""

from __future__ import annotations

from collections.abc import Sequence

from denoising_vit.evaluation.metrics import main_metric
from denoising_vit.evaluation.tables.entries import Entry
from denoising_vit.evaluation.tables.figures import interval_words
from denoising_vit.evaluation.tables.markdown import NONE, code, fixed, plain, readable, signed, table
from denoising_vit.evaluation.tables.sections import FIRST, Section, data_title

#: Tasks that have no one figure to be led by.
_WITHOUT = ("artifacts",)

_MEANING = (
    "Each cell is a figure, and in parentheses its difference from the reference of its task over the same images, "
    "with a 95 % interval where there are groups enough. **Bold** differences are certain: their interval does not "
    "hold zero. Others may be chance; and of twenty comparisons where nothing differs, about one looks certain. The "
    "figures of each row in full are in the details below."
)


def leaderboard(found: Sequence[Section]) -> list[list[str]]:
    """Blocks of Markdown: a table for each backbone, a row for each task and data, a column for each kind of features.

    Args:
        found: sections of the report; those of label-free figures have no place here, nor has what failed.
    """
    tasks = [section for section in found if section.task not in _WITHOUT and section.measured]
    if not tasks:
        return [["No task has been measured: run `dvit evaluate` on one with labels first."]]
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
    words = f"{section.task}, {entry.data}: {metric.name}{', less is better' if metric.lower else ''}"
    return f"{words} ({own})" if own else words


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return NONE
    metric, paired = main_metric(entry.task), entry.paired
    value = fixed(entry.metrics[metric.name], metric.digits)
    if paired is None or paired.metric != metric.name:
        return value
    told = signed(paired.difference, metric.digits)
    if paired.low is None or paired.high is None:
        return f"{value} ({told})"
    told = f"{told} [{signed(paired.low, metric.digits)}, {signed(paired.high, metric.digits)}]"
    return f"{value} (**{told}**)" if paired.low > 0 or paired.high < 0 else f"{value} ({told})"


def _groups(entry: Entry) -> str:
    paired = entry.paired
    assert paired is not None
    return NONE if paired.groups is None else f"{paired.groups} {paired.over}"


def _commands(members: Sequence[Section]) -> list[str]:
    """Of each row: what tells it from others, what differences are of, and the commands."""
    lines = []
    for number, section in enumerate(members, start=1):
        entries = [entry for _, entry in section.measured]
        commands = " and ".join(code(command) for command in dict.fromkeys(entry.command for entry in entries))
        against = dict.fromkeys(
            f"against {entry.paired.against}, {interval_words(entry.paired)}" for entry in entries if entry.paired
        )
        words = "; ".join([section.title, *against])
        lines.append(f"{number}. {plain(words)}. Command: {commands}.")
    return lines


def _backbone(section: Section) -> str:
    backbone = section.rows[0][1].backbone
    return f"{backbone['name']} ({readable(backbone.get('weights'))}), layer {readable(backbone.get('layer'))}"
