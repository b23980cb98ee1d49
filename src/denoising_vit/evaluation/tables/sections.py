"""Sections of the report: entries that differ in their features only, and how their figures were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from denoising_vit.evaluation.tables.entries import Entry, canonical
from denoising_vit.evaluation.tables.markdown import code, differing, flat, plain, readable

#: Features that are listed first.
FIRST = "raw"

#: Settings that every title names.
_IN_TITLE = ("data.name", "backbone.name", "backbone.weights")

#: Number of skipped items that are named.
_SHOWN = 10


@dataclass(frozen=True)
class Section:
    """Entries that differ in their features only.

    Attributes:
        task: the task.
        title: data, backbone, and the settings in which it differs from other sections of these.
        settings: value by dotted name, without those of the features and those in every title.
        rows: label of the features, unique within the section, and entry; raw features first.
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
    """Settings for titles: data sets differ by their number of images, or by digests if that is not enough."""
    settings = [_settings(entry, without) for entry in entries]
    sizes = [", ".join(f"{count} {split}" for split, count in entry.images.items()) for entry in entries]
    digests = [each.get("data.digest") for each in settings]
    if len(set(zip(digests, sizes, strict=True))) == len(set(sizes)) == len(set(digests)):
        settings = [
            {key: value for key, value in each.items() if key != "data.digest"} | {"images": size}
            for each, size in zip(settings, sizes, strict=True)
        ]
    return settings


def data_title(entry: Entry) -> str:
    """Beginning of every title: data and backbone."""
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
    """Label rows by features; features with the same name get the settings in which they differ."""
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
    """Settings that all rows share, and those of each row's features."""
    shared = ", ".join(f"{key} {value}" for key, value in section.settings.items())
    features = []
    for label, entry in section.rows:
        own = ", ".join(f"{key} {value}" for key, value in feature_settings(entry).items())
        features += [f"{label} ({own})"] if own else []
    parts = {"Settings": shared, "Features": "; ".join(features)}
    return " ".join(f"{name}: {plain(words)}." for name, words in parts.items() if words)


def provenance_line(section: Section) -> str:
    """Command, hardware, software, precision, images, seeds, and what was left out; shared values once."""
    entries = [entry for _, entry in section.rows]
    parts = {
        "Hardware": _distinct(entry.hardware for entry in entries),
        "Software": _distinct(
            ", ".join(f"{name} {version}" for name, version in entry.software.items()) for entry in entries
        ),
        "Precision": _distinct(readable(entry.backbone.get("dtype", "not recorded")) for entry in entries),
        "Images": _distinct(", ".join(f"{n} {split}" for split, n in entry.images.items()) for entry in entries),
        "Seeds": _distinct(", ".join(str(seed) for seed, _ in entry.seed_scores) for entry in entries),
        "Skipped": _first([f"{item} ({reason})" for entry in entries for item, reason in entry.skipped]),
    }
    if section.task != "artifacts":  # which has no classes
        absent = dict.fromkeys(name for entry in entries for name in entry.absent)
        parts["Never occurs in val, left out of the means"] = ", ".join(absent)
    figures = " ".join(f"{name}: {plain(words) or 'none'}." for name, words in parts.items())
    return f"Command: {commands_of(entries)}. {figures}"


def commands_of(entries: Iterable[Entry]) -> str:
    """The distinct commands, as code."""
    return " and ".join(code(command) for command in dict.fromkeys(entry.command for entry in entries))


def failed_lines(section: Section) -> list[str]:
    """A list of failures with their reasons."""
    return [f"- failed: {plain(label)}: {plain(entry.failed or '')}" for label, entry in section.failed]


def _first(items: Sequence[str]) -> str:
    """The first items and the number of further ones."""
    items = list(dict.fromkeys(items))
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))
